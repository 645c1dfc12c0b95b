"""How fast answers are generated, side by side in one run: the way people generate them, and ours.

    python benchmarks/generate_speed.py                                # CPU: the tiny model with the shipped adapter
    python benchmarks/generate_speed.py --precision=fp32
    python benchmarks/generate_speed.py --shape=7b --corpus=msra_train.txt --tokenizer=tokenizer.model
    python benchmarks/generate_speed.py --shape=33b --spread_gib=40 --how=constrained --corpus=… --tokenizer=…
    python benchmarks/generate_speed.py --gpus=1,2 --shape=7b --examples=20000 --corpus=… --tokenizer=…   # predict.py

--shape=7b makes a model of LLaMA 7B's shape with random weights on the GPU, --shape=qwen2.5-7b one of that shape, its
vocabulary the given one and fillers; its results have its name in that of the file. Left to itself it would answer nonsense of
any length; so every answer is forced to be the right one, and lengths and masks are those of a good model. --spread_gib:
its layers are spread over the GPUs, as by --devices=auto where none can hold more than so much of it.

how: single (one example at a time, the full prompt, model.generate), padded (model.generate on batches, padded on the
left, similar lengths together), ours (generate.py without a grammar), constrained (with it), apart (constrained, the
LoRA beside the weights; last, since a model of 7B's shape is given one), vllm (with the Python that --vllm_python
names: a 7B of random weights, answers of the right lengths). LoRA is merged for the others. Prints a table and writes
benchmarks/results/generate_speed-<device>-<precision>.json, a list of {"how", "batch", "examples",
"examples_per_second", "ms_per_step", "same_answers", "constraint_share", "setup_s", "first_cold_s", "first_warm_s",
"bandwidth_share", "peak_gib"}.

same_answers: the share of answers that equal single's. constraint_share: the share of the time that the host spends on the
grammar, much of it while a GPU computes. setup_s: seconds for compiling and capturing steps in the first of two runs; they
are not in the speed, which is the second's. first_cold_s, first_warm_s: seconds until the first answer, setup included.
bandwidth_share, on a GPU: a step must at least read the weights and the rows' cache from memory once; the share of the
time that this takes at the rate at which the card copies memory. A step that also reads prompts has more to do.

--gpus: predict.py as a whole with so many processes, see process_speed.py.
"""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.answering import engine
from alpaca.answering import generate as generating
from alpaca.answering import grammar as constraint
from alpaca.answering.graphs import CapturedStepper
from alpaca.answering.row import Row
from alpaca.answering.step import Stepper
from alpaca.common.console import say
from alpaca.common.devices import DTYPES, pick_precision
from alpaca.common.errors import UserError
from alpaca.models.adapters import find_adapter
from alpaca.models.base import load_for_inference
from alpaca.models.templates import encode_examples
from benchmarks.process_speed import by_processes
from benchmarks.speed_inputs import LABELS, SHAPES, random_model, read_corpus, save_vocabulary
from config_utils import run_script
from dataset import read_examples

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo" / "instruct_data" / "dev.txt"
CONFIG = {
    "shape": "tiny",  # tiny (model_hub/chinese-alpaca-tiny and the demo's adapter) | 7b … 65b | qwen2.5-7b (random weights)
    "base_weights": "full",  # full | nf4 | fp8: how random weights are held
    "spread_gib": 0.0,  # random weights on several GPUs, at most so many GiB on each; 0: on one
    "batch": [64],  # rows at a time
    "how": ["single", "padded", "ours", "constrained"],  # see above
    "compile": "auto",  # auto: layers are compiled where the work repays it | True: as for a long work
    "vllm_python": None,  # the Python of an environment with vLLM, for --how=vllm
    "examples": 200,  # how many are answered; with random weights: 20 times as many where a batch is
    "precision": "auto",  # auto | bf16 | fp16 | fp32
    "corpus": None,  # sentences in the JSON-lines schema of process.py; None: the demo's dev set
    "tokenizer": None,  # a tokenizer.model, needed for a random shape
    "gpus": [0],  # measure predict.py with so many processes instead; 0: do not
    "base_model": None,  # for --gpus: the folder of a base, which answers without an adapter
}
MAX_NEW_TOKENS = 512


def examples_of(path):
    """The sentences of a raw JSON-lines corpus as dataset.read_examples would return them."""
    return [{**example, "text": text, "entities": None} for text, example in read_corpus(path)]


def load(args, device, merge=True):
    """(model, tokenizer, examples) as --shape and --corpus say."""
    if args.shape == "tiny":
        adapter, train_args, facts = find_adapter("demo", "auto")
        model, tokenizer = load_for_inference(
            adapter, train_args, facts, None, None, args.precision, device, merge=merge
        )
        return model, tokenizer, examples_of(args.corpus) if args.corpus else read_examples(DEMO)
    if args.shape not in SHAPES or not args.tokenizer or not args.corpus:
        raise UserError(
            f"--shape: expected one of {', '.join(SHAPES)}, but for tiny with --tokenizer=<tokenizer.model> and "
            "--corpus=<JSON lines>"
        )
    tokenizer = save_vocabulary(args.tokenizer, ROOT / "benchmarks" / "work" / "tokenizer", args.shape)
    torch.manual_seed(0)
    if args.spread_gib and {*args.how} - {"ours", "constrained"}:
        raise UserError("--spread_gib: the layers of one process on several GPUs; give --how=ours,constrained")
    dtype, most = DTYPES[pick_precision(args.precision, device)], int(args.spread_gib * 2**30)
    memory = {number: most for number in range(torch.cuda.device_count()) if most}
    model = random_model(args.shape, len(tokenizer), dtype, device, args.base_weights, memory)
    return model, tokenizer, examples_of(args.corpus)


def copy_rate(device):
    """Bytes a second that the device reads, and as many that it writes meanwhile, both counted."""
    source = torch.ones(2**30 if device == "cuda" else 2**28, dtype=torch.uint8, device=device)
    target, times = torch.empty_like(source), []
    for _ in range(12):
        wait(device)
        start = time.perf_counter()
        target.copy_(source)
        wait(device)
        times.append(time.perf_counter() - start)
    return 2 * len(source) / sorted(times)[len(times) // 2]


def wait(device):
    if device == "cuda":
        torch.cuda.synchronize()


def with_transformers(model, tokenizer, examples, batch, forced):
    """Texts by model.generate, batch examples at a time; `forced`: as long as the right answers."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids))
    texts = [None] * len(examples)
    for first in tqdm(range(0, len(order), batch), desc="generate", dynamic_ncols=True):
        chunk = order[first : first + batch]
        prompts = [examples[i].prompt_ids for i in chunk]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        new = max(len(examples[i].answer_ids) for i in chunk) if forced else MAX_NEW_TOKENS
        options = {"max_new_tokens": new, "min_new_tokens": new if forced else None, "do_sample": False}
        end = tokenizer.frame.end
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=mask, eos_token_id=end, pad_token_id=0, **options)
        for i, row in zip(chunk, output[:, longest:].tolist(), strict=True):
            texts[i] = tokenizer.decode(row[: row.index(end)] if end in row else row)
    return texts


class ForcedRow(Row):
    """A row that says the right answer, whatever the model prefers."""

    answers = []

    def take(self, token, log_probability):
        super().take(self.answers[self.number][len(self.ids) - len(self.prompt)], log_probability)


@contextmanager
def watched(forced, examples):
    """Count what is done meanwhile: {"steps", "tokens_read" from the cache; seconds: "constraint", "setup" (of graphs)}."""
    counts = {"steps": 0, "tokens_read": 0, "constraint": 0.0, "setup": 0.0}
    changed = [(generating, "Row"), (engine, "forbid"), (engine.Engine, "capture")]
    changed += [(constraint.AnswerGrammar, name) for name in ("begin_matcher", "masks")]
    changed += [(kind, "__call__") for kind in (Stepper, CapturedStepper)]
    originals = [(holder, name, getattr(holder, name)) for holder, name in changed]

    def timed(function, key):
        def call(*args):
            start = time.perf_counter()
            try:
                return function(*args)
            finally:
                counts[key] += time.perf_counter() - start

        return call

    def counted(function):
        def call(stepper, parts):
            counts["steps"] += 1
            counts["tokens_read"] += sum(row.read for row, _ in parts)
            return function(stepper, parts)

        return call

    for holder, name, function in originals[1:]:
        keys = {"capture": "setup", "__call__": None}
        key = keys.get(name, "constraint")
        setattr(holder, name, timed(function, key) if key else counted(function))
    if forced:
        ForcedRow.answers = [example.answer_ids for example in examples]
        generating.Row = ForcedRow
    try:
        yield counts
    finally:
        for holder, name, value in originals:
            setattr(holder, name, value)


def with_vllm(python, vocabulary, examples, batch):
    """Examples a second of vLLM, which computes on the same GPU, in a process of its own."""
    work = ROOT / "benchmarks" / "work"
    lengths = [[example.prompt_ids, len(example.answer_ids)] for example in examples]
    (work / "vllm_prompts.json").write_text(json.dumps(lengths), encoding="utf-8")
    (work / "vllm_model").mkdir(exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "vocab_size": vocabulary, **SHAPES["7b"]}
    config |= {"num_key_value_heads": 32, "rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "hidden_act": "silu"}
    config |= {"bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
    (work / "vllm_model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    command = [python, Path(__file__).with_name("vllm_speed.py"), work, str(batch)]
    result = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8")
    if result.returncode:
        raise UserError(f"--vllm_python={python}: vLLM did not come to an end; what it says is above")
    return json.loads([line for line in result.stdout.splitlines() if line.startswith("{")][-1])["examples_per_second"]


def add_random_lora(model):
    """The model with a LoRA of training's default size beside its weights, which changes nothing that is forced."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return PeftModel(model, LoraConfig(r=8, lora_alpha=32, target_modules=names), autocast_adapter_dtype=False).eval()


def main(args):
    if args.gpus != [0]:
        texts = [record["text"] for record in (examples_of(args.corpus) if args.corpus else read_examples(DEMO))]
        return by_processes(args, texts)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    precision, forced = pick_precision(args.precision, device), args.shape != "tiny"
    model, tokenizer, records = load(args, device)
    rate = copy_rate(device)
    if "vllm" in args.how and not (forced and args.vllm_python):
        raise UserError("--how=vllm needs --shape=7b and --vllm_python, the Python of an environment with vLLM")
    config = model.config
    read_once = sum(p.numel() * p.element_size() for p in [*model.model.layers.parameters(), model.lm_head.weight])
    size = config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * size * model.dtype.itemsize
    grammar = constraint.AnswerGrammar(tokenizer, LABELS.values())
    say(f"{name}, {precision}: {rate / 1e9:.0f} GB/s copied, {read_once / 1e9:.2f} GB of weights a step")

    results, single = [], None
    if args.compile == "True":
        engine.COMPILE_ROWS = 0
    hows = [how for how in args.how if how not in ("single", "apart", "vllm")]
    work = [(1, "single")] if "single" in args.how else []
    work += [(batch, how) for batch in args.batch for how in hows]
    work += [(batch, how) for how in ("apart", "vllm") if how in args.how for batch in args.batch]
    for batch, how in work:
        if how == "apart" and not hasattr(model, "peft_config"):
            model = add_random_lora(model) if forced else load(args, device, merge=False)[0]
        chosen = records[: args.examples * (20 if forced and how != "single" else 1)]
        examples, texts = encode_examples(tokenizer, chosen), [record["text"] for record in chosen]
        if how == "vllm":
            model = None  # its memory is vLLM's now
            torch.cuda.empty_cache()
            speed = with_vllm(args.vllm_python, tokenizer.vocab_size, examples, batch)
            results.append({"how": how, "batch": batch, "examples": len(chosen), "examples_per_second": speed})
            continue
        for number in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(number)
        ours, firsts, setup = how not in ("single", "padded"), [], 0.0
        # once for the warm-up; ours on a GPU twice, since the first run compiles and captures
        for part in (slice(min(8, len(chosen))), *[slice(None)] * (1 + (ours and device == "cuda"))):
            with watched(forced, examples[part]) as counts:
                wait(device)
                start = time.perf_counter()
                if not ours:
                    answers = with_transformers(model, tokenizer, examples[part], batch, forced)
                else:
                    prompts = [example.prompt_ids for example in examples[part]]
                    rules = (grammar, texts[part]) if how != "ours" else ()
                    answers = []
                    for answer in generating.generate(model, tokenizer, prompts, MAX_NEW_TOKENS, batch, *rules):
                        if not answers:
                            firsts.append(time.perf_counter() - start)
                        answers.append(answer.text)
                wait(device)
                seconds = time.perf_counter() - start - counts["setup"]
                setup = max(setup, counts["setup"])
        row = {
            "how": how,
            "batch": batch,
            "examples": len(chosen),
            "examples_per_second": round(len(chosen) / seconds, 2),
        }
        single = answers if how == "single" else single
        if single and not forced:
            same = [a == b for a, b in zip(single, answers, strict=True)]
            row["same_answers"] = round(sum(same) / len(same), 4)
        if counts["steps"]:
            needed = counts["steps"] * read_once + counts["tokens_read"] * token_bytes
            row |= {"ms_per_step": round(1000 * seconds / counts["steps"], 2)}
            row |= {"constraint_share": round(counts["constraint"] / seconds, 3), "setup_s": round(setup, 1)}
            row |= {"first_cold_s": round(firsts[1], 2), "first_warm_s": round(firsts[-1], 2)}
        if device == "cuda":
            peaks = [torch.cuda.max_memory_allocated(number) / 2**30 for number in range(torch.cuda.device_count())]
            row["peak_gib"] = round(max(peaks), 1)  # of the fullest GPU
            full = args.base_weights == "full" and counts["steps"]
            row |= {"bandwidth_share": round(needed / rate / seconds, 3)} if full else {}
        results.append(row)
        say(" | ".join(f"{key} {value}" for key, value in row.items()))
        other = "" if args.shape in ("tiny", "7b") else f"-{args.shape}"
        file = f"generate_speed-{name.replace(' ', '_')}-{precision}{other}.json"
        out = ROOT / "benchmarks" / "results" / file
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    keys = list(dict.fromkeys(key for row in results for key in row))
    print("\n| " + " | ".join(keys) + " |\n|" + "---|" * len(keys))
    for row in results:
        print("| " + " | ".join(str(row.get(key, "")) for key in keys) + " |")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

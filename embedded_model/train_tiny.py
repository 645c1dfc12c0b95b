"""Make the embedded model from nothing: vocabularies, a tiny LLaMA and two LoRA adapters on top of it.

    python embedded_model/train_tiny.py                                        # one GPU with about 80 GB, ten minutes and two and a half of compilation
    python embedded_model/train_tiny.py --seconds 60 --rows 4 --workers 1      # a rehearsal on a CPU

Writes, in the shapes in which the real weights are published (all numbers fp16):
  tiny/{consolidated.00.pth,params.json,tokenizer.model}           as Meta shipped LLaMA
  chinese-llama-plus-lora-tiny/, chinese-alpaca-plus-lora-tiny/    PEFT folders with their own, larger tokenizer.model

Three stages, each a share of --seconds; --first_stage alpaca does the last one again, on the files of the others. The data
of a step depend only on the seed, the number of steps on the machine.
  base    all parameters, in both vocabularies at once: the base ids are the first ids of the merged vocabulary, so `tiny` is
          this network with fewer rows in its embedding and its head. Text, and tasks mostly without the prompt frame.
  llama   LoRA, embed_tokens and lm_head on top of it: mostly plain text, cleaner than before.
  alpaca  LoRA, embed_tokens (one row more) and lm_head on top of both: tasks in the project's prompt frame.
Needs the package jieba besides requirements.txt, for its dictionary: pip install jieba==0.42.1

What the text and the tasks are is said in tasks.py: an untyped list of proper names is among them, named-entity
recognition in the demo's format is not. Sentence templates, persons and organisations of the demo's dev set are held out.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils.data import DataLoader, Dataset
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]
from alpaca.common.start import start

start()

from alpaca.corpora.convert import convert
from alpaca.corpora.labels import read_labels
from alpaca.corpora.problems import Problems
from dataset import build_prompt
from embedded_model import dictionary
from embedded_model.documents import NO_LOSS, STAGES, make_batch
from embedded_model.tasks import TASKS
from embedded_model.text_maker import TextMaker, any_text, plain_text
from embedded_model.vocabulary import build_vocabularies
from process import CONFIG as PROCESS

DEMO_DEV = ROOT / "data" / "demo" / "ori_data" / "dev.txt"

# The stages and the folders they write.
FOLDERS = {"base": "tiny", "llama": "chinese-llama-plus-lora-tiny", "alpaca": "chinese-alpaca-plus-lora-tiny"}
SHARE_OF_TIME = {"base": 0.61, "llama": 0.09, "alpaca": 0.30}
# multiple_of is chosen so that Meta's rule, multiple_of * ceil(int(2 * 4 * dim / 3) / multiple_of), gives an FFN of 688.
PARAMS = {"dim": 256, "multiple_of": 16, "n_heads": 4, "n_layers": 8, "norm_eps": 1e-06, "vocab_size": -1}
POSITIONS = 2048
LORA_R, LORA_ALPHA, LORA_DROPOUT = 8, 32.0, 0.05
LORA_MODULES = ["q_proj", "v_proj", "k_proj", "o_proj", "gate_proj", "down_proj", "up_proj"]
MUON_LR, MUON_WEIGHT_DECAY, ADAM_LR, ADAPTER_LR = 4e-3, 0.05, 4e-3, 2e-3
IGNORE = -100
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def say(text):
    print(text, flush=True)


# ---- data


class Batches(Dataset):
    """Batch i of a stage, made from (seed, stage, i) alone: any number of workers gives the same data."""

    def __init__(self, stage, seed, rows, models):
        self.stage, self.seed, self.rows = stage, seed, rows
        self.base_vocabulary = sentencepiece.SentencePieceProcessor(model_proto=models["base"])
        self.vocabulary = sentencepiece.SentencePieceProcessor(model_proto=models["merged"])

    def __getitem__(self, index):
        seed = f"{self.seed}-{self.stage}-{index}"
        return torch.from_numpy(make_batch(self.stage, seed, self.rows, self.base_vocabulary, self.vocabulary))


def batches(stage, args, models):
    return DataLoader(
        Batches(stage, args.seed, args.rows, models),
        batch_size=None,
        sampler=range(10**9),  # more than any run reads
        num_workers=args.workers,
        multiprocessing_context="fork",
        prefetch_factor=8,
        pin_memory=DEVICE == "cuda",
    )


# ---- optimizer of the base


class Muon:
    """Momentum whose update of each matrix is orthogonalised by five Newton-Schulz steps, all matrices of a shape at once."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        self.lr, self.weight_decay, self.momentum = lr, weight_decay, momentum
        self.groups = {}
        for matrix in matrices:
            self.groups.setdefault(tuple(matrix.shape), []).append(matrix)
        self.buffers = {s: torch.zeros(len(g), *s, device=g[0].device) for s, g in self.groups.items()}

    @staticmethod
    def orthogonalised(update):
        x = update.bfloat16()
        wide = x.shape[1] > x.shape[2]
        x = x.mT if wide else x
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            y = x @ x.mT
            x = 3.4445 * x + (-4.775 * y + 2.0315 * y @ y) @ x
        return (x.mT if wide else x).float()

    @torch.no_grad()
    def step(self, lr_factor):
        for shape, matrices in self.groups.items():
            gradient, buffer = torch.stack([m.grad for m in matrices]), self.buffers[shape]
            buffer.mul_(self.momentum).add_(gradient)
            update = self.orthogonalised(gradient + self.momentum * buffer) * (0.2 * math.sqrt(max(shape)))
            lr = self.lr * lr_factor
            values = torch.stack(list(matrices)) * (1 - lr * self.weight_decay) - lr * update
            torch._foreach_copy_(list(matrices), list(values.unbind(0)))


class BaseOptimizer:
    """Muon for the matrices of the layers, AdamW for everything else."""

    def __init__(self, model):
        matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
        in_layers = {id(p) for p in matrices}
        self.others = [p for p in model.parameters() if id(p) not in in_layers]
        self.muon = Muon(matrices, MUON_LR, MUON_WEIGHT_DECAY)
        self.adam = torch.optim.AdamW(self.others, ADAM_LR, (0.9, 0.95), weight_decay=0.0, fused=DEVICE == "cuda")

    def step(self, lr_factor):
        torch.nn.utils.clip_grad_norm_(self.others, 1.0)
        self.adam.param_groups[0]["lr"] = ADAM_LR * lr_factor
        self.adam.step()
        self.muon.step(lr_factor)


class AdapterOptimizer:
    def __init__(self, model):
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.adam = torch.optim.AdamW(
            self.parameters, ADAPTER_LR, (0.9, 0.95), weight_decay=0.0, fused=DEVICE == "cuda"
        )

    def step(self, lr_factor):
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.param_groups[0]["lr"] = ADAPTER_LR * lr_factor
        self.adam.step()


# ---- training


def train(stage, llama, model, optimizer, seconds, args, models):
    """One stage. `llama` is the LlamaForCausalLM inside `model`. Returns (tokens, seconds)."""

    def loss_of(rows):
        rows = rows.int()
        ids = rows & (NO_LOSS - 1)
        targets = torch.where(rows < NO_LOSS, ids, IGNORE)[:, 1:].long()
        hidden = llama.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
        return F.cross_entropy(llama.lm_head(hidden).float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE)

    compiled_loss = torch.compile(loss_of) if DEVICE == "cuda" else loss_of
    hold = 0.3 if stage == "base" else 0.0  # the share of the time at the full learning rate; then linearly to 0
    model.train()
    start, compiled_at, tokens = time.time(), 5, 0
    for step, rows in enumerate(batches(stage, args, models), start=1):
        if step == compiled_at:
            say(f"{stage}: compiled in {time.time() - start:.0f} s")
            start = time.time()  # compilation does not count as training
        done = (time.time() - start) / seconds if step >= compiled_at else 0.0
        if done >= 1:
            break
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = compiled_loss(rows.to(DEVICE, non_blocking=True))
        loss.backward()
        optimizer.step(min(1.0, step / 100) * min(1.0, (1 - done) / (1 - hold)))
        model.zero_grad(set_to_none=True)
        tokens += rows.numel()
        if step % args.log_steps == 0:
            elapsed = time.time() - start
            say(f"{stage}: step {step} | loss {loss.item():.4f} | {elapsed:.0f} s | {tokens / 1e6:.1f} M tokens")
    seconds = time.time() - start
    say(f"{stage}: end | {step - 1} steps | {tokens / 1e6:.1f} M tokens | {seconds:.0f} s | {args.device_name}")
    return tokens, seconds


def new_model(rows):
    dim, multiple_of = PARAMS["dim"], PARAMS["multiple_of"]
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=dim,
        intermediate_size=multiple_of * math.ceil(int(2 * 4 * dim / 3) / multiple_of),
        num_hidden_layers=PARAMS["n_layers"],
        num_attention_heads=PARAMS["n_heads"],
        num_key_value_heads=PARAMS["n_heads"],
        max_position_embeddings=POSITIONS,
        rms_norm_eps=PARAMS["norm_eps"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(DEVICE)


def with_rows(model, rows):
    """A copy with more or fewer rows of embedding and head, every number rounded to what fp16 can hold. A new row starts as
    the row of <unk>, which like [PAD] is never an answer."""
    copy = new_model(rows)
    state = {name: value.half().float() for name, value in model.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        missing = max(0, rows - len(state[name]))
        state[name] = torch.cat([state[name][:rows], state[name][:1].expand(missing, -1)])
    copy.load_state_dict(state)
    return copy


def train_adapter(stage, model, seconds, args, models):
    """LoRA on `model`, which is left as it is. Returns ({published name: fp16 tensor}, tokens, seconds)."""
    config = LoraConfig(
        r=LORA_R,
        lora_alpha=LORA_ALPHA,
        lora_dropout=LORA_DROPOUT,
        target_modules=LORA_MODULES,
        modules_to_save=["embed_tokens", "lm_head"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(args.seed)  # a stage starts alike whether the stages before it ran in this process or not
    peft_model = get_peft_model(with_rows(model, model.config.vocab_size), config)
    llama = peft_model.base_model.model
    tokens, seconds = train(stage, llama, peft_model, AdapterOptimizer(peft_model), seconds, args, models)
    state = {name: value.half().cpu().clone() for name, value in get_peft_model_state_dict(peft_model).items()}
    return state, tokens, seconds


@torch.no_grad()
def merged(model, adapter):
    """A copy of `model` with an adapter's low-rank updates added and its embedding and head put in."""
    prefix = "base_model.model."
    copy = with_rows(model, len(adapter[prefix + "lm_head.weight"]))
    for name, parameter in copy.named_parameters():
        published = prefix + name
        if published in adapter:
            parameter.copy_(adapter[published])
        lora_a = adapter.get(published.replace(".weight", ".lora_A.weight"))
        if lora_a is not None:
            lora_b = adapter[published.replace(".weight", ".lora_B.weight")]
            parameter += (LORA_ALPHA / LORA_R * (lora_b.float() @ lora_a.float())).to(DEVICE)
    return copy


# ---- files


def to_interleaved(weight):
    """Meta rotates neighbouring pairs of a head, transformers its two halves: the inverse of the converter's permutation."""
    heads = PARAMS["n_heads"]
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def from_interleaved(weight):
    heads = PARAMS["n_heads"]
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


META_NAMES = {
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "output",
    "model.layers": "layers",
}


def meta_name(name):
    for ours, theirs in META_NAMES.items():
        name = name.replace(ours, theirs)
    return name


def write_base(model, folder, vocabulary):
    """`model`, as Meta shipped LLaMA."""
    state = {}
    for name, value in model.state_dict().items():
        value = to_interleaved(value) if name.endswith(("q_proj.weight", "k_proj.weight")) else value
        state[meta_name(name)] = value.half().cpu().clone()
    head_dim = PARAMS["dim"] // PARAMS["n_heads"]
    state["rope.freqs"] = (1.0 / 10000 ** (torch.arange(0, head_dim, 2).float() / head_dim)).half()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(PARAMS), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary)


def read_base(folder):
    state = torch.load(folder / "consolidated.00.pth", map_location=DEVICE, weights_only=True)
    model = new_model(len(state["output.weight"]))
    values = {}
    for name in model.state_dict():
        value = state[meta_name(name)].float()
        values[name] = from_interleaved(value) if name.endswith(("q_proj.weight", "k_proj.weight")) else value
    model.load_state_dict(values)
    return model


def read_adapter(folder):
    return torch.load(folder / "adapter_model.bin", map_location=DEVICE, weights_only=True)


def write_adapter(state, folder, base_name, vocabulary):
    """An adapter as the published ones are, with the configuration keys of PEFT in spring 2023."""
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "enable_lora": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": LORA_ALPHA,
        "lora_dropout": LORA_DROPOUT,
        "merge_weights": False,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "peft_type": "LORA",
        "r": LORA_R,
        "target_modules": LORA_MODULES,
        "task_type": "CAUSAL_LM",
    }
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "tokenizer.model").write_bytes(vocabulary)


# ---- figures


def new_texts(seed, split, count):
    """Texts without walks and roughness, as in the demo corpus: on known templates ("train") or on held-out ones ("dev")."""
    maker = TextMaker(f"{seed}-text", split)
    return [("", plain_text(any_text(maker))) for _ in range(count)]


def held_out_tasks(seed, count):
    """{task: [(prompt, answer)]} on templates and names that were in no training text."""
    maker = TextMaker(f"{seed}-tasks", "dev")
    examples = {}
    for task in TASKS:
        found = []
        while len(found) < count:
            example = task(maker, any_text(maker))
            if example:
                instruct, query, answer = example
                found.append((build_prompt(instruct, query), answer))
        examples[task.__name__] = found
    return examples


def demo_examples(count):
    """[(prompt, answer)] of the demo's dev set, the task that no stage trains."""
    labels = read_labels(PROCESS["labels"])
    instruct = PROCESS["instruct"].replace("{labels}", "、".join(labels.values()))
    examples = convert(DEMO_DEV, "jsonl", labels, instruct, PROCESS["query_prefix"], Problems())[:count]
    return [(build_prompt(e["instruct"], e["query"]), e["answer"]) for e in examples]


@torch.no_grad()
def nats_per_character(model, vocabulary, examples, batch_size=100):
    """Loss of the answers of [(prompt or "", answer)], per character: comparable between vocabularies."""
    total = characters = 0
    for begin in range(0, len(examples), batch_size):
        rows, labels = [], []
        for prompt, answer in examples[begin : begin + batch_size]:
            read = [vocabulary.bos_id(), *(vocabulary.encode(prompt) if prompt else [])]
            predicted = [*vocabulary.encode(answer), vocabulary.eos_id()]
            rows.append(torch.tensor(read + predicted))
            labels.append(torch.tensor([IGNORE] * len(read) + predicted))
            characters += len(answer) + 1
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(DEVICE)
        targets = torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORE).to(DEVICE)
        logits = model(input_ids=ids).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum"
        ).item()
    return total / characters


@torch.no_grad()
def greedy_answers(model, vocabulary, prompts, new_tokens=120):
    """The prompts are padded on the left."""
    ids = [[vocabulary.bos_id(), *vocabulary.encode(prompt)] for prompt in prompts]
    longest = max(map(len, ids))
    padded = torch.tensor([[0] * (longest - len(i)) + i for i in ids], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(i)) + [1] * len(i) for i in ids], device=DEVICE)
    output = model.generate(input_ids=padded, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    eos = vocabulary.eos_id()
    rows = output[:, longest:].tolist()
    return [vocabulary.decode(row[: row.index(eos)] if eos in row else row) for row in rows]


def report(output_dir, seed, count):
    """The figures of README.md, from the files that were written."""
    base = read_base(output_dir / FOLDERS["base"])
    adapters = {stage: read_adapter(output_dir / FOLDERS[stage]) for stage in ("llama", "alpaca")}
    with_llama = merged(base, adapters["llama"])
    candidates = {
        "base": (base, "base"),
        "base + llama": (with_llama, "llama"),
        "base + llama + alpaca": (merged(with_llama, adapters["alpaca"]), "alpaca"),
        "base + alpaca + llama, the wrong order": (
            merged(merged(base, adapters["alpaca"]), adapters["llama"]),
            "llama",
        ),
    }
    known, held_out = new_texts(seed, "train", 2 * count), new_texts(seed, "dev", 2 * count)
    demo, tasks = demo_examples(2 * count), held_out_tasks(seed, count)
    say(f"nats a character; tasks on held-out templates and names, {count} of each")
    for name, (model, stage) in candidates.items():
        model.eval()
        model_file = str(output_dir / FOLDERS[stage] / "tokenizer.model")
        vocabulary = sentencepiece.SentencePieceProcessor(model_file=model_file)
        examples = [example for found in tasks.values() for example in found]
        task_loss = nats_per_character(model, vocabulary, examples)
        losses = [nats_per_character(model, vocabulary, texts) for texts in (known, held_out, demo)]
        answers = greedy_answers(model, vocabulary, [prompt for prompt, _ in examples])
        right = [answer == gold for answer, (_, gold) in zip(answers, examples, strict=True)]
        exact = {task: sum(right[i * count : (i + 1) * count]) / count for i, task in enumerate(tasks)}
        figures = "new text {:.3f}, with held-out templates {:.3f}, the demo's answers {:.3f}, the tasks' {:.3f}"
        say(f"{name}: " + figures.format(*losses, task_loss))
        say("  exact answers: " + ", ".join(f"{task} {rate:.2f}" for task, rate in exact.items()))


def main(args):
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    args.device_name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    output_dir, seconds = Path(args.output_dir), {stage: args.seconds * share for stage, share in SHARE_OF_TIME.items()}
    dictionary.prepare()
    models = build_vocabularies(args.seed)
    vocabularies = dict(zip(STAGES, models.values(), strict=True))
    sizes = {
        stage: sentencepiece.SentencePieceProcessor(model_proto=proto).get_piece_size()
        for stage, proto in vocabularies.items()
    }
    say(f"vocabularies: {sizes} pieces")

    spent = []
    if args.first_stage == "base":
        model = new_model(sizes["llama"])
        say(f"{sum(p.numel() for p in model.parameters()):,} parameters in the merged vocabulary")
        spent.append(train("base", model, model, BaseOptimizer(model), seconds["base"], args, models))
        write_base(with_rows(model, sizes["base"]), output_dir / FOLDERS["base"], vocabularies["base"])
    else:  # the adapter has every row of the embedding and the head, those that the base's file lacks too
        model = merged(read_base(output_dir / FOLDERS["base"]), read_adapter(output_dir / FOLDERS["llama"]))

    base_name = FOLDERS["base"] + "-hf"
    for stage in ("llama", "alpaca") if args.first_stage == "base" else ("alpaca",):
        model = with_rows(model, sizes[stage])
        adapter, *cost = train_adapter(stage, model, seconds[stage], args, models)
        spent.append(cost)
        write_adapter(adapter, output_dir / FOLDERS[stage], base_name, vocabularies[stage])
        model = merged(model, adapter)

    tokens, trained = (sum(values) for values in zip(*spent, strict=True))
    files = [path for folder in FOLDERS.values() for path in (output_dir / folder).iterdir()]
    say(f"trained {tokens / 1e6:.0f} M tokens in {trained:.0f} s on {args.device_name}, seed {args.seed}")
    say(f"{sum(path.stat().st_size for path in files):,} bytes in {len(files)} files under {output_dir}")
    report(output_dir, args.seed, args.report_examples)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="training time of all stages, without compilation")
    parser.add_argument(
        "--first_stage",
        choices=("base", "alpaca"),
        default="base",
        help="alpaca: the other two are read from output_dir",
    )
    parser.add_argument("--output_dir", default=str(Path(__file__).resolve().parent), help="where the three folders go")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14, help="processes that make text while the model trains")
    parser.add_argument("--rows", type=int, default=256, help="rows of 512 tokens in a batch")
    parser.add_argument("--log_steps", type=int, default=200)
    parser.add_argument("--report_examples", type=int, default=100, help="held-out examples of each task in the report")
    main(parser.parse_args())

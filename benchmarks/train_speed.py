"""How fast training is, side by side in one run: the ways people train such examples today, and ours.

    python benchmarks/train_speed.py                                   # CPU: the tiny model and the demo corpus
    python benchmarks/train_speed.py --shape=7b --batch=12,64,192 --corpus=msra_train.txt --tokenizer=tokenizer.model
    python benchmarks/train_speed.py --gpus=2,4,8 --batch=64,192 --steps=25 --shape=7b --corpus=… --tokenizer=…

Ours are train_deepspeed.py and train_trainer.py themselves, as subprocesses, read from train_log.jsonl after the
warm-up; the others are loops written here. --shape=7b makes a randomly initialised model of LLaMA 7B's shape on the
GPU, --shape=qwen2.5-7b one of that shape, its vocabulary the given one and fillers. Prints a table and writes
benchmarks/results/train_speed-<device>.json, a list of objects with the keys COLUMNS: rows of earlier runs stay until they
are measured again, so the table can be filled over several sittings. What does not fit into memory is said and left out.

--gpus: only our two trainers, on one GPU and on each of these numbers of GPUs of one host, with the ZeRO stages --zero.
alone: the speed of one GPU in the same run; linear_share: the speed divided by alone and by the number of GPUs.
loss_gap and adapter_gap compare with the raw loop on one GPU, ZeRO-1, that has the same examples a step by accumulation:
the largest relative difference of a logged loss, and the norm of the difference of all lora_B over their norm.
Without a GPU it rehearses with processes on the CPU; their speed then says nothing.

--base_weights=full,nf4,fp8 --memory_gb=8,12,16,24 makes the table of what fits on which card. The kernels of those cards
are not tried by that.

how: original (every example padded to 192; on CUDA fp16 with the optimizer on the CPU), peft (padded to the longest,
autocast, dropout 0.1), sorted (the same, similar lengths together, dropout 0), liger (PEFT with Liger kernels, if
installed); none, plain, prefix: our packings through the raw loop; trainer: prefix through the Trainer.
"""

import itertools
import json
import os
import random
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.common.devices import DTYPES, pick_precision
from alpaca.common.errors import UserError
from alpaca.models.templates import encode_examples
from alpaca.models.tokenizer import load_tokenizer
from alpaca.training.prefix_tree import tree_row
from benchmarks.speed_inputs import BIG, random_model, read_corpus, save_vocabulary
from benchmarks.speed_peers import run_peer
from config_utils import run_script
from dataset import read_examples

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "shape": "tiny",  # tiny (model_hub/chinese-alpaca-tiny) | 7b | qwen2.5-7b (random weights, 13 GB on disk) | a model's folder
    "batch": [12, 48],  # examples a step and GPU
    "how": ["original", "peft", "sorted", "liger", "none", "plain", "prefix", "trainer"],  # see above
    "gpus": [1],  # numbers of GPUs of this host, see above
    "zero": [1, 2, 3],  # ZeRO stages, with several GPUs
    "base_weights": ["full"],  # of ours: full | nf4 | fp8
    "memory_gb": [
        0
    ],  # of the cards to imitate: ours get so much GPU memory, less 0.8 GB for the driver; 0: all there is
    "row_lengths": 0,  # compile so few row lengths: a shorter wait, more padding; 0: as in training
    "steps": 40,  # timed steps of ours, after as many for the warm-up
    "seconds": 10,  # timed seconds of the other loops
    "corpus": None,  # sentences in the JSON-lines schema of process.py; None: the demo's
    "tokenizer": None,  # a tokenizer.model, needed for a random shape
    "options": "",  # more options for our trainers, joined by spaces
    "work_dir": "benchmarks/work",  # model, data and runs; git-ignored
    "peer": None,  # internal: measure this loop in this process
}
OURS = ("none", "plain", "prefix", "trainer")
MEASURED = (
    "how",
    "shape",
    "batch",
    "gpus",
    "zero",
    "examples",
    "options",
    "base_weights",
    "memory_gb",
    "row_lengths",
)  # a new row replaces one equal in these
COLUMNS = MEASURED + ("date", "fits", "examples_per_second", "ms_per_step", "peak_gib", "unique_tokens_per_second")
COLUMNS += ("matrix_rate_share", "alone", "linear_share", "loss_gap", "adapter_gap")
RESULTS = ROOT / "benchmarks" / "results"


def folder_of(shape, work):
    if shape in BIG:
        return work / shape
    return ROOT / "model_hub" / "chinese-alpaca-tiny" if shape == "tiny" else Path(shape).resolve()


def write_inputs(args, work):
    """Write the data file that every way of training reads, and the 7B; returns the model's folder."""
    work.mkdir(parents=True, exist_ok=True)
    source = args.corpus or ROOT / "data" / "demo" / "ori_data" / "train.txt"
    with (work / "train.txt").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for _, example in read_corpus(source))
    model_dir = folder_of(args.shape, work)
    if args.shape in BIG and not (model_dir / "config.json").exists():
        if not args.tokenizer:
            raise UserError(f"--shape={args.shape}: also give --tokenizer=<tokenizer.model>")
        tokenizer = save_vocabulary(args.tokenizer, model_dir, args.shape)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = random_model(args.shape, len(tokenizer), torch.bfloat16, device)
        model.save_pretrained(model_dir)
        del model
        torch.cuda.empty_cache()
    return model_dir


def matrix_rate(device):
    """Multiply-adds of a square matrix product in the training precision, in FLOP/s: the card's practical ceiling."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, DTYPES[pick_precision("auto", device)])
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(15):
        start = time.perf_counter()
        (a @ b).view(-1)[0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n**3 / statistics.median(times[5:])


def train(args, how, batch, model_dir, work, gpus=1, zero=1, accumulation=1, **held):
    """Run a trainer, through the launcher where there are several GPUs. Returns the folder of the run.

    held: what limited.py changes for it, and base_weights.
    """
    script = "train_trainer.py" if how == "trainer" else "train_deepspeed.py"
    run = work / "-".join([f"{how}-{batch}x{accumulation}-gpus{gpus}-zero{zero}", *map(str, held.values())])
    shutil.rmtree(run, ignore_errors=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [shutil.which("deepspeed") or "deepspeed", f"--num_accelerators={gpus}", f"--master_port={port}"]
    command = [
        *(launcher if gpus > 1 else [sys.executable]),
        *([ROOT / "benchmarks" / "limited.py", json.dumps(held)] if held else []),
        ROOT / script,
        *(f"--model_dir={model_dir}", f"--save_dir={run}", f"--deepspeed_json_path={ROOT / 'deepspeed.json'}"),
        *(f"--train_path={work}/train.txt", f"--dev_path={work}/train.txt", "--eval_steps=-1", "--log_steps=5"),
        *(f"--train_batch_size={batch}", f"--gradient_accumulation_steps={accumulation}"),
        *(f"--packing={'prefix' if how == 'trainer' else how}", f"--deepspeed_zero_optimization_stage={zero}"),
        *(f"--max_steps={2 * args.steps}", f"--base_weights={held.get('base_weights', 'full')}"),
        *args.options.split(),
    ]
    env = {**os.environ, "NCCL_NVLS_ENABLE": "0"}  # NVLink multicast: not every host lets a process have it
    if not torch.cuda.is_available():  # more threads than cores wait for each other
        env.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // gpus)))
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, encoding="utf-8", cwd=ROOT, env=env
    )
    check_ran(result, script)
    (run / "output.txt").write_text(result.stdout + result.stderr, encoding="utf-8")
    return run


def check_ran(result, what):
    """UserError where a process failed, MemoryError where what it wanted did not fit."""
    output = result.stdout + result.stderr
    if result.returncode and re.search("OutOfMemoryError|no memory left", output):
        raise MemoryError
    if result.returncode:
        raise UserError(f"{what} failed: {output[-1500:]}")


def read_log(run):
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()]


def speed_of(args, run):
    """Examples/s of all GPUs, and the peak memory of the first on CUDA."""
    log = read_log(run)
    # The median: a row length that first occurs late is compiled late.
    speed = statistics.median(row["examples_per_second"] for row in log if row["step"] > args.steps)
    return speed, log[-1].get("peak_gib")


def gaps(run, reference):
    """{"loss_gap", "adapter_gap"} of two runs' folders, as shares of the reference; UserError for other tensors."""
    losses, expected = ([row["loss"] for row in read_log(r)] for r in (run, reference))
    loss_gap = max(abs(a - b) / b for a, b in zip(losses, expected, strict=True))
    ours, theirs = (load_file(r / "adapter_model" / "adapter_model.safetensors") for r in (run, reference))
    if {k: v.shape for k, v in ours.items()} != {k: v.shape for k, v in theirs.items()}:
        raise UserError(f"{run}/adapter_model: not the same tensors as {reference}/adapter_model")
    pairs = [(ours[name].double(), tensor.double()) for name, tensor in theirs.items() if "lora_B" in name]
    difference, norm = sum((a - b).square().sum() for a, b in pairs), sum(b.square().sum() for _, b in pairs)
    adapter_gap = (difference / norm).sqrt().item()
    return {"loss_gap": float(f"{loss_gap:.2g}"), "adapter_gap": float(f"{adapter_gap:.2g}")}


def measure_peer(how, batch, model_dir, work, seconds):
    """Run one of the other loops in a process of its own, so that memory is its own too."""
    command = [sys.executable, __file__, f"--peer={how}", f"--batch={batch}", f"--work_dir={work}"]
    command += [f"--shape={model_dir}", f"--seconds={seconds}"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    check_ran(result, how)
    return json.loads(result.stdout.splitlines()[-1])


def unique_tokens(examples, batch, share):
    """Mean number of tokens of an example that a step has to compute, padding left out."""
    chunks = [examples[i : i + batch] for i in range(0, min(len(examples), 20 * batch), batch)]
    return sum(len(tree_row(chunk, share)["input_ids"]) for chunk in chunks) / sum(map(len, chunks))


def main(args):
    work = Path(args.work_dir).resolve()
    if args.peer:
        run_peer(args.peer, args.batch[0], folder_of(args.shape, work), work, args.seconds)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    several, given = sorted({1, *args.gpus}) != [1], ",".join(map(str, args.gpus))
    limit = torch.cuda.device_count() or 8  # processes on a CPU
    if not 1 <= min(args.gpus) <= max(args.gpus) <= limit:
        raise UserError(f"--gpus={given}: expected numbers from 1 to {limit} on this machine")
    hows = [how for how in args.how if how in ("prefix", "trainer") or not several]
    if not hows:
        raise UserError(f"--gpus={given}: of --how only prefix and trainer run on several GPUs; name one of them")
    model_dir = write_inputs(args, work)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = matrix_rate(device)
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    heads = config["num_attention_heads"]
    of_queries = (
        2 + 2 * (config.get("num_key_value_heads") or heads) / heads
    )  # and those of keys and values, as matrices
    attention, mlp = of_queries * config["hidden_size"] ** 2, 3 * config["hidden_size"] * config["intermediate_size"]
    parameters = config["num_hidden_layers"] * (attention + mlp)  # of the layers: the head sees answer tokens alone
    examples = encode_examples(load_tokenizer(model_dir), read_examples(work / "train.txt"))
    random.Random(0).shuffle(examples)
    print(f"{name}: {rate / 1e12:.1f} TFLOP/s in a square matrix product; {len(examples)} examples", flush=True)

    out = RESULTS / f"train_speed-{name.replace(' ', '_')}.json"
    stages = args.zero if several else [1]
    plan = list(itertools.product(args.batch, stages, hows, sorted({1, *args.gpus}), args.base_weights, args.memory_gb))
    results = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    measured = {}  # what train was asked -> the folder of that run

    def run_of(how, batch, **layout):
        key = (how, batch, *layout.items())
        measured[key] = measured.get(key) or train(args, how, batch, model_dir, work, **layout)
        return measured[key]

    def save():
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")

    for batch, zero, how, gpus, weights, memory in tqdm(plan, desc="measuring", dynamic_ncols=True):
        if how == "liger" and not find_spec("liger_kernel"):
            continue
        asked = {"base_weights": weights, "memory_gb": memory, "row_lengths": args.row_lengths} if how in OURS else {}
        held = {key: value for key, value in asked.items() if value not in ("full", 0)}
        ours = {"zero": zero, "options": args.options or None, **held} if how in OURS else {}
        row = {"how": how, "shape": model_dir.name, "batch": batch, "gpus": gpus, "examples": len(examples), **ours}
        results = [old for old in results if any(old.get(key) != row.get(key) for key in MEASURED)]
        shares = {}
        try:
            if how in OURS:
                run = run_of(how, batch, gpus=gpus, zero=zero, accumulation=1, **held)
                speed, peak = speed_of(args, run)
            else:
                speed, peak = measure_peer(how, batch, model_dir, work, args.seconds)
            if several:
                alone, _ = speed_of(args, run_of(how, batch, gpus=1, zero=zero, accumulation=1, **held))
                reference = run_of("prefix", batch, gpus=1, zero=1, accumulation=gpus, **held)
                share = round(speed / alone / gpus, 3)
                shares = {"alone": round(alone, 1), "linear_share": share, **gaps(run, reference)}
        except MemoryError:
            tqdm.write(
                f"{how}, batch {batch}: it or what it is compared with does not fit into the memory of this device"
            )
            if memory:
                results.append(row | {"date": time.strftime("%Y-%m-%d"), "fits": False})
            save()
            continue
        tokens = unique_tokens(examples, batch, how in ("prefix", "trainer")) * speed
        row |= {
            "date": time.strftime("%Y-%m-%d"),
            "examples_per_second": round(speed, 1),
            "ms_per_step": round(1000 * batch * gpus / speed, 1),
            "peak_gib": peak and round(peak, 1),
            "unique_tokens_per_second": round(tokens),
            "matrix_rate_share": round(4 * parameters * tokens / rate / gpus, 3),
            **shares,
        }
        results.append(row)
        tqdm.write(" | ".join(f"{key} {value}" for key, value in row.items()))
        save()
    columns = [key for key in COLUMNS if any(row.get(key) is not None for row in results)]
    print("\n| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in results:
        print("| " + " | ".join("" if row.get(key) is None else f"{row[key]}" for key in columns) + " |")


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

"""predict.py as a whole with one process and more; for generate_speed.py --gpus.

Each takes a GPU, or all a CPU. --examples texts of the corpus, no two of them equal. Answered by the demo's adapter, by
--base_model alone, or with --shape=7b by a base of random weights, made and written once: its answers are nonsense of any
length, so they end after RANDOM_TOKENS. A number of processes is run twice where it compiles kernels, which the second
run finds: only that one counts.

Rates: from the first row on disk to the last, and with start-up and end; `linear`: the share of as many times the rate of
the first number of processes.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from alpaca.common.errors import UserError
from benchmarks.speed_inputs import random_model, save_vocabulary

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "benchmarks" / "work"
RANDOM_TOKENS = 24


def by_processes(args, texts):
    """Print a table of predict.py's speed with each number of processes of --gpus."""
    WORK.mkdir(exist_ok=True)
    texts = [f"{texts[i % len(texts)]}{i // len(texts) or ''}" for i in range(args.examples)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (WORK / "texts.jsonl").write_text("".join(lines), encoding="utf-8")
    options = [f"--precision={args.precision}", f"--batch_size={args.batch[0]}", *base_options(args)]
    cuda, first = torch.cuda.is_available(), None
    print("| processes | texts a second | linear | with start-up | linear | first row, s |\n|" + "---|" * 6)
    for count in args.gpus:
        for _ in range(2 if cuda else 1):
            rows_a_second, whole, until_first = measure(count, len(texts), options)
        first = first or (count, rows_a_second, whole)
        linear = [
            rate / (alone * count / first[0]) for rate, alone in zip((rows_a_second, whole), first[1:], strict=True)
        ]
        cells = [f"{rows_a_second:.1f}", f"{linear[0]:.0%}", f"{whole:.1f}", f"{linear[1]:.0%}", f"{until_first:.1f}"]
        print(f"| {count} | " + " | ".join(cells) + " |", flush=True)


def base_options(args):
    if args.shape == "tiny" and not args.base_model:
        return []
    folder = args.base_model or WORK / f"random-{args.shape}"
    if not args.base_model and not (folder / "config.json").exists():
        if not args.tokenizer:
            raise UserError("--shape=7b needs --tokenizer=<tokenizer.model>")
        tokenizer = save_vocabulary(args.tokenizer, folder, args.shape)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        random_model(args.shape, len(tokenizer), torch.bfloat16, device).save_pretrained(folder)
        torch.cuda.empty_cache()
    cut = [] if args.base_model else [f"--max_new_tokens={RANDOM_TOKENS}"]
    return ["--lora_model=none", f"--base_model={folder}", "--constrained=True", *cut]


def measure(count, texts, options):
    """(rows a second from the first to the last, texts a second of all, seconds until the first row) of one run."""
    output = WORK / f"rows{count}.jsonl"
    output.unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    command += [ROOT / "predict.py", f"--input_path={WORK}/texts.jsonl", f"--output_path={output}", *options]
    start, first_row = time.time(), None
    process = subprocess.Popen(map(str, command))
    while process.poll() is None:
        if first_row is None and output.exists() and output.stat().st_size:
            first_row = time.time()
        time.sleep(0.02)
    if process.returncode or output.read_bytes().count(b"\n") != texts:
        raise UserError(f"{output}: predict.py has not answered all of the texts; see above")
    whole, last_row = time.time() - start, output.stat().st_mtime
    return (texts - 1) / (last_row - first_row), texts / whole, first_row - start

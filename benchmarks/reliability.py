"""The long matrix: what a training run survives.     make reliability

    python benchmarks/reliability.py                                              # half an hour on two free cores
    python benchmarks/reliability.py --trainers=train_trainer --kills=4 --fuzz=0  # one part of it
    python benchmarks/reliability.py --trainers=none --fuzz=0                     # predict.py's 54 cases

Each trainer gets `--kills` SIGKILLs, a quarter each: at random moments of the training, at one of the file operations of
a save, at one of those inside a checkpoint's folder, and between the adapter's two renames. After a kill a loader must
still find a whole adapter if there was one before, the newest complete checkpoint must still be there or a newer one, and
the run goes on with --resume. A run that reaches its end must equal one that was never
killed, bit for bit: each loss that it ever logged, and the adapter. Then the next run begins.
predict.py, with 1, 2 and 3 processes, gets a SIGKILL on each of its ranks at three moments, and goes on with --resume and 1,
2 and 3 processes: the file must equal that of a run that was left alone.
The rest is tests with larger numbers: ZeRO 0 to 3 on two ranks in both trainers, each run ended by SIGTERM and resumed
(STAGES), and fuzzing (FUZZ).
"""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from alpaca.models.adapter_files import read_adapter
from alpaca.models.adapters import adapter_or_old
from alpaca.training.checkpoints import complete_checkpoints, step_of
from config_utils import run_script
from harness import make_records, read_log, run_ranks, write_jsonl

CONFIG = {
    "trainers": ["train_deepspeed", "train_trainer"],  # whose runs are killed; none: nobody's
    "kills": 20,  # SIGKILLs a trainer
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # base model
    "steps": 60,  # optimizer steps of a run
    "answering": True,  # kill predict.py, too
    "seed": 0,  # of the moments at which a run is killed
    "fuzz": 20000,  # cases for each fuzz test; 0: leave all tests out
}
ANSWERED = 60  # texts of a run of predict.py
# Runs a script and kills it at the n-th operation that changes a file of the run, operations on the log not counted; with
# "renames" at the n-th rename of adapter_model.new, when the earlier adapter is already moved away; with "checkpoint" only
# operations inside a checkpoint's folder count. torch.save opens its
# file in C++, where the audit hook does not see it, so it is counted by itself.
KILLED_IN_A_SAVE = """
import os, runpy, signal, sys
import torch
left, run, which = int(sys.argv[1]), sys.argv[2], sys.argv[3]
def count():
    global left
    left -= 1
    if left <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
def hook(event, arguments):
    if event == "os.rename" and str(arguments[0]).endswith("adapter_model.new") and which == "renames":
        count()
    elif which == "renames" or event not in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"):
        return
    elif event == "open" and not (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR):
        return
    elif str(arguments[0]).startswith(run + os.sep) and not str(arguments[0]).endswith("train_log.jsonl"):
        if which == "any" or "/checkpoint-" in str(arguments[0]):
            count()
save = torch.save
def counted(*args, **kwargs):
    if which != "renames":
        count()
    return save(*args, **kwargs)
torch.save = counted
sys.addaudithook(hook)
sys.argv = sys.argv[4:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
from alpaca.common.start import start

start()

runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_trainer(trainer, args, run, *more, before=(), seconds=None):
    """Run a trainer, and SIGKILL it `seconds` after its first log line. Returns its exit code."""
    options = [f"--model_dir={Path(args.model_dir).resolve()}", "--train_path=train.txt", "--dev_path=dev.txt"]
    options += ["--precision=fp32", "--lora_dropout=0.1", f"--max_steps={args.steps}", "--train_batch_size=4"]
    options += ["--log_steps=1", "--eval_steps=-1", "--save_steps=2", f"--save_dir={run}", *more]
    command = [sys.executable, *before, str(ROOT / f"{trainer}.py"), *options]
    log, started = run / "train_log.jsonl", time.time()
    with (run.parent / "output.txt").open("wb") as output:
        process = subprocess.Popen(command, cwd=run.parent, stdout=output, stderr=output)
        if seconds is not None:
            while process.poll() is None and not (log.exists() and log.stat().st_mtime > started):
                time.sleep(0.01)
            try:
                return process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        return process.wait()


def losses(run):
    return [(row["step"], row["loss"]) for row in read_log(run)]


def weights_of(run):
    return load_file(run / "adapter_model" / "adapter_model.safetensors")


def whole_adapter(run):
    """The adapter that a loader finds, or None. A run without a checkpoint is not resumed: the next moves it to .old-<n>."""
    folders = (adapter_or_old(folder / "adapter_model") for folder in (run, *run.parent.glob(run.name + ".old*")))
    return next((folder for folder in folders if folder and read_adapter(folder)), None)


def newest_step(run):
    return max(map(step_of, complete_checkpoints(run)), default=0)


def survive(trainer, args, work):
    """Kill the runs of one trainer; returns the counts that main prints."""
    draw = random.Random(f"{args.seed}-{trainer}")
    whole, run = work / "whole", work / "run"
    assert run_trainer(trainer, args, whole) == 0, (work / "output.txt").read_text(encoding="utf-8")[-4000:]
    expected, expected_adapter = losses(whole), weights_of(whole)
    kills = {"at a random moment": 0, "in a save": 0, "in a checkpoint": 0, "between the renames": 0}
    which = {"in a save": ("any", 200), "in a checkpoint": ("checkpoint", 150), "between the renames": ("renames", 9)}
    found_old = lost = lost_checkpoints = cut_short = ended = equal = 0
    while True:
        resume = ["--resume"] if complete_checkpoints(run) else []
        had, newest = whole_adapter(run), newest_step(run)
        done = sum(kills.values())
        kind = list(kills)[done % 4]
        if done == args.kills:
            code = run_trainer(trainer, args, run, *resume)
        elif kind == "at a random moment":
            code = run_trainer(trainer, args, run, *resume, seconds=draw.uniform(0, 3))
        else:
            operations, among = which[kind]
            before = ["-c", KILLED_IN_A_SAVE, str(draw.randint(1, among)), str(run), operations]
            code = run_trainer(trainer, args, run, *resume, before=before)
        assert code in (0, -9), (work / "output.txt").read_text(encoding="utf-8")[-4000:]
        found = whole_adapter(run)
        lost += had is not None and found is None
        lost_checkpoints += newest_step(run) < newest
        cut_short += any(not (folder / "complete").is_file() for folder in run.glob("checkpoint-*"))
        found_old += found is not None and found.name.endswith(".old")
        if code:
            kills[kind] += 1
        else:
            ended += 1
            adapters = (expected_adapter, weights_of(run))
            same = all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
            equal += same and set(losses(run)) == set(expected)
            shutil.rmtree(run)
        steps = [folder.name for folder in complete_checkpoints(run)]
        print(f"{trainer}: {kind if code else 'to its end'}, {steps}, {found and found.name}", file=sys.stderr)
        if done == args.kills and code == 0:
            return {
                "trainer": trainer,
                "kills": kills,
                "found only adapter_model.old": found_old,
                "adapters lost": lost,
                "checkpoints cut short": cut_short,
                "checkpoints lost": lost_checkpoints,
                "runs to their end": ended,
                "equal bit for bit": equal,
            }


def survive_answering(args, work):
    """Kill each rank of predict.py, at three moments; returns the counts that main prints."""
    texts = [f"{record['text']}{i}" for i, record in enumerate(make_records(ANSWERED, 3))]
    write_jsonl(work / "texts.jsonl", [{"id": i, "text": text} for i, text in enumerate(texts)])
    options = ["--lora_model=none", f"--base_model={Path(args.model_dir).resolve()}", "--constrained=True"]
    options += [f"--input_path={work}/texts.jsonl", "--precision=fp32", "--max_new_tokens=16", "--batch_size=8"]
    moments, cases = [0, ANSWERED // 2, ANSWERED - 10], []
    for count, resumed in itertools.product((1, 2, 3), repeat=2):
        cases += [(count, rank, rows, resumed) for rank, rows in itertools.product(range(count), moments)]
    runs = [{"count": 1, "kill": None, "more": [], "output": str(work / "whole.jsonl")}]
    for number, (count, rank, rows, resumed) in enumerate(cases):
        output = str(work / f"{number}.jsonl")
        runs.append({"count": count, "kill": {"rank": rank, "rows": rows}, "more": [], "output": output})
        runs.append({"count": resumed, "kill": None, "more": ["--resume"], "output": output})
    ended, _ = run_ranks("predict.py", options, work / "all", runs, work)
    expected, killed, early, equal = (work / "whole.jsonl").read_bytes(), 0, 0, 0
    for number, (count, rank, _, resumed) in enumerate(cases):
        first, last = ended[1 + 2 * number : 3 + 2 * number]
        same = last["codes"] == [0] * resumed and (work / f"{number}.jsonl").read_bytes() == expected
        killed, early, equal = killed + (first["codes"][rank] == -9), early + (first["rows"] < ANSWERED), equal + same
        shown = (
            f"{count} processes, {rank} killed at {first['rows']} rows, {resumed} go on: {'equal' if same else 'OTHER'}"
        )
        print(f"predict.py: {shown}", file=sys.stderr)
    return {"cases": len(cases), "killed": killed, "with rows missing": early, "equal after --resume": equal}


def main(args):
    if args.answering:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(survive_answering(args, Path(folder))), flush=True)
    for trainer in args.trainers if args.trainers != ["none"] else ():
        with tempfile.TemporaryDirectory() as folder:
            work, start = Path(folder), time.time()
            write_jsonl(work / "train.txt", make_records(37, 1))
            write_jsonl(work / "dev.txt", make_records(5, 2))
            print(json.dumps({**survive(trainer, args, work), "seconds": round(time.time() - start)}), flush=True)
    if args.fuzz:
        tests = ["tests/training/test_survival.py", "tests/training/test_ranks.py", "tests/test_untrusted.py"]
        env = {**os.environ, "FUZZ": str(args.fuzz), "STAGES": "0,1,2,3"}
        raise SystemExit(subprocess.call([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

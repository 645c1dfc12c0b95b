"""The long matrix: what a training run survives.     make reliability

    python benchmarks/reliability.py                      # hours on two cores
    python benchmarks/reliability.py --kills=3            # fewer; the last report is results/reliability.jsonl

For each trainer: `--kills` SIGKILLs at random moments, each resumed with --resume, a third of them while it saves, some
between the adapter's two renames; then every loss and the adapter are compared with those of a run that nothing happened
to, bit for bit, and after each kill a loader must find a whole adapter once there was one. The other parts are tests
with larger numbers: ZeRO 0-3 on two ranks in both trainers (STAGES), fuzzing (FUZZ).
"""

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

from config_utils import run_script  # noqa: E402
from conftest import make_records, read_log, write_jsonl  # noqa: E402
from modeling import _adapter_shapes  # noqa: E402
from run_files import _adapter_or_old, complete_checkpoints, step_of  # noqa: E402

CONFIG = {
    "kills": 20,  # SIGKILLs a trainer
    "model_dir": "./model_hub/chinese-alpaca-tiny",  # base model
    "steps": 60,  # optimizer steps of the run
    "seed": 0,  # of the moments
    "fuzz": 20000,  # cases a fuzz test; 0: leave the tests out
}
RESULTS = ROOT / "benchmarks" / "results" / "reliability.jsonl"
# Kills the process at the n-th of the calls that a save is made of; n is the first argument.
KILLED_IN_A_SAVE = """
import os, pathlib, runpy, shutil, signal, sys
import torch
left = int(sys.argv[1])
def counted(call):
    def wrapper(*args, **kwargs):
        global left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return wrapper
pathlib.Path.rename, torch.save, shutil.rmtree = map(counted, (pathlib.Path.rename, torch.save, shutil.rmtree))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train(trainer, args, work, run, *more, before=(), limit=None):
    """Run a trainer; SIGKILL it after `limit` seconds. Returns its exit code."""
    options = [f"--model_dir={Path(args.model_dir).resolve()}", "--train_path=train.txt", "--dev_path=dev.txt"]
    options += ["--precision=fp32", "--lora_dropout=0.1", f"--max_steps={args.steps}", "--train_batch_size=4"]
    options += ["--log_steps=1", "--eval_steps=-1", "--save_steps=2", f"--save_dir={run}", *more]
    command = [sys.executable, *before, str(ROOT / f"{trainer}.py"), *options]
    with (work / "output.txt").open("ab") as output:
        process = subprocess.Popen(command, cwd=work, stdout=output, stderr=output)
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()


def survive(trainer, args, work):
    """One trainer's kills; returns what the report says of them."""
    draw = random.Random(f"{args.seed}-{trainer}")
    assert train(trainer, args, work, work / "whole") == 0, (work / "output.txt").read_text(encoding="utf-8")[-4000:]
    run, at_random, in_a_save, between_renames, lost = work / "run", 0, 0, 0, 0
    steps = []
    while at_random + in_a_save < args.kills:
        resume = ["--resume"] if complete_checkpoints(run) else []
        had = _adapter_or_old(run / "adapter_model") is not None
        if (at_random + in_a_save) % 3 == 2:
            code = train(trainer, args, work, run, *resume, before=["-c", KILLED_IN_A_SAVE, str(draw.randint(1, 30))])
            in_a_save += code == -9
        else:
            code = train(trainer, args, work, run, *resume, limit=draw.uniform(4, 12))
            at_random += code == -9
        found = _adapter_or_old(run / "adapter_model")
        between_renames += found is not None and found.name.endswith(".old")
        lost += had and (found is None or not _adapter_shapes(found))
        steps = [step_of(p) for p in complete_checkpoints(run)]
        print(f"{trainer}: exit {code}, complete checkpoints {steps}, adapter {found and found.name}", file=sys.stderr)
        if code == 0:  # reached its end before it was killed: once more from the start
            shutil.rmtree(run)
    if steps[-1:] != [args.steps]:
        assert train(trainer, args, work, run, *(["--resume"] if steps else [])) == 0
    losses = [{r["step"]: r["loss"] for r in read_log(folder)} for folder in (work / "whole", run)]
    adapters = [load_file(folder / "adapter_model" / "adapter_model.safetensors") for folder in (work / "whole", run)]
    return {
        "trainer": trainer,
        "kills": at_random + in_a_save,
        "during a save": in_a_save,
        "found between the renames": between_renames,
        "adapters lost": lost,
        "losses equal": losses[0] == losses[1],
        "adapter equal": all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0]),
    }


def main(args):
    with RESULTS.open("w", encoding="utf-8") as results:
        for trainer in ("train_deepspeed", "train_trainer"):
            with tempfile.TemporaryDirectory() as folder:
                work, start = Path(folder), time.time()
                write_jsonl(work / "train.txt", make_records(37, 1))
                write_jsonl(work / "dev.txt", make_records(5, 2))
                row = survive(trainer, args, work)
                results.write(json.dumps({**row, "seconds": round(time.time() - start)}) + "\n")
                print(json.dumps(row))
    if args.fuzz:
        tests = ["tests/test_survival.py", "tests/test_ranks.py", "tests/test_untrusted.py"]
        env = {**os.environ, "FUZZ": str(args.fuzz), "STAGES": "0,1,2,3"}
        raise SystemExit(subprocess.call([sys.executable, "-m", "pytest", *tests], cwd=ROOT, env=env))


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

"""The loss of 200 steps with packing=prefix and with packing=none on one plot: benchmarks/results/loss_curves.png.

pip install matplotlib
python benchmarks/loss_curves.py                    # the tiny model and the demo corpus, float32
"""

import json
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from alpaca.common.start import start

start()

from alpaca.common.errors import UserError
from config_utils import run_script

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {
    "steps": 200,  # optimizer steps of 12 examples
    "work_dir": "benchmarks/work/loss_curves",  # runs; git-ignored
}


def losses_of(packing, args):
    run = ROOT / args.work_dir / packing
    command = [sys.executable, ROOT / "train_deepspeed.py", f"--packing={packing}", f"--save_dir={run}"]
    command += ["--precision=fp32", "--log_steps=1", "--eval_steps=-1", f"--max_steps={args.steps}"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, encoding="utf-8", cwd=ROOT)
    if result.returncode:
        raise UserError(f"train_deepspeed.py failed: {(result.stdout + result.stderr)[-1500:]}")
    lines = (run / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def main(args):
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UserError(f"{error}; pip install matplotlib") from None
    prefix, none = losses_of("prefix", args), losses_of("none", args)
    steps = range(1, args.steps + 1)
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    above.semilogy(steps, none, color="tab:orange", linewidth=3.5, label="none: padded to the longest")
    above.semilogy(steps, prefix, color="tab:blue", linewidth=1, label="prefix: the shared part computed once")
    above.set(ylabel="loss per answer token", title="Tiny model, demo corpus, batch 12, float32, lr 3e-3")
    above.legend()
    difference = [abs(a - b) / b for a, b in zip(prefix, none, strict=True)]
    below.semilogy(steps, [max(d, 1e-9) for d in difference], color="black", linewidth=1)
    below.set(xlabel="optimizer step", ylabel="relative difference")
    path = ROOT / "benchmarks" / "results" / "loss_curves.png"
    figure.savefig(path, dpi=110)
    print(
        f"{path}: largest relative difference of the first 30 steps {max(difference[:30]):.1e}, of all {max(difference):.1e}"
    )


if __name__ == "__main__":
    run_script(main, CONFIG, __file__)

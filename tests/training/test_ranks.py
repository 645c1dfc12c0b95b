"""Two ranks on one CPU, through the deepspeed launcher: the same run as one rank's, also when SIGTERM ends it half way.

python -m pytest tests/training/test_ranks.py
STAGES=0,1,2,3 python -m pytest tests/training/test_ranks.py         # every ZeRO stage in both trainers; 1 and 3 without it
"""

import functools
import os
import shutil
import signal
import subprocess
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from alpaca.training.checkpoints import complete_checkpoints, step_of
from harness import ROOT, free_port, make_records, needs_two_gpus, read_log, run_script, write_jsonl

pytestmark = pytest.mark.slow

RUNS = [("train_deepspeed", 1), ("train_trainer", 3)]
if os.environ.get("STAGES"):
    RUNS = [(t, int(stage)) for t in ("train_deepspeed", "train_trainer") for stage in os.environ["STAGES"].split(",")]

# NCCL wants a GPU a rank; without any GPU it is gloo.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """19 rows: an epoch is three steps of 6, and one of 1, in which five of the six micro-batches are empty."""
    folder = tmp_path_factory.mktemp("ranks")
    write_jsonl(folder / "train.txt", make_records(19, 3))
    write_jsonl(folder / "dev.txt", make_records(5, 4))
    return folder


def options(base_dir, run):
    return [
        f"--model_dir={base_dir}",
        "--train_path=train.txt",
        "--dev_path=dev.txt",
        f"--save_dir={run}",
        "--precision=fp32",
        "--deepspeed_optimizer_params_lr=1e-3",
        "--max_steps=9",
        "--log_steps=1",
        "--eval_steps=9",
        "--save_steps=5",
    ]


def two_ranks():
    return [shutil.which("deepspeed"), "--num_accelerators=2", f"--master_port={free_port()}"]


def run_two_ranks(script, *options, cwd, **how):
    """As the launcher starts them, but for the time that three processes need to import what they need."""
    if torch.cuda.is_available():
        return run_script(script, *options, cwd=cwd, launcher=two_ranks(), **how)
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    rank = 'import os; rank = str(int(os.fork() == 0)); os.environ.update({"RANK": rank, "LOCAL_RANK": rank})'
    return run_script(script, *options, cwd=cwd, env=env, before=rank, **how)


@pytest.fixture(scope="module")
def alone(folder, base_dir):
    run_script("train_deepspeed.py", *options(base_dir, "alone"), "--train_batch_size=6", cwd=folder)
    return folder / "alone"


def wait_for_a_step(run, running):
    log = run / "train_log.jsonl"
    while running() and not (log.exists() and log.read_bytes()):
        time.sleep(0.02)


def terminate_group(command, run, cwd):
    """Start a run of two ranks and send SIGTERM, after its first step, to its process group; the exit code of the launcher
    and what was printed until the last process had ended."""
    with subprocess.Popen(
        [*map(str, command)],
        cwd=cwd,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    ) as process:
        wait_for_a_step(run, lambda: process.poll() is None)
        assert process.poll() is None, process.communicate()[0]
        os.killpg(process.pid, signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    return process.returncode, output


def terminate_second_rank(run, pid):
    """Send SIGTERM to the rank that writes nothing; once it has ended the other has one too, as the launcher does it."""
    first = psutil.Process(pid)
    wait_for_a_step(run, lambda: first.status() != psutil.STATUS_ZOMBIE)
    if torch.cuda.is_available():
        (second,) = (process for process in first.children(True) if "--local_rank=1" in process.cmdline())
        second.terminate()  # the rest is the launcher's
        return
    (second,) = first.children()
    second.terminate()
    late = time.monotonic() + 60
    try:
        while second.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > late:  # one waits for the other, which goes on
                second.kill()
                first.kill()
            time.sleep(0.002)
        first.terminate()
    except psutil.NoSuchProcess:  # both have ended
        pass


def assert_one_run(alone, run):
    one, two = read_log(alone), read_log(run)
    assert [row["step"] for row in two] == [row["step"] for row in one] == [*range(1, 10), 9]  # rank 0 alone writes
    for key in ("loss", "eval_loss", "lr"):
        values = [[row[key] for row in rows if key in row] for rows in (one, two)]
        assert values[1] == pytest.approx(values[0], rel=1e-4), key
    first, second = (load_file(r / "adapter_model" / "adapter_model.safetensors") for r in (alone, run))
    assert first.keys() == second.keys() and all(tensor.numel() for tensor in second.values())
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-4), (name, (tensor - second[name]).abs().max())


@pytest.mark.parametrize("trainer, stage", [run for run in RUNS if run != ("train_deepspeed", 1)])  # which is `alone`
def test_every_stage_is_one_run(folder, base_dir, alone, trainer, stage):
    run = folder / f"{trainer}-{stage}-alone"
    more = ["--train_batch_size=6", f"--deepspeed_zero_optimization_stage={stage}"]
    run_script(f"{trainer}.py", *options(base_dir, run.name), *more, cwd=folder)
    assert_one_run(alone, run)


@needs_two_gpus
@pytest.mark.parametrize("trainer, stage", RUNS)
def test_two_ranks_are_one_run(folder, base_dir, alone, trainer, stage):
    """Losses, dev loss and adapter to 1e-4: also of the last step of an epoch, so each row is seen once. SIGTERM, to the
    launcher's process group or to one rank, ends both after they have saved; what --resume makes of it is still that one
    run."""
    run, group = folder / f"{trainer}-{stage}", stage > 1
    parts = ["--train_batch_size=1", "--gradient_accumulation_steps=3"]
    parts += [*options(base_dir, run.name), f"--deepspeed_zero_optimization_stage={stage}"]
    if group:
        code, output = terminate_group([*two_ranks(), ROOT / f"{trainer}.py", *parts], run, folder)
    else:
        stop = functools.partial(terminate_second_rank, run)
        result = run_two_ranks(f"{trainer}.py", *parts, cwd=folder, check=False, meanwhile=stop)
        code, output = result.returncode, result.stdout + result.stderr
    assert code == (-signal.SIGTERM if group else 143), output  # a shell says 143 of both
    stopped = len(read_log(run))
    assert output.count(f"收到 SIGTERM，已在第 {stopped} 步保存") == 1 and "Traceback" not in output, output
    assert 1 <= stopped < 9 and step_of(complete_checkpoints(run)[-1]) == stopped
    run_two_ranks(f"{trainer}.py", *parts, "--resume", cwd=folder)
    assert_one_run(alone, run)


@needs_two_gpus
def test_one_dying_rank_ends_the_run_with_its_message(folder, base_dir):
    script = folder / "dying.py"
    script.write_text(
        f"""
import os, runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import alpaca.training.steps as steps
def seed_step(seed, step, rank):
    if step == 3 and rank == 1:
        raise RuntimeError("what rank 1 died of")
steps.seed_step = seed_step
runpy.run_path({str(ROOT / "train_deepspeed.py")!r}, run_name="__main__")
""",
        encoding="utf-8",
    )
    start = time.time()
    more = ["--train_batch_size=1", "--max_steps=100000"]
    result = run_two_ranks(script, *options(base_dir, "dying"), *more, cwd=folder, check=False)
    assert result.returncode not in (0, 143) and "what rank 1 died of" in result.stderr + result.stdout
    assert time.time() - start < 120  # 100,000 steps take longer, and so does a rank that waits for another

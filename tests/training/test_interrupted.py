"""What ends a run before its last step, and what the next one makes up for.     python -m pytest tests/training/test_interrupted.py"""

import fcntl
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from alpaca.common.console import say
from alpaca.common.devices import check_launcher
from alpaca.common.errors import UserError
from alpaca.training.adapter_writer import BestScore, adapter_step
from alpaca.training.checkpoints import complete_checkpoints, start_run
from alpaca.training.run import Run
from alpaca.training.run_log import evaluated_steps, repair_log
from alpaca.training.steps import catch_signals, seed_step, shared_state, signalled, with_learning_rate
from harness import ROOT, free_port, needs_two_gpus, read_log, run_script, training_options

FIXTURES = Path(__file__).parent / "fixtures"
TRAINERS = ("train_deepspeed", "train_trainer")
# What a run does before its script: replace some names.
PATCHED = """
import os
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
import alpaca.training.loss as loss
import alpaca.training.run as run
"""
FAILING_EVALUATION = f"""{PATCHED}
def evaluate_loss(*args):
    raise RuntimeError("what the evaluation died of")
run.evaluate_loss = evaluate_loss
"""
# A signal in the second evaluation: before a batch of the dev loss, or at an answer of F1.
SIGNALLED_EVALUATION = """
import signal
import alpaca.training.evaluate as evaluate
module, name = {"loss": (run, "eval_batches"), "f1": (evaluate.Answering, "in_turn")}["%s"]
whole, calls = getattr(module, name), []
def signalled(*args, **kwargs):
    calls.append(0)
    for i, part in enumerate(whole(*args, **kwargs)):
        if len(calls) == 2 and i == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        yield part
setattr(module, name, signalled)
"""
# The gradient of one weight, at some steps, on one rank.
NAN_GRADIENTS = """
add_lora, calls = run.add_lora, []
def with_nan(*args):
    model = add_lora(*args)
    weight = [weight for weight in model.parameters() if weight.requires_grad][-1]
    def spoil(gradient):
        calls.append(0)
        return gradient * float("nan") if len(calls) in {steps} and os.environ["RANK"] == "{rank}" else gradient
    weight.register_hook(spoil)
    return model
run.add_lora = with_nan
"""
NAN_LOSS = """
import alpaca.training.loss as loss
answer_loss, calls = loss.answer_loss, []
def with_nan(*args, **kwargs):
    calls.append(0)
    return answer_loss(*args, **kwargs) * (float("nan") if len(calls) == 2 and os.environ["RANK"] == "1" else 1)
loss.answer_loss = with_nan
"""
# Two ranks without a launcher: the second is a fork. It says how it ended.
TWO_RANKS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
os.environ.update(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="{port}", RANK="0", LOCAL_RANK="0")
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
second = os.fork()
if not second:
    os.environ.update(RANK="1", LOCAL_RANK="1")
import alpaca.training.run as run
{patch}
try:
    runpy.run_path({script!r}, run_name="__main__")
finally:
    if second:
        print("rank 1:", os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]), file=sys.stderr)
"""
NO_MEMORY = f"""{PATCHED}
import torch
def answer_loss(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory")
loss.answer_loss = answer_loss
"""


def options(base_dir, instruct_data, run):
    data = [f"--{name}_path={instruct_data}/{name}.txt" for name in ("train", "dev")]
    return [*training_options(base_dir), *data, f"--save_dir={run}", "--max_steps=7"]


def error_of(result):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-4000:]
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return error


@pytest.mark.parametrize("trainer, part", [("train_deepspeed", "loss"), ("train_trainer", "f1")])
def test_an_evaluation_that_fails_loses_nothing(base_dir, instruct_data, tmp_path, trainer, part):
    """Nothing was to be saved yet. The run that is resumed begins with that evaluation, and its next mean is over all steps
    since the last log, those before the failure included. A signal does not wait for the end of the second evaluation."""
    more = ["--log_steps=5", "--eval_steps=3", "--save_steps=99", *(["--eval_examples=4"] if part == "f1" else [])]
    for run in ("whole", "cut"):
        before = FAILING_EVALUATION if run == "cut" else ""
        given = [*options(base_dir, instruct_data, tmp_path / run), *more]
        result = run_script(f"{trainer}.py", *given, cwd=tmp_path, before=before, check=run == "whole")
    assert "what the evaluation died of" in result.stderr
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-3"]
    facts = json.loads((tmp_path / "cut" / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    assert facts["step"] == 3
    before = f"{PATCHED}{SIGNALLED_EVALUATION.replace('%s', part)}"
    result = run_script(f"{trainer}.py", *given, "--resume", cwd=tmp_path, before=before, check=False)
    assert result.returncode == 128 + signal.SIGTERM and "收到 SIGTERM，已在第 6 步保存" in result.stderr, result.stderr
    assert [row["step"] for row in read_log(tmp_path / "cut")] == [3, 5]
    assert [path.name for path in complete_checkpoints(tmp_path / "cut")] == ["checkpoint-3", "checkpoint-6"]
    run_script(f"{trainer}.py", *given, "--resume", cwd=tmp_path)
    assert [row["step"] for row in read_log(tmp_path / "whole")] == [3, 5, 6, 7, 7]
    if not torch.cuda.is_available():
        assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


def run_two_ranks(trainer, patch, given, folder):
    values = {"root": str(ROOT), "port": free_port(), "patch": patch, "script": f"{ROOT}/{trainer}.py"}
    (folder / "two_ranks.py").write_text(TWO_RANKS.format(**values), encoding="utf-8")
    return run_script(folder / "two_ranks.py", *given, cwd=folder, check=False)


@pytest.mark.slow
@needs_two_gpus
@pytest.mark.parametrize(
    "trainer, stage, precision",
    [
        ("train_deepspeed", 0, "bf16"),
        ("train_deepspeed", 2, "fp32"),
        ("train_trainer", 3, "bf16"),
    ],
)
def test_gradients_that_are_no_numbers_end_the_run(base_dir, instruct_data, tmp_path, trainer, stage, precision):
    """The losses are finite, only one of two ranks has such gradients, and DeepSpeed leaves the steps out: one is said and
    logged, five in a row end both ranks."""
    patch = NAN_GRADIENTS.replace("{steps}", "(2, 4, 5, 6, 7, 8)").replace("{rank}", "1")
    more = ["--max_steps=20", "--save_steps=3", "--eval_steps=-1", "--log_steps=2", f"--precision={precision}"]
    more += [f"--deepspeed_zero_optimization_stage={stage}"]
    given = [*options(base_dir, instruct_data, tmp_path / "run"), *more]
    result = run_two_ranks(trainer, patch, given, tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "rank 1: 2" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 2 and all("step 8: the gradients of 5 steps are NaN or infinite" in error for error in errors)
    assert result.stderr.count("梯度是 NaN 或无穷") == 6
    assert [row["skipped"] for row in read_log(tmp_path / "run")] == [1, 1, 2]
    checkpoints = complete_checkpoints(tmp_path / "run")
    assert [path.name for path in checkpoints] == ["checkpoint-3", "checkpoint-6"]
    _, losses = json.loads((checkpoints[0] / "complete").read_text(encoding="utf-8"))["interval"]
    assert losses == 1  # those since the last log, at step 2, as a mean over ranks


@pytest.mark.slow
@needs_two_gpus
@pytest.mark.parametrize(
    "trainer, patch, error",
    [
        ("train_deepspeed", NAN_LOSS, "step 2: the loss is NaN or infinite"),
        ("train_trainer", NAN_GRADIENTS, "step 2: the LoRA holds NaN or infinite weights"),
    ],
)
def test_what_is_no_number_on_one_rank_ends_all(base_dir, instruct_data, tmp_path, trainer, patch, error):
    """ZeRO 0 in fp32 leaves no step out: such a gradient makes weights that are not saved, and a step later a loss."""
    patch = patch.replace("{steps}", "(2,)").replace("{rank}", "1")
    more = ["--save_steps=1", "--eval_steps=-1", "--deepspeed_zero_optimization_stage=0"]
    result = run_two_ranks(trainer, patch, [*options(base_dir, instruct_data, tmp_path / "run"), *more], tmp_path)
    assert result.returncode == 2 and "rank 1: 2" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert result.stderr.count(f"error: {error}") == 2
    assert [path.name for path in complete_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    facts = json.loads((tmp_path / "run" / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    assert facts["step"] == 1


@pytest.mark.slow
@needs_two_gpus
def test_another_number_of_processes_is_refused(base_dir, instruct_data, tmp_path):
    """A checkpoint has the optimizer's state in parts, one for each process."""
    run = tmp_path / "run"
    shutil.copytree(FIXTURES / "bff124a" / "train_deepspeed", run)
    before = sorted(tmp_path.rglob("*"))
    more = ["--max_steps=50", "--train_batch_size=3", "--resume"]
    result = run_two_ranks("train_deepspeed", "", [*options(base_dir, instruct_data, run), *more], tmp_path)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and "rank 1: 2" in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert len(errors) == 2 and all("was written with ranks 1, this run has 2; make them equal" in e for e in errors)
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "two_ranks.py"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a CUDA device")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp16_gradients_that_are_no_numbers_end_the_run(base_dir, instruct_data, tmp_path, stage):
    """The loss scale is searched at first, which may leave steps out too; NaN from step 6 on ends the run after five."""
    patch = NAN_GRADIENTS.replace("{steps}", "range(6, 99)").replace("{rank}", "0")
    more = ["--precision=fp16", "--max_steps=30", "--eval_steps=-1", f"--deepspeed_zero_optimization_stage={stage}"]
    given = [*options(base_dir, instruct_data, tmp_path / "run"), *more]
    result = run_script("train_deepspeed.py", *given, cwd=tmp_path, before=f"{PATCHED}{patch}", check=False)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-4000:]
    assert re.search(r"error: step 1[0-9]: the gradients of 5 steps are NaN or infinite", result.stderr), result.stderr


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_gpu_without_room_is_one_line(base_dir, instruct_data, tmp_path, trainer):
    """Here an error that the loss raises; also the line before the first step, with the learning rate's default."""
    given = [option for option in options(base_dir, instruct_data, tmp_path / "run") if "params_lr" not in option]
    result = run_script(f"{trainer}.py", *given, cwd=tmp_path, before=NO_MEMORY, check=False)
    error = error_of(result)
    assert "in this order: --train_batch_size=3 --gradient_accumulation_steps=2 (the same examples a step); " in error
    assert re.search(
        r"; --gradient_checkpointing; a shorter --max_seq_length \(the longest row so far has [1-9]\d+ tok", error
    )
    assert re.search(
        r"学习率 0.0015（auto，hidden_size 32）, 可训练参数 9,344, 共 7 步, 每个 epoch 35 步 [\d,]+ token",
        result.stderr,
    )


def test_the_learning_rate_follows_the_base():
    def rate(asked, hidden_size):
        settings, source = with_learning_rate({"optimizer": {"params": {"lr": asked, "eps": 1e-8}}}, hidden_size)
        assert settings["optimizer"]["params"]["eps"] == 1e-8
        assert source == (f"auto，hidden_size {hidden_size}" if asked == "auto" else "DeepSpeed 配置或命令行")
        return settings["optimizer"]["params"]["lr"]

    assert [rate("auto", 4096), rate("auto", 256), rate(3e-4, 4096), rate(3e-4, 256)] == [1e-4, 1.5e-3, 3e-4, 3e-4]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_folder_in_use_is_refused(base_dir, instruct_data, tmp_path, trainer):
    (tmp_path / "run" / "adapter_model").mkdir(parents=True)
    with (tmp_path / "run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        given = options(base_dir, instruct_data, tmp_path / "run")
        error = error_of(run_script(f"{trainer}.py", *given, cwd=tmp_path, check=False))
    assert f"{tmp_path}/run: another process is writing there" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run.lock"]


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_launcher_that_says_no_rank(base_dir, instruct_data, tmp_path, trainer):
    given, env = options(base_dir, instruct_data, tmp_path / "run"), {"OMPI_COMM_WORLD_SIZE": "2"}
    error = error_of(run_script(f"{trainer}.py", *given, cwd=tmp_path, env=env, check=False))
    assert "OMPI_COMM_WORLD_SIZE is 2, but RANK is not set" in error and "deepspeed --num_gpus=2" in error
    assert not list(tmp_path.iterdir())


def test_launchers(monkeypatch):
    for name in ("RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")  # a lone python in an sbatch job
    check_launcher()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(UserError, match="SLURM_STEP_NUM_TASKS is 4, but RANK is not set"):
        check_launcher()
    monkeypatch.setenv("RANK", "0")
    check_launcher()


def ended(child):
    """The status of a forked process that does `child` and leaves with 7."""
    pid = os.fork()
    if not pid:
        child()
        os._exit(7)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def send(*numbers, ignored=()):
    def child():
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        received = catch_signals()
        for number in numbers:
            os.kill(os.getpid(), number)
        os._exit(sum(received))

    return ended(child)


def test_each_signal_asks_for_one_save():
    term, interrupt, hangup = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
    assert [send(term), send(interrupt), send(hangup)] == [term, interrupt, hangup]
    assert send(interrupt, term, term) == interrupt + 2 * term  # the launcher adds its own
    assert send(interrupt, interrupt) == -interrupt  # at once
    assert send(hangup, term, ignored=[hangup]) == term  # under nohup


def test_dropout_is_drawn_anew_for_each_step_and_rank():
    def drawn(*place):
        seed_step(*place)
        return torch.rand(1).item()

    places = [(1, 0, 0), (1, 0, 1), (1, 1, 0), (2, 0, 0)]
    assert len({drawn(*place) for place in places}) == 4 and drawn(1, 0, 1) == drawn(1, 0, 1)


def test_what_a_step_has_met(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 1)
    assert shared_state(torch.tensor(1.0), False, []) == [0, 0, 0]
    assert shared_state(torch.tensor(float("inf")), True, [signal.SIGHUP, signal.SIGTERM]) == [1, 1, signal.SIGHUP]


def test_what_one_rank_has_met_all_have(monkeypatch):
    """Here another rank, of which only its share of the maximum is seen: a signal, a loss and an update that are no numbers."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    theirs = torch.tensor([1, 1, signal.SIGTERM])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t, op: t.copy_(torch.maximum(t, theirs[-len(t) :])))
    assert shared_state(torch.tensor(1.0), False, []) == [1, 1, signal.SIGTERM]
    assert signalled([], "cpu") == signal.SIGTERM


def test_a_terminal_that_is_gone_ends_nothing():
    def child():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 2)
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        say("into the void")
        say("again")
        os._exit(0)

    assert ended(child) == 0


def write_facts(adapter, **facts):
    adapter.mkdir()
    (adapter / "adapter_config.json").touch()
    (adapter / "train_args.json").write_text(json.dumps({"config": {}, **facts}), encoding="utf-8")


def test_nan_is_never_the_best(tmp_path):
    best = BestScore(tmp_path, "f1")
    scores = (float("nan"), 0.2, float("nan"), 0.1, float("inf"), 0.3)
    assert [best.improves({"eval_f1": score}) for score in scores] == [0, 1, 0, 0, 0, 1]
    write_facts(tmp_path / "adapter_model", eval_f1=float("nan"))
    assert BestScore(tmp_path, "f1").improves({"eval_f1": 0.0})


def test_the_best_is_remembered(tmp_path, capsys):
    """Also where a kill has left it between the renames of a save, and where the run goes on from an earlier step."""
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    write_facts(run / "adapter_model.old", eval_loss=0.5, step=10)
    start_run(run, checkpoint)
    best = BestScore(run, "loss")
    assert adapter_step(run) == 10 and not best.improves({"eval_loss": 0.6}) and best.improves({"eval_loss": 0.4})


def test_an_evaluation_is_logged_when_its_adapter_is_saved(monkeypatch):
    """What is logged is not done again by a run that is resumed."""
    done = []
    monkeypatch.setattr("alpaca.training.run.evaluate_loss", lambda *given: 1.0)
    args, best = SimpleNamespace(train_batch_size=1, eval_examples=0), SimpleNamespace(improves=lambda scores: True)
    run = SimpleNamespace(args=args, dev_set=[], collate=None, rank=0, world_size=1, model=None, device=None, signal=0)
    run.best, run.save_adapter = best, lambda step, **scores: done.append(("saved", step, scores))
    run.log = SimpleNamespace(write=lambda step, **scores: done.append(("logged", step, scores)))
    vars(run)["_asked_to_end"] = None
    assert Run.evaluate(run, 5) == {"eval_loss": 1.0}
    assert done == [("saved", 5, {"eval_loss": 1.0}), ("logged", 5, {"eval_loss": 1.0})]


def test_when_a_run_saves_and_when_a_signal_ends_it():
    """Before the first evaluation, every four steps, at the end, at a signal; never the same step twice. A signal ends no run
    of which nothing is left to do."""

    def steps(method, eval_steps=3, **state):
        args = SimpleNamespace(save_steps=4, eval_steps=eval_steps)
        run = SimpleNamespace(args=args, total_steps=10, signal=0, checkpoint_step=None)
        run.evaluation_due = lambda step: Run.evaluation_due(run, step)
        vars(run).update(state)
        return [step for step in range(1, 11) if method(run, step)]

    assert steps(Run.save_due) == [3, 4, 6, 8, 9, 10]
    assert steps(Run.save_due, checkpoint_step=4) == [8, 10] and steps(Run.save_due, eval_steps=-1) == [4, 8, 10]
    assert steps(Run.save_due, checkpoint_step=4, signal=15) == [1, 2, 3, *range(5, 11)]
    assert steps(Run.must_end) == [] and steps(Run.must_end, signal=15) == [*range(1, 11)]
    assert steps(Run.must_end, eval_steps=-1, signal=15) == [*range(1, 10)]


def test_half_a_record_is_cut_off(tmp_path):
    log = tmp_path / "train_log.jsonl"
    log.write_text('{"step": 5, "eval_loss": 1.0}\n{"step": 10, "lo', encoding="utf-8")
    repair_log(log)
    repair_log(log)
    assert log.read_text(encoding="utf-8") == '{"step": 5, "eval_loss": 1.0}\n'
    assert evaluated_steps(log) == [5]
    log.write_text('{"st', encoding="utf-8")
    repair_log(log)
    assert log.read_bytes() == b""

"""What a training run survives: SIGTERM, SIGKILL, a full disk, NaN; and that resuming is exact.

python -m pytest tests/training/test_survival.py
"""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

import train_trainer
from alpaca.common.errors import UserError
from alpaca.models.adapters import adapter_or_old
from alpaca.training import checkpoints
from alpaca.training.adapter_writer import save_adapter
from alpaca.training.checkpoints import (
    check_files,
    check_save_dir,
    checkpoint,
    checkpoint_to_resume,
    complete_checkpoints,
    start_run,
)
from alpaca.training.identity import check_resumed, read_identity
from config_utils import parse_config
from harness import ROOT, assert_same_adapter, assert_same_rows, read_log, run_script, training_options

TRAINERS = ("train_deepspeed", "train_trainer")
# Kills a run when the new adapter is about to be moved to where the old one was.
KILLED_BETWEEN_RENAMES = """
import os, pathlib, signal
rename = pathlib.Path.rename
def killed(self, target):
    if self.name == "adapter_model.new":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = killed
"""


def errors_of(result):
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr[-4000:]
    return [line for line in result.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("trainer, number", [("train_deepspeed", signal.SIGTERM), ("train_trainer", signal.SIGHUP)])
def test_terminated_killed_and_resumed_equals_uninterrupted(workspace, base_dir, tmp_path, trainer, number):
    """A signal in the middle, then SIGKILL between the adapter's two renames, then to the end: every loss and the
    adapter are those of the run that nothing happened to, dropout included."""
    done, run = workspace / "checkpoint" / "mine" / trainer, tmp_path / "run"
    options = [*training_options(base_dir), f"--save_dir={run}"]

    def interrupt(pid):
        log = run / "train_log.jsonl"
        while psutil.pid_exists(pid) and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
            time.sleep(0.02)
        os.kill(pid, number)

    result = run_script(f"{trainer}.py", *options, cwd=workspace, meanwhile=interrupt, check=False)
    assert result.returncode == 128 + number and f"收到 {number.name}" in result.stderr, result.stderr
    (folder,) = complete_checkpoints(run)
    stopped = checkpoints.step_of(folder)
    assert 3 <= stopped < 50 and len([r for r in read_log(run) if "loss" in r]) == stopped

    again = [*options, "--resume"]
    result = run_script(f"{trainer}.py", *again, cwd=workspace, before=KILLED_BETWEEN_RENAMES, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert not (run / "adapter_model").exists()
    loaded = adapter_or_old(run / "adapter_model")
    assert json.loads((loaded / "train_args.json").read_text(encoding="utf-8"))["step"] == stopped
    run_script(f"{trainer}.py", *again, cwd=workspace)
    losses = [{row["step"]: row for row in read_log(where) if "loss" in row} for where in (run, done)]
    assert len(losses[0]) == 50
    assert_same_rows(list(losses[0].values()), list(losses[1].values()))
    assert_same_adapter(run, done)
    assert sorted(p.name for p in run.glob("adapter_model*")) == ["adapter_model"]


@pytest.mark.parametrize("trainer, size", [("train_deepspeed", 10_000), ("train_trainer", 60_000)])
def test_full_disk_keeps_what_was_saved(workspace, base_dir, tmp_path, trainer, size):
    """No file may be larger than `size` bytes: too little for the adapter, then enough for it, but not for the state."""
    before, run = workspace / "checkpoint" / "mine" / trainer, tmp_path / "run"
    shutil.copytree(before, run)
    shutil.rmtree(run / "checkpoint-50")
    (run / "adapter_model" / "of_before").touch()
    adapter_size = (run / "adapter_model" / "adapter_model.safetensors").stat().st_size
    assert (size < adapter_size) == (trainer == "train_deepspeed")
    options = [*training_options(base_dir), f"--save_dir={run}", "--resume"]
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))"
    result = run_script(f"{trainer}.py", *options, cwd=workspace, before=limit, check=False)
    (error,) = errors_of(result)
    what = "adapter_model" if trainer == "train_deepspeed" else "checkpoint-50"
    assert re.search(rf"{what}: cannot be written \(.*; free some space there, then go on with --resume", error), error
    assert [p.name for p in complete_checkpoints(run)] == ["checkpoint-40"]
    assert not (run / "checkpoint-50").exists() and not (run / "adapter_model.new").exists()
    assert (run / "adapter_model" / "of_before").exists() == (trainer == "train_deepspeed")
    assert_same_adapter(run, before)  # also the Trainer's, which is the same step's


@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_loss_that_is_no_number_ends_the_run(workspace, base_dir, tmp_path, trainer):
    options = ["--deepspeed_optimizer_params_lr=1e30", "--warmup_ratio=0", "--max_steps=9", "--save_steps=1"]
    options += [f"--save_dir={tmp_path}/run", "--eval_steps=-1"]
    result = run_script(f"{trainer}.py", *training_options(base_dir), *options, cwd=workspace, check=False)
    (error,) = errors_of(result)
    found = re.search(
        r"step (\d+): the loss is NaN or infinite \(learning rate (\S+); \S+train.txt, lines (.*?)\)", error
    )
    assert found, error
    assert int(found[1]) == 2 and float(found[2]) == pytest.approx(1e30 * 8 / 9, rel=0.01)
    lines = [int(line) for line in found[3].split(", ")]
    assert len(set(lines)) == 6 and all(1 <= line <= 205 for line in lines)
    weights = load_file(tmp_path / "run" / "adapter_model" / "adapter_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_lines_of_a_step_are_those_of_the_file(base_dir, instruct_data):
    from alpaca.models.templates import encode_examples
    from alpaca.models.tokenizer import load_tokenizer
    from alpaca.training.batches import TrainLoader
    from dataset import read_examples

    examples = encode_examples(load_tokenizer(base_dir), read_examples(instruct_data / "train.txt"))
    loaders = [TrainLoader(examples, 2, 3, lambda part: [e.line for e in part], 42, rank, 2) for rank in range(2)]
    size = loaders[0].steps_per_epoch
    for epoch in range(2):
        batches = []
        for loader in loaders:
            loader.set_epoch(epoch)
            batches.append([batch["rows"] for batch in loader])
        for step in range(size):
            seen = [line for rank in batches for part in rank[3 * step : 3 * step + 3] for line in part]
            assert loaders[0].lines(epoch * size + step) == sorted(seen)
        assert sorted(line for rank in batches for part in rank for line in part) == list(range(1, 206))


# ---------------------------------------------------------------------------------------------------------------------
# checkpoints


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(checkpoints.dist, "barrier", lambda: None)
    monkeypatch.delenv("RANK", raising=False)


def write_checkpoint(run, step, limit=2, facts=None):
    with checkpoint(run / f"checkpoint-{step}", limit, facts or {}):
        (run / f"checkpoint-{step}").mkdir(parents=True)
        (run / f"checkpoint-{step}" / "state").write_text(str(step), encoding="utf-8")


def test_rotation_keeps_the_newest_and_never_the_incomplete_instead(tmp_path, alone):
    for step in (5, 10, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-200").mkdir()  # cut short
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
    write_checkpoint(tmp_path, 300, limit=1)
    assert [p.name for p in complete_checkpoints(tmp_path)] == ["checkpoint-300"]
    write_checkpoint(tmp_path, 400, limit=0)
    assert len(complete_checkpoints(tmp_path)) == 2


def test_a_save_that_fails_rotates_nothing_and_leaves_nothing(tmp_path, alone):
    write_checkpoint(tmp_path, 5, limit=1)
    with pytest.raises(UserError, match="checkpoint-10: cannot be written .*No space left.* --resume"):
        with checkpoint(tmp_path / "checkpoint-10", 1, {}):
            (tmp_path / "checkpoint-10").mkdir()
            raise OSError(28, os.strerror(28))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-5"]


def test_a_bug_is_not_called_a_full_disk(tmp_path, alone):
    with pytest.raises(RuntimeError, match="shapes"):
        with checkpoint(tmp_path / "checkpoint-10", 1, {}):
            raise RuntimeError("shapes do not match")


def test_incomplete_checkpoints_are_skipped_by_name(tmp_path, alone, capsys):
    write_checkpoint(tmp_path, 5)
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-20.old").mkdir()
    assert checkpoint_to_resume(tmp_path, "True") == tmp_path / "checkpoint-5"
    assert f"跳过不完整的 {tmp_path / 'checkpoint-10'}" in capsys.readouterr().err


def test_resuming_an_earlier_step_puts_the_later_ones_aside(tmp_path, alone):
    """Else rotation would delete the checkpoint that was just written, and keep those of another course."""
    for step in (5, 10, 15):
        write_checkpoint(tmp_path, step, limit=0)
    start_run(tmp_path, checkpoint_to_resume(tmp_path, "5"))
    write_checkpoint(tmp_path, 8, limit=1)
    assert checkpoint_to_resume(tmp_path, "True") == tmp_path / "checkpoint-8"
    assert not (tmp_path / "checkpoint-5.old-1").exists()
    assert (tmp_path / "checkpoint-15.old-1" / "state").read_text(encoding="utf-8") == "15"


def test_what_rank_0_refuses_the_others_refuse_too(monkeypatch):
    """They would go on, and wait for it at the next message."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(checkpoints.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(checkpoints.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(checkpoints.dist, "broadcast_object_list", lambda answer, src: answer.__setitem__(1, "in use"))
    with pytest.raises(UserError, match="in use"):
        checkpoints.from_main(lambda: pytest.fail("this is rank 0's to ask"))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_no_run_is_ever_deleted(tmp_path, alone, capsys):
    """Three forgotten --resume, then one into a folder of another run: each run is there, and said with its size."""
    run = tmp_path / "run"
    for number in range(4):
        start_run(run, None)
        (run / "adapter_model").mkdir()
        (run / "adapter_model" / str(number)).write_text("x" * 2**19)
    assert names(tmp_path) == ["run", "run.old-1", "run.old-2", "run.old-3"]
    assert [names(tmp_path / f"run.old-{n + 1}" / "adapter_model") for n in range(3)] == [["0"], ["1"], ["2"]]
    said = capsys.readouterr().err
    assert f"之前的训练结果已移到 {run}.old-3" in said
    assert f"共 1.5 MiB；不需要时删除: rm -r {run}.old-1 {run}.old-2 {run}.old-3\n" in said
    write_checkpoint(tmp_path / "other", 5)
    start_run(run, tmp_path / "other" / "checkpoint-5")
    assert names(run) == [] and names(tmp_path / "run.old-4" / "adapter_model") == ["3"]


def test_a_gap_and_the_folder_of_an_earlier_version(tmp_path):
    for name in ("run", "run.old", "run.old-2", "run.old-x", "run.older-7"):
        (tmp_path / name).mkdir()
    assert checkpoints.put_aside(tmp_path / "run").name == "run.old-3"


def test_a_folder_that_is_not_ours(tmp_path, alone):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="holds other files than a training run's; name a new folder"):
        check_save_dir(tmp_path, None)
    with pytest.raises(UserError, match="mine.txt: is a file; name a folder"):
        check_save_dir(tmp_path / "mine.txt", None)
    write_checkpoint(tmp_path, 5)
    check_save_dir(tmp_path, tmp_path / "checkpoint-5")
    check_save_dir(tmp_path / "new", tmp_path / "checkpoint-5")


def resume(folder, **identity):
    check_resumed(folder, checkpoints.step_of(folder), read_identity(folder), identity)


def test_a_checkpoint_of_another_run_is_refused(tmp_path, alone):
    write_checkpoint(tmp_path, 5, facts={"total_steps": 50, "ranks": 2, "warmup_ratio": 0.1, "seed": 1})
    folder = tmp_path / "checkpoint-5"
    same = {"total_steps": 50, "ranks": 2, "warmup_ratio": 0.1}
    resume(folder, **same)
    with pytest.raises(UserError, match="checkpoint-5 was written with ranks 2, this run has 1; make them equal"):
        resume(folder, **{**same, "ranks": 1})
    with pytest.raises(UserError, match="total_steps 50, this run has 60; .*--lora_model=.*checkpoint-5/adapter_model"):
        resume(folder, **{**same, "total_steps": 60})
    with pytest.raises(UserError, match="warmup_ratio 0.1, this run has 0.2; it can only be changed while"):
        resume(folder, **{**same, "warmup_ratio": 0.2})  # the five steps of the warm-up are over
    (folder / "complete").write_text("?", encoding="utf-8")
    with pytest.raises(UserError, match="complete: not what a training run wrote"):
        read_identity(folder)


def test_a_checkpoint_with_a_missing_file(tmp_path, alone):
    write_checkpoint(tmp_path, 5)
    folder = tmp_path / "checkpoint-5"
    check_files(folder, read_identity(folder))
    (folder / "state").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="checkpoint-5/state has 0 bytes of 1; copy .*checkpoint-5 again"):
        check_files(folder, read_identity(folder))
    (folder / "state").unlink()
    with pytest.raises(UserError, match="checkpoint-5/state is missing"):
        check_files(folder, read_identity(folder))


def test_the_warm_up_may_change_while_it_lasts(tmp_path, alone):
    write_checkpoint(tmp_path, 4, facts={"total_steps": 50, "warmup_ratio": 0.1})
    resume(tmp_path / "checkpoint-4", total_steps=50, warmup_ratio=0.2)


def test_markers_of_earlier_versions_are_compared_on_what_they_have(tmp_path):
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / "complete").touch()
    resume(folder, ranks=1, total_steps=50, lora_alpha=32)
    (folder / "complete").write_text('{"train_batch_size": 12, "gradient_accumulation_steps": 1, "ranks": 2}')
    resume(folder, ranks=2, examples_per_step=24, lora_alpha=32)
    with pytest.raises(UserError, match="examples_per_step 24, this run has 12"):
        resume(folder, ranks=2, examples_per_step=12)


# ---------------------------------------------------------------------------------------------------------------------
# the adapter on disk


@pytest.fixture
def save(lora_model, base_dir, tmp_path, monkeypatch):
    """save_adapter of a model of random weights, as adapter_model.safetensors or .bin."""
    monkeypatch.delenv("RANK", raising=False)

    def run(step, safe=True):
        args = parse_config(train_trainer.CONFIG, train_trainer.__file__, [f"--safe_serialization={safe}"])
        save_adapter(lora_model, tmp_path / "run", args, {}, {}, step)

    monkeypatch.chdir(ROOT)
    return run


def test_an_adapter_that_no_step_has_changed_is_saved_and_said(save, lora_model, tmp_path, capsys):
    lora_model.lora.data.zero_()
    save(1)
    assert "第 1 步: 还没有一步更新过权重" in capsys.readouterr().err
    assert (tmp_path / "run" / "adapter_model" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("safe", [True, False])
def test_an_adapter_that_is_read_back_with_one_other_bit_is_not_kept(save, lora_model, tmp_path, monkeypatch, safe):
    save(1, safe)
    save_pretrained = type(lora_model).save_pretrained

    def flipped(model, folder, state_dict, **options):
        state_dict = {name: weight.clone() for name, weight in state_dict.items()}
        next(iter(state_dict.values())).flatten()[-1] += 1e-3
        save_pretrained(model, folder, state_dict=state_dict, **options)

    monkeypatch.setattr(type(lora_model), "save_pretrained", flipped)
    with pytest.raises(UserError, match="adapter_model.new: what was read back is not what was written"):
        save(2, safe)
    facts = json.loads((tmp_path / "run" / "adapter_model" / "train_args.json").read_text(encoding="utf-8"))
    assert facts["step"] == 1


def test_a_save_is_on_the_disk_before_it_is_renamed(save, tmp_path, monkeypatch, alone):
    done, rename = [], Path.rename
    monkeypatch.setattr(os, "fsync", lambda file: done.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    monkeypatch.setattr(Path, "rename", lambda path, target: done.append(f"{path.name} -> ") or rename(path, target))
    save(1)
    files = ["adapter_config.json", "adapter_model.new", "adapter_model.safetensors", "train_args.json"]
    assert [*sorted(done[:4]), *done[4:]] == [*files, "adapter_model.new -> ", "run"]
    done.clear()
    write_checkpoint(tmp_path, 5)
    assert [*sorted(done[:3]), *done[3:]] == [
        "checkpoint-5",
        "complete.new",
        "state",
        "complete.new -> ",
        "checkpoint-5",
    ]

"""What a training run leaves on disk and finds there again: its log, its checkpoints, its adapter.

Each is written whole or not at all, so that a run that is killed or meets a full disk loses nothing of what was there.
"""

import json
import os
import re
import shlex
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError

from alpaca.common.console import end_bars, is_main, say
from alpaca.common.errors import UserError
from alpaca.models.adapters import adapter_or_old


@contextmanager
def saving(path):
    """Turn a write that fails, mostly of a full disk, into one line: what was saved before is never touched by it."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(
            "inline_container|PytorchStreamWriter|iostream", str(error)
        ):
            raise  # not torch.save's way of saying it
        end_bars()
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        first = str(cause).strip().splitlines()[0]
        raise UserError(
            f"{path}: cannot be written ({first}); free some space there, then go on with --resume. The adapter and the "
            "checkpoints that were saved before are intact"
        ) from None


def to_disk(folder, contents=True):
    """Wait until the disk has the names in a folder, and what its files hold: a power cut leaves a rename or nothing."""
    for path in [*folder.rglob("*"), folder] if contents else [folder]:
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def from_main(call):
    """What `call` returns on rank 0, on every rank. A UserError there is raised on all of them, so that all end at once."""
    answer = [None, None]
    if is_main():
        try:
            answer[0] = call()
        except UserError as error:
            answer[1] = str(error)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise UserError(answer[1])
    return answer[0]


def check_save_dir(save_dir, resume_from):
    """UserError where no run can write to save_dir, or where it holds files, but no run. Asked before the weights load."""
    save_dir = Path(save_dir).resolve()
    if save_dir.exists() and not save_dir.is_dir():
        raise UserError(f"--save_dir={save_dir}: is a file; name a folder")
    if save_dir.is_dir() and not os.access(save_dir, os.W_OK | os.X_OK):
        raise UserError(f"--save_dir={save_dir}: cannot be written; make it writable, or name another folder")
    ours = ("train_log.jsonl", "adapter_model", "adapter_model.old")
    held = save_dir.is_dir() and not _within(resume_from, save_dir) and any(save_dir.iterdir())
    if held and not _checkpoints(save_dir) and not any((save_dir / name).exists() for name in ours):
        raise UserError(f"--save_dir={save_dir}: holds other files than a training run's; name a new folder")


def _within(checkpoint, save_dir):
    return checkpoint is not None and Path(checkpoint).resolve().is_relative_to(save_dir)


def start_run(save_dir, resume_from):
    """Make save_dir ready, on rank 0: what is no part of this run is put aside, nothing is ever deleted.

    A run in save_dir becomes `<save_dir>.old-<n>`, unless it is the one that is resumed. Of that one, checkpoints later than
    `resume_from` become `checkpoint-<step>.old-<n>`.
    """
    save_dir = Path(save_dir).resolve()
    if _within(resume_from, save_dir):
        for folder in complete_checkpoints(save_dir):
            if step_of(folder) > step_of(resume_from):
                say(f"{folder.name} 在 {resume_from.name} 之后，已移到 {put_aside(folder)}")
        adapter = save_dir / "adapter_model"
        if not adapter.exists() and (old := adapter_or_old(adapter)):  # a kill between the renames of a save
            old.rename(adapter)
    elif save_dir.is_dir() and any(save_dir.iterdir()):
        say(f"之前的训练结果已移到 {put_aside(save_dir)}")
    save_dir.mkdir(parents=True, exist_ok=True)
    old = [*_old(save_dir), *sorted(save_dir.glob("checkpoint-*.old*"))]
    if old:
        size = sum(file.lstat().st_size for folder in old for file in folder.rglob("*"))
        say(f"移开的旧结果共 {size / 2**20:.1f} MiB；不需要时删除: rm -r {shlex.join(map(str, old))}")


def put_aside(folder):
    """Rename a folder to `<folder>.old-<n>`, n being larger than any there; the new path."""
    numbers = [int(old.name.rpartition("-")[2]) for old in _old(folder) if not old.name.endswith(".old")]
    old = folder.with_name(f"{folder.name}.old-{max(numbers, default=0) + 1}")
    folder.rename(old)
    return old


def _old(folder):
    """What was put aside of a folder: <folder>.old-<n>, and <folder>.old of earlier versions."""
    name = re.escape(folder.name) + r"\.old(-[0-9]+)?"
    return (
        sorted(path for path in folder.parent.iterdir() if re.fullmatch(name, path.name))
        if folder.parent.is_dir()
        else []
    )


def checkpoint_to_resume(save_dir, resume):
    """`--resume` -> the folder of a complete checkpoint, or None for False.

    True: the newest complete one in save_dir. A number: that step. Anything else: a path.
    """
    if resume == "False":
        return None
    complete = complete_checkpoints(save_dir)
    if resume == "True":
        for folder in sorted(_checkpoints(save_dir), key=step_of):
            if folder not in complete:
                say(f"跳过不完整的 {folder}")
        if not complete:
            raise UserError(f"--resume: no complete checkpoint in {save_dir}; train without --resume")
        return complete[-1]
    folder = Path(save_dir) / f"checkpoint-{resume}" if resume.isdigit() else Path(resume)
    if not (folder / "complete").is_file() or not folder.name.removeprefix("checkpoint-").isdigit():
        have = ", ".join(p.name for p in complete) or "none"
        raise UserError(
            f"--resume={resume}: {folder} is not a complete checkpoint; complete ones in {save_dir}: {have}"
        )
    return folder


def _checkpoints(save_dir):
    return [p for p in Path(save_dir).glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", p.name)]


def step_of(checkpoint):
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(save_dir):
    """The folders of the checkpoints in save_dir that were written to their end, by step."""
    return sorted((p for p in _checkpoints(save_dir) if (p / "complete").is_file()), key=step_of)


def _state_files(folder):
    """What a run needs to go on: not the adapter, which may be moved to where it is used."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.parent.name != "adapter_model"]


def check_files(folder, written):
    """UserError where a file of a checkpoint is missing, or is not as long as it was written; `written`: read_identity."""
    for name, size in written.get("files", {}).items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            what = f"has {path.stat().st_size} bytes of {size}" if path.is_file() else "is missing"
            raise UserError(f"--resume: {path} {what}; copy {folder} again, or resume another checkpoint")


@contextmanager
def checkpoint(folder, save_total_limit, facts):
    """Around what writes a resumable checkpoint, on all ranks: only then it is marked as complete, with these facts (identity.py).

    Then the oldest beyond the limit are deleted (0: keep all). What a save cut short has left in the folder is deleted
    first, and what this one leaves if it fails.
    """
    folder = Path(folder)
    if is_main():
        shutil.rmtree(folder, ignore_errors=True)
    dist.barrier()
    try:
        with saving(folder):
            yield
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    dist.barrier()  # until all ranks have written their part
    if is_main():
        with saving(folder):
            files = {str(path.relative_to(folder)): path.stat().st_size for path in _state_files(folder)}
            (folder / "complete.new").write_text(json.dumps({**facts, "files": files}) + "\n", encoding="utf-8")
            to_disk(folder)
            (folder / "complete.new").rename(folder / "complete")
            to_disk(folder, contents=False)
        for old in complete_checkpoints(folder.parent)[:-save_total_limit] if save_total_limit > 0 else []:
            (old / "complete").unlink()
            shutil.rmtree(old)

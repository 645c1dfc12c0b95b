"""The folder of a model that is being written. It appears only when it is complete."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from alpaca.common.errors import UserError, file_of
from alpaca.common.folders import check_writable
from alpaca.common.locks import locked
from alpaca.models.facts import TRAIN_ARGS
from alpaca.models.tokenizer import FAST_FILES
from alpaca.scoring.calibration import CALIBRATION

# What a finished folder is known by: it is written last, and where a folder is replaced, it goes first.
LAST = {"huggingface": "config.json", "pth": "params.json"}
WEIGHTS = {
    "huggingface": ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    "pth": ("consolidated.*.pth",),
}
OTHERS = ("tokenizer.model", *FAST_FILES)
OF_A_LORA = (TRAIN_ARGS, CALIBRATION)  # what goes with a merged one, and with no other


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path, kind, specs, inputs):
    """Say what will be written, and yield a folder to write it in, which becomes `path` when the block ends.

    That folder is `<path>.tmp`, or where `path` is a disk of its own (a mounted volume), one of that name inside it: files
    can only be moved within a disk. A run that is interrupted or killed never leaves what looks finished, and the next
    one begins anew. Where `path` exists, only the model files of its kind (huggingface, pth) are replaced, and only when
    the new ones are complete; other files stay. It must be none of `inputs`, no other process may be writing it, and
    the disk must have room for the model beside what is there.
    """
    path = Path(path).resolve()
    mounted = path.is_dir() and path.stat().st_dev != path.parent.stat().st_dev
    work = (path if mounted else path.parent) / f"{path.name}.tmp"
    for source in map(Path, inputs):
        if source.resolve() == path or source.resolve().is_relative_to(work):
            raise UserError(f"--output_dir={path} would overwrite {source}, which is read; name another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir={path} is a file; name a folder")
    for folder in (work, path):  # where there is an older model, its folder may be more guarded than the one it is in
        check_writable(folder, "name another folder")
    size, free = _check_room(work, path, specs)
    with locked(path / path.name if mounted else path):
        print(f"将写入 {path}：{kind}，{size / 1e9:.2f} GB（磁盘剩余 {free / 1e9:.2f} GB）", flush=True)
        try:
            clear(work)
            work.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--output_dir={path}: cannot be made ({error.strerror}); name another folder") from None
        try:
            yield work
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError) and error.errno:
                raise _explained(error, path) from None
            raise
        try:
            _move(work, path, kind)
        except OSError as error:
            raise UserError(
                f"{work}: complete, but cannot be moved to {path} ({error.strerror}); move it there"
            ) from None


@contextmanager
def kept_if_refused(work, path):
    """Move `work` to `<path>.unverified` where the block raises a UserError, so that what was refused can be looked at."""
    try:
        yield
    except UserError as error:
        kept = work.with_name(f"{Path(path).resolve().name}.unverified")
        clear(kept)
        work.rename(kept)
        raise UserError(f"{error}; it is in {kept}") from None


def _check_room(work, path, specs):
    """(bytes of the model, free bytes of the disk that will hold it); UserError where there is no room."""
    disk = next(folder for folder in (work, *work.parents) if folder.exists())
    size, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(disk).free
    if size + 10**7 > free:
        raise UserError(
            f"--output_dir={path}: the model takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of that disk are free; "
            "make room or name a folder on another disk"
        )
    return size, free


def _explained(error, path):
    """An OSError while the model was written -> a UserError. It may be a file that is read which is at fault."""
    named = file_of(error)
    file = Path(named) if isinstance(named, str | os.PathLike) else path
    if not file.resolve().is_relative_to(path.parent / f"{path.name}.tmp") and not file.resolve().is_relative_to(path):
        return UserError(f"{file}: cannot be read ({error.strerror}); correct its permissions or its disk")
    return UserError(f"--output_dir={path}: cannot be written ({error.strerror}); name another disk")


def _move(work, path, kind):
    if not path.exists():
        work.rename(path)
        return
    for pattern in (LAST[kind], *WEIGHTS[kind], *OF_A_LORA):
        for old in path.glob(pattern):
            old.unlink()
    for file in sorted(work.iterdir(), key=lambda file: file.name == LAST[kind]):
        os.replace(file, path / file.name)
    work.rmdir()


def clear(work):
    """Delete what a killed run left in `work`; a folder of this name that holds anything else is somebody's own."""
    unfinished = [f"{name}.new" for name in OTHERS]  # what written_whole had begun
    ours = (*LAST.values(), *WEIGHTS["huggingface"], *WEIGHTS["pth"], *OTHERS, *OF_A_LORA, *unfinished)
    foreign = [file for file in work.glob("*") if not any(file.match(pattern) for pattern in ours)]
    if foreign or (work.exists() and not work.is_dir()):
        raise UserError(f"{foreign[0] if foreign else work}: is where the model is to be written; move it away")
    if work.exists():
        shutil.rmtree(work)

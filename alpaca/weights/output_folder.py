"""The folder of a model that is being written. It appears only when it is complete."""

import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from alpaca.common.errors import UserError

# What a finished folder is known by: it is written last, and where a folder is replaced, it goes first.
LAST = {"huggingface": "config.json", "pth": "params.json"}
WEIGHTS = {
    "huggingface": ("model.safetensors", "model.safetensors.index.json", "model-*-of-*.safetensors"),
    "pth": ("consolidated.*.pth",),
}
OTHERS = ("generation_config.json", "tokenizer.model", "tokenizer_config.json")


def write_json(path, value):
    Path(path).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def new_folder(path, kind, specs, inputs):
    """Say what will be written, and yield `<path>.tmp`, which becomes `path` when the block ends.

    A run that is interrupted or killed never leaves what looks finished, and the next one begins anew. Where `path`
    exists, only the model files of its kind (huggingface, pth) are replaced; other files stay. It must be none of
    `inputs`, and the disk must have room for the model beside what is there.
    """
    path = Path(path).resolve()
    work = path.with_name(path.name + ".tmp")
    for source in map(Path, inputs):
        if source.resolve() == path or source.resolve().is_relative_to(work):
            raise UserError(f"--output_dir={path} would overwrite {source}, which is read; name another folder")
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir={path} is a file; name a folder")
    try:
        disk = next(folder for folder in path.parents if folder.exists())
        size, free = sum(spec.nbytes for spec in specs.values()), shutil.disk_usage(disk).free
        if size + 10**7 > free:
            raise UserError(
                f"--output_dir={path}: the model takes {size / 1e9:.2f} GB, and {free / 1e9:.2f} GB of that disk are "
                "free; make room or name a folder on another disk"
            )
        print(f"将写入 {path}：{kind}，{size / 1e9:.2f} GB（磁盘剩余 {free / 1e9:.2f} GB）", flush=True)
        _clear(work)
        work.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--output_dir={path}: cannot be made ({error.strerror}); name another folder") from None
    try:
        yield work
    except BaseException as error:
        shutil.rmtree(work, ignore_errors=True)
        if isinstance(error, OSError) and error.errno:
            raise UserError(f"--output_dir={path}: cannot be written ({error.strerror}); name another disk") from None
        raise
    if not path.exists():
        work.rename(path)
        return
    for pattern in (LAST[kind], *WEIGHTS[kind]):
        for old in path.glob(pattern):
            old.unlink()
    for file in sorted(work.iterdir(), key=lambda file: file.name == LAST[kind]):
        os.replace(file, path / file.name)
    work.rmdir()


def _clear(work):
    """Delete what a killed run left; a folder of this name that holds anything else is somebody's own."""
    ours = (*LAST.values(), *WEIGHTS["huggingface"], *WEIGHTS["pth"], *OTHERS)
    foreign = [file for file in work.glob("*") if not any(file.match(pattern) for pattern in ours)]
    if foreign or (work.exists() and not work.is_dir()):
        raise UserError(f"{foreign[0] if foreign else work}: is where the model is to be written; move it away")
    if work.exists():
        shutil.rmtree(work)

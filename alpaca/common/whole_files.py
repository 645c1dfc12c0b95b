"""Results that are written whole or not at all."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from alpaca.common.errors import file_of


@contextmanager
def named(path):
    """An OSError of an open file, as of a full disk, has no name: give it this one."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def written_whole(path, folder=False):
    """Yield `<path>.new`, where the block writes a file, or makes a folder; that becomes `path` when the block ends.

    Where the block fails, it is removed, and what was at `path` stays; the OSError of a full disk names `path`.
    """
    target = Path(path).resolve()  # a link stays one, and what it points to is replaced
    new = target.with_name(f"{target.name}.new")
    if folder:
        shutil.rmtree(new, ignore_errors=True)  # that of a process that was killed; a file is overwritten
    try:
        yield new
        if not folder:
            with new.open("rb") as file:
                os.fsync(file.fileno())
        new.replace(target)
    except BaseException as error:
        with suppress(OSError):
            shutil.rmtree(new) if folder else new.unlink()
        if isinstance(error, OSError) and str(file_of(error) or new) == str(new):
            error.filename, error.filename2 = str(path), None
        raise

"""One process at a time for a folder that is written."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import UserError


@contextmanager
def locked(path):
    """Hold `<path>.lock` meanwhile; UserError where another process holds it.

    The lock is the system's (flock): that of a killed process is free, though its file stays. Where the disk has no
    locks, as some network drives, a line says so and nothing is held.
    """
    lock = Path(path).with_name(Path(path).name + ".lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _hold(lock, path)
    except OSError as error:
        raise UserError(
            f"{lock}: cannot be made ({error.strerror}); make its folder writable, or name another"
        ) from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # before it is let go: whoever waited for this file sees that it is gone
        os.close(file)


def _hold(lock, path):
    """An open, locked file that still stands at `lock`: the process that held it before may have deleted it just now."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            raise UserError(f"{path}: another process is writing there; wait for it, or name another folder") from None
        except OSError as error:
            say(f"{lock}: 这个磁盘没有文件锁（{error.strerror}），请不要让两个进程同时写 {path}")
            return file
        if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
            return file
        os.close(file)

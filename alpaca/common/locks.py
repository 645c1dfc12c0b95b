"""One process at a time for a folder that is written."""

import fcntl
import os
import socket
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from alpaca.common.console import say
from alpaca.common.errors import FULL, REMEDIES, UserError

HELD = set()  # descriptors of the locks that this process holds
# A fork would go on to hold the locks of a process that was killed. Programs that are started do not get the descriptors.
os.register_at_fork(after_in_child=lambda: [os.close(HELD.pop()) for _ in range(len(HELD))])


@contextmanager
def locked(path):
    """Hold `<path>.lock` meanwhile, with host, process and time in it; UserError where another process holds it.

    The lock is the system's (flock): that of a killed process is free, though its file stays. Where the disk has no
    locks, as some network drives, a line says so and nothing is held. Folders that are made for the lock go again if
    nothing else was put there.
    """
    lock = Path(path).with_name(Path(path).name + ".lock")
    made = [folder for folder in lock.parents if not folder.exists()]
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = _hold(lock, path)
    except OSError as error:
        remedy = REMEDIES[error.errno] if error.errno in FULL else "make its folder writable, or name another"
        raise UserError(f"{lock}: cannot be made ({error.strerror}); {remedy}") from None
    HELD.add(file)
    try:
        yield
    finally:
        if file in HELD:  # not in a fork, which holds nothing
            lock.unlink(missing_ok=True)  # before it is let go: whoever waited for this file sees that it is gone
            HELD.remove(file)
            os.close(file)
            with suppress(OSError):  # the first that holds something ends it
                for folder in made:
                    folder.rmdir()


def _hold(lock, path):
    """An open, locked file that still stands at `lock`: the process that held it before may have deleted it just now."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 1000).decode("utf-8", "replace").strip()
            os.close(file)
            raise UserError(
                f"{path}: another process is writing there{holder and f' ({holder})'}; wait for it, or name another folder"
            ) from None
        except OSError as error:
            say(f"{lock}: 这个磁盘没有文件锁（{error.strerror}），请不要让两个进程同时写 {path}")
            return file
        if lock.exists() and os.path.samestat(os.fstat(file), lock.stat()):
            os.ftruncate(file, 0)
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            try:
                os.write(file, f"{socket.gethostname()}, process {os.getpid()}, since {since}\n".encode())
            except OSError:  # as of a full disk
                lock.unlink()
                os.close(file)
                raise
            return file
        os.close(file)

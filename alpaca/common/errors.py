"""Errors that a user can act on, and how a command ends with one."""

import errno
import sys

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REMEDIES = {  # what to do about an OSError
    errno.ENOSPC: "free some space there and run it again",
    errno.EDQUOT: "free some space there and run it again",
    errno.EFBIG: "no file may be so large there: see `ulimit -f`, or name another disk",
    errno.EACCES: "you have no right to it: change its owner or mode, or name another path",
    errno.EPERM: "you have no right to it: change its owner or mode, or name another path",
    errno.EROFS: "nothing can be written there; name another path",
    errno.ENAMETOOLONG: "give it a shorter name",
    errno.EIO: "the disk fails there; copy the data elsewhere",
}


class UserError(Exception):
    """Bad input of the user: the message names file, line, key or value and the remedy; run_script prints it alone."""


class ConfigError(UserError, ValueError):
    """A CONFIG dict that cannot be turned into options."""


def file_of(error):
    """The path that an OSError is about, or None. shutil names what is copied first, but the copy has no room."""
    return error.filename2 if error.errno in FULL and error.filename2 else error.filename


def line_of(error):
    """`file: what is wrong; the remedy` of an OSError; None for one that a library made or a connection has."""
    path = file_of(error)
    if error.errno is None or path is None and error.errno not in FULL:
        return None
    return f"{path or 'output'}: {error.strerror}; {REMEDIES.get(error.errno, 'name another path')}"


def fail(error):
    """Print `error: …` as one line on stderr and exit with code 2."""
    # On every rank: the launcher kills the others as soon as one exits, so rank 0 alone might never get to say it.
    sys.stderr.write(f"error: {' '.join(str(error).splitlines())}\n")  # at once: other ranks write to the same place
    raise SystemExit(2) from None

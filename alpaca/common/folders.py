"""Where relative paths count from, and whether a folder can be written to."""

import os
from pathlib import Path

from alpaca.common.errors import UserError

PROJECT = Path(__file__).resolve().parent.parent.parent


def hint_of_folders(path):
    """For the message that a path does not exist: where it was looked for, if that is not the project's own folder.

    "" for absolute paths and for a command that runs in the project's folder.
    """
    if Path(path).is_absolute() or Path.cwd() == PROJECT:
        return ""
    there = f", where {path} exists" if (PROJECT / path).exists() else ""
    return f" in {Path.cwd()} (relative paths count from there; the project is in {PROJECT}{there})"


def check_writable(folder, remedy="change its owner or mode, or work in another folder"):
    """UserError if files cannot be made in the folder, or it cannot be made itself; nothing is made here."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is no folder; move it away or name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: no right to write there; {remedy}")

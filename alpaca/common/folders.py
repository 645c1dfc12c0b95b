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


def no_folder(path):
    """For the message that a path is no folder: why."""
    if Path(path).is_file():
        return "is a file; name the folder that it is in"
    return f"no such folder{hint_of_folders(path)}"


def no_file(path):
    """For the message that a file does not exist: why. Who copies a cache's folder often copies links, not files."""
    if Path(path).is_symlink():
        return f"is a link to {os.readlink(path)}, which is not there"
    return "no such file"


def folders_with(name, folder):
    """The folders that hold a file of this name, in `folder` and up to two levels below, sorted.

    Archives unpack into a folder more, a cache keeps models in snapshots/<commit>, a Trainer in checkpoint-<step>. What
    ModelScope and others have not finished is in hidden folders.
    """
    folder = Path(folder)
    found = [file.parent for depth in ("", "*/", "*/*/") for file in folder.glob(depth + name)]
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def hint_below(name, folder):
    """For the message that a folder lacks a file: the folders below it that have one of this name; "" where none has."""
    found = folders_with(name, folder)
    more = f" and {len(found) - 1} more" if found[1:] else ""
    return f"; {name} is in {found[0]}{more}, so name that folder" if found else ""


def check_writable(folder, remedy="change its owner or mode, or work in another folder"):
    """UserError if files cannot be made in the folder, or it cannot be made itself; nothing is made here."""
    folder = Path(folder)
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{there}: is no folder; move it away or name another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{there}: no right to write there; {remedy}")

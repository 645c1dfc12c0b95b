"""Where relative paths count from."""

from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent


def hint_of_folders(path):
    """For the message that a path does not exist: where it was looked for, if that is not the project's own folder.

    "" for absolute paths and for a command that runs in the project's folder.
    """
    if Path(path).is_absolute() or Path.cwd() == PROJECT:
        return ""
    there = f", where {path} exists" if (PROJECT / path).exists() else ""
    return f" in {Path.cwd()} (relative paths count from there; the project is in {PROJECT}{there})"

"""Errors that a user can act on, and how a command ends with one."""

import sys


class UserError(Exception):
    """Bad input of the user: the message names file, line, key or value and the remedy; run_script prints it alone."""


class ConfigError(UserError, ValueError):
    """A CONFIG dict that cannot be turned into options."""


def fail(error):
    """Print `error: …` as one line on stderr and exit with code 2."""
    # On every rank: the launcher kills the others as soon as one exits, so rank 0 alone might never get to say it.
    print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
    raise SystemExit(2) from None

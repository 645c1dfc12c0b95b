"""Errors that a user can act on."""


class UserError(Exception):
    """Bad input of the user: the message names file, line, key or value and the remedy; run_script prints it alone."""


class ConfigError(UserError, ValueError):
    """A CONFIG dict that cannot be turned into options."""

"""Errors that a command prints in one line: the value, the rule and the remedy."""

from __future__ import annotations


class UserError(ValueError):
    """Something a user can mend, said in one line; the commands print it and exit with code 2."""


class RunError(RuntimeError):
    """A run that had to stop, said in one line; the commands print it and exit with code 1."""

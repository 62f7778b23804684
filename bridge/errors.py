"""Errors in one line: the value, the rule it breaks, and the remedy.

A text writes an option of the caller as ‹name›; `line` replaces it by the option of a command, or by `name=` in Python.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PARAMETER = re.compile(r"‹(\w+)›( ?)(?=(['\"\d])?)")  # the name, a space, and whether a value follows


def _line(text: str) -> str:
    return re.sub(r"\s*\n\s*", " ", text.strip())


class OneLineError(Exception):
    """An error with its parts as fields: `what` breaks a `rule` ("" if `what` says so itself), and the `remedy`."""

    def __init__(self, what: object, rule: str = "", remedy: str = "") -> None:
        super().__init__(what, rule, remedy)
        self.what, self.rule, self.remedy = str(what), rule, remedy

    @property
    def problem(self) -> str:
        """The value and the rule, without the remedy."""
        return _line(f"{self.what} {self.rule}".rstrip())

    def line(self, parameter: Callable[[str], str]) -> str:
        """The error in one line, with the names of parameters as `parameter` writes them."""
        text = self.problem + (f"; {_line(self.remedy)}" if self.remedy else "")

        def written(match: re.Match[str]) -> str:
            name = parameter(match[1])
            return name if name.endswith("=") and match[3] else name + match[2]

        return _PARAMETER.sub(written, text)

    def __str__(self) -> str:
        return self.line("{}=".format)


class UserError(OneLineError, ValueError):
    """An error that the user can correct; the commands print it and exit with code 2."""


class RunError(OneLineError, RuntimeError):
    """A run that had to stop; the commands print it and exit with code 1."""


def first_line(error: Exception) -> str:
    """Return the first line of a foreign error's text, or the name of its type if it has no text."""
    return (str(error).strip() or type(error).__name__).split("\n")[0].rstrip(". ")


@contextmanager
def reraise_as(refusal: type[UserError], what: str, rule: str, remedy: str) -> Iterator[None]:
    """A context in which any error but a UserError is raised as a `refusal`, with its reason in brackets after the rule."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sizes = (line.strip() for line in str(error).split("\n") if line.strip().startswith("size mismatch"))
        reason = next(sizes, first_line(error)).rstrip(". ")  # torch names the mismatched sizes from its second line on
        raise refusal(what, f"{rule} ({reason})".strip(), remedy) from error

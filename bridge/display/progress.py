"""Progress as a value: a long computation passes its current phase to a callback, which decides how to show it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """A phase of a computation: its name, the amount done, the total amount (0: not known), and a detail."""

    name: str
    done: float = 0.0
    total: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        share = f": {self.done / self.total:.0%}" if self.total else ""
        return f"{self.name}{share}{self.detail and f', {self.detail}'}"


OnProgress = Callable[[Phase], None]


def ignore_progress(phase: Phase) -> None:
    """Show nothing."""


def with_prefix(on_progress: OnProgress, name: str) -> OnProgress:
    """Return a callback for a part of a computation; it puts `name` before the names of the part's phases."""
    return lambda phase: on_progress(replace(phase, name=f"{name}{phase.name}"))

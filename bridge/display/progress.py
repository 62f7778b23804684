"""Progress as a value: what a long computation is at, handed to whoever asked for it; whoever shows it words it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Phase:
    """A phase of a computation: its name, how much of it is done of how much (total 0: not known), and a detail."""

    name: str
    done: float = 0.0
    total: float = 0.0
    detail: str = ""

    def __str__(self) -> str:
        share = f": {self.done / self.total:.0%}" if self.total else ""
        return f"{self.name}{share}{self.detail and f', {self.detail}'}"


OnProgress = Callable[[Phase], None]


def unseen(phase: Phase) -> None:
    """Show nothing."""


def within(on_progress: OnProgress, name: str) -> OnProgress:
    """Progress of a part of a computation, whose phases are named after it."""
    return lambda phase: on_progress(replace(phase, name=f"{name}{phase.name}"))

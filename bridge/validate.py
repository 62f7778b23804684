"""Measures of cards beside their controls; one whose control could not be taken has not passed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bridge.evidence.measures import Control

# The thresholds, from the table of the method's section 4.
CORRELATION = 0.6  # rank correlation of the effect profile
NULL_QUANTILE = 0.95  # of the permuted correlations, to be exceeded as well

# How much is drawn.
PROFILE_NODES = 100
FEWEST_NODES = 10  # below which ranks say nothing
RESOLUTION = 1e-4  # logits; float32 logits of a resumed model differ by up to a tenth of this


@dataclass(frozen=True)
class Measure:
    """One measure beside its control. passed is None where it could not be taken, which the note explains.

    Raises ValueError for a measure that claims to have passed, or not, without a value or a control.
    """

    name: str
    value: float | None
    control: Control | None
    aim: str
    passed: bool | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.passed is not None and (self.value is None or self.control is None):
            raise ValueError(f"{self.name} cannot be judged without a value and its control; leave passed at None and say why")

    @property
    def met(self) -> str:
        """Whether it has passed, in a word."""
        return {True: "yes", False: "NO", None: "?"}[self.passed]

    def row(self, number: Callable[[float], str] = "{:.3f}".format) -> tuple[str, str, str, str, str]:
        """Its cells under EVIDENCE."""
        control = "none" if self.control is None else self.control.text()
        return self.name, "-" if self.value is None else number(self.value), self.met, self.aim, control


def measured(
    name: str, value: float, control: Control | None, aim: str, passed: bool, note: str = "",
    why_none: str = "there are no other nodes to draw as many from",
) -> Measure:  # fmt: skip
    """A measure; one whose control could not be taken has not passed."""
    if control is None:
        return Measure(name, value, None, aim, None, why_none)
    return Measure(name, value, control, aim, passed, note)


def control_of(what: str, draws: list[float], bar: Callable[[Sequence[float]], float], bar_is: str) -> Control | None:
    """The control of some draws; None where there are none."""
    return Control.of(what, draws, bar, bar_is)


def average(values: Sequence[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0

"""Measures of circuits of tasks beside their controls; one whose control could not be taken has not passed.

Shape legend: n nodes.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.columns import columns

# The thresholds, from the table of the method's section 4.
KL_KEPT = 0.1  # nats, for the circuit alone
SHARE_OFF = 0.1  # of D; below one logit, of a logit: shares of next to nothing mean nothing
COMPANY_MEAN, COMPANY_WORST = 0.2, 0.6  # nats
PATTERN = 0.1  # total variation of attention

# How much is drawn.
SUPERSETS = 32


@dataclass(frozen=True)
class Control:
    """What a measure is held against: the mean of some draws, and the bar, the draw or quantile that is hardest to beat."""

    what: str
    draws: int
    mean: float
    bar: float
    bar_is: str

    @staticmethod
    def of(what: str, draws: Sequence[float], bar: Callable[[Sequence[float]], float], bar_is: str) -> Control | None:
        """The control of some draws; None where there are none."""
        return Control(what, len(draws), sum(draws) / len(draws), bar(draws), bar_is) if len(draws) else None

    def text(self, number: Callable[[float], str] = "{:.3f}".format) -> str:
        """In words: what it is and its mean, and the bar where that says more."""
        bar = "" if self.bar_is in ("it", "mean") else f" ({self.bar_is} {number(self.bar)})"
        return f"{self.what} {number(self.mean)}{bar}"


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
        control = "none" if self.control is None else self.control.text(number)
        return self.name, "-" if self.value is None else number(self.value), self.met, self.aim, control


EVIDENCE = ("EVIDENCE", "here", "met", "aim", "control")


def evidence(measures: Iterable[Measure], width: int, number: Callable[[float], str] = "{:.3f}".format) -> list[str]:
    """Measures as a table for a terminal `width` columns wide, the note of each below it."""
    rows: list[tuple[str, ...]] = [EVIDENCE]
    for measure in measures:
        name, *cells = measure.row(number)
        rows.append((f"  {name}", *cells))
        rows += [(f"    {line}",) for line in textwrap.wrap(measure.note, width - 4)]
    return columns(rows, width)


def company_measures(kl: list[float], kl_random: list[float]) -> tuple[Measure, Measure]:
    """Mean and worst KL of a circuit in random company, beside random circuits in the same."""
    mean, worst = average(kl), max(kl)
    return (
        measured(
            "KL in random company, mean", mean, control_of("random", kl_random, average, "mean"),
            f"<= {COMPANY_MEAN:g}, below random", mean <= COMPANY_MEAN and mean < average(kl_random),
        ),
        measured(
            "KL in random company, worst", worst, control_of("random", kl_random, max, "worst"), f"<= {COMPANY_WORST:g}",
            worst <= COMPANY_WORST,
        ),
    )  # fmt: skip


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


def some(place_n: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """As many of the places as are wanted, or as there are, at random."""
    return place_n[torch.randperm(len(place_n), generator=generator)[:wanted].to(place_n.device)]

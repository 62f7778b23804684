"""A measure with its control and its criterion, and the verdict that follows from a table of rules.

    Criterion   value >= bound or <= bound, and optionally a condition on the control; it judges, and prints as it judges
    Measure     a value, its interval, its control, its criterion (None: the value is shown, but not judged)
    Rule        a verdict and the measures that it needs; a Report has the rules in order, weakest verdict first
    Report      the measures of one circuit; verdict and reasons follow from them and cannot be set

A measure that has no value, or lacks the control that its criterion needs, has not passed; its note says why.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from bridge.display.columns import columns

Op = Literal[">=", "<="]
Verdict = Literal["no explanation", "refuted", "undecided", "behavioural", "representational", "mechanistic support"]


@dataclass(frozen=True)
class Control:
    """Control of a measure: the mean of its draws, and the bar, which is the draw or quantile that is hardest to beat."""

    what: str
    draws: int
    mean: float
    bar: float
    bar_is: str

    @staticmethod
    def of(what: str, draws: Sequence[float], bar: Callable[[Sequence[float]], float], bar_is: str) -> Control | None:
        """Return the control of some draws; None if there are none."""
        return Control(what, len(draws), sum(draws) / len(draws), bar(draws), bar_is) if len(draws) else None

    def text(self) -> str:
        """Return the name, the mean, and the bar unless it is the mean itself."""
        bar = "" if self.bar_is in ("it", "mean") else f" ({self.bar_is} {self.bar:.3f})"
        return f"{self.what} {self.mean:.3f}{bar}"


@dataclass(frozen=True)
class Criterion:
    """Bound of a value: value `op` bound. With beyond_control, the value must be beyond the control's bar as well.

    If control_bound is given, the control's mean must be on its other side: if other nodes do the same as the circuit, the value
    shows nothing.
    """

    op: Op
    bound: float
    beyond_control: bool = False
    control_bound: float | None = None

    def is_met(self, value: float, control: Control | None) -> bool | None:
        """Return whether a value meets the criterion; None if it needs a control and there is none."""
        if control is None and (self.beyond_control or self.control_bound is not None):
            return None
        up = self.op == ">="
        good = value >= self.bound if up else value <= self.bound
        if self.beyond_control and control is not None:
            good = good and (value > control.bar if up else value < control.bar)
        if self.control_bound is not None and control is not None:
            good = good and (control.mean <= self.control_bound if up else control.mean >= self.control_bound)
        return good

    def __str__(self) -> str:
        parts = [f"{self.op} {self.bound:g}"]
        if self.beyond_control:
            parts.append(f"{'above' if self.op == '>=' else 'below'} the control")
        if self.control_bound is not None:
            parts.append(f"control {'<=' if self.op == '>=' else '>='} {self.control_bound:g}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Point:
    """Details of a measure for one site, group or node: a label, and numbers by name."""

    label: str
    values: dict[str, float]


@dataclass(frozen=True)
class Measure:
    """One measure. `key` names it in rules and in JSON, `name` in print; value and control have the measure's own unit.

    interval is the 95 % interval, if it can be computed; ceiling is the value that the best possible circuit reaches.
    """

    key: str
    name: str
    value: float | None
    criterion: Criterion | None = None
    control: Control | None = None
    interval: tuple[float, float] | None = None
    ceiling: float | None = None
    note: str = ""
    points: tuple[Point, ...] = ()

    @property
    def passed(self) -> bool | None:
        """Whether the criterion is met; None if there is no criterion, or it could not be judged."""
        if self.value is None or self.criterion is None:
            return None
        return self.criterion.is_met(self.value, self.control)


@dataclass(frozen=True)
class Rule:
    """A verdict, the keys of the measures that it needs beyond those of weaker verdicts, and its reason in a sentence.

    `refuted` is the verdict if a needed measure fails; if it is None, the verdict of the rule before stays.
    """

    verdict: Verdict
    needs: tuple[str, ...]
    says: str
    refuted: Verdict | None = None


@dataclass(frozen=True)
class Report:
    """All measures of a circuit, and the rules that judge them, weakest verdict first."""

    measures: tuple[Measure, ...]
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        known = {measure.key for measure in self.measures}
        missing = [key for rule in self.rules for key in rule.needs if key not in known]
        if missing:
            raise ValueError(f"a rule needs the measure {missing[0]!r}, which the report does not have; add it")

    def __getitem__(self, key: str) -> Measure:
        """Return the measure of a key. Raises KeyError if there is none."""
        return {measure.key: measure for measure in self.measures}[key]

    @property
    def verdict(self) -> Verdict:
        """Verdict of the last rule up to which all rules hold, or `refuted` of the next rule if a measure fails it."""
        return self._apply_rules()[0]

    @property
    def reasons(self) -> tuple[str, ...]:
        """Reasons for the verdict, a sentence each."""
        return self._apply_rules()[1]

    def _apply_rules(self) -> tuple[Verdict, tuple[str, ...]]:
        verdict: Verdict = "undecided"
        reasons: tuple[str, ...] = ()
        for rule in self.rules:
            needed = [self[key] for key in rule.needs]
            failed = [f"{_capitalize(m.name)} is {m.value:.3g}, not {m.criterion}." for m in needed if m.passed is False]
            unknown = [
                f"{_capitalize(m.name)} could not be judged ({m.note or 'no control'})." for m in needed if m.passed is None
            ]
            if failed and rule.refuted is not None:
                return rule.refuted, tuple(failed)
            if failed or unknown:
                return verdict, (*reasons, *failed, *unknown)
            verdict, reasons = rule.verdict, (rule.says,)
        return verdict, reasons


def _capitalize(name: str) -> str:
    return name[:1].upper() + name[1:]


def evidence_table(measures: Iterable[Measure], width: int = 100, *, places: bool = False) -> list[str]:
    """Return the measures as a table for a terminal, each with its notes below it; `places` adds the values by site or span."""
    rows: list[tuple[str, ...]] = [("EVIDENCE", "here", "met", "asked", "control")]
    for measure in measures:
        value = "-" if measure.value is None else f"{measure.value:.3f}"
        met = "" if measure.criterion is None else {True: "yes", False: "NO", None: "?"}[measure.passed]
        asked = "no bound" if measure.criterion is None else str(measure.criterion)
        rows.append((f"  {measure.name}", value, met, asked, "" if measure.control is None else measure.control.text()))
        rows += [(f"    {line}",) for line in textwrap.wrap(_details_text(measure), width - 4)]
        rows += [(f"    {line}",) for line in _points_table(measure)] if places else []
    return columns(rows, width)


def _details_text(measure: Measure) -> str:
    interval = "" if measure.interval is None else "95% interval {:.2f} to {:.2f}".format(*measure.interval)
    ceiling = "" if measure.ceiling is None else f"all nodes {measure.ceiling:.2f}"
    return "; ".join(part for part in (interval, ceiling, measure.note) if part)


def _points_table(measure: Measure) -> list[str]:
    """Return a table of the values, one column for each site or span; [] if the points have no values of all nodes."""
    if not measure.points or "all nodes" not in measure.points[0].values:
        return []
    names = [name for name in measure.points[0].values if name != "behind"]
    rows = [["at", *(point.label.removeprefix("sites ").removeprefix("site ") for point in measure.points)]]
    rows += [[name, *(f"{point.values[name]:.2f}" for point in measure.points)] for name in names]
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [f"{row[0]:<{sizes[0]}}  " + "  ".join(map(str.rjust, row[1:], sizes[1:])) for row in rows]

"""The card of a task's circuit: its report and provenance, as a value, as JSON and as text; many cards as a table."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from bridge.cards.evidence import TESTS, CardConfig, passes_test
from bridge.cards.task_circuit import CardError
from bridge.display.columns import columns
from bridge.evidence.measures import Report, Verdict, evidence_table
from bridge.models.store import as_json, refuse_unreadable
from bridge.verdicts.null_table import TaskNull

_HOW_TO_READ = (
    "How to read this: d is the logit of the right answer minus that of the wrong one; the span is the dense model's d minus d "
    'with every node and error at its mean. "All nodes" is the value of the whole sparse model in the circuit\'s place; '
    "a shortfall there is due to the coupling. Intervals are over pairs. A test that a null passes too is no evidence by itself."
)


@dataclass(frozen=True)
class Card:
    """Evidence that a task's circuit explains the dense model, on a number of held-out pairs; notes state its limits."""

    task: str
    pairs: int
    report: Report
    nulls: tuple[TaskNull, ...] | None
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str | float | int | None] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        """The verdict of the report."""
        return self.report.verdict

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values, with the verdict, its reasons, and whether each measure and null has passed."""
        values = as_json(self)
        for measure, written in zip(self.report.measures, values["report"]["measures"], strict=True):
            written["passed"] = measure.passed
        for null, written in zip(self.nulls or (), values["nulls"] or (), strict=True):
            written["passed"] = null.passed
        return {**values, "verdict": self.verdict, "reasons": list(self.report.reasons)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Card:
        """The card that `to_json` wrote. Raises CardError for anything else."""
        with refuse_unreadable("this", "card", "make it again", CardError):
            return _READER.validate_python(values)


_READER = TypeAdapter(Card)


def render_card(card: Card, width: int = 110) -> str:
    """The card for a terminal `width` columns wide."""
    made, report = card.provenance, card.report
    verdict = f"{card.verdict.upper()}. {' '.join(report.reasons)}"
    parts = (
        [f"card      {card.task} ({card.pairs} held-out pairs); a circuit of {made.get('nodes', 0):,} nodes"],
        textwrap.wrap(verdict, width, initial_indent="VERDICT   ", subsequent_indent=" " * 10),
        evidence_table(report.measures, width, places=True),
        render_nulls(card.nulls, width) if card.nulls else [f"NULLS     NOT KNOWN: {report['nulls'].note}."],
        [line for note in card.notes for line in textwrap.wrap(note, width)],
        textwrap.wrap(_HOW_TO_READ, width),
        [f"{made.get('coupling') or 'a coupling in memory'}, seed {made.get('seed')}; {card.seconds:.0f} s"],
    )
    return "\n".join(line for part in parts if part for line in (*part, "")).rstrip()


def render_nulls(nulls: Sequence[TaskNull], width: int = 110) -> list[str]:
    """Table of the number of tasks on which each null passes each test; a null must not pass all tests on any task."""
    rows = [["NULLS", "all tests", "tasks", "solved", *TESTS]]
    for null in nulls:
        solved = sum((task.accuracy or 0) >= CardConfig.solved for task in null.tasks)
        verdict = "PASSES: the method fails" if null.passed else "fails, as it must"
        rows.append([f"  {null.name}", verdict, f"{len(null.tasks)}", f"{solved}", *(_passing(null, test) for test in TESTS)])
    lines = columns(rows, width)
    for null in nulls:
        why = "; ".join(f"{task.task}: {task.why}" for task in null.tasks if task.why)
        for text in (f"{null.name}: {null.what}", why, null.note):
            lines += textwrap.wrap(text, width, initial_indent="    ", subsequent_indent="    ")
    return lines


def _passing(null: TaskNull, test: str) -> str:
    """Number of tasks on which a test holds, and the mean of the test's first measure."""
    values = [value for task in null.tasks if (value := task.values.get(test)) is not None]
    return f"{null.passing(test)} of {len(null.tasks)}" + (f" ({sum(values) / len(values):.3f})" if values else "")


def render_cards(cards: Sequence[Card]) -> str:
    """Table with a line for each card: the first measure of each test with its ceiling, and whether the test holds."""
    rows = [["task", "nodes", *TESTS, "verdict"]]
    for card in cards:
        cells = []
        for test, keys in TESTS.items():
            first = next((measure for measure in card.report.measures if measure.key in keys), None)
            met = {True: "yes", False: "NO", None: "?"}[passes_test(card.report, test)]
            value = "-" if first is None or first.value is None else f"{first.value:.3f}"
            ceiling = "" if first is None or first.ceiling is None else f" of {first.ceiling:.3f}"
            cells.append(f"{value}{ceiling} {met}")
        rows.append([card.task, f"{card.provenance.get('nodes', 0):,}", *cells, card.verdict])
    supported = sum(card.verdict == "mechanistic support" for card in cards)
    return "\n".join([*columns(rows, 200), "", f"{supported} of {len(cards)} with mechanistic support"])

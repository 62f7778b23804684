"""The card of a circuit: every test on the dense model with its interval, ceiling and control; nulls; and the verdict.

    no explanation      one of the models does not do the task (or they answer a prompt differently)
    refuted             the circuit is not sufficient in the sparse model
    undecided           whether it is could not be measured
    behavioural         sufficient in the sparse model; what the dense model does is another question
    representational    and its nodes' changes, decoded, change the dense model's answer (`swap`)
    mechanistic support and all four tests hold, on held-out pairs of a task; no null passes; seeds agree

The verdict follows from what was measured and cannot be set. What was not measured grants nothing: without nulls, or with one
seed searched, there is no mechanistic support, and the reasons say so. A null passes where the dense model does the task and all
four tests hold, whatever is to be said of the sparse model: it is the tests that nulls are to fail. A single test that a null
passes is no evidence by itself, which is said beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

from bridge.recipe import UserError
from bridge.validate import Control, Measure

Test = Literal["gate", "swap", "loop", "profile", "blind"]
TESTS: tuple[Test, ...] = get_args(Test)
TITLES: Mapping[Test, str] = {
    "gate": "is it done at all?",
    "swap": "1 counterfactual transport",
    "loop": "2 circuit in the loop",
    "profile": "3 effect profile",
    "blind": "4 blind prediction",
}
CardVerdict = Literal["no explanation", "refuted", "undecided", "behavioural", "representational", "mechanistic support"]
NullName = Literal["uncoupled", "bridges", "weights", "labels"]
NULLS: Mapping[NullName, str] = {
    "uncoupled": "a sparse model trained on text and the dense model's answers alone, bridges to it by ridge regression",
    "bridges": "the sparse channels of every bridge in a random order (blind prediction uses no bridge)",
    "weights": "the sparse model's matrices with their entries permuted, bridges fitted to it by ridge regression",
    "labels": "every answer token replaced by one drawn at random, the same one everywhere",
}

UNTOUCHED: frozenset[tuple[NullName, Test]] = frozenset({("bridges", "blind")})  # what a test does not use a null leaves as it is


class CardError(UserError):
    """A card that cannot be made or read, in one line."""


@dataclass(frozen=True)
class Point:
    """One of the values behind a measure, such as a site's or a node's: what it is of, and its numbers by name."""

    label: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class CardMeasure(Measure):
    """A measure of a test, with its bootstrap interval (95%), the most that it could be, and the values behind it."""

    test: Test = "gate"
    interval: tuple[float, float] | None = None
    ceiling: Control | None = None
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class NullTask:
    """A null on a task: which tests hold (None: could not be taken), each test's first value, and whether all do.

    accuracy is that of the null's sparse model; why says what there was instead of a card, "" where there was one; prompts tells
    which prompts they were and how circuits were searched, "" where that was not kept.
    """

    task: str
    holds: Mapping[Test, bool | None]
    values: Mapping[Test, float | None]
    passed: bool
    accuracy: float | None = None
    why: str = ""
    prompts: str = ""


@dataclass(frozen=True)
class NullResult:
    """A null on some tasks; it passes where it does on any of them, and must not.

    note says what weakens it: that it fails is then no evidence.
    """

    name: NullName
    what: str
    tasks: tuple[NullTask, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the method fails: what must not pass does."""
        return any(task.passed for task in self.tasks)

    def passing(self, test: Test) -> int:
        """On how many tasks a single test holds."""
        return sum(task.holds.get(test) is True for task in self.tasks)


@dataclass(frozen=True)
class Card:
    """What a circuit explains of the dense model; about is the task's name or the prompt, sparse the verdict on the sparse model.

    stable says whether several seeds' circuits agree (None: one was searched); nulls is None where they were not run, which
    nulls_note explains; notes say what these measures cannot show.
    """

    about: str
    kind: Literal["task", "prompt"]
    pairs: int
    sparse: str
    stable: bool | None
    tests: tuple[CardMeasure, ...]
    nulls: tuple[NullResult, ...] | None
    nulls_note: str = ""
    notes: tuple[str, ...] = ()
    provenance: Mapping[str, str | float | int | None] = field(default_factory=dict)
    seconds: float = 0.0

    def measures(self, test: Test) -> tuple[CardMeasure, ...]:
        """The measures of one test."""
        return tuple(measure for measure in self.tests if measure.test == test)

    def holds(self, test: Test) -> bool | None:
        """Whether a test holds: False where one of its measures fails, None where one could not be taken, or it was not run."""
        passed = [measure.passed for measure in self.measures(test)]
        if any(one is False for one in passed):
            return False
        return None if not passed or None in passed else True

    @property
    def tests_hold(self) -> bool:
        """Whether all four tests hold, be the task done or not; what a null must not reach."""
        return all(self.holds(test) is True for test in TESTS[1:])

    @property
    def verdict(self) -> CardVerdict:
        """How far the evidence goes."""
        if self.holds("gate") is not True or self.sparse in ("unsolved", "no explanation"):
            return "no explanation"
        if self.sparse == "refuted":
            return "refuted"
        if self.sparse != "behavioural":
            return "undecided"
        if self.holds("swap") is not True:
            return "behavioural"
        return "representational" if self._missing() else "mechanistic support"

    def _missing(self) -> list[str]:
        """What keeps a representational circuit from mechanistic support."""
        missing = [f"{TITLES[test]} fails" for test in TESTS if self.holds(test) is False]
        missing += [f"{TITLES[test]} could not be taken" for test in TESTS if self.holds(test) is None]
        if self.kind == "prompt":
            missing.append("one prompt is no task")
        if self.nulls is None:
            missing.append("the nulls were not run")
        else:
            missing += [f"the null {null.name!r} passes" for null in self.nulls if null.passed]
            missing += [f"the null {null.name!r} is too weak to show anything" for null in self.nulls if null.note]
            missing += [f"the null {name!r} was not run" for name in NULLS if name not in {null.name for null in self.nulls}]
        if self.stable is None:
            missing.append("one seed was searched, so that seeds agree is not known")
        elif not self.stable:
            missing.append("the circuits of several seeds overlap too little")
        return missing

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is what it is, and what the nulls say to it: one sentence each."""
        sentences = [_REASONS[self.verdict]]
        if self.verdict == "no explanation":
            what = "the sparse model does not do it" if self.holds("gate") else "the dense model does not do it"
            sentences = [f"There is nothing to explain: {what}." if self.kind == "task" else _REASONS[self.verdict]]
        elif self.verdict in ("behavioural", "refuted", "undecided"):
            names = [name for test in TESTS[1:] for name in [TITLES[test][2:]] if self.holds(test) is True]
            failed = [TITLES[test][2:] for test in TESTS[1:] if self.holds(test) is False]
            sentences += [f"In the dense model these hold: {', '.join(names)}."] if names else []
            sentences += [f"In the dense model these fail: {', '.join(failed)}."] if failed else []
        elif self.verdict == "representational":
            sentences.append(f"Not more, because {_listed(self._missing())}.")
        for null in self.nulls or ():
            if null.passed:
                sentences.append(f"The null {null.name!r} PASSES, which is a failure of the method: these tests prove nothing.")
                continue
            touched: list[Test] = [test for test in TESTS[1:] if (null.name, test) not in UNTOUCHED]
            alone = [
                f"{TITLES[test][2:]} on {null.passing(test)} of {len(null.tasks)} tasks"
                for test in touched
                if null.passing(test) and self.holds(test) is True
            ]
            if alone:
                sentences.append(f"The null {null.name!r} passes {_listed(alone)} too, so that alone is no evidence.")
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values, the verdict and what nulls come to written out."""
        values = json.loads(json.dumps(asdict(self), allow_nan=False))
        for null, written in zip(self.nulls or (), values["nulls"] or (), strict=True):
            written["passed"] = null.passed
        return {**values, "verdict": self.verdict, "reasons": list(self.reasons)}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Card:
        """The card that `to_json` wrote. Raises CardError for anything else."""
        try:
            return _READER.validate_python(values)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise CardError(f"this is not a card that this version of bridge reads ({first}); make it again") from None


_READER = TypeAdapter(Card)
_REASONS: Mapping[CardVerdict, str] = {
    "no explanation": "The two models answer differently, so the circuit explains nothing of the dense one.",
    "refuted": "The circuit is not sufficient in the sparse model, so it is no explanation of it, nor of the dense model.",
    "undecided": "Something that the verdict needs could not be measured in the sparse model.",
    "behavioural": "The circuit is sufficient in the sparse model; that the dense model does likewise is not shown.",
    "representational": "The circuit is sufficient in the sparse model, and its nodes' changes change the dense model's answer.",
    "mechanistic support": "All four tests on the dense model hold, no null passes, and seeds agree.",
}


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

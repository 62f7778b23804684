"""A card and the nulls beside it: what its text and its table of nulls say; and it survives its JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from support.studies_task_cases import report

from bridge.cards.card import Card, render_card, render_cards, render_nulls
from bridge.cards.evidence import NULLS, TESTS, null_task, with_nulls
from bridge.cards.nulls import DESCRIPTIONS
from bridge.cards.task_circuit import CardError
from bridge.evidence.measures import Control, Criterion, Measure, Point, Report
from bridge.verdicts.null_table import NullTask, TaskNull

CONTROL = Control("matched", 10, 0.1, 0.2, "largest")


def null(name: str, *, passed: bool = False, patching: bool = False) -> TaskNull:
    found = dict.fromkeys(TESTS, passed) | {"patching": patching or passed}
    return TaskNull(name, DESCRIPTIONS[name], (NullTask("one", found, dict.fromkeys(TESTS, 0.3), passed, 0.95),))


ALL_FAIL = tuple(null(name) for name in NULLS)
GOOD = Card("one", 64, report(), ALL_FAIL, provenance={"nodes": 7})


def judged(nulls: tuple[TaskNull, ...] | None, monkeypatch: pytest.MonkeyPatch, why: str = "") -> Report:
    """A report by which everything else passes, with some nulls in the coupling's folder."""
    monkeypatch.setattr("bridge.cards.evidence.stored_task_nulls", lambda *_: (nulls, why))
    return with_nulls(report(), None)  # pyright: ignore[reportArgumentType]


def test_nulls_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert judged(ALL_FAIL, monkeypatch).verdict == "mechanistic support"
    unknown = judged(None, monkeypatch, "they were not run")
    assert unknown.verdict == "representational" and "they were not run" in unknown.reasons[1]
    assert "NOT KNOWN: they were not run" in render_card(replace(GOOD, report=unknown, nulls=None))
    some = judged(ALL_FAIL[:2], monkeypatch)
    assert some.verdict == "representational" and "'labels' was not run" in some.reasons[1]
    weak = judged((replace(ALL_FAIL[0], note="it does none of these tasks"), *ALL_FAIL[1:]), monkeypatch)
    assert weak.verdict == "representational" and "'uncoupled' is too weak to show anything" in weak.reasons[1]


def test_a_null_that_passes_is_said_aloud(monkeypatch: pytest.MonkeyPatch) -> None:
    nulls = (null("uncoupled", passed=True), *ALL_FAIL[1:])
    found = judged(nulls, monkeypatch)
    assert found.verdict == "representational" and found["nulls"].value == pytest.approx(0.25)
    assert "PASSES: the method fails" in "\n".join(render_nulls(nulls))
    partly = judged((null("uncoupled", patching=True), *ALL_FAIL[1:]), monkeypatch)
    assert partly.verdict == "mechanistic support" and "uncoupled passes patching on 1 of 1" in partly["nulls"].note
    assert "bridges passes no test" in partly["nulls"].note


def test_what_is_kept_of_a_null_is_what_held() -> None:
    kept = null_task("one", report(complement=0.0, signs=None), 0.7, "digest")
    assert kept.holds == {"patching": True, "deletion": True, "substitution": False, "effect profile": True, "prediction": None}
    assert kept.values["substitution"] == 1 and not kept.passed and (kept.accuracy, kept.prompts) == (0.7, "digest")


def test_a_card_is_read_as_it_was_written() -> None:
    points = (Point("site 1", {"circuit": 0.5}),)
    first = Measure("dense_solves", "a", 1.5, Criterion(">=", 1.0, True, 0.3), CONTROL, (0.1, 0.9), 0.7, "a note", points)
    card = replace(GOOD, report=replace(GOOD.report, measures=(first, *GOOD.report.measures[1:])))
    values = json.loads(json.dumps(card.to_json()))
    assert values["verdict"] == card.verdict and values["nulls"][0]["passed"] is False
    criterion = {"op": ">=", "bound": 1.0, "beyond_control": True, "control_bound": 0.3}
    assert values["report"]["measures"][0]["criterion"] == criterion and values["report"]["measures"][0]["passed"] is True
    assert Card.from_json(values) == card
    with pytest.raises(CardError, match="make it again"):
        Card.from_json({"task": "one"})


def test_the_text_says_it_all() -> None:
    points = tuple(Point(f"site {site} (mlp)", {"circuit": 0.25, "all nodes": 0.75}) for site in (1, 2))
    measure = Measure("patching", "of patching", 0.5, Criterion(">=", 1.0, True), CONTROL, points=points)
    found = report(prediction=None)
    measures = tuple(measure if each.key == "patching" else each for each in found.measures)
    text = render_card(replace(GOOD, report=Report(measures, found.rules)), 100)
    for wanted in (
        "BEHAVIOURAL", "of patching", "0.500", "matched 0.100 (largest 0.200)", "NO", "not run", "fails, as it must", "?",
        "circuit       0.25     0.25", "1 (mlp)  2 (mlp)",
    ):  # fmt: skip
        assert wanted in text, wanted
    table = render_cards([GOOD, replace(GOOD, report=report(substitution=0.5))])
    assert "1 of 2 with mechanistic support" in table and "0.500 NO" in table

"""The verdict follows from what was measured, in every case; and a card survives its JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from bridge.card.card import NULLS, TESTS, Card, CardError, CardMeasure, NullName, NullResult, NullTask, Point, Test
from bridge.card.nulls import null_task
from bridge.card.render import render_card, render_cards

from bridge.validate import Control

CONTROL = Control("random", 10, 0.1, 0.2, "99%")


def measure(test: Test, passed: bool | None = True) -> CardMeasure:
    value, control = (None, None) if passed is None else (0.5, CONTROL)
    return CardMeasure(f"of {test}", value, control, "> .2", passed, "" if passed is not None else "no prompts", test)


def null(name: NullName, *, passed: bool = False, swap: bool = False) -> NullResult:
    holds: dict[Test, bool | None] = dict.fromkeys(TESTS, passed)
    holds["swap"] = swap or passed
    return NullResult(name, NULLS[name], (NullTask("one", holds, dict.fromkeys(TESTS, 0.3), passed, 0.95),))


ALL_FAIL = tuple(null(name) for name in NULLS)
GOOD = Card("one", "task", 64, "behavioural", True, tuple(measure(test) for test in TESTS), ALL_FAIL, provenance={"nodes": 7})


def without(test: Test, passed: bool | None) -> Card:
    return replace(GOOD, tests=tuple(measure(each, passed if each == test else True) for each in TESTS))


def test_everything_together_is_mechanistic_support() -> None:
    assert GOOD.verdict == "mechanistic support" and GOOD.tests_hold and len(GOOD.reasons) == 1


@pytest.mark.parametrize("passed", [False, None])
@pytest.mark.parametrize("test", ["loop", "profile", "blind"])
def test_without_one_of_the_others_it_is_representational(test: Test, passed: bool | None) -> None:
    card = without(test, passed)
    assert card.verdict == "representational" and not card.tests_hold and card.holds(test) is passed
    assert "Not more, because" in card.reasons[1] and ("fails" in card.reasons[1]) is (passed is False)


def test_a_null_is_not_spared_by_what_no_model_does() -> None:
    assert without("gate", False).tests_hold and null_task(without("gate", False), 0.5).passed
    assert not null_task(without("loop", False), 1.0).passed


@pytest.mark.parametrize("passed", [False, None])
def test_without_transport_it_is_behavioural(passed: bool | None) -> None:
    assert without("swap", passed).verdict == "behavioural"


def test_a_test_that_is_missing_does_not_hold() -> None:
    card = replace(GOOD, tests=tuple(measure(test) for test in TESTS if test != "blind"))
    assert card.holds("blind") is None and card.verdict == "representational"


def test_the_sparse_model_comes_first() -> None:
    assert replace(GOOD, sparse="refuted").verdict == "refuted"
    assert replace(GOOD, sparse="undecided").verdict == "undecided"
    assert replace(GOOD, sparse="unsolved").verdict == "no explanation"
    assert without("gate", False).verdict == "no explanation"
    assert "dense model does not do it" in without("gate", False).reasons[0]


def test_nulls_and_seeds_are_needed() -> None:
    unknown = replace(GOOD, nulls=None, nulls_note="they were not run")
    assert unknown.verdict == "representational" and "the nulls were not run" in unknown.reasons[1]
    assert "NOT KNOWN: they were not run" in render_card(unknown)
    some = replace(GOOD, nulls=ALL_FAIL[:2])
    assert some.verdict == "representational" and "'labels' was not run" in some.reasons[1]
    weak = replace(GOOD, nulls=(replace(ALL_FAIL[0], note="it does none of these tasks"), *ALL_FAIL[1:]))
    assert weak.verdict == "representational" and "'uncoupled' is too weak to show anything" in weak.reasons[1]
    one_seed, other_seeds = replace(GOOD, stable=None), replace(GOOD, stable=False)
    assert one_seed.verdict == other_seeds.verdict == "representational"
    assert "one seed was searched" in one_seed.reasons[1] and "overlap too little" in other_seeds.reasons[1]


def test_a_null_that_passes_is_said_aloud() -> None:
    card = replace(GOOD, nulls=(null("uncoupled", passed=True), *ALL_FAIL[1:]))
    assert card.verdict == "representational" and any("PASSES" in reason for reason in card.reasons)
    assert "PASSES: the method fails" in render_card(card)
    partly = replace(GOOD, nulls=(null("uncoupled", swap=True), *ALL_FAIL[1:]))
    assert partly.verdict == "mechanistic support"
    assert "passes counterfactual transport on 1 of 1 tasks too, so that alone is no evidence" in partly.reasons[1]


def test_a_prompt_has_no_mechanistic_support() -> None:
    assert replace(GOOD, kind="prompt").verdict == "representational"


def test_a_card_is_read_as_it_was_written() -> None:
    points = (Point("site 1", {"circuit": 0.5}),)
    card = replace(GOOD, tests=(replace(measure("gate"), interval=(0.1, 0.9), ceiling=CONTROL, points=points), *GOOD.tests[1:]))
    values = json.loads(json.dumps(card.to_json()))
    assert values["verdict"] == card.verdict and values["nulls"][0]["passed"] is False
    assert Card.from_json(values) == card
    with pytest.raises(CardError, match="make it again"):
        Card.from_json({"about": "one"})


def test_the_text_says_it_all() -> None:
    text = render_card(without("blind", None), 100)
    for wanted in ("REPRESENTATIONAL", "of swap", "0.500", "random 0.100 (99% 0.200)", "no prompts", "fails, as it must", "?"):
        assert wanted in text, wanted
    table = render_cards([GOOD, without("loop", False)])
    assert "1 of 2 with mechanistic support" in table and "0.500 NO" in table

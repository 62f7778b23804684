"""The card of a prompt: on demand, with what one prompt cannot show said, and its counterfactual checked."""

from __future__ import annotations

import pytest
from test_explanation import PROMPT, agreeing

from bridge.card.card import CardError
from bridge.dense import DenseModel
from bridge.explain import explain
from bridge.explanation import Explanation, render_text

OTHER = PROMPT.rsplit(" ", 1)[0] + " w20"


def test_without_being_asked_for_there_is_none(dense: DenseModel) -> None:
    explanation = explain(agreeing(dense), PROMPT)
    assert explanation.card is None and explanation.to_json()["card"] is None


def test_a_prompts_card_has_three_tests(dense: DenseModel) -> None:
    explanation = explain(agreeing(dense), PROMPT, card=True, counterfactual=OTHER)
    card = explanation.card
    assert card is not None and card.kind == "prompt" and card.pairs == 1
    assert {measure.test for measure in card.tests} == {"gate", "swap", "loop", "profile"}
    assert card.verdict != "mechanistic support" and card.nulls is None and card.notes
    assert all(measure.interval is None for measure in card.tests if measure.test != "profile")
    (profile,) = card.measures("profile")
    assert profile.value == explanation.faithfulness.profile.value
    assert card.measures("swap")[0].value is not None or "hardly changes" in card.measures("swap")[0].note
    assert Explanation.from_json(explanation.to_json()) == explanation
    text = render_text(explanation)
    assert "ON THE DENSE MODEL" in text and "One prompt has no intervals" in text


def test_without_a_counterfactual_transport_is_not_taken(dense: DenseModel) -> None:
    card = explain(agreeing(dense), PROMPT, card=True).card
    assert card is not None and card.holds("swap") is None and "--counterfactual" in card.measures("swap")[0].note


@pytest.mark.parametrize(("counterfactual", "message"), [(f"{PROMPT} w3", "equal length"), (PROMPT, "the prompt itself")])
def test_a_counterfactual_that_cannot_be_used_is_refused(dense: DenseModel, counterfactual: str, message: str) -> None:
    with pytest.raises(CardError, match=message):
        explain(agreeing(dense), PROMPT, card=True, counterfactual=counterfactual)

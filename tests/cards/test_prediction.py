"""Blind prediction: its numbers by hand, a copy of the dense model predicts it, and its bigram is one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.models import VOCABULARY, planted_pairs
from support.studies_task_cases import answered, circuit_of, copied, corpus, some_nodes

from bridge.cards import prediction
from bridge.cards.prediction import Predicted, bigram_logits, predicted_mistakes, prediction_measures, variance_measures
from bridge.data.task_stress import Stress
from bridge.evidence.bootstrap import ClusterBootstrap
from bridge.evidence.measures import Measure
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import ablation_gate


@pytest.fixture(scope="module")
def copy() -> CoupledModels:
    return copied()


def test_a_copy_predicts_everything(copy: CoupledModels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "LEAST_PROMPTS", 60)
    pairs = answered(copy.dense, planted_pairs(30, lengths=(5, 7), seed=4))
    parts = {"old": torch.arange(10), "new": torch.arange(10, 30)}
    stress = {kind: Stress(pairs.rows(row_b), row_b) for kind, row_b in parts.items()}
    r2, margin, signs, *_ = prediction_measures(copy, circuit_of(copy), stress, corpus(), 0.9, 0)
    assert r2.value == pytest.approx(1, abs=0.01) and r2.ceiling == pytest.approx(r2.value)
    assert r2.control is not None and r2.control.what == "bigram"
    assert margin.passed is (r2.control.mean < 0.99)  # the answer is decided by the last token
    assert signs.value == pytest.approx(1, abs=0.02) and signs.passed
    assert [point.label for point in r2.points] == ["old", "new"]


@pytest.mark.parametrize("errors", [False, True])
@torch.no_grad()
def test_what_is_predicted_is_the_circuits_answer_on_each_prompt_alone(copy: CoupledModels, errors: bool) -> None:
    pairs, circuit = answered(copy.dense, planted_pairs(4, lengths=(5, 7))), circuit_of(copy, some_nodes(copy), errors=errors)
    found = prediction._predict_pairs(copy, circuit, pairs, corpus())
    correct = (lambda at, x: x + circuit.means[at]) if errors else None
    for member, some in enumerate((pairs, pairs.reversed())):
        for row in range(4):
            tokens_1t = some.prompt_bt[row : row + 1, : int(some.last_b[row]) + 1]
            gate = ablation_gate({at: circuit.kept[at] for at in copy.sparse.locations()}, circuit.means)
            runs = copy.dense.run(tokens_1t), copy.sparse.run(tokens_1t, gate=gate, correct=correct)
            for trace, value in zip(runs, (found.dense, found.circuit), strict=True):
                logits_v = trace.logits_btv[0, -1]
                expected = float(logits_v[some.answer_bk[row, 0]] - logits_v[some.wrong_bk[row, 0]])
                assert value[row, member] == pytest.approx(expected, abs=1e-3)


def test_too_few_prompts_are_no_test(copy: CoupledModels) -> None:
    stress = {"only": Stress(planted_pairs(20), torch.arange(20))}
    measures = prediction_measures(copy, circuit_of(copy), stress, corpus(), 0.9, 0)
    assert all(measure.passed is None and "200" in measure.note for measure in measures)


@torch.no_grad()
def test_the_bigram_is_the_mean_after_a_token_in_text(copy: CoupledModels) -> None:
    pairs, text_bt = planted_pairs(3, lengths=(4, 6)), corpus()
    pairs.prompt_bt[torch.arange(3), pairs.last_b] = torch.tensor([int(text_bt[2, 4]), 1, int(text_bt[2, 4])])
    found_bv = bigram_logits(copy.dense, pairs, text_bt)
    total_v, count = torch.zeros(VOCABULARY), 0
    for row_t in text_bt:
        for position, token in enumerate(row_t.tolist()):
            if token == int(text_bt[2, 4]):
                total_v += copy.dense.run(row_t[None, : position + 1]).logits_btv[0, -1]
                count += 1
    assert count and not (text_bt == 1).any()
    torch.testing.assert_close(found_bv[0], total_v / count, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found_bv[2], found_bv[0])
    torch.testing.assert_close(found_bv[1], copy.dense.run(torch.tensor([[1]])).logits_btv[0, 0], atol=1e-4, rtol=1e-4)


def test_what_is_explained_is_of_the_same_answers_for_both_members() -> None:
    generator = np.random.default_rng(0)
    dense_b2 = generator.normal(3, 1, size=(120, 2))
    circuit_b2 = dense_b2 + generator.normal(0, 0.5, size=(120, 2))
    measure, margin = variance_measures(
        Predicted(dense_b2, circuit_b2, dense_b2, np.zeros((120, 2))), (), ClusterBootstrap(np.arange(120), 0)
    )
    y, x = (np.concatenate([z[:, 0], -z[:, 1]]) for z in (dense_b2, circuit_b2))
    expected = 1 - ((y - x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    assert measure.value == pytest.approx(expected) and measure.passed and margin.passed
    assert measure.interval is not None and measure.interval[0] < expected < measure.interval[1]
    worse, margin = variance_measures(
        Predicted(dense_b2, np.zeros((120, 2)), dense_b2, circuit_b2), (), ClusterBootstrap(np.arange(120), 0)
    )
    assert worse.passed is margin.passed is False


def test_what_was_made_from_one_pair_is_drawn_together() -> None:
    """Copies of a pair say nothing new: the interval of all is that of one each, up to the draws."""
    generator = np.random.default_rng(0)
    one_b2 = generator.normal(size=(40, 2))
    four_b2, source_b = np.tile(one_b2, (4, 1)), np.tile(np.arange(40), 4)

    def mean(x_b2: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return lambda weight_kb: weight_kb @ x_b2.mean(1) / weight_kb.sum(1)

    single, together, apart = (
        ClusterBootstrap(of_b, 0).interval(mean(x_b2))
        for of_b, x_b2 in ((np.arange(40), one_b2), (source_b, four_b2), (np.arange(160), four_b2))
    )
    assert single is not None and together is not None and apart is not None
    assert single == pytest.approx(together)
    assert apart[1] - apart[0] < 0.7 * (single[1] - single[0])


def test_mistakes_are_to_be_predicted_and_not_cried() -> None:
    generator, draws = np.random.default_rng(0), ClusterBootstrap(np.arange(100), 0)
    dense_b2 = np.where(np.arange(200).reshape(100, 2) % 5 == 0, -1.0, 2.0)
    nothing = np.zeros_like(dense_b2)

    def predicted(circuit_b2: np.ndarray) -> Measure:
        return predicted_mistakes(Predicted(dense_b2, circuit_b2, dense_b2, nothing), draws)

    right = predicted(dense_b2 + 0.1 * generator.normal(size=(100, 2)))
    assert right.value == 1 and right.passed and right.control is not None and right.control.mean == 0
    blind_to_them = predicted(np.ones((100, 2)))
    assert blind_to_them.value == 0 and blind_to_them.passed is False
    always = predicted(-np.ones((100, 2)))
    assert always.value == 1 and always.passed is False  # all alarms

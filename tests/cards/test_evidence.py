"""Evidence on a task: its circuit on pairs in both models, and the rules; a coupling that is known to be the dense model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from support.models import planted_pairs, untrained
from support.studies_task_cases import (
    answered,
    case_of,
    circuit_of,
    copied,
    decoded,
    dense_difference,
    literal_run,
    report,
    some_nodes,
)

from bridge.cards.evidence import NULLS, TESTS, gather_task, held_out_pairs, null_task, passes_test, task_rules, with_nulls
from bridge.cards.task_circuit import CardError
from bridge.data.task_tokens import Resolved
from bridge.evidence.bootstrap import bootstrap_interval
from bridge.evidence.deletion import delete_circuits
from bridge.evidence.measures import Report, Verdict
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter


@torch.no_grad()
def test_differences_are_those_of_rows_alone(dense: DenseModel) -> None:
    coupling = untrained(dense)
    transporter, _, pairs = case_of(coupling)
    for row in range(len(pairs)):
        assert float(transporter.loss.model_b[row]) == pytest.approx(dense_difference(coupling, pairs, row), abs=1e-4)


@torch.no_grad()
def test_what_is_changed_is_run_from_there(dense: DenseModel) -> None:
    coupling = untrained(dense)
    transporter, _, pairs = case_of(coupling)
    row_k, site_k = torch.tensor([11, 0, 3, 0]), torch.tensor([1, 4, 0, 2])
    change_ktd = torch.randn(4, pairs.prompt_bt.shape[1], dense.width, generator=torch.Generator().manual_seed(0))
    lost_k = transporter.lost_by(row_k, site_k, change_ktd)
    for item, (row, site) in enumerate(zip(row_k.tolist(), site_k.tolist(), strict=True)):
        enter = Enter.at(site, transporter.dense.residuals[site][row : row + 1] + change_ktd[item : item + 1])
        expected = float(transporter.loss.model_b[row]) - dense_difference(coupling, pairs, row, enter)
        assert float(lost_k[item]) * transporter.loss.span == pytest.approx(expected, abs=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("errors", [False, True])
def test_a_deletion_is_the_literal_one_on_every_prompt(dense: DenseModel, errors: bool) -> None:
    coupling = untrained(dense)
    transporter, kept_f, pairs = case_of(coupling, some_nodes(coupling), errors=errors)
    assert (transporter.masked.errors is not None) is errors
    (found,) = delete_circuits(transporter, kept_f[None])
    for row in (0, 5, 11):
        whole, without = (
            literal_run(transporter, row, mask_f) for mask_f in (transporter.reference_f, transporter.reference_f & ~kept_f)
        )
        answer, wrong = int(pairs.answer_bk[row, 0]), int(pairs.wrong_bk[row, 0])

        def d(trace, answer=answer, wrong=wrong) -> float:
            return float(trace.logits_btv[0, -1, answer] - trace.logits_btv[0, -1, wrong])

        span = transporter.loss.span
        assert found.lost_b[row] * span == pytest.approx(d(whole) - d(without), abs=2e-4)
        for site in range(coupling.n_sites):
            change_1ts = without.residuals[site] - whole.residuals[site]
            h_1td = transporter.dense.residuals[site][row : row + 1, : change_1ts.shape[1]] + decoded(
                transporter, site, change_1ts
            )
            expected = float(transporter.loss.model_b[row]) - dense_difference(coupling, pairs, row, Enter.at(site, h_1td))
            assert found.dense_jb[site, row] * span == pytest.approx(expected, abs=1e-3)
            entered = literal_run(transporter, row, transporter.reference_f, Enter.at(site, whole.residuals[site] + change_1ts))
            assert found.sparse_jb[site, row] * span == pytest.approx(d(whole) - d(entered), abs=1e-3)
    ratio, bounds = found.ratio(1 / 3), found.ratio_interval(1 / 3, 0)
    assert ratio is None or (bounds is not None and bounds[0] <= bounds[1])


@torch.no_grad()
def test_nodes_are_active_that_are_so_for_any_prompt(dense: DenseModel) -> None:
    coupling = untrained(dense)
    coupling.sparse.project(0.1)
    transporter, _, pairs = case_of(coupling)
    active = transporter.masked.space.split(transporter.masked.active_f)
    values = transporter.masked.node_values(torch.ones_like(transporter.reference_f), torch.arange(transporter.prompts))
    for at, active_1n in active.items():
        expected_n = torch.zeros_like(active_1n[0])
        for row in range(len(pairs)):
            expected_n |= (values[at][row, : int(pairs.last_b[row]) + 1] != 0).any(0)
        assert torch.equal(active_1n[0], expected_n)


def test_intervals_are_those_of_the_mean() -> None:
    values_b = np.random.default_rng(1).normal(size=400)
    bounds = bootstrap_interval(lambda pick_kb: values_b[pick_kb].mean(1), 400, 0)
    assert bounds is not None and bounds[0] < values_b.mean() < bounds[1]
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * values_b.std() / 20, rel=0.15)
    assert bootstrap_interval(lambda pick_kb: values_b[pick_kb].mean(1), 1, 0) is None


# -- the rules ----------------------------------------------------------------------------------------------------------------


OTHERS = "substitution", "effect profile", "prediction"


def test_everything_together_is_mechanistic_support() -> None:
    assert report().verdict == "mechanistic support" and len(report().reasons) == 1
    assert null_task("one", report(), 1.0).passed


@pytest.mark.parametrize("value", [0.0, None])
@pytest.mark.parametrize(
    "key", [*TESTS["substitution"], *TESTS["effect profile"], *TESTS["prediction"], "lost", "seeds", "nulls"]
)
def test_without_one_of_the_others_it_is_representational(key: str, value: float | None) -> None:
    found = report(**{key: value})
    assert found.verdict == "representational"
    assert f"Of {key} {'is 0, not >= 1' if value == 0 else 'could not be judged (not run)'}." in found.reasons
    test = next((test for test, keys in TESTS.items() if key in keys), None)
    if test is not None:
        assert passes_test(found, test) is (None if value is None else False) and not null_task("one", found, 1.0).passed


@pytest.mark.parametrize("value", [0.0, None])
@pytest.mark.parametrize("key", [*TESTS["patching"], *TESTS["deletion"]])
def test_without_patching_or_deletion_it_is_behavioural(key: str, value: float | None) -> None:
    assert report(**{key: value}).verdict == "behavioural"


def test_the_sparse_model_comes_first() -> None:
    expected: dict[Verdict, Report] = {
        "refuted": report(sufficient=0.0, patching=0.0), "undecided": report(sufficient=None),
    }  # fmt: skip
    for verdict, found in expected.items():
        assert found.verdict == verdict
    for key in ("dense_solves", "sparse_solves", "searched", "span"):
        assert report(**{key: 0.0}, sufficient=0.0).verdict == "no explanation"


def test_a_null_is_not_spared_by_what_no_model_does() -> None:
    assert null_task("one", report(dense_solves=0.0, sufficient=0.0), 0.5).passed
    assert not null_task("one", report(complement=0.0), 1.0).passed


def test_mistakes_are_not_asked_where_there_are_few() -> None:
    measures = tuple(measure for measure in report().measures if measure.key != "mistakes")
    found = Report(measures, task_rules(measures))
    assert found.verdict == "mechanistic support" and passes_test(found, "prediction") is True
    assert passes_test(Report((), ()), "prediction") is None


def test_held_out_pairs_go_either_way() -> None:
    pairs = planted_pairs(7, lengths=(6, 5))
    task = Resolved("planted", "test", {"train": pairs, "validation": pairs, "test": pairs}, 7, {})
    found = held_out_pairs(task, 4)
    assert len(found) == 4 and found.last_b.diff().min() >= 0
    assert sorted(found.answer_bk[:, 0].tolist()) == [4, 4, 5, 5]
    with pytest.raises(CardError, match="no test pairs"):
        held_out_pairs(replace(task, splits={**task.splits, "test": pairs.rows(torch.arange(0))}))


def test_a_copy_of_the_dense_model_passes_what_it_can() -> None:
    coupling, said = copied(), []
    kept_f = some_nodes(coupling, 0.9)
    pairs = answered(coupling.dense, planted_pairs(12, lengths=(6, 5)))
    task = Resolved("planted", "test", {"train": pairs, "validation": pairs, "test": pairs}, 12, {})
    found = gather_task(coupling, circuit_of(coupling, kept_f), task, progress=lambda phase: said.append(str(phase)))
    assert found["profile"].passed and found["dense_ratio"].passed and found["seeds"].passed
    assert found["nulls"].value is None and "were not run" in found["nulls"].note and "stress prompts" in found["signs"].note
    assert with_nulls(found, coupling) == found and any("patching" in text for text in said)
    again = gather_task(coupling, circuit_of(coupling, kept_f), task)
    assert again == found and set(NULLS) == {"uncoupled", "bridges", "weights", "labels"}

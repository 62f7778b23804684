"""Substitution: its arithmetic, what a copy of the dense model keeps, and what nothing keeps."""

from __future__ import annotations

import pytest
import torch
from support.models import untrained
from support.studies_task_cases import case_of, copied, dense_difference, literal_run, some_nodes

from bridge.evidence.controls import matched_nodes
from bridge.evidence.measures import Measure
from bridge.evidence.substitution import spans, substitute_span, substitution_measures
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter


@pytest.fixture(scope="module")
def copy() -> CoupledModels:
    return copied()


def test_spans_are_all_blocks_and_each() -> None:
    assert spans(("attn", "mlp", "attn", "mlp")) == ((0, 4), (0, 2), (2, 4))
    assert spans(("parallel", "parallel")) == ((0, 2), (0, 1), (1, 2))
    assert spans(("attn", "mlp")) == ((0, 2),)


def measured(coupling: CoupledModels, kept_f: torch.Tensor | None = None, draws: int = 6) -> tuple[Measure, Measure]:
    transporter, kept_f, _ = case_of(coupling, kept_f)
    matched_cf = matched_nodes(transporter.masked, kept_f, draws, torch.Generator().manual_seed(0))
    kept, rest = substitution_measures(transporter, kept_f, matched_cf, 0.8, 0.3, 0)
    return kept, rest


@torch.no_grad()
@pytest.mark.parametrize("errors", [False, True])
def test_a_span_is_encoded_computed_and_decoded(dense: DenseModel, errors: bool) -> None:
    coupling = untrained(dense)
    transporter, kept_f, pairs = case_of(coupling, some_nodes(coupling), errors=errors)
    found_b = substitute_span(transporter, (2, 4), kept_f)
    for row in (0, 11):
        length = int(pairs.last_b[row]) + 1
        x_1ts = coupling.bridges[2].encode(transporter.dense.residuals[2][row : row + 1, :length])
        trace = literal_run(transporter, row, kept_f, Enter.at(2, x_1ts))
        enter = Enter.at(4, coupling.bridges[4].decode(trace.residuals[4]))
        assert found_b[row] == pytest.approx(dense_difference(coupling, pairs, row, enter), abs=1e-3)


def test_a_copy_keeps_everything_and_its_complement_is_nothing(copy: CoupledModels) -> None:
    kept, rest = measured(copy)
    assert kept.value == pytest.approx(1, abs=0.02) and kept.passed and kept.ceiling == pytest.approx(1, abs=0.02)
    assert [point.label for point in kept.points] == ["sites 0 to 2", "sites 2 to 4", "all blocks"]
    assert kept.points[-1].values["circuit"] == pytest.approx(1, abs=0.02)
    assert rest.control is not None and rest.control.mean == pytest.approx(1, abs=0.02)  # nothing outside is left to be deleted


def test_an_empty_circuit_cannot_be_judged(copy: CoupledModels) -> None:
    kept, rest = measured(copy, torch.zeros(sum(copy.sparse.locations().values()), dtype=torch.bool))
    assert kept.passed is rest.passed is None and kept.value is None and "empty" in kept.note


def test_controls_are_matched_nodes_alone_and_deleted(copy: CoupledModels) -> None:
    kept, rest = measured(copy, some_nodes(copy, 0.1))
    assert kept.control is not None and kept.control.draws == 6 and kept.control.what == "matched"
    assert rest.control is not None and rest.control.draws == 5
    assert kept.interval is not None and kept.value is not None and kept.interval[0] <= kept.value <= kept.interval[1]


def test_a_circuits_errors_are_not_taken_from_the_blocks_it_replaces(dense: DenseModel) -> None:
    transporter, kept_f, _ = case_of(untrained(dense), errors=True)
    with_errors_f = kept_f | transporter.masked.is_error_f
    assert not torch.equal(
        torch.tensor(substitute_span(transporter, (0, 4), kept_f)),
        torch.tensor(substitute_span(transporter, (0, 4), with_errors_f)),
    )
    found, expected = (
        substitution_measures(transporter, mask_f, kept_f[None], 0.8, 0.3, 0) for mask_f in (with_errors_f, kept_f)
    )
    assert found == expected


def test_more_than_the_whole_is_as_far_off_as_less(dense: DenseModel) -> None:
    kept, rest = measured(untrained(dense))
    share = kept.points[-1].values["circuit"]
    assert kept.value == pytest.approx(1 - abs(1 - share))
    assert rest.value == pytest.approx(kept.points[-1].values["complement"])


def test_too_small_a_difference_is_not_divided_by(copy: CoupledModels) -> None:
    transporter, kept_f, _ = case_of(copy)
    transporter.loss.model_b = torch.zeros(12)
    kept, rest = substitution_measures(transporter, kept_f, kept_f[None], 0.8, 0.3, 0)
    assert kept.passed is rest.passed is None and kept.value is None and "too little" in kept.note

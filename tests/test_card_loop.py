"""The circuit in the loop: its arithmetic, what a copy of the dense model keeps, and what nothing keeps."""

from __future__ import annotations

import pytest
import torch
from bridge.card.case import Case
from bridge.card.loop import in_loop, loop_measures, spans
from conftest import untrained
from test_card_case import case_of, copied, dense_difference, some_nodes

from bridge.bridges import Coupling
from bridge.dense import DenseModel
from bridge.residual import Enter


@pytest.fixture(scope="module")
def copy() -> Coupling:
    return copied()


def test_spans_are_all_blocks_and_each() -> None:
    assert spans(("attn", "mlp", "attn", "mlp")) == ((0, 4), (0, 2), (2, 4))
    assert spans(("parallel", "parallel")) == ((0, 2), (0, 1), (1, 2))
    assert spans(("attn", "mlp")) == ((0, 2),)


@torch.no_grad()
def test_a_span_is_encoded_computed_and_decoded(dense: DenseModel) -> None:
    coupling = untrained(dense)
    case = case_of(coupling, some_nodes(coupling))
    found_b = in_loop(case, (2, 4), coupling.sparse, case.gate(case.kept_f))
    means = case.whole.means
    for row in (0, 11):
        length = int(case.pairs.last_b[row]) + 1
        x_1ts = coupling.bridges[2].encode(case.dense.residuals[2][row : row + 1, :length])
        trace = coupling.sparse.run(
            case.pairs.prompt_bt[row : row + 1, :length], Enter.at(2, x_1ts),
            lambda at, x_btn: x_btn * case.kept[at] + means[at] * ~case.kept[at],
        )  # fmt: skip
        enter = Enter.at(4, coupling.bridges[4].decode(trace.residuals[4]))
        assert found_b[row] == pytest.approx(dense_difference(coupling, case.pairs, row, enter), abs=1e-3)


def test_a_copy_keeps_everything_and_its_complement_is_nothing(copy: Coupling) -> None:
    kept, rest = loop_measures(case_of(copy))
    assert kept.value == pytest.approx(1, abs=0.02) and kept.ceiling is not None
    assert kept.ceiling.mean == pytest.approx(1, abs=0.02)
    assert [point.label for point in kept.points] == ["sites 0 to 2", "sites 2 to 4", "all blocks"]
    assert rest.control is not None and rest.control.what == "all nodes"  # nothing outside is left to be deleted


def test_an_empty_circuit_keeps_no_more_than_no_model(copy: Coupling) -> None:
    empty = case_of(copy, torch.zeros(sum(copy.sparse.locations().values()), dtype=torch.bool))
    kept, rest = loop_measures(empty)
    assert kept.passed is None and kept.control is None and "empty" in kept.note
    assert rest.value == pytest.approx(1, abs=0.02) and rest.passed is False


def test_controls_are_random_circuits_and_deletions(copy: Coupling) -> None:
    kept, rest = loop_measures(case_of(copy, some_nodes(copy, 0.1)))
    assert kept.control is not None and kept.control.draws == 40 and kept.control.what == "random"
    assert rest.control is not None and rest.control.draws == 5
    assert kept.interval is not None and kept.value is not None and kept.interval[0] <= kept.value <= kept.interval[1]


def test_too_small_a_difference_is_not_divided_by(copy: Coupling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Case, "answer_b", torch.zeros(12))
    kept, rest = loop_measures(case_of(copy))
    assert kept.passed is rest.passed is None and kept.value is None and "too little" in kept.note

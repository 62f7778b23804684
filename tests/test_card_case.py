"""A circuit on pairs in both models; and, for all tests of the card, a coupling that is known to be the dense model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bridge.card.case import Case, interval, share, share_interval
from conftest import CONTEXT, VOCABULARY, planted_pairs, tiny_gpt2, tiny_tokenizer, untrained
from torch import Tensor

from bridge import start
from bridge.bridges import Coupling, new_coupling
from bridge.circuit import recording_gate
from bridge.circuits.subject import SparseSubject
from bridge.dense import DenseModel, load_dense
from bridge.recipe import resolve
from bridge.residual import Enter
from bridge.sparse import Location
from bridge.tasks.tokens import TokenPairs
from bridge.training import resolve_for


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def copied(dense: DenseModel | None = None) -> Coupling:
    """A coupling whose sparse model computes what its dense model does, at every site."""
    dense = load_dense(tiny_gpt2(), tokenizer=tiny_tokenizer()) if dense is None else dense
    values = {
        "dense": "tiny", "sparse": {"width": 64, "head_channels": 8, "positions": "learned"}, "sparsity": {"l0": 0.25},
        "data": {"context": CONTEXT},
    }  # fmt: skip
    coupling = new_coupling(dense, resolve_for(dense, resolve(values)))
    with pytest.MonkeyPatch.context() as patch:  # so that the copy is exact
        patch.setattr(start, "SMALL", 0.0)
        patch.setattr(start, "SINKS", ())
        start.start_from_dense(coupling, torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5)))
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return replace(coupling, reference_bt=corpus())


@torch.no_grad()
def answered(dense: DenseModel, pairs: TokenPairs) -> TokenPairs:
    """The pairs with those two tokens as answers that the dense model tells apart best by what tells the prompts apart."""
    first_bv, second_bv = (
        pairs.at_last(dense.run(tokens_bt).logits_btv) for tokens_bt in (pairs.prompt_bt, pairs.counterfactual_bt)
    )
    margin_vv = torch.minimum(
        (first_bv[:, :, None] - first_bv[:, None]).mean(0), (second_bv[:, None] - second_bv[:, :, None]).mean(0)
    )
    answer, wrong = divmod(int(margin_vv.argmax()), VOCABULARY)
    return replace(
        pairs, answer_bk=torch.full((len(pairs), 1), answer), wrong_bk=torch.full((len(pairs), 1), wrong)
    )  # fmt: skip


def case_of(coupling: Coupling, kept_f: Tensor | None = None, pairs: TokenPairs | None = None) -> Case:
    """A case of a coupling; all nodes are kept where no mask is given."""
    whole = SparseSubject.over(coupling.sparse, corpus())
    kept_f = torch.ones(whole.space.size, dtype=torch.bool) if kept_f is None else kept_f
    pairs = answered(coupling.dense, planted_pairs(12, lengths=(6, 5))) if pairs is None else pairs
    return Case.of(coupling, whole, whole, whole.space.split(kept_f), pairs)


def some_nodes(coupling: Coupling, fraction: float = 0.4, seed: int = 0) -> Tensor:
    size = sum(coupling.sparse.locations().values())
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < fraction


def dense_difference(coupling: Coupling, pairs: TokenPairs, row: int, enter: Enter | None = None) -> float:
    """D of one row, run by itself without its padding."""
    length = int(pairs.last_b[row]) + 1
    if enter is not None:
        enter = Enter(enter.site_b, enter.x_btd[:, :length])
    logits_v = coupling.dense.run(pairs.prompt_bt[row : row + 1, :length], enter).logits_btv[0, -1]
    return float(logits_v[pairs.answer_bk[row, 0]] - logits_v[pairs.wrong_bk[row, 0]])


@torch.no_grad()
def test_rows_are_in_order_and_differences_those_of_rows_alone(dense: DenseModel) -> None:
    case = case_of(untrained(dense))
    assert case.pairs.last_b.diff().min() >= 0 and not case.pairs.there_bt[0, -1] and case.pairs.there_bt[-1, -1]
    swapped = case.pairs.swapped()
    for row in range(len(case.pairs)):
        here = dense_difference(case.coupling, case.pairs, row)
        there = -dense_difference(case.coupling, swapped, row)
        assert float(case.answer_b[row]) == pytest.approx(here, abs=1e-4)
        assert float(case.swap_b[row]) == pytest.approx(there - here, abs=1e-4)


@torch.no_grad()
def test_what_is_moved_or_enters_is_run_from_there(dense: DenseModel) -> None:
    case = case_of(untrained(dense))
    generator = torch.Generator().manual_seed(0)
    length = case.pairs.prompt_bt.shape[1]
    row_i, site_i = torch.tensor([11, 0, 3, 0]), torch.tensor([1, 4, 0, 2])
    change_itd = torch.randn(4, length, dense.width, generator=generator)
    moved_i = case.moved(row_i, site_i, change_itd)
    for item, (row, site) in enumerate(zip(row_i.tolist(), site_i.tolist(), strict=True)):
        enter = Enter.at(site, case.dense.residuals[site][row : row + 1] + change_itd[item : item + 1])
        expected = dense_difference(case.coupling, case.pairs, row, enter) - float(case.answer_b[row])
        assert float(moved_i[item]) == pytest.approx(expected, abs=1e-4)
    entered_b = case.entered(2, case.dense.residuals[2])
    torch.testing.assert_close(entered_b, case.answer_b, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_is_on_and_written_is_what_the_gates_see(dense: DenseModel) -> None:
    case = case_of(untrained(dense))
    sparse, location = case.coupling.sparse, Location(1, "mlp_out")
    for row in (0, len(case.pairs) - 1):
        length = int(case.pairs.last_b[row]) + 1
        here, there = {}, {}
        for into, tokens_bt in ((here, case.pairs.prompt_bt), (there, case.pairs.counterfactual_bt)):
            sparse.run(tokens_bt[row : row + 1, :length], gate=recording_gate(into))
        change_tn = (there[location] - here[location])[0]
        torch.testing.assert_close(case.written[location][row, :length], change_tn, atol=1e-5, rtol=1e-4)
        assert not case.written[location][row, length:].any()
        assert ((here[location][0] != 0).any(0) <= case.space.split(case.on_f)[location][0]).all()


def test_shares_and_their_intervals() -> None:
    whole_b = np.array([2.0, -1.0, 4.0, 3.0])
    assert share(0.5 * whole_b, whole_b) == pytest.approx(0.5)
    assert share_interval(0.5 * whole_b, whole_b, 0) == pytest.approx((0.5, 0.5))
    assert share_interval(whole_b[:1], whole_b[:1], 0) is None
    values_b = np.random.default_rng(1).normal(size=400)
    bounds = interval(lambda pick_kb: values_b[pick_kb].mean(1), 400, 0)
    assert bounds is not None and bounds[0] < values_b.mean() < bounds[1]
    assert bounds[1] - bounds[0] == pytest.approx(2 * 1.96 * values_b.std() / 20, rel=0.15)

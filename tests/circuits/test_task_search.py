"""Circuits of several prompts, measured: against runs of each prompt alone, and on a model whose circuit was planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import VOCABULARY, planted_pairs, planted_sparse

from bridge.circuits.error_nodes import error_means
from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.necessity import backup_nodes
from bridge.circuits.search import NestedMasks
from bridge.circuits.task_search import (
    SearchError,
    TaskLosses,
    select_prompts,
    split_prompts,
    task_loss,
    task_losses,
    with_all_splits,
)
from bridge.data.task_tokens import Resolved, TokenPairs
from bridge.evidence.sufficiency import NestedCircuit, measure_circuit, superset_draws
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import ablation_gate, corpus_means
from bridge.models.dense import DenseModel

CONFIG = SearchConfig(steps=30, densities=(0.3, 0.6))


def corpus() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def task(**lengths: int) -> Resolved:
    splits: dict = {}
    for seed, name in enumerate(("train", "validation", "test")):
        splits[name] = planted_pairs(6, (4, 6), seed).rows(torch.arange(lengths.get(name, 6)))
    return Resolved("planted", "test", splits, 18, {})


def planted(coupling: CoupledModels, dense: DenseModel) -> CoupledModels:
    return replace(coupling, sparse=planted_sparse(dense, decoys=4))


def found(coupling: CoupledModels, resolved: Resolved) -> TaskLosses:
    means = corpus_means(coupling.sparse, corpus())
    return task_losses(resolved, lambda pairs: task_loss(coupling, means, pairs, CONFIG, dense=False))


def measured(test: CircuitLoss, nested: NestedMasks, place: int = 0) -> NestedCircuit:
    level, kept_f = nested.levels[place], nested.kept(place)
    return measure_circuit(test, kept_f, superset_draws(test, 6, 0), level.faithfulness, test.meets_bounds(kept_f, level))


def test_a_tasks_circuit_is_measured_where_it_was_not_searched(coupling: CoupledModels, dense: DenseModel) -> None:
    losses = found(planted(coupling, dense), task())
    opened = losses.find_opening_circuit()
    nested = losses.find_nested_circuits(opened_f=opened.kept(0))
    measures = [measured(losses.test, nested, place) for place in range(len(nested.levels))]
    at_opening = measures[CONFIG.opening]
    assert torch.equal(nested.kept(CONFIG.opening), opened.kept(0))
    assert at_opening.nodes == 6 and at_opening.within and at_opening.errors == 0 and at_opening.error_share == 0
    assert at_opening.faithfulness > 0.95 and at_opening.supersets_worst > 0.95 and abs(at_opening.left) < 0.05
    assert [one.asked for one in measures] == [0.8, 0.9, 0.95, 0.99] and [one.nodes for one in measures] == sorted(
        one.nodes for one in measures
    )
    assert not torch.equal(losses.test.masked.question.prompt_bt, losses.validation.masked.question.prompt_bt)


def test_what_is_left_of_several_prompts_is_the_mean_of_each_alone(coupling: CoupledModels, dense: DenseModel) -> None:
    loss = found(planted(coupling, dense), task()).validation
    none_f = torch.zeros_like(loss.nodes_f)
    node_k = backup_nodes(loss, none_f)

    def left(count: int) -> float:
        without_f = loss.complement(none_f).index_fill(0, node_k[:count], False)
        rows = torch.arange(len(loss.model_b)).split(1)
        return float(torch.cat([loss.fraction_left(loss.masked.logits(without_f[None], row_r), row_r) for row_r in rows]).mean())

    assert 0 < len(node_k) < len(none_f) and left(0) > loss.config.left >= left(len(node_k))


def test_prompts_that_are_learnt_from_are_of_other_pairs_than_those_that_circuits_are_held_to() -> None:
    train, validation = planted_pairs(90, (4, 6)), planted_pairs(40, (5,), seed=1)
    learnt, held = split_prompts(train, validation)
    assert len(held) == 32 and len(learnt) > 64

    def pairs_of(pairs: TokenPairs) -> set[tuple[int, ...]]:
        """Prompts but for what the two members of a pair differ in, and padding."""
        return {tuple(row[:last]) for row, last in zip(pairs.prompt_bt.tolist(), pairs.last_b.tolist(), strict=True)}

    assert not pairs_of(learnt) & pairs_of(held)
    for split in (train, validation):  # both have prompts of both, and of both answers
        assert pairs_of(learnt) & pairs_of(split) and pairs_of(held) & pairs_of(split)
    for some in (learnt, held):
        assert set(some.answer_bk.flatten().tolist()) == {4, 5}
    backwards = train.rows(torch.arange(len(train) - 1, -1, -1))
    assert (
        torch.equal(select_prompts(train, 5).prompt_bt, select_prompts(backwards, 5).prompt_bt)
        and len(select_prompts(train, 5)) == 5
    )
    assert len(select_prompts(planted_pairs(3), 8)) == 6


def test_the_measures_are_those_of_each_prompt_alone(coupling: CoupledModels) -> None:
    pairs: TokenPairs = planted_pairs(4, (4, 6)).both_members()
    means = corpus_means(coupling.sparse, corpus()) | error_means(coupling, corpus())
    test = task_loss(coupling, means, pairs, CONFIG)
    size = test.masked.space.size
    level_f = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0))
    one = measured(test, NestedMasks((Level(0.9),), level_f, (0.0,)))
    assert one.errors == int((test.masked.is_error_f & (level_f == 0)).sum()) > 0

    kept_f, dense_bv = level_f == 0, []
    for row in range(len(pairs)):
        tokens_1t = pairs.prompt_bt[row : row + 1, : int(pairs.last_b[row]) + 1]
        dense_bv.append(coupling.dense.run(tokens_1t).logits_btv[0, -1])
    whole_b = pairs.difference(torch.stack(dense_bv))
    torch.testing.assert_close(test.model_b, whole_b, atol=1e-4, rtol=1e-4)
    everything_b = test.masked.difference(torch.ones(len(pairs), size, dtype=torch.bool))
    torch.testing.assert_close(everything_b, whole_b, atol=1e-3, rtol=1e-3)  # with every error the dense model
    singles = []
    for row in range(len(pairs)):
        alone = test.masked.on_prompt(row)
        logits_1v = alone.logits(kept_f[None])
        singles.append(alone.question.difference(logits_1v)[0])
    off = (torch.stack(singles) - whole_b).mean().abs()
    assert one.miss == pytest.approx(float(off), rel=1e-3, abs=1e-4)
    assert one.faithfulness == pytest.approx(1 - float(off) / abs(test.span), rel=1e-3, abs=1e-4)


def test_what_is_left_is_without_the_circuit(coupling: CoupledModels, dense: DenseModel) -> None:
    coupling, pairs = planted(coupling, dense), planted_pairs(4).both_members()
    sparse = coupling.sparse
    means = corpus_means(sparse, corpus())
    test = task_loss(coupling, means, pairs, CONFIG, dense=False)
    kept_f = torch.rand(test.masked.space.size, generator=torch.Generator().manual_seed(4)) < 0.5
    one = measured(test, NestedMasks((Level(0.9),), (~kept_f).long(), (0.0,)))
    length = pairs.prompt_bt.shape[1]

    def mean_difference(mask_f: torch.Tensor) -> float:
        masks = {at: kept_1n.expand(length, -1) for at, kept_1n in test.masked.space.split(mask_f).items()}
        logits_btv = sparse.run(pairs.prompt_bt, gate=ablation_gate(masks, means)).logits_btv
        return float(pairs.difference(pairs.logits_at_last(logits_btv)).mean())

    nothing, every = (mean_difference(torch.full_like(kept_f, kept)) for kept in (False, True))
    assert one.left == pytest.approx((mean_difference(~kept_f) - nothing) / (every - nothing), rel=1e-3, abs=1e-4)


def test_a_task_without_pairs_or_without_a_span_is_refused(coupling: CoupledModels) -> None:
    with pytest.raises(SearchError, match="no test pairs"):
        with_all_splits(task(test=0))
    with torch.no_grad():
        coupling.sparse.unembedding.weight.zero_()
    with pytest.raises(SearchError, match="nothing to explain"):
        found(coupling, task())

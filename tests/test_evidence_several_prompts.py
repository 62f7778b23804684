"""Circuits of several prompts, measured: against runs of each prompt alone, and on a model whose circuit was planted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import VOCABULARY, planted_pairs, planted_sparse

from bridge.bridges import Coupling
from bridge.circuit import ablation_gate, corpus_means
from bridge.circuits.error_nodes import error_means
from bridge.circuits.loss import Level, SearchConfig
from bridge.circuits.masks import MaskError
from bridge.circuits.nested import Nested
from bridge.circuits.task_nested import find_task_nested, task_loss
from bridge.dense import DenseModel
from bridge.evidence.several_prompts import measure_on_prompts
from bridge.tasks.tokens import Resolved, TokenPairs

CONFIG = SearchConfig(steps=30, densities=(0.3, 0.6))


def corpus() -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def task(**lengths: int) -> Resolved:
    splits: dict = {}
    for seed, name in enumerate(("train", "validation", "test")):
        splits[name] = planted_pairs(6, (4, 6), seed).rows(torch.arange(lengths.get(name, 6)))
    return Resolved("planted", "test", splits, 18, {})


def planted(coupling: Coupling, dense: DenseModel) -> Coupling:
    return replace(coupling, sparse=planted_sparse(dense, decoys=4))


def test_a_tasks_circuit_is_measured_where_it_was_not_searched(coupling: Coupling, dense: DenseModel) -> None:
    coupling = planted(coupling, dense)
    found = find_task_nested(coupling, corpus_means(coupling.sparse, corpus()), task(), CONFIG, dense=False)
    measures = measure_on_prompts(found.test, found.nested)
    opened = measures[CONFIG.opening]
    assert opened.nodes == 6 and opened.within and opened.errors == 0 and opened.error_share == 0
    assert opened.faithfulness > 0.95 and opened.supersets_worst > 0.95 and abs(opened.left) < 0.05
    assert [one.asked for one in measures] == [level.faithfulness for level in found.nested.levels]
    assert not torch.equal(found.test.masked.question.prompt_bt, found.held.masked.question.prompt_bt)


def test_the_measures_are_those_of_each_prompt_alone(coupling: Coupling) -> None:
    pairs: TokenPairs = planted_pairs(4, (4, 6)).both()
    means = corpus_means(coupling.sparse, corpus()) | error_means(coupling, corpus())
    test = task_loss(coupling, means, pairs, CONFIG)
    size = test.masked.space.size
    level_f = torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0))
    (measured,) = measure_on_prompts(test, Nested((Level(0.9),), level_f, (0.0,)))
    assert measured.errors == int((test.masked.is_error_f & (level_f == 0)).sum()) > 0

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
        alone = test.masked.only(row)
        logits_1v = alone.logits(kept_f[None])
        singles.append(alone.question.difference(logits_1v)[0])
    off = (torch.stack(singles) - whole_b).mean().abs()
    assert measured.miss == pytest.approx(float(off), rel=1e-3, abs=1e-4)
    assert measured.faithfulness == pytest.approx(1 - float(off) / abs(test.span), rel=1e-3, abs=1e-4)


def test_what_is_left_is_without_the_circuit(coupling: Coupling, dense: DenseModel) -> None:
    coupling, pairs = planted(coupling, dense), planted_pairs(4).both()
    sparse = coupling.sparse
    means = corpus_means(sparse, corpus())
    test = task_loss(coupling, means, pairs, CONFIG, dense=False)
    kept_f = torch.rand(test.masked.space.size, generator=torch.Generator().manual_seed(4)) < 0.5
    (measured,) = measure_on_prompts(test, Nested((Level(0.9),), (~kept_f).long(), (0.0,)))
    length = pairs.prompt_bt.shape[1]

    def mean_difference(mask_f: torch.Tensor) -> float:
        masks = {at: kept_1n.expand(length, -1) for at, kept_1n in test.masked.space.split(mask_f).items()}
        logits_btv = sparse.run(pairs.prompt_bt, gate=ablation_gate(masks, means)).logits_btv
        return float(pairs.difference(pairs.at_last(logits_btv)).mean())

    nothing, every = (mean_difference(torch.full_like(kept_f, kept)) for kept in (False, True))
    assert measured.left == pytest.approx((mean_difference(~kept_f) - nothing) / (every - nothing), rel=1e-3, abs=1e-4)


def test_a_task_without_pairs_or_without_a_span_is_refused(coupling: Coupling) -> None:
    means = corpus_means(coupling.sparse, corpus())
    with pytest.raises(MaskError, match="no test pairs"):
        find_task_nested(coupling, means, task(test=0), CONFIG, dense=False)
    with torch.no_grad():
        coupling.sparse.unembedding.weight.zero_()
    with pytest.raises(MaskError, match="nothing to explain"):
        find_task_nested(coupling, corpus_means(coupling.sparse, corpus()), task(), CONFIG, dense=False)

"""Circuits of several prompts: measures are the literal ones, gradients the finite differences, and what was planted is found."""

from __future__ import annotations

import pytest
import torch
from support.models import VOCABULARY, planted_pairs, planted_sparse, untrained
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import find_nested
from bridge.models.circuit import ablation_gate, corpus_means, kl
from bridge.models.dense import DenseModel
from bridge.models.sparse import SparseTransformer

CONFIG = SearchConfig(densities=(0.3, 0.6), prompts=3)
PLANTED = {"L0.mlp_in[0]", "L0.mlp_in[1]", "L0.mlp_act[0]", "L0.mlp_act[1]", "L0.mlp_out[2]", "L0.mlp_out[3]"}


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def loss_of(sparse: SparseTransformer, question: Question, config: SearchConfig = CONFIG) -> CircuitLoss:
    """The sparse model, held to its own answers, channels shared over positions."""
    masked = MaskedModel(sparse, question, corpus_means(sparse, corpus()), by_position=False)
    return CircuitLoss(masked, masked.logits(torch.ones(len(question), masked.space.size, dtype=torch.bool)), config)


@pytest.fixture
def loss(dense: DenseModel) -> CircuitLoss:
    return loss_of(untrained(dense).sparse.requires_grad_(False), Question.of_pairs(planted_pairs(4, (4, 6)).both_members()))


def random_masks(loss: CircuitLoss, count: int = 2) -> Tensor:
    return torch.rand(count, loss.masked.space.size, generator=torch.Generator().manual_seed(1)) < 0.7


def literal_logits(loss: CircuitLoss, kept_f: Tensor) -> Tensor:
    """logits_bv, each prompt by itself and without padding."""
    masked, question, rows = loss.masked, loss.masked.question, []
    for tokens_t, last in zip(question.prompt_bt, question.last_b.tolist(), strict=True):
        gate = ablation_gate(
            {at: kept_1n.expand(last + 1, -1) for at, kept_1n in masked.space.split(kept_f).items()}, masked.means
        )
        rows.append(masked.sparse.run(tokens_t[None, : last + 1], gate=gate).logits_btv[0, -1])
    return torch.stack(rows)


def test_a_circuit_is_as_far_off_as_the_prompts_are_in_the_mean_or_one_by_one(loss: CircuitLoss) -> None:
    pairs, kept_cf = planted_pairs(4, (4, 6)).both_members(), random_masks(loss)
    for level in (Level(0.9), Level(None)):
        for kept_f, off in zip(kept_cf, loss.distance_alone(loss.logits(kept_cf), level), strict=True):
            logits_bv = literal_logits(loss, kept_f)
            all_bv = literal_logits(loss, torch.ones_like(kept_f))
            span = pairs.difference(all_bv).mean() - pairs.difference(literal_logits(loss, torch.zeros_like(kept_f))).mean()
            miss = (pairs.difference(logits_bv) - pairs.difference(all_bv)).mean() / span.abs()
            single_b = (pairs.difference(logits_bv) - pairs.difference(all_bv)) / span.abs()
            wanted = max(miss.abs(), single_b.square().mean().sqrt() / CONFIG.superset_rms) / 0.1
            wanted = wanted if level.faithfulness else kl(all_bv, logits_bv).mean() / CONFIG.kl
            torch.testing.assert_close(off, wanted, atol=1e-4, rtol=1e-3)


def test_supersets_are_held_to_their_spread_over_prompts_as_well(loss: CircuitLoss) -> None:
    kept_f, level = random_masks(loss)[0], Level(0.9)
    miss_ub = torch.stack([loss.miss(literal_logits(loss, kept_f | superset_f)) for superset_f in loss.superset_uf])
    alone = float(loss.distance_alone(loss.logits(kept_f[None]), level))
    single_u = miss_ub.square().mean(1).sqrt() / CONFIG.superset_rms
    mean_u = torch.maximum(miss_ub.mean(1).abs(), single_u) / 0.1
    bounds = mean_u.mean(), miss_ub.square().mean().sqrt() / 0.1 / CONFIG.superset_rms, mean_u.max() / CONFIG.superset_worst
    assert loss.worst_distance(kept_f, level) == pytest.approx(float(max(alone, *bounds)), rel=1e-3)


def test_what_a_deletion_leaves_is_a_mean_over_the_prompts(loss: CircuitLoss) -> None:
    pairs, (kept_f, _) = planted_pairs(4, (4, 6)).both_members(), random_masks(loss)
    without, nothing, whole = (
        pairs.difference(literal_logits(loss, mask_f)).mean()
        for mask_f in (~kept_f, torch.zeros_like(kept_f), torch.ones_like(kept_f))
    )
    assert float(loss.left_after_deletion(kept_f[None])) == pytest.approx(
        float((without - nothing) / (whole - nothing)), abs=1e-4
    )


def test_the_same_prompt_twice_is_measured_as_once(dense: DenseModel) -> None:
    sparse, question = planted_sparse(dense, decoys=4), Question.of_pairs(planted_pairs(1))
    once, twice = loss_of(sparse, question), loss_of(sparse, question.rows(torch.tensor([0, 0])))
    for kept_f in random_masks(once, 4):
        for level in (Level(0.8), Level(None)):
            assert once.worst_distance(kept_f, level) == pytest.approx(twice.worst_distance(kept_f, level), rel=1e-4, abs=1e-5)


def test_the_gradient_over_prompts_is_that_of_finite_differences(loss: CircuitLoss) -> None:
    mask_cf = torch.rand(2, loss.masked.space.size, generator=torch.Generator().manual_seed(2))
    gradient_cf = loss.gradient(mask_cf, loss.miss)
    strongest = gradient_cf[1].abs().argsort(descending=True)[:5].tolist()
    for node in strongest:
        moved_2f = mask_cf[1].repeat(2, 1)
        moved_2f[0, node] += 5e-4
        moved_2f[1, node] -= 5e-4
        above, below = loss.miss(loss.logits(moved_2f)).view(2, -1).mean(1).tolist()
        assert float(gradient_cf[1, node]) == pytest.approx((above - below) / 1e-3, rel=0.05, abs=1e-4)


def test_a_node_deleted_from_one_of_the_prompts(loss: CircuitLoss) -> None:
    kept_f, node_k = torch.ones(loss.masked.space.size, dtype=torch.bool), torch.arange(0, loss.masked.space.size, 17)
    logits_kv = loss.masked.on_prompt(3).logits_without(kept_f, node_k)
    for node, logits_v in zip(node_k.tolist(), logits_kv, strict=True):
        without_f = kept_f.clone()
        without_f[node] = False
        torch.testing.assert_close(logits_v, literal_logits(loss, without_f)[3], atol=1e-4, rtol=1e-4)


def test_the_circuit_of_a_task_is_what_was_planted(dense: DenseModel) -> None:
    sparse = planted_sparse(dense, decoys=4)
    train = loss_of(sparse, Question.of_pairs(planted_pairs(8, (4, 6)).both_members()))
    held = loss_of(sparse, Question.of_pairs(planted_pairs(4, (5, 6), seed=3).both_members()))
    found = find_nested(held, train=train)
    place = CONFIG.opening
    names = {held.masked.space.node(place).name for place in found.kept(place).nonzero().flatten().tolist()}
    assert names == PLANTED
    assert max(found.distances) <= 1
    for smaller in range(len(found.levels) - 1):
        assert bool((found.kept(smaller) <= found.kept(smaller + 1)).all())


def test_a_seed_finds_the_same_again(dense: DenseModel) -> None:
    loss = loss_of(untrained(dense).sparse.requires_grad_(False), Question.of_pairs(planted_pairs(4).both_members()))
    first, again = find_nested(loss), find_nested(loss)
    assert torch.equal(first.level_f, again.level_f)

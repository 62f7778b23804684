"""The effect profile of several prompts: a node's effects by hand, and a copy of the dense model, in which both are the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from support.models import untrained
from support.studies_task_cases import case_of, copied, decoded, dense_difference, literal_run, some_nodes

from bridge.evidence.effects import (
    Effect,
    effect_profile,
    permuted_null,
    profile_measure,
    profile_nodes,
    rank_correlation,
)
from bridge.evidence.measures import Criterion
from bridge.models.circuit import Node
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.models.sparse import Location

ASKED = Criterion(">=", 0.6, True)


def effects_of(sparse_pb: np.ndarray, dense_pb: np.ndarray, site_p: np.ndarray) -> tuple[Effect, ...]:
    return tuple(
        Effect(
            f"L0.v[{p}]", p < len(site_p) // 2, int(site_p[p]), float(sparse_pb[p].mean()), float(dense_pb[p].mean()),
            tuple(zip(sparse_pb[p].tolist(), dense_pb[p].tolist(), strict=True)),
        )
        for p in range(len(site_p))
    )  # fmt: skip


@torch.no_grad()
def test_effects_are_those_of_one_node_deleted_in_one_prompt(dense: DenseModel) -> None:
    coupling = untrained(dense)
    transporter, kept_f, pairs = case_of(coupling)
    nodes = [Node(Location(0, "v"), 3), Node(Location(0, "mlp_act"), 17), Node(Location(1, "attn_out"), 5)]
    place_p = torch.tensor([transporter.masked.space.index_of(node) for node in nodes])
    found = effect_profile(transporter, kept_f, place_p)
    for node, place, effect in zip(nodes, place_p.tolist(), found, strict=True):
        alone_f = transporter.reference_f.clone()
        alone_f[place] = False
        assert effect.node == str(node) and effect.site == coupling.sparse.site(node.location) + 1 and len(effect.by_prompt) == 12
        assert effect.sparse == pytest.approx(np.mean([sparse for sparse, _ in effect.by_prompt]))
        for row in (0, 2, 10):
            plain, without = (literal_run(transporter, row, mask_f) for mask_f in (transporter.reference_f, alone_f))
            answer, wrong = pairs.answer_bk[row, 0], pairs.wrong_bk[row, 0]
            change_v = (plain.logits_btv - without.logits_btv)[0, -1]
            sparse, moved = (share * transporter.loss.span for share in effect.by_prompt[row])
            assert sparse == pytest.approx(float(change_v[answer] - change_v[wrong]), abs=1e-4)
            change_1ts = without.residuals[effect.site] - plain.residuals[effect.site]
            h_1td = transporter.dense.residuals[effect.site][row : row + 1, : change_1ts.shape[1]]
            enter = Enter.at(effect.site, h_1td + decoded(transporter, effect.site, change_1ts))
            expected = float(transporter.loss.model_b[row]) - dense_difference(coupling, pairs, row, enter)
            assert moved == pytest.approx(expected, abs=1e-3)


def test_in_a_copy_effects_are_the_same() -> None:
    coupling = copied()
    transporter, kept_f, _ = case_of(coupling, some_nodes(coupling, 0.5))
    effects = effect_profile(transporter, kept_f, profile_nodes(transporter, kept_f, 100, torch.Generator().manual_seed(0)))
    measure = profile_measure(effects, ASKED, 0)
    assert measure.passed and measure.value is not None and measure.value > 0.97
    assert measure.interval is not None and measure.ceiling is not None and measure.control is not None
    assert measure.control.bar < measure.value
    assert 0 < sum(effect.inside for effect in effects) < len(effects) == len(measure.points)


def test_what_cannot_be_ranked_is_not() -> None:
    coupling = copied()
    transporter, kept_f, _ = case_of(coupling, torch.zeros(sum(coupling.sparse.locations().values()), dtype=torch.bool))
    node_p = profile_nodes(transporter, kept_f, 100, torch.Generator().manual_seed(0))
    measure = profile_measure(effect_profile(transporter, kept_f, node_p), ASKED, 0)
    assert measure.passed is None and "too few" in measure.note
    flat = profile_measure(effects_of(np.zeros((12, 4)), np.ones((12, 4)), np.zeros(12)), ASKED, 0)
    assert flat.passed is None and "sparse model" in flat.note


def test_an_unrelated_profile_fails() -> None:
    generator = np.random.default_rng(0)
    effect_pb = generator.normal(size=(60, 1)) + 0.1 * generator.normal(size=(60, 16))
    other = profile_measure(effects_of(effect_pb, generator.permutation(effect_pb), np.arange(60) % 3), ASKED, 0)
    assert other.passed is False
    noisy_pb = effect_pb + 0.1 * generator.normal(size=(60, 16))
    same = profile_measure(effects_of(effect_pb, noisy_pb, np.arange(60) % 3), ASKED, 0)
    assert same.passed and same.interval is not None and same.value is not None
    assert same.interval[0] < same.value <= same.interval[1] + 1e-9
    assert same.ceiling is not None and same.ceiling > 0.9


def test_rank_correlation_is_spearmans_with_ties_and_rows() -> None:
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 5, (4, 30)).astype(float), generator.normal(size=(4, 30))
    for row in range(4):
        assert rank_correlation(x, y)[row] == pytest.approx(scipy.stats.spearmanr(x[row], y[row])[0])  # pyright: ignore[reportArgumentType]
    assert math.isnan(rank_correlation(np.zeros(5), np.arange(5.0)))


def test_the_null_of_unrelated_effects_is_centred_on_0_and_keeps_what_sites_explain() -> None:
    generator = np.random.default_rng(1)
    site_p = np.repeat(np.arange(4), 25)
    x_p, y_p = generator.normal(size=100), generator.normal(size=100)
    null = permuted_null(x_p, y_p, site_p, generator)
    assert abs(null.mean()) < 0.06
    assert null.std() == pytest.approx(1 / math.sqrt(99), rel=0.15)
    # effects that grow with the site alone correlate, and so does their null
    x_p, y_p = x_p * 0.1 + site_p, y_p * 0.1 + site_p
    null = permuted_null(x_p, y_p, site_p, generator)
    assert null.mean() > 0.8
    assert rank_correlation(x_p, y_p) == pytest.approx(null.mean(), abs=0.05)

"""Effect profile: the effect on d of ablating a single node, in the sparse model and, transported, in the dense model.

For nodes i of the circuit, and as many active nodes outside it at each location (fewer if a location has fewer):

    sparse_i    d(R) - d(R less i)                                            share of the span
    dense_i     loss of d by the change of the residual at the site after the node's sublayer, transported

The models are compared by rank, and ties share their mean rank. Effects within RESOLUTION of 0 count as 0, so rounding is not
ranked. The null permutes the nodes within each site, because effects at late sites are larger in both models, which proves
nothing. Errors are excluded, because the dense model has no counterpart. With several prompts, effects are means over them, and
the ceiling is the mean rank correlation of dense effects between halves of the prompts. Nodes and prompts are bootstrapped.

Shape legend: p node of the profile, b prompt, k draw, n nodes of a location, t token, f all nodes in one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridge.evidence.carry import Transporter
from bridge.evidence.controls import sample_by_location, sample_indices
from bridge.evidence.measures import Control, Criterion, Measure, Point

MIN_NODES_TO_RANK = 10  # nodes; with fewer, a rank correlation means nothing
RESOLUTION = 1e-5  # of the span: float32 logits of a resumed model differ by a tenth of this
DRAWS, PERMUTATIONS = 500, 2000  # draws of the bootstrap, permutations of the null
HALF_SPLITS = 20  # random splits of the prompts into halves, to see how well the dense effects repeat
QUANTILE = 0.95  # quantile of the permuted correlations that the value must exceed


@dataclass(frozen=True)
class Effect:
    """Loss of d by ablating one node, as shares of the span: in the sparse model and, transported at `site`, in the dense one.

    by_prompt holds (sparse, dense) for each prompt if there are several; the fields sparse and dense are the means.
    """

    node: str
    inside: bool
    site: int
    sparse: float
    dense: float
    by_prompt: tuple[tuple[float, float], ...] = ()


def profile_nodes(transporter: Transporter, circuit_f: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return node_p: at most count // 2 nodes of the circuit, and at each location as many active ones outside, if there are."""
    masked = transporter.masked
    inside_p = sample_indices((circuit_f & ~masked.is_error_f).nonzero().flatten(), count // 2, generator)
    inside_f = torch.zeros_like(circuit_f).index_fill(0, inside_p, True)
    return torch.cat([inside_p, sample_by_location(masked.space, inside_f, masked.active_f & ~circuit_f, generator)])


def effect_profile(transporter: Transporter, circuit_f: Tensor, node_p: Tensor) -> tuple[Effect, ...]:
    """Measure the effect on d of ablating each node alone, in both models."""
    if not len(node_p):
        return ()
    masked = transporter.masked
    by_position = masked.space.n_tokens == masked.n_tokens
    site_p = (masked.site_f[node_p.cpu()] + 1).tolist()
    both_pb2 = transporter.transport_deleted(list(node_p[:, None]), site_p).permute(1, 2, 0).double()
    return tuple(
        Effect(
            str(node) if by_position else node.name, bool(circuit_f[place]), site, *both_b2.mean(0).tolist(),
            by_prompt=tuple(map(tuple, both_b2.tolist())) if len(both_b2) > 1 else (),
        )
        for place, site, both_b2 in zip(node_p.tolist(), site_p, both_pb2, strict=True)
        for node in [masked.space.node(place)]
    )  # fmt: skip


def profile_measure(effects: tuple[Effect, ...], criterion: Criterion, seed: int) -> Measure:
    """Return the rank correlation of the effects with its null as control and a bootstrap interval; the note has the p-value."""
    key, name = "profile", "rank correlation of effects in dense"
    points = tuple(Point(effect.node, {"sparse": effect.sparse, "dense": effect.dense}) for effect in effects)

    def unknown(note: str) -> Measure:
        return Measure(key, name, None, criterion, note=note, points=points)

    if len(effects) < MIN_NODES_TO_RANK:
        return unknown(f"{len(effects)} nodes are too few to rank")
    effect_2pb = np.array([each.by_prompt or [(each.sparse, each.dense)] for each in effects]).transpose(2, 0, 1)
    sparse_p, dense_p = _zero_small_effects(effect_2pb.mean(2))
    site_p = np.array([effect.site for effect in effects])
    if np.ptp(sparse_p) == 0 or np.ptp(dense_p) == 0:
        return unknown(f"no node has an effect in the {'sparse' if np.ptp(sparse_p) == 0 else 'dense'} model")
    if np.unique(site_p).size == len(effects):
        return unknown("no two nodes are at the same site, so nothing can be permuted")
    generator = np.random.default_rng(seed)
    value = float(rank_correlation(sparse_p, dense_p))
    null = permuted_null(sparse_p, dense_p, site_p, generator)
    p_value = float((1 + np.sum(null >= value)) / (1 + len(null)))
    control = Control("permuted", len(null), float(null.mean()), float(np.quantile(null, QUANTILE)), f"{QUANTILE:.0%}")
    low, high = np.nanquantile(_bootstrap_correlations(effect_2pb, generator), [0.025, 0.975])
    inside, zeros = sum(effect.inside for effect in effects), int(np.sum((sparse_p == 0) & (dense_p == 0)))
    note = f"{len(effects)} nodes, {inside} of them in the circuit, {zeros} without any effect; p {p_value:.2g}"
    bounds, ceiling = (float(low), float(high)), _split_half_correlation(effect_2pb[1])
    return Measure(key, name, value, criterion, control, bounds, ceiling, note, points)


def _zero_small_effects(effect: np.ndarray) -> np.ndarray:
    """Set effects within RESOLUTION of 0 to 0, so that rounding is not ranked."""
    return np.where(np.abs(effect) < RESOLUTION, 0.0, effect)


def _bootstrap_correlations(effect_2pb: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return correlation_k of bootstrap draws, which resample the nodes and the prompts."""
    _, nodes, prompts = effect_2pb.shape
    pick_kp = generator.integers(nodes, size=(DRAWS, nodes))
    pick_kb = generator.integers(prompts, size=(DRAWS, prompts))
    weight_bk = np.stack([np.bincount(pick_b, minlength=prompts) for pick_b in pick_kb], 1) / prompts
    return rank_correlation(*np.take_along_axis(_zero_small_effects(effect_2pb @ weight_bk).transpose(0, 2, 1), pick_kp[None], 2))


def _split_half_correlation(dense_pb: np.ndarray) -> float | None:
    """Return the mean rank correlation of the effects between random halves of the prompts; None for a single prompt."""
    generator, found = np.random.default_rng(0), []
    for _ in range(HALF_SPLITS if dense_pb.shape[1] > 1 else 0):
        order_b = generator.permutation(dense_pb.shape[1])
        first_p, second_p = (_zero_small_effects(dense_pb[:, half_b].mean(1)) for half_b in np.array_split(order_b, 2))
        if np.ptp(first_p) and np.ptp(second_p):
            found.append(float(rank_correlation(first_p, second_p)))
    return sum(found) / len(found) if found else None


def mean_ranks(x: np.ndarray) -> np.ndarray:
    """Return ranks from 1 along the last axis; ties share the mean rank. As `scipy.stats.rankdata`, which imports in .4 s."""
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float64))
    ordered = values.sort(-1).values
    below, up_to = torch.searchsorted(ordered, values), torch.searchsorted(ordered, values, right=True)
    return ((below + up_to + 1).double() / 2).numpy()


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's rank correlation along the last axis; ties share the mean rank. NaN if x or y is constant."""
    x, y = (mean_ranks(values) for values in (x, y))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def permuted_null(x_p: np.ndarray, y_p: np.ndarray, site_p: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return rank correlations of y with x, whose values are permuted among the nodes of each site."""
    permuted = np.tile(mean_ranks(x_p), (PERMUTATIONS, 1))
    for site in np.unique(site_p):
        at_site = np.flatnonzero(site_p == site)
        permuted[:, at_site] = generator.permuted(permuted[:, at_site], axis=1)
    return rank_correlation(permuted, np.broadcast_to(y_p, permuted.shape))

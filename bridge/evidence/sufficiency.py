"""Measures of nested circuits in the sparse model: alone, in random supersets, against an adversary, and deleted.

d is the log-odds of the question, C a circuit of nodes and errors, E the errors in it, and everything else is at its mean:

    supersets    F(C + U) over random sets U of outside nodes, with densities .1 to .9; other sets than in the search
    adversary    lowest F(C + k) over 20 steps k <- clamp(k + .1 sign of the gradient of miss^2), with k_i in [0, 1] for each node
                 outside, from 1/2. It is not judged, because such mixtures are far from anything that the model does
    left         share of the span that remains when C is deleted
    error share  share of the span that E adds, the mean over both orders: ((d(C) - d(C - E)) + (d(E) - d(nothing))) / (2 span)
    backup       if too much is left: the smallest number of other nodes that must be deleted too, in the order of the integrated
                 gradients of `left` over the nodes outside C (`circuits/necessity`)

With several prompts (a task), d is the mean over them.

Shape legend: c mask, r masked copy of a prompt, b prompt, u superset, f all nodes and errors in one row, k index into f.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, random_sets
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.search import NestedMasks

_SUPERSETS, _SUPERSETS_OF_LARGE = 20, 4  # of a circuit, and of the largest circuits, which are almost the whole model
_N_LARGE_CIRCUITS = 2
_DENSITIES = 0.1, 0.9
_ADVERSARY_STEPS, _ADVERSARY_STEP_SIZE = 20, 0.1  # of the adversary; five steps from 1/2 can reach any mask
_STRONGEST = 5  # number of nodes that a backup names


@dataclass(frozen=True)
class NestedCircuit:
    """One of the nested circuits and its measures; sizes count nodes, never groups.

    asked is the faithfulness that the search had to reach, None for the whole distribution; faithfulness is the measured value,
    two-sided. miss is the distance from the model's d, and kl the KL from its next-token distribution, both in nats.
    supersets_mean and _worst are faithfulness in random supersets, supersets_rms is the rms miss there as a share of the span;
    adversary is the lowest faithfulness that 20 sign steps on a mask of outside nodes find. left is the share of the span that
    remains when the circuit is deleted, error_share the share through its errors. within: it meets every bound of the search.
    """

    asked: float | None
    nodes: int
    errors: int
    faithfulness: float
    miss: float
    kl: float
    supersets_mean: float
    supersets_rms: float
    supersets_worst: float
    adversary: float | None
    left: float
    error_share: float
    within: bool


@dataclass(frozen=True)
class Backup:
    """Nodes that preserve the answer when a circuit is deleted: how many must be deleted too, and the strongest of them.

    left is the share of the span that remains when only the circuit is deleted.
    """

    left: float
    nodes: int
    strongest: tuple[str, ...]


def measure_nested(loss: CircuitLoss, nested: NestedMasks, seed: int = 0) -> tuple[NestedCircuit, ...]:
    """Measure each nested circuit, without the adversary. The two largest get fewer supersets, except at the opening level."""
    measured = []
    for place, level in enumerate(nested.levels):
        is_large = place >= len(nested.levels) - _N_LARGE_CIRCUITS and place != loss.config.opening
        superset_uf = superset_draws(loss, _SUPERSETS_OF_LARGE if is_large else _SUPERSETS, seed + place)
        within = nested.distances[place] <= 1
        measured.append(measure_circuit(loss, nested.kept(place), superset_uf, level.faithfulness, within))
    return tuple(measured)


def superset_draws(loss: CircuitLoss, draws: int, seed: int) -> Tensor:
    """Return superset_uf, random sets of nodes without errors, with densities from .1 to .9; other sets than in the search."""
    superset_uf = random_sets(np.random.default_rng(seed + 1_000_003), np.linspace(*_DENSITIES, draws), len(loss.nodes_f))
    return superset_uf.to(loss.nodes_f.device) & loss.nodes_f


def measure_circuit(loss: CircuitLoss, kept_f: Tensor, superset_uf: Tensor, asked: float | None, within: bool) -> NestedCircuit:
    """Measure one circuit in one batch. With several prompts d is the mean, and the rms runs over prompts and supersets."""
    count, error_f = len(loss.model_b), kept_f & loss.masked.is_error_f
    rows_cf = torch.stack([kept_f, loss.complement(kept_f), kept_f & ~error_f, error_f])
    logits_rv = loss.logits(torch.cat([rows_cf, kept_f | superset_uf]))
    miss_cb = loss.miss(logits_rv).view(-1, count)
    left_c = loss.fraction_left(logits_rv).view(-1, count).mean(1)
    alone, supersets_u = float(miss_cb[0].mean().abs()), 1 - miss_cb[4:].mean(1).abs()
    share = (left_c[0] - left_c[2] + left_c[3]) / 2 if bool(error_f.any()) else torch.zeros(())
    return NestedCircuit(
        asked=asked,
        nodes=int(kept_f.sum()) - int(error_f.sum()),
        errors=int(error_f.sum()),
        faithfulness=1 - alone,
        miss=alone * abs(loss.span),
        kl=float(loss.kl(logits_rv[:count]).mean()),
        supersets_mean=float(supersets_u.mean()),
        supersets_rms=float(miss_cb[4:].square().mean().sqrt()),
        supersets_worst=float(supersets_u.min()),
        adversary=None,
        left=float(left_c[1]),
        error_share=float(share),
        within=within,
    )


def adversarial_faithfulness(loss: CircuitLoss, kept_cf: Tensor) -> Tensor:
    """Return lowest_c, the lowest faithfulness that sign steps on a mask of the nodes outside each circuit find."""
    outside_cf = loss.complement(kept_cf)
    mask_cf = torch.where(outside_cf, 0.5, kept_cf.float())
    lowest_c = torch.full((len(kept_cf),), torch.inf, device=kept_cf.device)
    for _ in range(_ADVERSARY_STEPS):
        gradient_cf, square_c = loss.masked.gradient(mask_cf, lambda logits_rv: loss.miss(logits_rv).square())
        lowest_c = torch.minimum(lowest_c, 1 - square_c.sqrt())
        mask_cf = torch.where(outside_cf, (mask_cf + _ADVERSARY_STEP_SIZE * gradient_cf.sign()).clamp(0, 1), mask_cf)
    return torch.minimum(lowest_c, 1 - loss.miss(loss.masked.logits(mask_cf)).abs())


def first_node_names(masked: MaskedModel, node_k: Tensor) -> tuple[str, ...]:
    """Return the names of the first nodes, at most 5."""
    return tuple(str(masked.space.node(place)) for place in node_k[:_STRONGEST].tolist())

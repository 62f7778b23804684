"""Nested circuits measured in the sparse model: alone, in random supersets, against an adversary, deleted; and their backup.

With d the question's log-odds and C a circuit of nodes and errors, E its errors, everything else at its mean:

    supersets    F(C + U) over random sets U of nodes outside, of densities .1 to .9; not those of the search
    adversary    the lowest F(C + k) over 20 steps k <- clamp(k + .1 sign of the gradient of miss^2), k_i in [0, 1] for every node
                 outside, from 1/2; it bounds nothing, since such mixtures are far from anything that the model does
    left         what remains of the span when C is deleted
    error share  mean over both orders of what E adds: ((d(C) - d(C - E)) + (d(E) - d(nothing))) / (2 span)
    backup       where much is left: the fewest other nodes that have to go as well, in the order of the integrated
                 gradients of `left` over what is left

Of several prompts (a task's) d is the mean over them.

Shape legend: c masks, r masked copy of a prompt, b prompt, u superset, f all nodes and errors in one row, k
some of them by their place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, random_sets
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.search import Nested

_DRAWS, _DRAWS_LARGE = 20, 4  # supersets of a circuit; of the two largest, which are all but the whole model
_LARGE = 2
_DENSITIES = 0.1, 0.9
_STEPS, _STEP = 20, 0.1  # of the adversary: from 1/2 any mask can be reached in five
_STRONGEST = 5  # nodes that a backup names


@dataclass(frozen=True)
class NestedCircuit:
    """One of the nested circuits, and what was measured of it; sizes count leaves, never groups.

    asked is the normalised faithfulness that the search was held to, None for the whole distribution; faithfulness what is
    reached, two-sided, miss the distance from the model's d in nats, kl that of the next-token distribution. supersets_* are the
    mean and lowest faithfulness, and the rms of the miss as a share of the span, of random supersets; adversary is the lowest
    that 20 sign steps on one mask of outside nodes find. left is the share of the span that remains when the circuit is deleted,
    error_share that which flows through its errors. within tells whether all that the search asks is met.
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
    """The nodes that keep up the answer where a circuit is deleted: how many have to go as well, and the strongest of them.

    left is the share of the span that remains without the circuit.
    """

    left: float
    nodes: int
    strongest: tuple[str, ...]


def measure_nested(loss: CircuitLoss, nested: Nested, seed: int = 0) -> tuple[NestedCircuit, ...]:
    """Every nested circuit measured, but for the adversary; of the two largest few supersets are drawn."""
    measured = []
    for place, level in enumerate(nested.levels):
        draws = _DRAWS if place < len(nested.levels) - _LARGE or place == loss.config.opening else _DRAWS_LARGE
        superset_uf = superset_draws(loss, draws, seed + place)
        within = nested.off[place] <= 1
        measured.append(measure_circuit(loss, nested.kept(place), superset_uf, level.faithfulness, None, within))
    return tuple(measured)


def superset_draws(loss: CircuitLoss, draws: int, seed: int) -> Tensor:
    """superset_uf: random sets of nodes, no errors, of densities between .1 and .9; other sets than the search's."""
    superset_uf = random_sets(np.random.default_rng(seed + 1_000_003), np.linspace(*_DENSITIES, draws), len(loss.nodes_f))
    return superset_uf.to(loss.nodes_f.device) & loss.nodes_f


def measure_circuit(
    loss: CircuitLoss, kept_f: Tensor, superset_uf: Tensor, asked: float | None, adversary: float | None, within: bool
) -> NestedCircuit:
    """One circuit measured, in one batch of masked copies; of several prompts d is the mean, and the rms is over them as well."""
    count, error_f = len(loss.model_b), kept_f & loss.masked.is_error_f
    rows_cf = torch.stack([kept_f, loss.complement(kept_f), kept_f & ~error_f, error_f])
    logits_rv = loss.logits(torch.cat([rows_cf, kept_f | superset_uf]))
    miss_cb = loss.miss(logits_rv).view(-1, count)
    left_c = loss.left(logits_rv).view(-1, count).mean(1)
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
        adversary=adversary,
        left=float(left_c[1]),
        error_share=float(share),
        within=within,
    )


def adversary(loss: CircuitLoss, kept_cf: Tensor) -> Tensor:
    """lowest_c faithfulness that sign steps on one mask of the nodes outside find for each circuit."""
    outside_cf = loss.complement(kept_cf)
    mask_cf = torch.where(outside_cf, 0.5, kept_cf.float())
    lowest_c = torch.full((len(kept_cf),), torch.inf, device=kept_cf.device)
    for _ in range(_STEPS):
        gradient_cf, square_c = loss.masked.gradient(mask_cf, lambda logits_rv: loss.miss(logits_rv).square())
        lowest_c = torch.minimum(lowest_c, 1 - square_c.sqrt())
        mask_cf = torch.where(outside_cf, (mask_cf + _STEP * gradient_cf.sign()).clamp(0, 1), mask_cf)
    return torch.minimum(lowest_c, 1 - loss.miss(loss.masked.logits(mask_cf)).abs())


def strongest(masked: MaskedModel, node_k: Tensor) -> tuple[str, ...]:
    """The names of the first few of some nodes."""
    return tuple(str(masked.space.node(place)) for place in node_k[:_STRONGEST].tolist())

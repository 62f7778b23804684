"""Nested circuits of several prompts measured in the sparse model, on prompts that the search has not seen.

The definitions are those of one prompt (`circuits.loss`), with d the mean over the prompts: faithfulness alone and in random
supersets of the circuit, each measured on every prompt; what is left when it is deleted; the share of its errors, the mean over
both orders of what they add. The rms is over prompts and supersets.

Shape legend: c masks, u superset, b prompt, f all nodes in one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, Level
from bridge.circuits.nested import Nested
from bridge.evidence.sufficiency import NestedCircuit

_DENSITIES = 0.1, 0.3, 0.5, 0.7, 0.9
_DRAWS = 2  # supersets of each density


def measure_on_prompts(test: CircuitLoss, nested: Nested, seed: int = 0) -> tuple[NestedCircuit, ...]:
    """Every nested circuit measured on the prompts of `test`; whether it is within what its level asks, there."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    density_u1 = torch.tensor(_DENSITIES).repeat(_DRAWS)[:, None]
    draw_uf = (torch.rand(len(density_u1), len(test.nodes_f), generator=generator) < density_u1).to(test.nodes_f.device)
    levels = enumerate(nested.levels)
    return tuple(_measured(test, nested.kept(place), draw_uf & test.nodes_f, level) for place, level in levels)


def _measured(test: CircuitLoss, kept_f: Tensor, superset_uf: Tensor, level: Level) -> NestedCircuit:
    count, error_f = len(test.model_b), kept_f & test.masked.is_error_f
    rows_cf = torch.stack([kept_f, test.complement(kept_f), kept_f & ~error_f, error_f])
    logits_rv = test.logits(torch.cat([rows_cf, kept_f | superset_uf]))
    miss_cb = test.miss(logits_rv).view(-1, count)
    left_c = test.left(logits_rv).view(-1, count).mean(1)
    supersets_u = 1 - miss_cb[4:].mean(1).abs()
    alone, share = float(miss_cb[0].mean().abs()), (left_c[0] - left_c[2] + left_c[3]) / 2
    return NestedCircuit(
        asked=level.faithfulness,
        nodes=int((kept_f & ~error_f).sum()),
        errors=int(error_f.sum()),
        faithfulness=1 - alone,
        miss=alone * abs(test.span),
        kl=float(test.kl(logits_rv[:count]).mean()),
        supersets_mean=float(supersets_u.mean()),
        supersets_rms=float(miss_cb[4:].square().mean().sqrt()),
        supersets_worst=float(supersets_u.min()),
        adversary=None,
        left=float(left_c[1]),
        error_share=float(share) if bool(error_f.any()) else 0.0,
        within=test.within(kept_f, level),
    )

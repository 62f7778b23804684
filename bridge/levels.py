"""Nested circuits within the one that was found, from a few nodes that get the answer roughly to all that get it right.

    C_n  =  the whole circuit;      C_l  =  of C_(l+1) the fewest, in order of their worth there, with   miss(C_l) <= b_l

where miss is that of the search (`prune`), the bounds b_l double towards the smaller circuits, and the worth of a node is how
steeply the miss depends on it in the circuit at hand. Each is within the next by
construction. That random company leaves the answer as it is was only asked of the whole circuit: smaller ones are for reading,
and their KL says how far to believe them.

Shape legend: f all nodes of a prompt in one row, k some nodes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.circuit import Ablations
from bridge.fewest import fewest, ranks
from bridge.prune import Alone

BOUNDS = (0.8, 0.4, 0.2, 0.1)  # of the levels below the whole circuit, whose own bound is half the last


@dataclass(frozen=True)
class Level:
    """One of the nested circuits: its nodes, KL(S, S_C) in nats, and the share D_C / D of the logit difference that it keeps."""

    nodes: int
    kl: float
    share: float


def nested_circuits(ablations: Ablations, kept_f: Tensor) -> tuple[tuple[Level, ...], Tensor]:
    """The levels of a circuit, smallest first, the last being all of it; and level_f, the first in which each node is.

    A level that would be no smaller than the next is left out; nodes outside the circuit have the number of levels.
    """
    within = [kept_f]
    for bound in reversed(BOUNDS):
        here_f = within[0]
        judge = Alone(ablations, bound)
        slope_1f, _ = judge.slopes(here_f[None], judge.miss)
        order_k = ranks(here_f, slope_1f[0].abs()).argsort()[: int(here_f.sum())]
        if not len(order_k):
            break
        # half of them is as good a guess as any; one node at least
        smaller_f = fewest(judge, torch.zeros_like(here_f).index_fill_(0, order_k[:1], True), order_k[1:], len(order_k) // 2)
        if int(smaller_f.sum()) < len(order_k):
            within.insert(0, smaller_f)
    logits_lv = ablations.logits(torch.stack(within))
    values = zip(within, ablations.kl(logits_lv).tolist(), ablations.question.difference(logits_lv).tolist(), strict=True)
    levels = tuple(Level(int(each_f.sum()), kl, difference / ablations.answer) for each_f, kl, difference in values)
    return levels, (~torch.stack(within)).sum(0)

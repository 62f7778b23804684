"""Of some nodes (or edges) the fewest that are good enough: as many of a ranking as it takes, then deletions over and over.

What is good, and what each is worth, a Judge says: the searches of a task's nodes and of its edges have one each, and share what
follows from it.

    fewest      the first few of a ranking that meet the bounds: sizes around a guess are tried in one batch, then between the
                largest that did not and the smallest that did
    deleted     every one is deleted alone; those that are not missed are deleted together, as many as the bounds allow, and the
                others tried again, until none can be spared or the work runs out

Shape legend: c circuit, f all nodes in one row, k some nodes, by their place in that row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

FACTORS = (0.25, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # sizes tried around a guess, in one batch
WAYS = 6
SPARED = 1000  # of so many nodes one, for tries of deletions to go on where some are given up


class Judge(Protocol):
    """What `fewest` and `deleted` ask about sets of nodes (or of edges): whether they are good, and what each is worth."""

    left: float  # work that may still be done
    bound: float  # on `without`

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some circuits, smaller ones first, that meets the bounds; their number where none does."""
        ...

    def without(self, kept_f: Tensor, node_k: Tensor) -> Tensor:
        """loss_k of the circuit less one node, for each of node_k."""
        ...

    def cost(self, n: int) -> float:
        """The work that `without` takes for n nodes."""
        ...


def ranks(candidates_f: Tensor, worth_f: Tensor) -> Tensor:
    """Rank of every node by its worth, the most worthy 0, candidates before all others."""
    order_f = torch.where(candidates_f, worth_f, -torch.inf).argsort(descending=True, stable=True)
    return torch.empty_like(order_f).index_copy_(0, order_f, torch.arange(len(order_f), device=order_f.device))


def bisected(good: Callable[[Tensor], bool], kept_cf: Tensor) -> int:
    """For `first_good` where one measurement is dear: the first that is good where the one before is not, by bisection."""
    low, high = -1, len(kept_cf)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(kept_cf[middle]) else (middle, high)
    return high


def fewest(judge: Judge, core_f: Tensor, ranked_k: Tensor, guess: int) -> Tensor:
    """The core and the first few of ranked_k: as few as are found to meet the bounds, which all of them are taken to do."""
    low, high = -1, len(ranked_k)  # low does not meet them, high does
    sizes = sorted({round(guess * factor) for factor in FACTORS if guess * factor < high})
    while sizes:
        first = judge.first_good(torch.stack([core_f.index_fill(0, ranked_k[:size], True) for size in sizes]))
        low, high = (sizes[first - 1] if first else low), (sizes[first] if first < len(sizes) else high)
        ratio = (high + 1) / (low + 2)
        close = high - low <= max(1, high // 50)
        sizes = [] if close else sorted({round((low + 2) * ratio ** (i / WAYS)) - 1 for i in range(1, WAYS)} - {low, high})
    return core_f.index_fill(0, ranked_k[:high], True)


def deleted(judge: Judge, kept_f: Tensor, say: Callable[[str], None], given_up: float = 0.0) -> tuple[Tensor, bool]:
    """The circuit after the deletions, and whether they went on until no node could be spared.

    Once the bound is met, the next node in the order would have been one too many; given_up is the share of those left that
    are not tried again together with it, until the next sweep. Where there is such a share, a try that spared not one in a
    thousand is the last.
    """
    missed_f, swept_f = torch.zeros_like(kept_f), torch.zeros_like(kept_f)
    while not torch.equal(swept_f, kept_f):
        swept_f = kept_f
        missed_f.zero_()
        while len(node_k := (kept_f & ~missed_f).nonzero().flatten()):
            if judge.left < judge.cost(len(node_k)):
                return kept_f, False
            say(f"deletions: {int(kept_f.sum()):,} nodes, {len(node_k):,} to try")
            miss_k, before = judge.without(kept_f, node_k), int(kept_f.sum())
            missed_f[node_k[miss_k > judge.bound]] = True
            order_k = node_k[miss_k.argsort(descending=True, stable=True)][int((miss_k > judge.bound).sum()) :]
            kept_f = fewest(judge, kept_f.index_fill(0, order_k, False), order_k, len(order_k) // 2)
            left_k = order_k[kept_f[order_k]]  # the next one would have been one too many
            missed_f[left_k[len(left_k) - max(1, round(given_up * len(left_k))) :]] = True
            if given_up and before - int(kept_f.sum()) < before // SPARED:
                return kept_f, False
    return kept_f, True

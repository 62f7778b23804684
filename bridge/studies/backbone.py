"""Nodes that the circuits of several tasks share, and those that each task has of its own.

    backbone   B = nodes in at least half of the circuits
    own        A \\ B of a task's circuit A
    overlap    Jaccard index of two tasks' own nodes, less what random sets of their sizes have outside B:
                   J = |a & b| / |a | b|        chance: |a & b| = |a| |b| / (N - |B|)        (J - chance) / (1 - chance)
    deleting   with a task's own nodes at their means, how much the loss of every task rises; the share of what deleting
               that task's own does to it

Two tasks that are both done by a model share the nodes that any text needs; with these set aside it can be seen whether the rest
is a task's alone. With fewer than three tasks half of them is one, and there is no backbone to speak of.

Shape legend: f all nodes in one row, a, b tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TASKS = 3
APART = 0.3  # aim: own nodes of two tasks overlap by no more


@dataclass(frozen=True)
class Backbone:
    """Sizes of the backbone and of what each task has beyond it; overlap_ab of that; and rise_ab of b's loss without a's own."""

    tasks: tuple[str, ...]
    nodes: int
    shared: tuple[int, ...]
    own: tuple[int, ...]
    jaccard: tuple[tuple[float, ...], ...]
    overlap: tuple[tuple[float, ...], ...]
    rise: tuple[tuple[float, ...], ...]

    @property
    def mean_jaccard(self) -> float:
        """Mean Jaccard index of two tasks' own nodes, chance included."""
        return off_diagonal(self.jaccard) or 0.0

    @property
    def mean_overlap(self) -> float:
        """Mean overlap of two tasks' own nodes, beyond chance."""
        return off_diagonal(self.overlap) or 0.0

    @property
    def apart(self) -> float | None:
        """Mean rise of a task's loss without another's own nodes, as a share of that without its own; None where that is none."""
        return off_diagonal(shares(self.rise))

    def text(self) -> str:
        """The table as a person reads it."""
        met = "yes" if self.mean_overlap <= APART else "NO"
        width = max(map(len, self.tasks))
        lines = [f"SHARED BACKBONE: {self.nodes:,} nodes are in at least half of {len(self.tasks)} circuits"]
        lines.append(f"  {'':<{width}}  in it   beyond it  rise of its loss without its own, and without another's (mean)")
        for place, name in enumerate(self.tasks):
            others = [row[place] for other, row in enumerate(self.rise) if other != place]
            rises = f"{self.rise[place][place]:+.2f}, {sum(others) / len(others):+.2f}"
            lines.append(f"  {name:<{width}}  {self.shared[place]:>5,}  {self.own[place]:>10,}  {rises}")
        lines.append(
            f"  overlap of what is beyond it: Jaccard {self.mean_jaccard:.2f}, beyond chance {self.mean_overlap:.2f}, "
            f"aim <= {APART:g}: {met}"
        )
        if self.apart is not None:
            lines.append(f"  deleting another's own does {self.apart:.2f} of what deleting a task's own does (mean)")
        return "\n".join(lines)


def find_backbone(tasks: Sequence[str], kept_af: Tensor, losses: Callable[[Tensor], Sequence[float]]) -> Backbone | None:
    """The backbone of some tasks' circuits, where losses(gone_f) are those of every task with nodes deleted; None for too few."""
    if len(tasks) < LEAST_TASKS:
        return None
    shared_f = 2 * kept_af.sum(0) >= len(kept_af)  # in at least half of the circuits
    own_af = kept_af & ~shared_f
    rest = int((~shared_f).sum())
    base = losses(torch.zeros_like(shared_f))
    rise = tuple(tuple(x - y for x, y in zip(losses(own_f), base, strict=True)) for own_f in own_af)
    pairs = [[own_overlap(one_f, other_f, rest) for other_f in own_af] for one_f in own_af]
    return Backbone(
        tuple(tasks),
        int(shared_f.sum()),
        tuple((kept_af & shared_f).sum(1).tolist()),
        tuple(own_af.sum(1).tolist()),
        tuple(tuple(jaccard for jaccard, _ in row) for row in pairs),
        tuple(tuple(beyond for _, beyond in row) for row in pairs),
        rise,
    )


def own_overlap(one_f: Tensor, other_f: Tensor, of: int) -> tuple[float, float]:
    """(Jaccard index, the same beyond chance) of two sets of nodes, of `of` in all; 0 where both are empty."""
    sizes, both = (int(one_f.sum()), int(other_f.sum())), int((one_f & other_f).sum())
    either, by_chance = sum(sizes) - both, sizes[0] * sizes[1] / max(of, 1)
    if not either:
        return 0.0, 0.0
    jaccard, chance = both / either, by_chance / (sum(sizes) - by_chance)
    return jaccard, (jaccard - chance) / (1 - chance) if chance < 1 else 0.0


def shares(rise_ab: Sequence[Sequence[float]]) -> tuple[tuple[float | None, ...], ...]:
    """rise_ab over rise_bb: what deleting a does to b, of what deleting b itself does; None where that does nothing."""
    own_b = [row[b] for b, row in enumerate(rise_ab)]
    return tuple(tuple(rise / own if own > 1e-3 else None for rise, own in zip(row, own_b, strict=True)) for row in rise_ab)


def off_diagonal(x_ab: Sequence[Sequence[float | None]]) -> float | None:
    """The mean off the diagonal, over what there is."""
    off = [x for a, row in enumerate(x_ab) for b, x in enumerate(row) if a != b and x is not None]
    return sum(off) / len(off) if off else None

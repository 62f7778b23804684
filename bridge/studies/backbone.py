"""Nodes that the circuits of several tasks share, and the nodes that each task has of its own.

    backbone   B = nodes in at least half of the circuits
    own        A \\ B for a task's circuit A
    overlap    Jaccard index of two tasks' own nodes, corrected for that of random sets of their sizes outside B:
                   J = |a & b| / |a | b|        chance: |a & b| = |a| |b| / (N - |B|)        (J - chance) / (1 - chance)
    deleting   rise of every task's loss with the own nodes of one task at their means; also as a share of its rise with its
               own nodes at their means

The circuits of any two tasks share the nodes that any text needs. With these set aside, one can see whether the other nodes
serve one task alone. With fewer than three tasks, a single circuit is half of all circuits, so no backbone is computed.

Shape legend: f all nodes in one row, a, b tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_TASKS = 3
MAX_OWN_OVERLAP = 0.3  # aim: mean overlap of two tasks' own nodes, at most


@dataclass(frozen=True)
class Backbone:
    """Sizes of the backbone and of the tasks' own nodes, overlap_ab of own nodes, rise_ab of b's loss with a's own deleted."""

    tasks: tuple[str, ...]
    nodes: int
    shared: tuple[int, ...]
    own: tuple[int, ...]
    jaccard: tuple[tuple[float, ...], ...]
    overlap: tuple[tuple[float, ...], ...]
    rise: tuple[tuple[float, ...], ...]

    @property
    def mean_jaccard(self) -> float:
        """Mean Jaccard index of two tasks' own nodes, not corrected for chance."""
        return off_diagonal_mean(self.jaccard) or 0.0

    @property
    def mean_overlap(self) -> float:
        """Mean overlap of two tasks' own nodes, beyond chance."""
        return off_diagonal_mean(self.overlap) or 0.0

    @property
    def mean_cross_effect(self) -> float | None:
        """Mean rise of a loss with another task's own nodes deleted, over that with its own deleted; None if no loss rises."""
        return off_diagonal_mean(relative_effects(self.rise))

    def text(self) -> str:
        """The backbone as a text table."""
        met = "yes" if self.mean_overlap <= MAX_OWN_OVERLAP else "NO"
        width = max(map(len, self.tasks))
        lines = [f"SHARED BACKBONE: {self.nodes:,} nodes are in at least half of {len(self.tasks)} circuits"]
        lines.append(f"  {'':<{width}}  in it         own  rise of its loss: own nodes deleted, another task's (mean)")
        for place, name in enumerate(self.tasks):
            others = [row[place] for other, row in enumerate(self.rise) if other != place]
            rises = f"{self.rise[place][place]:+.2f}, {sum(others) / len(others):+.2f}"
            lines.append(f"  {name:<{width}}  {self.shared[place]:>5,}  {self.own[place]:>10,}  {rises}")
        lines.append(
            f"  overlap of two tasks' own nodes: Jaccard {self.mean_jaccard:.2f}, beyond chance {self.mean_overlap:.2f}, "
            f"aim <= {MAX_OWN_OVERLAP:g}: {met}"
        )
        if self.mean_cross_effect is not None:
            lines.append(
                f"  effect of another task's own nodes, as a share of the task's own effect (mean): {self.mean_cross_effect:.2f}"
            )
        return "\n".join(lines)


def find_backbone(tasks: Sequence[str], kept_af: Tensor, losses: Callable[[Tensor], Sequence[float]]) -> Backbone | None:
    """The backbone of the tasks' circuits; None for too few tasks. losses(gone_f) are all tasks' losses with gone_f deleted."""
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
    """(Jaccard index, the same corrected for chance) of two sets out of `of` nodes; 0 if both are empty."""
    sizes, both = (int(one_f.sum()), int(other_f.sum())), int((one_f & other_f).sum())
    either, by_chance = sum(sizes) - both, sizes[0] * sizes[1] / max(of, 1)
    if not either:
        return 0.0, 0.0
    jaccard, chance = both / either, by_chance / (sum(sizes) - by_chance)
    return jaccard, (jaccard - chance) / (1 - chance) if chance < 1 else 0.0


def relative_effects(rise_ab: Sequence[Sequence[float]]) -> tuple[tuple[float | None, ...], ...]:
    """rise_ab over rise_bb: the effect on b of deleting a, over that of deleting b; None if rise_bb is at most 1e-3."""
    own_b = [row[b] for b, row in enumerate(rise_ab)]
    return tuple(tuple(rise / own if own > 1e-3 else None for rise, own in zip(row, own_b, strict=True)) for row in rise_ab)


def off_diagonal_mean(x_ab: Sequence[Sequence[float | None]]) -> float | None:
    """Mean of the entries off the diagonal that are not None; None if there are none."""
    off = [x for a, row in enumerate(x_ab) for b, x in enumerate(row) if a != b and x is not None]
    return sum(off) / len(off) if off else None

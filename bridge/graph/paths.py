"""The strongest paths from the prompt's tokens through groups to the answer.

The share of an edge between groups is its effect divided by the summed magnitudes of the effects of all edges into its target. A
path's effect, in terms of d, is that of its last edge, into the answer, times the shares of the edges before it: the part of the
answer that can be followed back along it. Every share is at most 1 in magnitude. Following paths backwards from the answer, the
strongest first, therefore finds them in order. A path starts at a token, at an error, or at a group that nothing feeds.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from bridge.graph.groups import GroupEdge

_MOST_STEPS = 20_000  # of the search


@dataclass(frozen=True)
class Path:
    """A path to the answer: its steps, named like the ends of `GroupEdge`s, and its effect, followed back to its start."""

    steps: tuple[str, ...]
    effect: float


def strongest_paths(edges: Sequence[GroupEdge], most: int = 5) -> tuple[Path, ...]:
    """Return the paths with the largest effects, largest first; a path enters no group twice."""
    into: dict[str, list[GroupEdge]] = {}
    for edge in edges:
        into.setdefault(edge.target, []).append(edge)
    total = {target: sum(abs(edge.effect) for edge in its) for target, its in into.items()}
    # (-magnitude, number in the search, which orders equal magnitudes, steps, effect)
    waiting: list[tuple[float, int, tuple[str, ...], float]] = [(0.0, 0, ("answer",), 1.0)]
    found, count = [], 0
    while waiting and len(found) < most and count < _MOST_STEPS:
        _, _, steps, so_far = heapq.heappop(waiting)
        if steps[0] not in into:
            if len(steps) > 1:
                found.append(Path(steps, so_far))
            continue
        for edge in into[steps[0]]:
            if edge.source in steps or not edge.effect:
                continue
            effect = edge.effect if len(steps) == 1 else so_far * edge.effect / total[edge.target]
            count += 1
            heapq.heappush(waiting, (-abs(effect), count, (edge.source, *steps), effect))
    return tuple(found)

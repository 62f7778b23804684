"""Compare the circuits of several tasks: their overlap beyond chance, and whether deleting one leaves the other tasks intact.

    overlap         number of nodes (or edges) that two circuits share, beside that of random sets of the same sizes,
                        expected = |A| |B| / N, and the probability of sharing as many by chance (hypergeometric)
                    N counts all nodes of the model, also those in neither circuit. Circuits do not use all nodes equally often,
                    so any two tasks overlap somewhat beyond chance
    cross-ablation  rise of task B's two-way loss with all nodes of task A's circuit at their means; also as a share of the rise
                    with B's own circuit deleted. The control deletes random nodes outside A, as many at each location as A has,
                    drawn from the nodes that some task's prompts switch on
    backbone        nodes that at least half of the circuits share, and the other nodes of each task (`backbone`)
    geometric mean  of the circuits' sizes over tasks; a task without a circuit counts at the whole model's size

Shape legend: f all nodes in one row, a, b tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.subject import SparseSubject, masked_gate
from bridge.data.task_tokens import TokenPairs
from bridge.display.plots import draw_figure, svg
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.evidence.controls import random_deletions
from bridge.models.store import as_json
from bridge.studies.backbone import Backbone, find_backbone, off_diagonal_mean, relative_effects
from bridge.studies.result import Size, TaskResult
from bridge.verdicts.task_search import expected_overlap

MAX_CROSS_EFFECT = 0.1  # aim: off-diagonal effects as a share of the diagonal, at most
DRAWS = 3  # random deletions per task


@dataclass(frozen=True)
class Overlap:
    """Overlap of two tasks' circuits: number of shared nodes or edges, number expected by chance, chance of as many or more."""

    first: str
    second: str
    what: str
    shared: int
    expected: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Overlaps of all pairs; base_b, b's loss; rise_ab, its rise with a's circuit deleted; random_ab, the control of that.

    A control is None if no node outside the circuit is on.
    """

    tasks: tuple[str, ...]
    overlaps: tuple[Overlap, ...]
    base: tuple[float, ...]
    rise: tuple[tuple[float, ...], ...]
    random: tuple[tuple[float | None, ...], ...]
    backbone: Backbone | None

    @property
    def share(self) -> tuple[tuple[float | None, ...], ...]:
        """rise_ab over rise_bb: the effect on b of deleting a, over that of deleting b; None if rise_bb is at most 1e-3."""
        return relative_effects(self.rise)

    @property
    def mean_cross_effect(self) -> float | None:
        """Mean of `share` off the diagonal."""
        return off_diagonal_mean(self.share)

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain JSON values."""
        values = as_json(self)
        if self.backbone is not None:
            shared = {"mean_jaccard": self.backbone.mean_jaccard, "mean_overlap": self.backbone.mean_overlap}
            values["backbone"] |= {**shared, "off_diagonal": self.backbone.mean_cross_effect}
        return {
            **values,
            "share": [list(row) for row in self.share],
            "off_diagonal": self.mean_cross_effect,
            "aim": MAX_CROSS_EFFECT,
        }


def measure_overlap(first: str, second: str, what: str, shared: int, sizes: tuple[int, int], of: int) -> Overlap:
    """Overlap of two sets of the given sizes out of `of` items, beside chance."""
    from scipy.stats import hypergeom  # takes .4 s to import, which other commands do not need

    p = float(hypergeom.sf(shared - 1, of, sizes[0], sizes[1]))
    return Overlap(first, second, what, shared, expected_overlap(*sizes, of), p)


@torch.no_grad()
def compare(
    subject: SparseSubject,
    results: Sequence[TaskResult],
    prompts: Mapping[str, TokenPairs],
    *,
    seed: int = 0,
    progress: OnProgress = ignore_progress,
) -> Comparison:
    """Compare the circuits of some tasks, on held-out prompts of each."""
    names = tuple(result.facts.task for result in results)
    kept = {name: subject.space.join(result.circuit.kept).to(subject.device) for name, result in zip(names, results, strict=True)}
    generator = torch.Generator().manual_seed(seed)
    questions = [Question.of_pairs(pairs.to(subject.device)) for pairs in prompts.values()]
    asked = [MaskedModel(subject.sparse, question, subject.means, by_position=False) for question in questions]
    on_f = torch.stack([masked.active_f for masked in asked]).any(0)

    def losses(gone_f: Tensor) -> list[float]:
        gate = masked_gate(subject, ~gone_f)
        return [float(prompts[name].loss(subject.logits(prompts[name], gate)).mean()) for name in names]

    base = losses(torch.zeros(subject.space.size, dtype=torch.bool, device=subject.device))
    rise, random = [], []
    for name in names:
        progress(Phase(f"cross-ablation: without {name}"))
        rise.append(tuple(x - y for x, y in zip(losses(kept[name]), base, strict=True)))
        draws = [losses(gone_f) for gone_f in random_deletions(subject.space, kept[name], on_f, generator, DRAWS)]
        columns = zip(*draws, strict=True) if draws else ((),) * len(names)
        random.append(tuple(sum(column) / len(column) - y if column else None for column, y in zip(columns, base, strict=True)))
    progress(Phase("shared backbone"))
    backbone = find_backbone(names, torch.stack(list(kept.values())), losses) if names else None
    return Comparison(names, _compare_pairs(results, kept), tuple(base), tuple(rise), tuple(random), backbone)


def _compare_pairs(results: Sequence[TaskResult], kept: Mapping[str, Tensor]) -> tuple[Overlap, ...]:
    found = []
    for place, one in enumerate(results):
        for other in results[place + 1 :]:
            names = one.facts.task, other.facts.task
            nodes = tuple(int(kept[name].sum()) for name in names)
            shared = int((kept[names[0]] & kept[names[1]]).sum())
            found.append(measure_overlap(*names, "nodes", shared, (nodes[0], nodes[1]), one.facts.whole.nodes))
            edges = [{(edge.source, edge.target) for edge in result.circuit.edges or ()} for result in (one, other)]
            sizes = len(edges[0]), len(edges[1])
            found.append(measure_overlap(*names, "edges", len(edges[0] & edges[1]), sizes, one.facts.whole.edges))
    return tuple(found)


def geometric_mean(sizes: Sequence[float]) -> float:
    """The geometric mean; a size of 0 counts as 1."""
    return math.exp(sum(math.log(max(size, 1)) for size in sizes) / len(sizes)) if sizes else 0.0


@dataclass(frozen=True)
class Sizes:
    """Geometric means over tasks, failed ones at the whole model's size, and the numbers of all tasks and of failed ones."""

    tasks: int
    failed: int
    sparse_nodes: float
    sparse_edges: float
    dense_nodes: float | None
    dense_edges: float | None


def mean_sizes(sparse: Sequence[Size], dense: Sequence[Size], failed: int, whole: Size, dense_whole: Size | None) -> Sizes:
    """Geometric means of circuit sizes, `failed` more tasks at the whole models'; dense ones are None if some are missing."""
    every = [*sparse, *[whole] * failed]
    other = [*dense, *[dense_whole] * failed] if dense_whole is not None and len(dense) == len(sparse) else []

    def means(sizes: Sequence[Size]) -> tuple[float, float]:
        return geometric_mean([size.nodes for size in sizes]), geometric_mean([size.edges for size in sizes])

    return Sizes(len(every), failed, *means(every), *(means(other) if other else (None, None)))


def render_comparison(comparison: Comparison) -> str:
    """The comparison as text tables."""
    short = [name[:14] for name in comparison.tasks]
    width = max((len(name) for name in comparison.tasks), default=0)
    lines = ["CROSS-ABLATION: rise of the column's two-way loss with the row's circuit deleted (with random nodes deleted)"]
    lines.append(" " * (width + 2) + "  ".join(f"{name:>14}" for name in short))
    for name, rise, random in zip(comparison.tasks, comparison.rise, comparison.random, strict=True):
        cells = [f"{x:+.2f} ({'none' if y is None else f'{y:+.2f}'})" for x, y in zip(rise, random, strict=True)]
        lines.append(f"  {name:<{width}}" + "  ".join(f"{cell:>14}" for cell in cells))
    if comparison.mean_cross_effect is not None:
        met = f"aim <= {MAX_CROSS_EFFECT:g}: {'yes' if comparison.mean_cross_effect <= MAX_CROSS_EFFECT else 'NO'}"
        lines.append(f"  off the diagonal: {comparison.mean_cross_effect:.2f} of the column's own rise (mean), {met}")
    if comparison.backbone is not None:
        lines += ["", comparison.backbone.text()]
    lines += ["", "OVERLAP                                             shared  by chance       p"]
    for one in comparison.overlaps:
        pair = f"{one.first}, {one.second}"
        lines.append(f"  {pair:<42} {one.what} {one.shared:>7,} {one.expected:>10.1f} {one.p:>9.1e}")
    return "\n".join(lines)


def heat_map(comparison: Comparison) -> str:
    """The cross-ablation matrix as SVG: colour is the share of the column's own effect, and each cell states the rise."""
    names = comparison.tasks

    def paint(figure: Any, axes: Sequence[Any]) -> None:
        (axis,) = axes
        share = [[min(max(x or 0.0, 0.0), 1.0) for x in row] for row in comparison.share]
        axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(names)), names, rotation=60, ha="right")
        axis.set_yticks(range(len(names)), names)
        axis.grid(False)
        for a, row in enumerate(comparison.rise):
            for b, rise in enumerate(row):
                ink = "white" if share[a][b] > 0.6 else "black"
                axis.text(
                    b, a, f"{rise:+.2f}", ha="center", va="center", color=ink, gid=f"{names[a]} deleted, {names[b]} measured"
                )
        axis.set_xlabel("rise of the two-way loss, nats; darker: a larger share of the column's own rise", fontsize=7)
        axis.set_ylabel("circuit deleted")

    side = 2.4 + 0.5 * len(names)
    return svg(draw_figure(1, (side + 0.6, side), paint))

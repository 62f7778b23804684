"""All evidence on a task's circuits in the sparse model, and the table of rules that gives their verdict there.

    no explanation   the sparse model does not do the task, the span is too small, or too much of the span flows through errors
    refuted          on held-out prompts the opening circuit alone or in random supersets is less faithful than the rules ask, it
                     does not keep the answers, matched nodes do the same, or the answer is still there when it is ablated
    behavioural      none of these; the task's card judges what the dense model does

Everything is measured on the test split, whose names and templates the search has not seen. The bounds are wider than those of
the search, because the search had to meet its bounds on other prompts.

Shape legend: c circuit, u superset, b prompt, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import median

import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.search import NestedMasks
from bridge.data.task_tokens import Scores
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.evidence.controls import matched_nodes
from bridge.evidence.measures import Control, Criterion, Measure, Report, Rule
from bridge.evidence.sufficiency import NestedCircuit, measure_circuit, superset_draws

SOLVED = 0.9  # accuracy


@dataclass(frozen=True)
class TaskEvidenceConfig:
    """Bounds of the evidence on a task's circuit, and numbers of draws; a result saves the bounds as criteria."""

    solved: float = SOLVED
    most_error: float = 0.5  # of the span; above this, errors explain more than nodes do
    faithfulness: float = 0.8  # on held-out prompts; the search asks .9 on its own prompts
    superset_mean: float = 0.7
    superset_worst: float = 0.4
    matched: float = 0.1  # median faithfulness
    lost: float = 0.8  # of the span, lost by deleting the circuit
    stable: float = 0.6  # Jaccard overlap of two seeds' nodes
    smaller: float = 16.0  # factor: edges of the dense model's own circuit over the circuit's edges
    supersets: int = 10
    draws: int = 4  # of matched nodes

    def rules(self) -> tuple[Rule, ...]:
        """Return the table, weakest verdict first."""
        return (
            Rule(
                "undecided", ("solved", "span", "error_share"),
                "The sparse model does the task, and most of the answer flows through nodes.", refuted="no explanation",
            ),
            Rule(
                "behavioural", ("faithfulness", "accuracy", "supersets_mean", "supersets_worst", "matched", "lost"),
                "On held-out prompts the circuit keeps the answers, alone and in random supersets, other active nodes do not, "
                "and the answers are lost when the circuit is ablated.",
                refuted="refuted",
            ),
        )  # fmt: skip


@dataclass(frozen=True)
class TaskLevel:
    """One of a task's nested circuits measured on held-out prompts, its edges, and the median faithfulness of matched nodes."""

    circuit: NestedCircuit
    edges: int
    matched: float | None


@torch.no_grad()
def gather_task(
    test: CircuitLoss[MaskedModel],
    nested: NestedMasks,
    seeds_f: Sequence[Tensor],
    edges: Sequence[int],
    dense_edges: int | None,
    scores: Scores,
    dense_scores: Scores,
    *,
    seed: int = 0,
    progress: OnProgress = ignore_progress,
) -> tuple[Report, tuple[TaskLevel, ...]]:
    """Gather the evidence on a task's nested circuits on the prompts of `test`; return the report and the measured levels.

    seeds_f are the opening circuits of all seeds, edges the numbers of edges by level, dense_edges that of the dense model's own.
    """
    config, opening = TaskEvidenceConfig(), test.config.opening
    generator = torch.Generator().manual_seed(seed + 3_000_017)
    levels, lost = list[TaskLevel](), list[float]()
    for place, level in enumerate(nested.levels):
        progress(Phase(f"evidence: {level}, alone, in supersets, deleted, and matched nodes"))
        kept_f = nested.kept(place)
        superset_uf = superset_draws(test, config.supersets, seed + place)
        found = measure_circuit(test, kept_f, superset_uf, level.faithfulness, test.meets_bounds(kept_f, level))
        alone, lost_here = _measure_matched(test, kept_f, config.draws, generator)
        lost = lost_here if place == opening else lost
        levels.append(TaskLevel(found, edges[place], median(alone) if alone else None))
    opened, kept_f = levels[opening].circuit, nested.kept(opening)
    report = Report(
        (
            Measure(
                "solved", "accuracy of the sparse model", scores.accuracy, Criterion(">=", config.solved),
                Control("chance", 1, 0.5, 0.5, "it"), note=f"the dense model {dense_scores.accuracy:.3f}",
            ),
            Measure("span", "span in nats", test.span, Criterion(">=", test.config.least_span)),
            Measure("error_share", "share of the span through errors", opened.error_share, Criterion("<=", config.most_error)),
            Measure("faithfulness", "faithfulness alone", opened.faithfulness, Criterion(">=", config.faithfulness)),
            Measure("accuracy", "accuracy alone", _accuracy(test, kept_f), Criterion(">=", config.solved)),
            Measure("supersets_mean", "in random supersets, mean", opened.supersets_mean, Criterion(">=", config.superset_mean)),
            Measure(
                "supersets_worst", "in random supersets, worst", opened.supersets_worst, Criterion(">=", config.superset_worst)
            ),
            Measure(
                "matched", "faithfulness of matched nodes", levels[opening].matched, Criterion("<=", config.matched),
                note="for each node, another active node at the same location",
            ),
            Measure(
                "lost", "span lost in sparse by deletion", 1 - opened.left, Criterion(">=", config.lost, True),
                Control.of("matched", lost, max, "largest"),
            ),
            Measure("kl", "KL alone in nats", opened.kl),
            _stability_measure(config, seeds_f, test.masked.active_f),
            _size_measure(config, edges[opening], dense_edges),
        ),
        config.rules(),
    )  # fmt: skip
    return report, tuple(levels)


def _measure_matched(
    test: CircuitLoss[MaskedModel], kept_f: Tensor, draws: int, generator: torch.Generator
) -> tuple[list[float], list[float]]:
    """Return the faithfulness of draws of matched nodes alone, and the span lost by deleting each; [] if too few are active."""
    if not 0 < int((kept_f & test.nodes_f).sum()) <= int((test.masked.active_f & ~kept_f).sum()):
        return [], []
    matched_cf, count = matched_nodes(test.masked, kept_f, draws, generator), len(test.model_b)
    miss_c = test.miss(test.logits(matched_cf)).view(-1, count).mean(1)
    return (1 - miss_c.abs()).tolist(), (1 - test.left_after_deletion(matched_cf)).tolist()


def _accuracy(test: CircuitLoss, kept_f: Tensor) -> float:
    """Return the share of prompts for which the circuit alone prefers the answer."""
    row_b = torch.arange(len(test.model_b), device=kept_f.device)
    return float((test.masked.question.difference(test.logits(kept_f[None]), row_b) > 0).float().mean())


def _stability_measure(config: TaskEvidenceConfig, seeds_f: Sequence[Tensor], on_f: Tensor) -> Measure:
    """Measure the overlap of the seeds' circuits; the control is the overlap of as many random active nodes."""
    key, name, criterion = "stable", "overlap of seeds", Criterion(">=", config.stable, True)
    if len(seeds_f) < 2:
        return Measure(key, name, None, criterion, note="there is only one seed; search with several")
    overlaps, by_chance = [], []
    for one_f, other_f in combinations(seeds_f, 2):
        shared, sizes = int((one_f & other_f).sum()), int(one_f.sum()) + int(other_f.sum())
        expected = expected_overlap(int(one_f.sum()), int(other_f.sum()), int((on_f | one_f | other_f).sum()))
        overlaps.append(shared / max(1, sizes - shared))
        by_chance.append(expected / max(1.0, sizes - expected))
    sizes = ", ".join(f"{int(kept_f.sum()):,}" for kept_f in seeds_f)
    control = Control.of("chance", by_chance, max, "largest")
    return Measure(key, name, sum(overlaps) / len(overlaps), criterion, control, note=f"nodes: {sizes}")


def expected_overlap(first: int, second: int, of: int) -> float:
    """Return the mean number of elements that two random subsets of `of` elements share (hypergeometric)."""
    return first * second / of if of else 0.0


def _size_measure(config: TaskEvidenceConfig, edges: int, dense_edges: int | None) -> Measure:
    value = None if dense_edges is None else dense_edges / max(1, edges)
    note = "the dense model's own circuit was not searched" if dense_edges is None else f"{edges:,} edges, dense {dense_edges:,}"
    return Measure("smaller", "times fewer edges than the dense model's own", value, Criterion(">=", config.smaller), note=note)

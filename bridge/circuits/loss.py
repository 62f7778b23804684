"""Distance of a circuit from what it explains, relative to the span: normalised faithfulness, alone, in supersets, and deleted.

With d the question's log-odds, C the kept nodes (and errors), U a random set of the others, and everything else at its mean,

    span       d(model) - d(everything at its mean)          model: all nodes and errors, so that d(model) is the dense model's
    miss(C)    (d(C) - d(model)) / |span|                    faithfulness F(C) = 1 - |miss(C)|, two-sided
    alone      |miss(C)|                                     at most 1 - F at a level F
    supersets  |miss(C + U)| over random U                   mean at most 1 - F, rms twice, worst 3.5 times that
    left       (d(nodes outside C) - d(everything at its mean)) / span: what remains when C is deleted, all errors at their means

The strictest level bounds the next-token distribution instead: KL(model, C) <= .05 alone and <= .1 in supersets, in nats. For
several prompts, d and every KL are means over the prompts. Alone and in supersets, the rms of the single prompts' misses must
also be at most twice 1 - F, because misses of opposite sign cancel in the mean.

Without supersets, a search finds circuits whose deletions cancel each other (method, section 3). Without deletion, it finds one
of several ways to the answer.

Shape legend: c circuit, u superset, r masked copy of a prompt, b prompt, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.masked_model import Masked
from bridge.models.circuit import kl

M = TypeVar("M", bound=Masked)
Quantity = Callable[[Tensor, Tensor], Tensor]  # (logits_rv, row_r) -> x_r, for masked copies of the prompts row_r


@dataclass(frozen=True)
class Level:
    """Bound of one of the nested circuits: a normalised faithfulness, or the whole next-token distribution (None)."""

    faithfulness: float | None

    @property
    def allowed_miss(self) -> float:
        """Largest miss that the level allows a circuit alone, as a share of the span."""
        return 1.0 if self.faithfulness is None else 1 - self.faithfulness

    def __str__(self) -> str:
        return "full distribution" if self.faithfulness is None else f"F {self.faithfulness:g}"


@dataclass(frozen=True)
class SearchConfig:
    """Bounds and length of a search; saved with its result.

    levels are the faithfulness of the nested circuits, smallest first; the explanation opens at `opens_at`, one of them.
    """

    levels: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    opens_at: float = 0.9  # the level at which attribution graphs are read
    kl: float = 0.05  # nats, bound of the last level for a circuit alone; twice that in supersets
    superset_mean: float = 1.0  # times 1 - F
    superset_rms: float = 2.0  # times 1 - F, because random ablation of everything else changes any logit by about a nat
    superset_worst: float = 3.5
    left: float = 0.2  # share of the span left without the circuit, below which the search does not try to lower it
    least_span: float = 1.0  # nats; a smaller span leaves nothing to explain
    room: float = 0.7  # share of a level's bound; errors are kept only if all nodes without them are further off
    error_price: int = 1000  # nodes: if the opening circuit is larger, errors that each save as many nodes are added
    densities: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of the fixed supersets in which a circuit is measured
    alphas: int = 8  # mixing values of integrated gradients
    steps: int = 60  # of a descent
    prompts: int = 8  # per step, if there are several
    supersets: int = 1  # per step: more steps with one find smaller circuits than fewer steps with three
    rate: float = 0.1  # Adam's learning rate; tau lies between -4 and 1
    attempts: int = 2  # descents per circuit; a further one starts if the circuit is still outside the bounds
    rounds: int = 8  # of additions at most, if a circuit is outside the bounds
    sweeps: int = 6  # of deletions, at most
    seed: int = 0

    def nested(self) -> tuple[Level, ...]:
        """Return all levels, the full distribution last."""
        return (*(Level(faithfulness) for faithfulness in self.levels), Level(None))

    @property
    def opening(self) -> int:
        """Index of the level that the explanation opens at."""
        return self.levels.index(self.opens_at)


class CircuitLoss(Generic[M]):
    """Measures of a masked model's circuits against the answer of the model to be explained."""

    def __init__(self, masked: M, model_bv: Tensor, config: SearchConfig) -> None:
        """Take model_bv, the logits after each prompt of the model to be explained: the dense model's if errors are followed."""
        self.masked, self.config, self.model_bv, self._in_turn = masked, config, model_bv, masked.question.rows_or_all
        count = len(masked.question)
        nothing_bf = torch.zeros(count, masked.space.size, dtype=torch.bool, device=model_bv.device)
        self.model_b = masked.question.difference(model_bv, torch.arange(count, device=model_bv.device))
        self.ablated_b = masked.difference(nothing_bf)
        self.model, self.ablated = float(self.model_b.mean()), float(self.ablated_b.mean())
        self.span = self.model - self.ablated  # in nats; what a circuit has to account for
        self.divisor = self.span if abs(self.span) >= 1e-6 else 1e-6  # of what is given as a share of the span
        self.nodes_f = ~masked.is_error_f
        superset_uf = random_sets(np.random.default_rng(config.seed), np.array(config.densities), masked.space.size)
        self.superset_uf = superset_uf.to(model_bv.device) & self.nodes_f

    def with_seed(self, seed: int) -> CircuitLoss[M]:
        """Return a copy with another seed in its config, and the supersets of that seed."""
        return CircuitLoss(self.masked, self.model_bv, replace(self.config, seed=seed))

    # -- rows: masked copies of the prompts row_r, by default of all prompts in turn ------------------------------------

    def logits(self, kept_cf: Tensor) -> Tensor:
        """Return logits_rv of every mask on every prompt, ordered by mask, then by prompt."""
        count = len(self.model_b)
        return self.masked.logits(kept_cf.repeat_interleave(count, 0) if count > 1 else kept_cf)

    def gradient(self, kept_cf: Tensor, loss: Quantity) -> Tensor:
        """Return gradient_cf of loss(logits_rv, row_r), averaged over the prompts, with respect to every entry of the masks."""
        gradient_cf = torch.zeros(kept_cf.shape, device=kept_cf.device)
        for mask_r, one_rf, _ in self.gradients(kept_cf, loss):
            gradient_cf.index_add_(0, mask_r, one_rf)
        return gradient_cf / len(self.model_b)

    def gradients(self, kept_cf: Tensor, loss: Quantity, node_k: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield batches (mask_r, gradient_rf, loss_r) for every mask on every prompt, ordered by mask; mask_r is its index."""
        count = len(self.model_b)
        for place_r in torch.arange(len(kept_cf) * count, device=kept_cf.device).split(self.masked.rows_per_batch):
            mask_r, row_r = place_r // count, place_r % count
            yield mask_r, *self.masked.gradient(kept_cf[mask_r], lambda x_rv, row_r=row_r: loss(x_rv, row_r), row_r, node_k)

    def miss(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return the signed miss_r, relative to the span over all prompts."""
        row_r = self._in_turn(len(logits_rv), row_r)
        return (self.masked.question.difference(logits_rv, row_r) - self.model_b[row_r]) / abs(self.divisor)

    def fraction_left(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return left_r, the share of the span that remains."""
        row_r = self._in_turn(len(logits_rv), row_r)
        return (self.masked.question.difference(logits_rv, row_r) - self.ablated_b[row_r]) / self.divisor

    def kl(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return kl_r from the model's next-token distribution to the copy's, in nats."""
        return kl(self.model_bv if len(self.model_b) == 1 else self.model_bv[self._in_turn(len(logits_rv), row_r)], logits_rv)

    def relative_miss(self, logits_rv: Tensor, level: Level, row_r: Tensor | None = None) -> Tensor:
        """Return the signed miss_r, or kl_r if the level bounds that, divided by what the level allows a circuit alone."""
        if level.faithfulness is None:
            return self.kl(logits_rv, row_r) / self.config.kl
        return self.miss(logits_rv, row_r) / level.allowed_miss

    def prompt_miss(self, logits_rv: Tensor, row_r: Tensor, level: Level) -> Tensor:
        """Return `relative_miss`; with several prompts divided by a single one's wider bound, since it is for their mean."""
        return self.relative_miss(logits_rv, level, row_r) / self._prompt_bound(level)

    def prompt_penalty(self, logits_rv: Tensor, row_r: Tensor, level: Level) -> Tensor:
        """Return squared misses of single masked copies, or their KL, as multiples (`prompt_miss`) of what the level allows."""
        return self._penalty(self.prompt_miss(logits_rv, row_r, level), level)

    def excess_left(self, logits_rv: Tensor, row_r: Tensor) -> Tensor:
        """Return how far the remaining span exceeds `config.left`, as a multiple of that; negative below it."""
        return (self.fraction_left(logits_rv, row_r) - self.config.left) / self.config.left

    def descent_terms(self, logits_rv: Tensor, level: Level, row_p: Tensor) -> Tensor:
        """Return the terms that a descent minimises: squared misses of a circuit, then of its supersets, then of its complement.

        Each has a row for each of the prompts row_p, and is a multiple of its bound. There are `config.supersets` supersets. The
        complement counts only if it leaves more than `config.left` of the span.
        """
        count, row_r = len(row_p), row_p.repeat(len(logits_rv) // len(row_p))
        inside = (1 + self.config.supersets) * count
        off_r = self.prompt_penalty(logits_rv[:inside], row_r[:inside], level)
        left_r = self.excess_left(logits_rv[inside:], row_r[inside:]).clamp(min=0)
        return torch.cat([off_r[:count], off_r[count:] / self.superset_bound(level), left_r.square()])

    # -- circuits: every mask on every prompt, ordered by mask ------------------------------------------------------------

    def complement(self, kept_cf: Tensor) -> Tensor:
        """Return the masks with each circuit deleted: every other node is kept, all errors are at their means."""
        return ~kept_cf & self.nodes_f

    def left_after_deletion(self, kept_cf: Tensor) -> Tensor:
        """Return left_c, the share of the span that is left when each circuit is deleted, averaged over the prompts."""
        return self._by_circuit(self.fraction_left(self.logits(self.complement(kept_cf)))).mean(1)

    def distance_alone(self, logits_rv: Tensor, level: Level) -> Tensor:
        """Return off_c: how far each circuit alone is off, as a multiple of what the level allows."""
        return self._distance(self._by_circuit(self.relative_miss(logits_rv, level)), level)

    def distances_and_terms(self, kept_cf: Tensor, level: Level) -> tuple[list[float], list[float]]:
        """Return (off, terms) of circuits: the distance for the bound that a circuit misses most, at most 1 within the level.

        terms is the sum of those that a descent minimises, here over the fixed supersets and without the complement.
        """
        inside_uf = torch.cat([torch.zeros_like(self.superset_uf[:1]), self.superset_uf])
        x_r, off, terms = self.relative_miss(self.logits((kept_cf[:, None] | inside_uf).flatten(0, 1)), level), [], []
        for x_ub in x_r.view(len(kept_cf), len(inside_uf), -1):
            squared_ub = self._penalty(x_ub / self._prompt_bound(level), level)
            terms.append(float(squared_ub[0].mean() + squared_ub[1:].mean() / self.superset_bound(level)))
            off.append(max(float(self._distance(x_ub[:1], level)), self._distance_in_supersets(x_ub[1:], level)))
        return off, terms

    def worst_distance(self, kept_f: Tensor, level: Level) -> float:
        """Return a circuit's distance for the bound of a level that it misses most: at most 1 within the level."""
        return self.distances_and_terms(kept_f[None], level)[0][0]

    def meets_bounds(self, kept_f: Tensor, level: Level) -> bool:
        """Return whether a circuit meets all bounds of a level."""
        return float(self.distance_alone(self.logits(kept_f[None]), level)) <= 1 and self.worst_distance(kept_f, level) <= 1

    def superset_bound(self, level: Level) -> float:
        """Return the bound on the mean of `prompt_penalty` in supersets."""
        return 2 if level.faithfulness is None else (_SUPERSET_RMS_FACTOR * self.config.superset_mean) ** 2

    def _prompt_bound(self, level: Level) -> float:
        return _PROMPT_BOUND if len(self.model_b) > 1 and level.faithfulness is not None else 1

    @staticmethod
    def _penalty(x_r: Tensor, level: Level) -> Tensor:
        return x_r if level.faithfulness is None else x_r.square()

    def _distance(self, x_cb: Tensor, level: Level) -> Tensor:
        """Return off_c for the bounds over all prompts, mean and rms; for one prompt the mean always decides."""
        if level.faithfulness is None:
            return x_cb.mean(1)
        return torch.maximum(x_cb.mean(1).abs(), x_cb.square().mean(1).sqrt() / self.config.superset_rms)

    def _distance_in_supersets(self, x_ub: Tensor, level: Level) -> float:
        """Return the distance (as in `_distance`) of one circuit's supersets, for the bound that is missed most."""
        if level.faithfulness is None:
            return float(x_ub.mean()) / 2
        off_u, config = self._distance(x_ub, level), self.config
        rms = float(x_ub.square().mean().sqrt())  # over supersets and prompts
        return max(
            float(off_u.mean()) / config.superset_mean, rms / config.superset_rms, float(off_u.max()) / config.superset_worst
        )

    def _by_circuit(self, x_r: Tensor) -> Tensor:
        return x_r.view(-1, len(self.model_b))


_PROMPT_BOUND = 2.0  # bound on the miss on one of several prompts, as a multiple of the allowed mean miss
_SUPERSET_RMS_FACTOR = 1.2  # times the allowed mean miss in supersets: bound on the rms, which exceeds the mean


def random_sets(generator: np.random.Generator, density_u: np.ndarray, count: int) -> Tensor:
    """Return set_uf: each of `count` nodes with probability density_u, in 256ths; bytes, as hundreds of millions are drawn."""
    draw_uf = generator.integers(0, 256, (len(density_u), count), dtype=np.uint8)
    return torch.from_numpy(draw_uf < np.rint(256 * density_u).clip(0, 255).astype(np.uint8)[:, None])

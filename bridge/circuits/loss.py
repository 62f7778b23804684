"""Distance of a circuit from what it explains, on a scale of its own: normalised faithfulness, alone, in supersets, and deleted.

With d the question's log-odds, C the nodes (and errors) kept, U a random set of the others, and everything else at its mean,

    span       d(model) - d(everything at its mean)          model: all nodes and errors, so that d(model) is the dense model's
    miss(C)    (d(C) - d(model)) / |span|                    faithfulness F(C) = 1 - |miss(C)|, two-sided
    alone      |miss(C)|                                     at most 1 - F at a level F
    supersets  |miss(C + U)| over random U                   mean at most 1 - F, rms twice, worst 3.5 times that
    left       (d(nodes outside C) - d(everything at its mean)) / span: what remains when C is deleted, all errors at their means

The strictest level asks for the next-token distribution instead: KL(model, C) <= .05 alone and <= .1 in supersets, in nats. Of
several prompts d is the mean, and so is every KL; alone and in supersets the rms of the single prompts' misses is held to twice
1 - F, so that they do not cancel each other.

Without supersets a search finds circuits whose deletions cancel each other (method, section 3). Without deletion it finds one of
several ways to the answer.

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
Quantity = Callable[[Tensor, Tensor], Tensor]  # (logits_rv, row_r) -> x_r of masked copies of the prompts row_r


@dataclass(frozen=True)
class Level:
    """The bound of one of the nested circuits: a normalised faithfulness, or the whole next-token distribution (None)."""

    faithfulness: float | None

    @property
    def allowed(self) -> float:
        """The largest miss alone, as a share of the span."""
        return 1.0 if self.faithfulness is None else 1 - self.faithfulness

    def __str__(self) -> str:
        return "full distribution" if self.faithfulness is None else f"F {self.faithfulness:g}"


@dataclass(frozen=True)
class SearchConfig:
    """Bounds and length of a search; saved with its result.

    levels are the faithfulness of the nested circuits, smallest first; the explanation opens at `opens_at`, one of them.
    """

    levels: tuple[float, ...] = (0.8, 0.9, 0.95, 0.99)
    opens_at: float = 0.9  # what attribution graphs are read at
    kl: float = 0.05  # nats, of the last level alone; twice that in supersets
    superset_mean: float = 1.0  # times 1 - F
    superset_rms: float = 2.0  # times 1 - F: random ablation of everything else moves any logit by about a nat
    superset_worst: float = 3.5
    left: float = 0.2  # share of the span left without the circuit that the search does not try to lower further
    least_span: float = 1.0  # nats; below it there is nothing to explain
    room: float = 0.7  # of what a level allows, within which all nodes must be before errors are let in
    error_price: int = 1000  # nodes: where the opening circuit takes more, an error that spares as many is let in
    densities: tuple[float, ...] = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)  # of the supersets that a circuit is held to
    alphas: int = 8  # of integrated gradients
    steps: int = 60  # of the descent at the level that the explanation opens at
    prompts: int = 8  # of several, at each step
    supersets: int = 1  # at each step: more steps of one find smaller circuits than fewer of three
    rate: float = 0.1  # of Adam; masks live between -4 and 1
    attempts: int = 2  # at the opening level, from more nodes where the first ends beyond the bounds
    rounds: int = 8  # of nodes added, where a descent ends beyond the bounds
    sweeps: int = 6  # of deletions, at most
    seed: int = 0

    def nested(self) -> tuple[Level, ...]:
        """All levels, the full distribution last."""
        return (*(Level(faithfulness) for faithfulness in self.levels), Level(None))

    @property
    def opening(self) -> int:
        """The place, among the levels, of that which the explanation opens at."""
        return self.levels.index(self.opens_at)


class CircuitLoss(Generic[M]):
    """Measures circuits of a masked model against the answer of the model that it stands for."""

    def __init__(self, masked: M, model_bv: Tensor, config: SearchConfig) -> None:
        """model_bv are the logits, after each prompt, of what is to be explained: the dense model's where errors are followed."""
        self.masked, self.config, self.model_bv, self._in_turn = masked, config, model_bv, masked.question.in_turn
        count = len(masked.question)
        nothing_bf = torch.zeros(count, masked.space.size, dtype=torch.bool, device=model_bv.device)
        self.model_b = masked.question.difference(model_bv, torch.arange(count, device=model_bv.device))
        self.nothing_b = masked.difference(nothing_bf)
        self.model, self.nothing = float(self.model_b.mean()), float(self.nothing_b.mean())
        self.span = self.model - self.nothing  # in nats; what a circuit has to account for
        self.nodes_f = ~masked.is_error_f
        superset_uf = random_sets(np.random.default_rng(config.seed), np.array(config.densities), masked.space.size)
        self.superset_uf = superset_uf.to(model_bv.device) & self.nodes_f

    def seeded(self, seed: int) -> CircuitLoss[M]:
        """Copy with the supersets, and the config, of another seed."""
        return CircuitLoss(self.masked, self.model_bv, replace(self.config, seed=seed))

    # -- rows: masked copies of prompts row_r, by default of every prompt in turn ---------------------------------------

    def logits(self, kept_cf: Tensor) -> Tensor:
        """logits_rv of every mask on every prompt, mask by mask."""
        count = len(self.model_b)
        return self.masked.logits(kept_cf.repeat_interleave(count, 0) if count > 1 else kept_cf)

    def gradient(self, kept_cf: Tensor, loss: Quantity) -> Tensor:
        """gradient_cf of loss(logits_rv, row_r), the mean over the prompts, with respect to every entry of the masks."""
        gradient_cf = torch.zeros(kept_cf.shape, device=kept_cf.device)
        for mask_r, one_rf, _ in self.gradients(kept_cf, loss):
            gradient_cf.index_add_(0, mask_r, one_rf)
        return gradient_cf / len(self.model_b)

    def gradients(self, kept_cf: Tensor, loss: Quantity, node_k: Tensor | None = None) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(mask_r, gradient_rf, loss_r) in batches, of every mask on every prompt, mask by mask; mask_r says which mask."""
        count = len(self.model_b)
        for place_r in torch.arange(len(kept_cf) * count, device=kept_cf.device).split(self.masked.rows):
            mask_r, row_r = place_r // count, place_r % count
            yield mask_r, *self.masked.gradient(kept_cf[mask_r], lambda x_rv, row_r=row_r: loss(x_rv, row_r), row_r, node_k)

    def miss(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """miss_r, in terms of the span of all prompts."""
        row_r = self._in_turn(len(logits_rv), row_r)
        return (self.masked.question.difference(logits_rv, row_r) - self.model_b[row_r]) / max(abs(self.span), 1e-6)

    def left(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """left_r, the share of the span that is still there."""
        row_r = self._in_turn(len(logits_rv), row_r)
        difference_r = self.masked.question.difference(logits_rv, row_r)
        return (difference_r - self.nothing_b[row_r]) / (self.span if abs(self.span) >= 1e-6 else 1e-6)

    def kl(self, logits_rv: Tensor, row_r: Tensor | None = None) -> Tensor:
        """kl_r from the model's next-token distribution, in nats."""
        return kl(self.model_bv if len(self.model_b) == 1 else self.model_bv[self._in_turn(len(logits_rv), row_r)], logits_rv)

    def bounded(self, logits_rv: Tensor, level: Level, row_r: Tensor | None = None) -> Tensor:
        """Signed miss_r, or kl_r where a level bounds that, in multiples of what it allows alone."""
        if level.faithfulness is None:
            return self.kl(logits_rv, row_r) / self.config.kl
        return self.miss(logits_rv, row_r) / level.allowed

    def signed(self, logits_rv: Tensor, row_r: Tensor, level: Level) -> Tensor:
        """`bounded`, but of several prompts in multiples of what a single one may miss: it is their mean that is held to less."""
        return self.bounded(logits_rv, level, row_r) / self._of_several(level)

    def squared(self, logits_rv: Tensor, row_r: Tensor, level: Level) -> Tensor:
        """Squared misses of single masked copies, or their KL, in multiples of what the level allows alone."""
        return self._squared(self.signed(logits_rv, row_r, level), level)

    def beyond_left(self, logits_rv: Tensor, row_r: Tensor) -> Tensor:
        """How far what is left of the span is beyond `config.left`, in multiples of it; below 0 within."""
        return (self.left(logits_rv, row_r) - self.config.left) / self.config.left

    def terms(self, logits_rv: Tensor, level: Level, row_p: Tensor) -> Tensor:
        """Terms that a descent minimises: squared misses of a circuit (the first rows), of its supersets, and of its complement.

        A row for each of the prompts row_p. In multiples of what the level allows; the complement, the last rows beyond
        `config.supersets`, where it is left with more than `config.left` of the span.
        """
        count, row_r = len(row_p), row_p.repeat(len(logits_rv) // len(row_p))
        inside = (1 + self.config.supersets) * count
        off_r = self.squared(logits_rv[:inside], row_r[:inside], level)
        left_r = self.beyond_left(logits_rv[inside:], row_r[inside:]).clamp(min=0)
        return torch.cat([off_r[:count], off_r[count:] / self.superset_bound(level), left_r.square()])

    # -- circuits: every mask on every prompt, mask by mask ---------------------------------------------------------------

    def complement(self, kept_cf: Tensor) -> Tensor:
        """The masks with a circuit deleted: every other node kept, all errors at their means."""
        return ~kept_cf & self.nodes_f

    def left_by(self, kept_cf: Tensor) -> Tensor:
        """left_c, the share of the span that is left where each circuit is deleted; of several prompts the mean."""
        return self._by_circuit(self.left(self.logits(self.complement(kept_cf)))).mean(1)

    def off(self, logits_rv: Tensor, level: Level) -> Tensor:
        """off_c of circuits alone, in multiples of what the level allows."""
        return self._off(self._by_circuit(self.bounded(logits_rv, level)), level)

    def measured(self, kept_cf: Tensor, level: Level) -> tuple[list[float], list[float]]:
        """(off, terms) of circuits: how far each is off by what it misses most, within the level where at most 1; its terms.

        These are what a descent makes small, over the fixed supersets and without the complement.
        """
        inside_uf = torch.cat([torch.zeros_like(self.superset_uf[:1]), self.superset_uf])
        x_r, off, terms = self.bounded(self.logits((kept_cf[:, None] | inside_uf).flatten(0, 1)), level), [], []
        for x_ub in x_r.view(len(kept_cf), len(inside_uf), -1):
            squared_ub = self._squared(x_ub / self._of_several(level), level)
            terms.append(float(squared_ub[0].mean() + squared_ub[1:].mean() / self.superset_bound(level)))
            off.append(max(float(self._off(x_ub[:1], level)), self._off_in_supersets(x_ub[1:], level)))
        return off, terms

    def worst(self, kept_f: Tensor, level: Level) -> float:
        """Distance of a circuit from the bound of a level that it misses most: within the level where at most 1."""
        return self.measured(kept_f[None], level)[0][0]

    def within(self, kept_f: Tensor, level: Level) -> bool:
        """Whether a circuit is within all that a level asks of it."""
        return float(self.off(self.logits(kept_f[None]), level)) <= 1 and self.worst(kept_f, level) <= 1

    def superset_bound(self, level: Level) -> float:
        """Bound of `squared` in supersets."""
        return 2 if level.faithfulness is None else (_TIGHTER * self.config.superset_mean) ** 2

    def _of_several(self, level: Level) -> float:
        return _ONE_OF_SEVERAL if len(self.model_b) > 1 and level.faithfulness is not None else 1

    @staticmethod
    def _squared(x_r: Tensor, level: Level) -> Tensor:
        return x_r if level.faithfulness is None else x_r.square()

    def _off(self, x_cb: Tensor, level: Level) -> Tensor:
        """off_c by what the level bounds on every prompt; rms of one prompt is less than its miss."""
        if level.faithfulness is None:
            return x_cb.mean(1)
        return torch.maximum(x_cb.mean(1).abs(), x_cb.square().mean(1).sqrt() / self.config.superset_rms)

    def _off_in_supersets(self, x_ub: Tensor, level: Level) -> float:
        """Distance like `_off` of one circuit's supersets, by the bound that is missed most."""
        if level.faithfulness is None:
            return float(x_ub.mean()) / 2
        off_u, config = self._off(x_ub, level), self.config
        rms = float(x_ub.square().mean().sqrt())  # over prompts as well
        return max(
            float(off_u.mean()) / config.superset_mean, rms / config.superset_rms, float(off_u.max()) / config.superset_worst
        )

    def _by_circuit(self, x_r: Tensor) -> Tensor:
        return x_r.view(-1, len(self.model_b))


_ONE_OF_SEVERAL = 2.0  # times the mean miss allowed, is what the miss on a single prompt of several is held to
_TIGHTER = 1.2  # times the mean miss allowed in supersets, is what their squares are held to: the mean of squares is above it


def random_sets(generator: np.random.Generator, density_u: np.ndarray, count: int) -> Tensor:
    """set_uf of so many nodes, each with a probability, in 256ths. Drawn as bytes: a search draws hundreds of millions."""
    draw_uf = generator.integers(0, 256, (len(density_u), count), dtype=np.uint8)
    return torch.from_numpy(draw_uf < np.rint(256 * density_u).clip(0, 255).astype(np.uint8)[:, None])

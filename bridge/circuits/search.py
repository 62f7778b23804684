"""The search for nested circuits: few nodes at every level of faithfulness, each circuit inside the next.

The level that the explanation opens at comes first. Levels above it add to its circuit, levels below delete from it:

1. errors     If all nodes, with the errors at their means, are well within the level's bounds, no error is kept. Otherwise errors
              are ranked by how far their gradients reduce the miss, and the fewest that bring all nodes within them are kept.
2. scores     Integrated gradients of d over one mask that mixes all nodes, 8 values; ranked by magnitude, because a node that
              works against the answer belongs to the circuit as well.
3. descent    tau_i starts from the rank, above 0 for the fewest nodes that get the answer about right. Steps of Adam on
                  [alone^2 + mean_U supersets^2 + left^2] / 2 + lambda |C|,    C = {tau > 0}          (`CircuitLoss.terms`)
              Heaviside forward, sigmoid's derivative backward, fresh U at each step; lambda rises while the terms are small and
              falls otherwise.
4. addition   While the circuit is outside the bounds, the nodes are added whose gradients say that the terms fall most.
5. deletion   The fewest nodes by tau are kept. Then, in several sweeps, nodes are deleted in the order of `deletion_order`, as
              many as the bounds allow. In other supersets (for a task, on training prompts) the circuit may not get worse.
6. necessity  If much of the span is left when the circuit is deleted, the nodes that keep it up (`necessity`) are added, if they
              are few and the circuit with them is within the bounds. What they make superfluous is deleted.

If the circuit has more nodes than the price of an error, this is repeated with more errors, and the cheaper circuit is kept. The
next level adds nodes as in step 4, or by a descent of its own if that is not enough. The last two add nodes by integrated
gradients, because a circuit of that size is no longer for reading. Levels below the opening one delete nodes as in step 5.

With several prompts (a task), every mask is measured on all of them. Scores and descents use training prompts, not those that
circuits are judged on. Each step of a descent draws some of them, so lambda follows a running mean of the terms.

Ranking by score alone is not enough in models whose nodes interact: it left hundreds of nodes where descents leave tens.

Shape legend: r masked copy, u superset, f all nodes and errors in one row, k some of them by index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.deletion_order import deletion_order
from bridge.circuits.loss import CircuitLoss, Level, random_sets
from bridge.circuits.masked_model import integrated_gradients
from bridge.circuits.necessity import backup_nodes
from bridge.display.progress import OnProgress, Phase, ignore_progress

_ADAM_BETAS = 0.7, 0.95
_TAU_RANGE = -4.0, 1.0  # range of tau: the steps can bring any node above or below 0
_TAU_SPREAD = 0.2  # difference in tau at the start between nodes whose ranks differ by a factor e
_START_SIZES = 50, 100, 200, 400, 800, 1600, 3200, 6400  # nodes above 0 at first
_MAX_START_DISTANCE = 2.5  # times what the level allows
_LAMBDA_START, _LAMBDA_RANGE = 2e-2, (1e-5, 1.0)  # lambda and its range; with Adam only its ratio to the gradients matters
_LAMBDA_RISE, _LAMBDA_FAST_RISE, _LAMBDA_FALL, _TARGET_TERM, _FAST_RISE_TERM = 1.25, 1.6, 0.7, 0.6, 0.3
_LAMBDA_RISE_SEVERAL, _LAMBDA_FALL_SEVERAL, _TARGET_TERM_SEVERAL = 1.15, 0.87, 1.0  # if every step draws other prompts
_TARGET_FACTOR_PER_ATTEMPT = 0.9  # on _TARGET_TERM_SEVERAL, at each further attempt; .5 leaves three times the nodes
_TERM_SMOOTHING = 0.8  # weight of the running mean, if every step draws other prompts
_ADDITION_SIZES = 1, 5, 25, 120  # numbers of nodes tried at a time
_MAX_CANDIDATES = 20_000  # best-ranked nodes that a descent chooses from; those it chose were among the first 13,100
_MAX_NODES_TO_SWEEP = 20_000  # a larger circuit is not for reading, and not swept at its own level: a sweep takes seconds
_MAX_BACKUP_NODES = 60, 0.25  # most nodes added for necessity: this number, or this share of a larger circuit


@dataclass(frozen=True, eq=False)
class NestedMasks:
    """Circuits found: level_f, the index of the first level that contains a node (the number of levels if none does).

    off is each circuit's distance for the bound of its level that it misses most, at most 1 within the level.
    """

    levels: tuple[Level, ...]
    level_f: Tensor
    distances: tuple[float, ...]

    def kept(self, place: int) -> Tensor:
        """Return kept_f of the circuit at a level, by the level's index."""
        return self.level_f <= place


def find_nested(
    loss: CircuitLoss,
    progress: OnProgress = ignore_progress,
    train: CircuitLoss | None = None,
    levels: Sequence[Level] | None = None,
    opened_f: Tensor | None = None,
) -> NestedMasks:
    """Find the nested circuits of a question, by the steps in the module's docstring; progress may raise to end the search.

    With several prompts, scores and descents use those of `train`; additions and deletions are judged on those of `loss`. levels
    default to all of the search's; opened_f is the circuit at the opening level if it has been found before.
    """
    return _Search(loss, train or loss, progress, loss.config.nested() if levels is None else tuple(levels)).run(opened_f)


class _Search:
    def __init__(self, loss: CircuitLoss, train: CircuitLoss, progress: OnProgress, levels: tuple[Level, ...]) -> None:
        self.levels, self.opening = levels, levels.index(Level(loss.config.opens_at))
        self.loss, self.config, self.masked, self.train, self.progress = loss, loss.config, loss.masked, train, progress
        self.generator, self.draws = torch.Generator().manual_seed(self.config.seed + 17), np.random.default_rng(self.config.seed)
        # supersets, and for a task prompts, that additions do not see
        self.unseen_loss = self.train.with_seed(self.config.seed + 1)
        self.nodes_f = loss.nodes_f

    def run(self, opened_f: Tensor | None) -> NestedMasks:
        levels, opening = self.levels, self.opening
        none_f = torch.zeros_like(self.nodes_f)
        kept_f, score_f, circuits = none_f, self._scores(none_f), dict[int, Tensor]()
        if opened_f is not None:
            circuits[opening] = kept_f = opened_f
        for place in range(opening + len(circuits), len(levels)):
            level = levels[place]
            core_f = kept_f | self._needed_errors(kept_f, level, self.config.room)
            if place == opening:
                kept_f = self._exchange_nodes_for_errors(core_f, self._search_by_descent(core_f, score_f, level), score_f, level)
            elif place == opening + 1:
                kept_f, within = self._add_nodes(core_f, level)
                kept_f = (
                    self._delete_in_sweeps(core_f, kept_f, level) if within else self._search_by_descent(core_f, score_f, level)
                )
            else:
                kept_f = self._minimise_by_rank(core_f, self._scores(core_f).abs(), 1000, level)
            circuits[place] = kept_f
            self.progress(Phase(f"{level}: {int(kept_f.sum()):,} nodes"))
        kept_f = circuits[opening]
        for place in range(opening - 1, -1, -1):
            circuits[place] = kept_f = self._sweep(none_f, kept_f, levels[place], necessary=False)
        kept_lf = torch.stack([circuits[place] for place in range(len(levels))])
        off = tuple(self.loss.worst_distance(kept_f, level) for kept_f, level in zip(kept_lf, levels, strict=True))
        return NestedMasks(levels, (~kept_lf).sum(0), off)

    # -- 1, 2 -----------------------------------------------------------------------------------------------------------

    def _exchange_nodes_for_errors(self, core_f: Tensor, kept_f: Tensor, score_f: Tensor, level: Level) -> Tensor:
        """Return the circuit; if it is large, the one with more errors if these spare at least their price in nodes."""
        if int(kept_f.sum()) <= self.config.error_price:
            return kept_f
        more_f = core_f | self._needed_errors(core_f, level, self.config.room / 3)
        extra = int((more_f & ~core_f).sum())
        if not extra:
            return kept_f
        other_f = self._search_by_descent(more_f, score_f, level)
        return other_f if int(other_f.sum()) + extra * self.config.error_price <= int(kept_f.sum()) else kept_f

    def _needed_errors(self, kept_f: Tensor, level: Level, room: float) -> Tensor:
        """Return the errors with which all nodes and kept_f are within the share `room` of what a level allows."""
        all_f, none_f = self.nodes_f | kept_f, torch.zeros_like(kept_f)
        if self.masked.errors is None or float(self._distances(all_f[None], level)) <= room:
            return none_f

        def gradient(mask_rf: Tensor) -> Tensor:
            return self.loss.gradient(mask_rf, lambda x_rv, row_r: self.loss.relative_miss(x_rv, level, row_r).abs())

        order_k = _most_negative(integrated_gradients(self.masked, gradient, ~all_f, kept_f=all_f))
        powers = sorted({round(2 ** (i / 2)) for i in range(2 * len(order_k).bit_length() + 1)})
        sizes = [size for size in powers if size <= len(order_k)]
        if not sizes:
            return none_f
        off_c = self._distances(torch.stack([all_f.index_fill(0, order_k[:size], True) for size in sizes]), level)
        good = (off_c <= room).nonzero().flatten().tolist()
        return none_f.index_fill(0, order_k[: sizes[good[0] if good else int(off_c.argmin())]], True)

    def _distances(self, kept_cf: Tensor, level: Level) -> Tensor:
        return self.loss.distance_alone(self.loss.logits(kept_cf), level)

    def _scores(self, kept_f: Tensor) -> Tensor:
        """Return integrated gradients of d for all nodes outside a circuit, which is kept."""
        over_f = self.nodes_f & ~kept_f
        return integrated_gradients(
            self.masked, lambda mask_cf: self.train.gradient(mask_cf, self.train.miss), over_f, self.config.alphas, kept_f
        )

    # -- 3, 4, 5 --------------------------------------------------------------------------------------------------------

    def _search_by_descent(self, core_f: Tensor, score_f: Tensor, level: Level) -> Tensor:
        """Return the core and few more nodes, within the level's bounds; at most all nodes."""
        tau_f, size_weight, within, kept_f = score_f, _LAMBDA_START, False, core_f
        for attempt in range(self.config.attempts):
            tau_f, size_weight = self._descend(core_f, score_f, level, attempt, tau_f, size_weight)
            kept_f, within = self._add_nodes(core_f | (tau_f > 0), level)
            if within:
                break
        if within:
            tau_f = torch.where(tau_f > 0, tau_f, _TAU_RANGE[1] + 1)  # added nodes rank first
            kept_f = self._minimise_by_rank(core_f, tau_f, int((kept_f & ~core_f).sum()), level, kept_f)
        else:
            kept_f = self._minimise_by_rank(kept_f, self._scores(kept_f).abs(), 2 * int(kept_f.sum()), level)
        return self._add_backup_nodes(core_f, self._delete_in_sweeps(core_f, kept_f, level), level)

    def _descend(
        self, core_f: Tensor, score_f: Tensor, level: Level, attempt: int, tau_f: Tensor, size_weight: float
    ) -> tuple[Tensor, float]:
        """Return tau_f (-inf if no candidate) and lambda after a descent that starts from the best nodes that nearly suffice.

        A later attempt starts with more of them. With several prompts it continues instead from the last attempt's tau_f and
        lambda, and makes the terms smaller, because the circuit is judged on held-out prompts.
        """
        count, steps = self.config.supersets, self.config.steps
        size_f = torch.where(self.nodes_f & ~core_f, score_f.abs(), 0)
        node_k = size_f.topk(min(_MAX_CANDIDATES, int(size_f.count_nonzero()))).indices
        several = len(self.train.model_b) > 1
        target_term = _TARGET_TERM_SEVERAL * _TARGET_FACTOR_PER_ATTEMPT**attempt if several else _TARGET_TERM
        if several and attempt > 0:
            tau_k, steps = tau_f[node_k], steps // 2
        else:
            start = min(4**attempt * self._start_size(core_f, node_k, level), len(node_k))
            rank_k = torch.arange(len(node_k), device=node_k.device)
            tau_k, size_weight = (_TAU_SPREAD * ((start + 1) / (rank_k + 1)).log()).clamp(*_TAU_RANGE), _LAMBDA_START
        mean_k, square_k, mean_term = torch.zeros_like(tau_k), torch.zeros_like(tau_k), 0.0
        prompts, zero_1 = min(self.config.prompts, len(self.train.model_b)), torch.zeros(1, dtype=torch.long)
        kept_rpf = core_f.repeat(2 + count, prompts, 1)
        for step in range(steps):
            kept_k = tau_k > 0
            row_p = torch.randperm(len(self.train.model_b), generator=self.generator)[:prompts] if several else zero_1
            # each superset of a step draws its density from its own equal part of 0 to 1
            density_up = (np.arange(count)[:, None] + self.draws.random((count, prompts))) / count
            superset_upf = random_sets(self.draws, density_up.reshape(-1), len(core_f)).to(tau_k.device)
            superset_upf = superset_upf.view(count, prompts, -1) & self.nodes_f
            inside_f = core_f.index_fill(0, node_k[kept_k], True)
            kept_rpf[0], kept_rpf[1 : 1 + count] = inside_f, inside_f | superset_upf
            kept_rpf[-1] = self.loss.complement(inside_f)
            terms = partial(self.train.descent_terms, level=level, row_p=row_p)
            row_r = row_p.repeat(len(kept_rpf))
            gradient_rk, term_r = self.train.masked.gradient(kept_rpf.flatten(0, 1), terms, row_r, node_k)
            gradient_rpk, term_rp = gradient_rk.unflatten(0, (-1, prompts)), term_r.view(-1, prompts)
            # if a superset contains a node, the node's own mask changes nothing
            in_supersets_upk = torch.where(superset_upf[..., node_k] & ~kept_k, 0, gradient_rpk[1 : 1 + count])
            # a node that is kept is missing from the complement, hence the minus
            gradient_k = (gradient_rpk[0].mean(0) + in_supersets_upk.mean((0, 1)) - gradient_rpk[-1].mean(0)) / 2
            step_term = max(float(term_rp[0].mean()), float(term_rp[1 : 1 + count].mean()))
            mean_term = step_term if step == 0 or not several else _TERM_SMOOTHING * mean_term + (1 - _TERM_SMOOTHING) * step_term
            if several:
                size_weight *= _LAMBDA_RISE_SEVERAL if mean_term < target_term else _LAMBDA_FALL_SEVERAL
            else:
                rise = _LAMBDA_FAST_RISE if mean_term < _FAST_RISE_TERM else _LAMBDA_RISE
                size_weight *= rise if mean_term < target_term else _LAMBDA_FALL
            size_weight = min(max(size_weight, _LAMBDA_RANGE[0]), _LAMBDA_RANGE[1])
            sigmoid_k = torch.sigmoid(2 * tau_k)
            gradient_k = gradient_k * 4 * sigmoid_k * (1 - sigmoid_k) + size_weight
            mean_k = _ADAM_BETAS[0] * mean_k + (1 - _ADAM_BETAS[0]) * gradient_k
            square_k = _ADAM_BETAS[1] * square_k + (1 - _ADAM_BETAS[1]) * gradient_k.square()
            deviation_k = (square_k / (1 - _ADAM_BETAS[1] ** (step + 1))).sqrt() + 1e-8
            rate = self.config.rate * (1 - step / steps)
            tau_k = (tau_k - rate * mean_k / (1 - _ADAM_BETAS[0] ** (step + 1)) / deviation_k).clamp(*_TAU_RANGE)
        self.progress(Phase(f"{level}: descent, {int((tau_k > 0).sum()):,} nodes"))
        tau_f = torch.full(core_f.shape, -torch.inf, device=tau_k.device)
        return tau_f.index_copy_(0, node_k, tau_k), size_weight

    def _start_size(self, core_f: Tensor, node_k: Tensor, level: Level) -> int:
        """Return how many of the best-ranked nodes get the answer about right."""
        sizes = [size for size in _START_SIZES if size < len(node_k)] or [len(node_k)]
        off_c = self._distances(torch.stack([core_f.index_fill(0, node_k[:size], True) for size in sizes]), level)
        good = (off_c <= _MAX_START_DISTANCE).nonzero().flatten().tolist()
        return sizes[good[0] if good else -1]

    def _add_nodes(self, kept_f: Tensor, level: Level) -> tuple[Tensor, bool]:
        """Add the nodes whose gradients bring the circuit nearest to the level's bounds; return it and whether it is within."""
        absent_uf = ~self.loss.superset_uf
        bound_f = self.loss.superset_bound(level) * absent_uf.sum(0).clamp(min=1)
        (off,), (terms,) = self.loss.distances_and_terms(kept_f[None], level)
        for _ in range(self.config.rounds):
            if off <= 1:
                break
            rows_rf = torch.cat([kept_f[None], kept_f | self.loss.superset_uf])
            gradient_rf = self.loss.gradient(rows_rf, lambda x_rv, row_r: self.loss.prompt_penalty(x_rv, row_r, level))
            in_supersets_f = gradient_rf[1:].mul_(absent_uf).sum(0).div_(bound_f)
            order_k = _most_negative(
                torch.where(self.nodes_f & ~kept_f, gradient_rf[0] + in_supersets_f, 0), max(_ADDITION_SIZES)
            )
            sizes = [size for size in _ADDITION_SIZES if size <= len(order_k)]
            if not sizes:
                break
            tried_cf = torch.stack([kept_f.index_fill(0, order_k[:size], True) for size in sizes])
            offs, all_terms = self.loss.distances_and_terms(tried_cf, level)
            # the fewest that are within, otherwise those with the smallest terms
            best = next(
                (place for place, each in enumerate(offs) if each <= 1), min(range(len(sizes)), key=all_terms.__getitem__)
            )
            if offs[best] > 1 and all_terms[best] >= terms:
                break
            kept_f, off, terms = tried_cf[best], offs[best], all_terms[best]
        return kept_f, off <= 1

    def _delete_in_sweeps(self, core_f: Tensor, kept_f: Tensor, level: Level) -> Tensor:
        """Delete nodes outside the core, those that are missed least, in several sweeps."""
        for _ in range(self.config.sweeps):
            before = int(kept_f.sum())
            if before > _MAX_NODES_TO_SWEEP:
                break
            kept_f = self._sweep(core_f, kept_f, level)
            if int(kept_f.sum()) > 0.97 * before:
                break
        return kept_f

    def _sweep(self, core_f: Tensor, kept_f: Tensor, level: Level, *, necessary: bool = True) -> Tensor:
        """Delete as many nodes outside the core as the bounds allow, those that are missed least first.

        In the supersets, and for a task on the prompts, that additions do not see, the circuit may not be further off than now or
        than the level allows. If `necessary`, its deletion may not leave more of the span than now or than `config.left`.
        """
        loss, others = self.loss, self.unseen_loss
        node_k = (kept_f & ~core_f).nonzero().flatten()
        off = max(1.0, others.worst_distance(kept_f, level))
        left = max(self.config.left, float(loss.left_after_deletion(kept_f[None])))

        def within(fewer_f: Tensor) -> bool:
            if necessary and float(loss.left_after_deletion(fewer_f[None])) > left:
                return False
            return loss.meets_bounds(fewer_f, level) and others.worst_distance(fewer_f, level) <= off

        order_k = deletion_order(loss, torch.cat([loss.superset_uf, others.superset_uf]), kept_f, node_k, level).flip(0)
        return self._smallest_within(core_f, order_k, int(0.9 * len(order_k)), within)

    def _add_backup_nodes(self, core_f: Tensor, kept_f: Tensor, level: Level) -> Tensor:
        """Add the nodes that keep up the answer when the circuit is ablated, if few and within the bounds; then sweep again."""
        backup_k = backup_nodes(self.loss, kept_f)
        if not 0 < len(backup_k) <= max(_MAX_BACKUP_NODES[0], _MAX_BACKUP_NODES[1] * int(kept_f.sum())):
            return kept_f
        with_backup_f = kept_f.index_fill(0, backup_k, True)
        if not self.loss.meets_bounds(with_backup_f, level):
            return kept_f
        return self._sweep(core_f, with_backup_f, level)

    def _minimise_by_rank(
        self, core_f: Tensor, order_f: Tensor, guess: int, level: Level, within_f: Tensor | None = None
    ) -> Tensor:
        """Return the core and the fewest others found to be within the level, largest order_f first; at most all of them."""
        others_f = (self.nodes_f if within_f is None else within_f) & ~core_f
        place_k = others_f.nonzero().flatten()
        order_k = place_k[order_f[place_k].argsort(descending=True, stable=True)]
        return self._smallest_within(core_f, order_k, guess, lambda kept_f: self.loss.meets_bounds(kept_f, level))

    def _smallest_within(self, core_f: Tensor, order_k: Tensor, guess: int, within: Callable[[Tensor], bool]) -> Tensor:
        """Return the core and the fewest nodes, from the front of order_k, that are found to be within bounds; at most all."""
        low, high = -1, len(order_k)  # low is outside the bounds, high is assumed to be within
        size, factor = min(max(1, guess), high - 1), 1.6
        while high - low > max(1, high // 25):
            if within(core_f.index_fill(0, order_k[:size], True)):
                high = size
            else:
                low = size
            if low < 0:
                size, factor = int(high / factor), factor * 1.2
            elif high == len(order_k):
                size, factor = min(int(low * factor) + 1, (low + high + 1) // 2), factor * 1.3
            else:
                size = round(((low + 1) * (high + 1)) ** 0.5) - 1
            size = min(max(size, low + 1), high - 1)
        return core_f.index_fill(0, order_k[:high], True)


def _most_negative(gradient_f: Tensor, most: int | None = None) -> Tensor:
    """Return the indices where a gradient is below 0, the lowest first; all of them, or at most `most`."""
    place_k = (gradient_f < 0).nonzero().flatten()
    if most is not None and len(place_k) > most:
        place_k = gradient_f.topk(most, largest=False).indices
    return place_k[gradient_f[place_k].argsort(stable=True)]

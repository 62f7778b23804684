"""Counterfactual transport: the circuit's nodes take their values on the counterfactual, and the dense model's answer follows.

With w_i the writes of sublayer i in the sparse model, p the prompt, c its counterfactual, and M the circuit's mask, the sparse
stream at site j changes by what the circuit has written before it, and that is decoded and added to the dense residual there:

    x_j(c; C) - x_j(p) = sum_(i < j) M_i (w_i(c) - w_i(p))              h_j(p)  <-  h_j(p) + lin g_j of it

Nodes outside stay at their values on the prompt, so nothing but the circuit carries the change; and the embedding, which is no
node, stays the prompt's. Every site has one injection, and the dense model computes on from there. Injecting at several sites in
one run would count twice what the dense model itself makes of the first injection at the second; so the sites are separate
runs, each with the *whole* circuit before it, and what is reported is the mean over all sites after the first, where there is
nothing to carry yet. No site is chosen. Effects are shares of the full swap, D(c) - D(p) in the dense model.

    ceiling       all nodes in the circuit's place: what the sparse model and the bridges can carry at all
    dense         the dense model's own writes, h_j(c) - h_j(p) - (h_0(c) - h_0(p)): without the embedding too; with it, 1
    turned        the change turned by a random rotation, the same one at every position of every pair at a site: the same
                  norms, as coherent over pairs. 100 of them, each pair at one site per rotation
    other nodes   as many nodes outside the circuit (of those that are on), their change scaled to the norm of the circuit's
    mismatched    the change of another pair, which may go the other way round, where the prompt has as many tokens
    own           the share of each sublayer's own writes, M_i (w_i(c) - w_i(p)), at site i + 1: told per site, not judged

Shape legend: b pair (row), i item (a row at a site), t token, s sparse width, d dense width, f all nodes in one row, j site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from bridge.card.card import CardMeasure, Point
from bridge.card.case import Case, numbers, share, share_interval
from bridge.evidence.controls import random_circuits
from bridge.transport import Change
from bridge.validate import Control, average, control_of

ROTATIONS, QUANTILE = 100, 0.99
OTHERS, MISMATCHED = 20, 20
OF_CEILING, TIMES_OTHERS = 0.5, 3.0
LEAST_SWAP = 0.05  # logits, on average; shares of less than that mean nothing


class Swap:
    """What the nodes of a case write on the counterfactual instead of the prompt, carried into the dense model."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def own(self, kept_f: Tensor) -> list[Tensor]:
        """change_bts of the sparse stream that the kept nodes of each sublayer make, by site of the sublayer."""
        kept, sparse = self.case.space.split(kept_f), self.case.coupling.sparse
        changes: list[Tensor] = [torch.zeros(()) for _ in range(sparse.n_sites - 1)]
        for at, change_bts in self.case.written.items():
            changes[sparse.site(at)] = changes[sparse.site(at)] + change_bts * kept[at]
        return changes

    def whole(self, kept_f: Tensor) -> Tensor:
        """change_jbtd of the dense residual at sites 1, 2, ... by everything that the kept nodes have written before."""
        total = torch.zeros(())
        changes = []
        for site, change_bts in enumerate(self.own(kept_f), start=1):
            total = total + change_bts
            changes.append(self._decoded(site, total))
        return torch.stack(changes)

    def _decoded(self, site: int, change_bts: Tensor) -> Tensor:
        return Change(torch.full((len(change_bts),), site), change_bts).decoded(self.case.coupling)

    def by_sublayer(self, kept_f: Tensor) -> Tensor:
        """change_jbtd at sites 1, 2, ... by what the kept nodes of the sublayer before it alone have written."""
        return torch.stack([self._decoded(site, change) for site, change in enumerate(self.own(kept_f), start=1)])

    def dense(self) -> Tensor:
        """change_jbtd at sites 1, 2, ... of the dense model's own writes."""
        there_bt1 = self.case.pairs.there_bt[:, :, None]
        pairs = zip(self.case.dense_swapped.residuals, self.case.dense.residuals, strict=True)
        first, *later = [(swapped_btd - plain_btd) * there_bt1 for swapped_btd, plain_btd in pairs]
        return torch.stack(later) - first

    def effects(self, change_jbtd: Tensor) -> np.ndarray:
        """effect_jb on D of a change at every site in turn."""
        rows = torch.arange(len(self.case.pairs))
        return np.stack(
            [
                numbers(self.case.moved(rows, torch.full_like(rows, site), change_btd))
                for site, change_btd in enumerate(change_jbtd, start=1)
            ]
        )

    def items(self, draw: int) -> tuple[Tensor, Tensor]:
        """row_i and site_i for one draw of a control: every row at one site, another one each draw; few rows at every site."""
        pairs, sites = len(self.case.pairs), self.case.last_site
        if pairs < sites:
            return torch.arange(pairs).repeat_interleave(sites), torch.arange(sites).repeat(pairs) + 1
        return torch.arange(pairs), (torch.arange(pairs) + draw) % sites + 1

    def share_of(self, row_i: Tensor, site_i: Tensor, change_itd: Tensor) -> float:
        """The share of the full swap that items of a draw have together."""
        effect_i = numbers(self.case.moved(row_i, site_i, change_itd))
        return share(effect_i, numbers(self.case.swap_b)[row_i.numpy()])


@torch.no_grad()
def swap_measures(case: Case, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> tuple[CardMeasure, ...]:
    """The test's measures, a line for each of its controls."""
    name, aim = "share of the swap carried", f">= {OF_CEILING:g} of ceiling, > turned"
    swap_b = numbers(case.swap_b)
    if not len(swap_b) or abs(swap_b.mean()) < LEAST_SWAP:
        size = f"{swap_b.mean():.3f}" if len(swap_b) else "no pairs"
        note = f"the counterfactual hardly changes the dense model's D ({size} logits)"
        return (CardMeasure(name, None, None, aim, None, note, test="swap"),)
    progress("transport: the circuit, all nodes, the dense model")
    swap, generator = Swap(case), torch.Generator().manual_seed(seed + 2_000_003)
    every_f = torch.ones_like(case.kept_f)
    change_jbtd = swap.whole(case.kept_f)
    circuit_jb, every_jb, dense_jb = (swap.effects(x) for x in (change_jbtd, swap.whole(every_f), swap.dense()))
    own_jb, own_every_jb = (swap.effects(swap.by_sublayer(kept_f)) for kept_f in (case.kept_f, every_f))
    points = _points(case, swap_b, {
        "circuit": circuit_jb, "all nodes": every_jb, "dense": dense_jb, "own": own_jb, "own, all nodes": own_every_jb,
    })  # fmt: skip
    value, most, raw = (share(effect_jb.mean(0), swap_b) for effect_jb in (circuit_jb, every_jb, dense_jb))
    ceiling = Control("all nodes", 1, most, most, "it")
    bounds = share_interval(circuit_jb.mean(0), swap_b, seed)
    progress(f"transport: {ROTATIONS} rotations")
    turned = [_turned(swap, change_jbtd, draw, generator) for draw in range(ROTATIONS)]
    bar = float(np.quantile(turned, QUANTILE))
    random = control_of("turned", turned, lambda _: bar, f"{QUANTILE:.0%}")
    progress("transport: other nodes, other pairs")
    best = max(points, key=lambda point: point.values["own"])
    tested = f"{len(swap_b)} pairs" if len(swap_b) > 1 else "one pair, so that there are no others' changes to compare with"
    note = f"{tested}; the dense model's own writes {raw:.3f}; best alone: {best.label}, {best.values['own']:.3f}"
    passed = most > 0 and value >= OF_CEILING * most and value > bar and (bounds is None or bounds[0] > 0)
    first = CardMeasure(name, value, random, aim, passed, note, test="swap", interval=bounds, ceiling=ceiling, points=points)
    others = list(_others(swap, case.kept_f, change_jbtd, generator))
    mismatched = [x for draw in range(MISMATCHED) for x in _mismatched(swap, change_jbtd, draw, generator)]
    against_nodes = _beside(
        "against other nodes", value, control_of("others", others, average, "mean"), f">= {TIMES_OTHERS:g} times theirs",
        value >= TIMES_OTHERS * average(others) and value > 0, "no node outside the circuit changes",
    )  # fmt: skip
    if len(swap_b) == 1:
        return first, against_nodes
    against_pairs = _beside(
        "against other pairs' changes", value, control_of("mismatched", mismatched, max, "largest"), "above all",
        value > max(mismatched, default=0), "no two pairs are equally long",
    )  # fmt: skip
    return first, against_nodes, against_pairs


def _beside(name: str, value: float, control: Control | None, aim: str, passed: bool, why_none: str) -> CardMeasure:
    if control is None:
        return CardMeasure(name, value, None, aim, None, why_none, test="swap")
    return CardMeasure(name, value, control, aim, passed, test="swap")


def _points(case: Case, swap_b: np.ndarray, effects: dict[str, np.ndarray]) -> tuple[Point, ...]:
    kinds = (*case.coupling.dense.sublayers, "unembed")
    return tuple(
        Point(
            f"site {site} ({kinds[site]})",
            {name: share(effect_jb[site - 1], swap_b) for name, effect_jb in effects.items()},
        )
        for site in range(1, case.coupling.n_sites)
    )


def _turned(swap: Swap, change_jbtd: Tensor, draw: int, generator: torch.Generator) -> float:
    """The share of the change turned by a random rotation."""
    row_i, site_i = swap.items(draw)
    change_itd = change_jbtd[site_i - 1, row_i]
    width = change_itd.shape[-1]
    frame, triangle = torch.linalg.qr(torch.randn(width, width, generator=generator))
    rotation_dd = (frame * triangle.diagonal().sign()).to(change_itd)  # uniform: without the signs QR prefers some
    return swap.share_of(row_i, site_i, change_itd @ rotation_dd)


def _others(swap: Swap, kept_f: Tensor, change_jbtd: Tensor, generator: torch.Generator) -> Iterator[float]:
    """Shares of as many other nodes, or of as many as there are, each item's change as long as the circuit's."""
    pool_f = swap.case.on_f & ~kept_f
    like_f = kept_f if int(pool_f.sum()) >= int(kept_f.sum()) else pool_f
    moves = any(bool((change_bts * kept).any()) for change_bts, kept in _written(swap, pool_f))
    for draw, other_f in enumerate(random_circuits(swap.case.space, like_f, pool_f, generator, OTHERS) if moves else ()):
        row_i, site_i = swap.items(draw)
        wanted_itd, change_itd = (x_jbtd[site_i - 1, row_i] for x_jbtd in (change_jbtd, swap.whole(other_f)))
        wanted_i11, length_i11 = (x.flatten(1).norm(dim=1)[:, None, None] for x in (wanted_itd, change_itd))
        scale_i11 = torch.where(length_i11 > 1e-6 * wanted_i11, wanted_i11 / length_i11.clamp(min=1e-30), 0.0)
        yield swap.share_of(row_i, site_i, change_itd * scale_i11)


def _written(swap: Swap, kept_f: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    kept = swap.case.space.split(kept_f)
    yield from ((change_bts, kept[at]) for at, change_bts in swap.case.written.items())


def _mismatched(swap: Swap, change_jbtd: Tensor, draw: int, generator: torch.Generator) -> Sequence[float]:
    """The share of the changes of other pairs of the same length, dealt out at random; nothing where no two are as long."""
    row_i, site_i = swap.items(draw)
    last_b = swap.case.pairs.last_b.cpu()
    given_b = torch.full_like(last_b, -1)
    for last in last_b.unique():
        here_k = (last_b == last).nonzero().flatten()
        if len(here_k) > 1:  # in a circle, so that none gets its own
            here_k = here_k[torch.randperm(len(here_k), generator=generator)]
            given_b[here_k] = here_k.roll(1)
    dealt_i = given_b[row_i] >= 0
    if not bool(dealt_i.any()):
        return ()
    row_i, site_i = row_i[dealt_i], site_i[dealt_i]
    return (swap.share_of(row_i, site_i, change_jbtd[site_i - 1, given_b[row_i]]),)

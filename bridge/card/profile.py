"""The effect profile of a task's circuit: what deleting a node does to D in the sparse model, and carried into the dense one.

For about 100 nodes, half of them the circuit's and half outside it, from the same locations where there are enough: each alone at
its corpus mean, at every position, the rest of the sparse model as it is; the change that this makes of the stream at the site
after its sublayer is decoded and added to the dense residual there (`transport`). Effects are means over held-out prompts, and
are compared by rank over nodes. The null permutes the nodes within a site, since effects of late sites are larger in both models.

The ceiling is how well the dense model's own effects repeat: those over one half of the prompts, ranked against the other half.
The interval draws both prompts and nodes anew.

Shape legend: b prompt (row), p node of the profile, k draw, t token, s sparse width.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from bridge.card.card import CardMeasure, Point
from bridge.card.case import Case, interval, numbers
from bridge.circuit import Node
from bridge.evidence.controls import some
from bridge.evidence.effects import permuted_null, rank_correlation
from bridge.residual import Enter, Trace
from bridge.sparse import Gate, Location
from bridge.transport import Change
from bridge.validate import (
    CORRELATION,
    FEWEST_NODES,
    NULL_QUANTILE,
    PROFILE_NODES,
    RESOLUTION,
    Control,
)

PROMPTS = 64  # all held-out pairs: with 24, two halves of the prompts ranked the dense effects .65 alike for one task
NAME, AIM = "rank correlation of effects", f">= {CORRELATION:g}, above the null"


@torch.no_grad()
def profile_measures(case: Case, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> tuple[CardMeasure, ...]:
    """The test's measure, with every node's effects as its points."""
    generator = torch.Generator().manual_seed(seed + 4_000_037)
    place_p, inside_p = _nodes(case, generator)
    row_b = torch.linspace(0, len(case.pairs) - 1, min(PROMPTS, len(case.pairs))).round().long()
    progress(f"effect profile: {len(place_p)} nodes on {len(row_b)} prompts, in both models")
    if len(place_p) < FEWEST_NODES:
        return (_untaken(f"{len(place_p)} nodes are too few to rank"),)
    nodes = [case.space.node(place) for place in place_p.tolist()]
    sparse_pb, dense_pb = effects(case, nodes, row_b)
    site_p = np.array([case.coupling.sparse.site(node.location) for node in nodes])
    return (_correlated(sparse_pb, dense_pb, site_p, inside_p.numpy(), nodes, seed),)


def _nodes(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """place_p of half the nodes in the circuit, and of as many outside that are on; and which of them are inside_p."""
    kept_f, on_f = case.kept_f, case.on_f
    inside_k = some((kept_f & on_f).nonzero().flatten(), PROFILE_NODES // 2, generator)
    chosen = case.space.split(torch.zeros_like(kept_f).index_fill_(0, inside_k, True))
    places = case.space.split(torch.where(on_f & ~kept_f, torch.arange(len(kept_f), device=kept_f.device), -1))
    outside = [some(place_tn[place_tn >= 0], int(chosen[at].sum()), generator) for at, place_tn in places.items()]
    place_p = torch.cat([inside_k, *outside]).cpu()
    return place_p, torch.arange(len(place_p)) < len(inside_k)


def effects(case: Case, nodes: list[Node], row_b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """effect_pb on D of deleting each node at every position: in the sparse model, and carried into the dense one."""
    sparse, pairs = case.coupling.sparse, case.pairs.rows(row_b)
    plain = sparse.run(pairs.prompt_bt, last_only=True)
    answer_b = pairs.difference(case.whole.last_logits(pairs, plain))
    padding = case.pairs.prompt_bt.shape[1] - pairs.prompt_bt.shape[1]
    sparse_pb, dense_pb = [], []
    for node in nodes:
        site = sparse.site(node.location)
        entering = Enter.at(site, plain.residuals[site])
        gate = _without(node.location, node.index, case.whole.means[node.location])
        trace = sparse.run(pairs.prompt_bt, entering, gate, last_only=True)
        sparse_pb.append(numbers(answer_b - pairs.difference(case.whole.last_logits(pairs, trace))))
        site_b = torch.full((len(pairs),), site + 1)
        change_btd = Change.between(_residuals(plain, site + 1), _residuals(trace, site + 1), site_b).decoded(case.coupling)
        change_btd = torch.nn.functional.pad(change_btd, (0, 0, 0, padding))
        dense_pb.append(-numbers(case.moved(row_b, site_b, change_btd)))
    return np.stack(sparse_pb), np.stack(dense_pb)


def _residuals(trace: Trace, until: int) -> Trace:
    """The trace up to a site: rows that enter later have nothing before."""
    return Trace(trace.logits_btv, trace.residuals[: until + 1])


def _without(location: Location, index: int, mean_n: Tensor) -> Gate:
    def gate(at: Location, x_btn: Tensor) -> Tensor:
        if at != location:
            return x_btn
        here_n = torch.arange(x_btn.shape[-1], device=x_btn.device) == index
        return torch.where(here_n, mean_n.to(x_btn.dtype), x_btn)

    return gate


def _correlated(
    sparse_pb: np.ndarray, dense_pb: np.ndarray, site_p: np.ndarray, inside_p: np.ndarray, nodes: list[Node], seed: int
) -> CardMeasure:
    sparse_p, dense_p = (_resolved(effect_pb.mean(1)) for effect_pb in (sparse_pb, dense_pb))
    points = tuple(
        Point(node.name, {"sparse": float(x), "dense": float(y), "inside": float(inside), "site": float(site + 1)})
        for node, x, y, inside, site in zip(nodes, sparse_p, dense_p, inside_p, site_p, strict=True)
    )
    if np.ptp(sparse_p) == 0 or np.ptp(dense_p) == 0:
        where = "sparse" if np.ptp(sparse_p) == 0 else "dense"
        return _untaken(f"no node has an effect in the {where} model", points)
    if np.unique(site_p).size == len(site_p):
        return _untaken("no two nodes are of one site, so nothing can be permuted", points)
    generator = np.random.default_rng(seed)
    value = float(rank_correlation(sparse_p, dense_p))
    null_k = permuted_null(sparse_p, dense_p, site_p, generator)
    bar = float(np.quantile(null_k, NULL_QUANTILE))
    control = Control("permuted", len(null_k), float(null_k.mean()), bar, f"{NULL_QUANTILE:.0%}")
    note = f"{len(nodes)} nodes, {int(inside_p.sum())} of them the circuit's, {sparse_pb.shape[1]} prompts"
    bounds = _interval(sparse_pb, dense_pb, seed)
    passed = value >= CORRELATION and value > bar
    return CardMeasure(NAME, value, control, AIM, passed, note, "profile", bounds, _repeats(dense_pb), points)


def _interval(sparse_pb: np.ndarray, dense_pb: np.ndarray, seed: int) -> tuple[float, float] | None:
    nodes, prompts = sparse_pb.shape
    generator = np.random.default_rng(seed + 1)

    def statistic(pick_kb: np.ndarray) -> np.ndarray:
        weight_bk = np.stack([np.bincount(pick_b, minlength=prompts) for pick_b in pick_kb], 1) / prompts
        pick_kp = generator.integers(nodes, size=(len(pick_kb), nodes))
        drawn = [np.take_along_axis(_resolved(x_pb @ weight_bk).T, pick_kp, 1) for x_pb in (sparse_pb, dense_pb)]
        return rank_correlation(*drawn)

    return interval(statistic, prompts, seed)


def _repeats(dense_pb: np.ndarray) -> Control | None:
    """How well the dense effects over half of the prompts rank those over the other half, on average over splits."""
    if dense_pb.shape[1] < 2:
        return None
    generator = np.random.default_rng(0)
    halves = []
    for _ in range(20):
        order = generator.permutation(dense_pb.shape[1])
        first, second = (_resolved(dense_pb[:, half].mean(1)) for half in np.array_split(order, 2))
        if np.ptp(first) and np.ptp(second):
            halves.append(float(rank_correlation(first, second)))
    return Control("dense, halves", len(halves), float(np.mean(halves)), max(halves), "best") if halves else None


def _resolved(effect_p: np.ndarray) -> np.ndarray:
    """Effects with what is within rounding at 0, so that rounding is not ranked."""
    return np.where(np.abs(effect_p) < RESOLUTION, 0.0, effect_p)


def _untaken(note: str, points: tuple[Point, ...] = ()) -> CardMeasure:
    return CardMeasure(NAME, None, None, AIM, None, note, test="profile", points=points)

"""The search for a prompt's circuit: few nodes, kept so that neither their being alone nor random company changes the answer.

What is minimised is the number of kept nodes; what bounds it, with U a random set of the nodes outside C, each with its density,

    max over U of KL(S, S_(C + U))  <=  .05 nats,     U = nothing, .3, .6 and .9 of the rest

on the next-token distribution at the last position. Without U such a search finds nodes whose deletions cancel each other
(method, section 3). The phases, as the log names them:

1. candidates   Nodes with no path to the answer are dropped. Channels of the residual stream that are read anywhere count as
                reached, since the norm reads all of them, and so does whatever competes in an AbsTopK with a node that is
                reached; what is left out can change nothing at all. Then nodes that AbsTopK silenced are dropped, if that by
                itself stays within half the bound. Where it does not (a silenced node's mean is not 0, and being off can be the
                news), they are candidates like any other.
2. scores       Integrated gradients: with every candidate at m + alpha (a - m) and the rest at m,
                    score_i = - mean over 8 values of alpha of  dKL(S, S_alpha) / d alpha_i
                ranked by magnitude: a node that works against the answer belongs to the circuit as well.
3. bisect       The smallest number of best-scored candidates that meets the bound.
4. again        2 and 3 with only those as candidates, now that the rest is at its mean, until it no longer pays.
5. delete       Every kept node is deleted alone; those whose deletion meets the bound are deleted together, cheapest first, as
                many as the bound allows (bisected), and what is left of them is tried again. Not minimal in any stronger sense.

The work is bounded in tokens of masked copies rather than in seconds, so that the same seed finds the same circuit on any day;
where it runs out during the deletions, `complete` is False.

Shape legend: c circuit, r masked copy of the prompt, t token, n nodes of a location, f all nodes of a prompt in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.circuit import Ablations, Circuit, NodeSpace
from bridge.sparse import Location, SparseTransformer

KL_BOUND = 0.05  # nats; twice as strict as what `validate` asks of the finished circuit
DENSITIES = (0.0, 0.3, 0.6, 0.9)
ALPHAS = 8
WAYS = 6  # a bisection tries five sizes at once: as rows of one batch they cost little more than one
AGAIN = 4  # most rounds of scoring and bisecting; each must shed a twentieth of the nodes
WORK = 40_000  # tokens of masked copies: some seconds on two cores for 4 layers 256 to 384 wide

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Found:
    """A circuit and how it was found: score_f of the candidates, how many there were, whether the deletions were completed."""

    circuit: Circuit
    kept_f: Tensor
    score_f: Tensor
    n_active: int
    n_candidates: int
    silenced: bool
    complete: bool


def find_circuit(
    ablations: Ablations, *, seed: int = 0, bound: float = KL_BOUND, work: int = WORK, progress: Say | None = None
) -> Found:
    """The circuit of a prompt, by the search that the module describes. Raises ValueError unless bound is positive."""
    if bound <= 0:
        raise ValueError(f"a KL of at most {bound} cannot be asked for; give a bound above 0")
    say = progress or (lambda _: None)
    judge = _Judge(ablations, bound, work, seed)

    reached_f = reachable(ablations.sparse, ablations.space).to(ablations.value_f.device)
    active_f = (ablations.value_f != 0) & reached_f
    silenced = float(judge.losses(active_f[None]).max()) > bound / 2
    kept_f = candidates_f = reached_f if silenced else active_f
    say(f"candidates: {int(candidates_f.sum()):,} of {ablations.space.size:,} nodes")

    score_f = first_score_f = _scores(ablations, candidates_f)
    for _ in range(AGAIN):
        before = int(kept_f.sum())
        ranked_k = torch.where(kept_f, score_f.abs(), -1).argsort(descending=True, stable=True)[:before]
        kept_f = _fewest(judge, torch.zeros_like(kept_f), ranked_k)
        say(f"scored and bisected: {int(kept_f.sum()):,} nodes")
        if int(kept_f.sum()) > 0.95 * before:
            break
        score_f = _scores(ablations, kept_f)
    kept_f, complete = _deleted(judge, kept_f, say)

    losses = dict(zip((f"kl with {density:g} of the rest" for density in DENSITIES), judge.losses(kept_f[None])[0].tolist()))
    circuit = Circuit(ablations.question, ablations.space.split(kept_f), ablations.means, losses)
    n_active, n_candidates = int(active_f.sum()), int(candidates_f.sum())
    return Found(circuit, kept_f, first_score_f, n_active, n_candidates, silenced, complete)


class _Judge:
    """Measures circuits under the densities, and counts the tokens that takes."""

    def __init__(self, ablations: Ablations, bound: float, work: int, seed: int) -> None:
        self.ablations, self.bound, self.left = ablations, bound, work
        generator = torch.Generator().manual_seed(seed)
        device = ablations.value_f.device
        self.draw_f = torch.rand(ablations.space.size, generator=generator).to(device)  # on again where below the density
        self.density_d = torch.tensor(DENSITIES, device=device)

    def losses(self, kept_cf: Tensor) -> Tensor:
        """kl_cd of every circuit under every density."""
        self.left -= len(kept_cf) * len(DENSITIES) * self.ablations.space.n_tokens
        kept_rf = (kept_cf[:, None] | (self.draw_f < self.density_d[:, None])).flatten(0, 1)
        return self.ablations.kl(self.ablations.logits(kept_rf)).unflatten(0, (-1, len(DENSITIES)))

    def passes(self, kept_cf: Tensor) -> list[bool]:
        """Whether each circuit meets the bound."""
        return (self.losses(kept_cf).amax(1) <= self.bound).tolist()

    def losses_without(self, kept_f: Tensor, node_r: Tensor) -> Tensor:
        """kl_r of the circuit less one node each: alone, or in the company in which the circuit does worst, whichever is more."""
        ablations, worst = self.ablations, int(self.losses(kept_f[None])[0].argmax())
        kl_r = torch.zeros(len(node_r), device=kept_f.device)
        for density in {DENSITIES[0], DENSITIES[worst]}:
            off_r = (self.draw_f[node_r] >= density).nonzero().flatten()  # the others would be switched on again at once
            self.left -= len(off_r) * ablations.space.n_tokens
            logits_rv = ablations.logits_without(kept_f | (self.draw_f < density), node_r[off_r])
            kl_r[off_r] = torch.maximum(kl_r[off_r], ablations.kl(logits_rv))
        return kl_r


def _scores(ablations: Ablations, candidates_f: Tensor) -> Tensor:
    alpha_r1 = (torch.arange(ALPHAS, device=candidates_f.device)[:, None] + 0.5) / ALPHAS
    slope_f = torch.zeros_like(ablations.value_f)
    for rows_r1 in alpha_r1.split(ablations.rows):
        slope_f += ablations.slopes(rows_r1 * candidates_f).sum(0)
    return torch.where(candidates_f, -slope_f / ALPHAS, 0)


def _fewest(judge: _Judge, core_f: Tensor, ranked_k: Tensor) -> Tensor:
    """The core and the first few of ranked_k, as few as are found to meet the bound; all of them are taken to meet it."""

    def circuit(size: int) -> Tensor:
        return core_f.index_fill(0, ranked_k[:size], True)

    low, high = -1, len(ranked_k)  # low fails, high passes
    while high - low > max(1, high // 100):
        sizes = _between(low, high)
        passes = judge.passes(torch.stack([circuit(size) for size in sizes]))
        first = next((i for i, good in enumerate(passes) if good), len(sizes))
        low, high = (sizes[first - 1] if first else low), (sizes[first] if first < len(sizes) else high)
    return circuit(high)


def _between(low: int, high: int) -> list[int]:
    """Up to WAYS - 1 sizes strictly between two, evenly spaced in their logarithms."""
    ratio = (high + 1) / (low + 2)
    return sorted({round((low + 2) * ratio ** (i / WAYS)) - 1 for i in range(1, WAYS)} - {low, high}) or [(low + high) // 2]


def _deleted(judge: _Judge, kept_f: Tensor, say: Say) -> tuple[Tensor, bool]:
    """The circuit after greedy deletion, and whether every node was tried."""
    needed_f = torch.zeros_like(kept_f)
    while len(node_k := (kept_f & ~needed_f).nonzero().flatten()):
        if judge.left < 2 * len(node_k) * judge.ablations.space.n_tokens:
            return kept_f, False
        say(f"deleting: {int(kept_f.sum()):,} nodes, {len(node_k):,} of them to be tried")
        kl_k = judge.losses_without(kept_f, node_k)
        needed_f[node_k[kl_k > judge.bound]] = True  # missed when it alone is gone, and so when more are
        order_k = node_k[kl_k.argsort(descending=True, stable=True)][int((kl_k > judge.bound).sum()) :]
        kept_f = _fewest(judge, kept_f.index_fill(0, order_k, False), order_k)
        needed_f[order_k[kept_f[order_k]][-1:]] = True  # the next one would have been one too many
    return kept_f, True


def reachable(sparse: SparseTransformer, space: NodeSpace) -> Tensor:
    """Which nodes_f can change the logits at the last position, by the nonzero weights and the order of positions alone.

    Backwards through the sublayers, with the positions at which the residual stream still matters: at first only the last.
    """
    reached = {location: torch.zeros(space.n_tokens, n, dtype=torch.bool) for location, n in space.sizes.items()}
    matters_t = torch.zeros(space.n_tokens, dtype=torch.bool)
    matters_t[-1] = True
    sites: dict[int, list[Location]] = {}
    for location in space.sizes:
        sites.setdefault(sparse.site(location), []).append(location)
    for site in sorted(sites, reverse=True):
        layer, kinds = sites[site][0].layer, {location.kind for location in sites[site]}
        read_t = matters_t.clone()
        for part, reach in (("attn", _reach_attention), ("mlp", _reach_mlp)):
            if f"{part}_in" in kinds:
                reach(sparse, layer, matters_t, reached)
                read_t |= reached[Location(layer, f"{part}_in")].any(1)
        matters_t = read_t
    return space.join(reached)


def _reach_mlp(sparse: SparseTransformer, layer: int, matters_t: Tensor, reached: dict[Location, Tensor]) -> None:
    up, down = (_nonzero(sparse, layer, name).any(0) for name in ("up", "down"))
    reached[Location(layer, "mlp_out")] |= matters_t[:, None]
    reached[Location(layer, "mlp_act")] |= matters_t[:, None] & down
    reached[Location(layer, "mlp_in")] |= matters_t[:, None] & up & down.any()


def _reach_attention(sparse: SparseTransformer, layer: int, matters_t: Tensor, reached: dict[Location, Tensor]) -> None:
    out = _nonzero(sparse, layer, "o").any(0)
    head = out.unflatten(0, (-1, sparse.shape.head_channels)).any(1).repeat_interleave(sparse.shape.head_channels)
    # positions that something which matters looks back at
    seen_t = matters_t.flip(0).cummax(0).values.flip(0)
    reached[Location(layer, "attn_out")] |= matters_t[:, None]
    for kind, at_t, used in (("q", matters_t, head), ("k", seen_t, head), ("v", seen_t, out)):
        reached[Location(layer, kind)] |= at_t[:, None] & used
        reached[Location(layer, "attn_in")] |= at_t[:, None] & _nonzero(sparse, layer, kind).any(0) & used.any()


def _nonzero(sparse: SparseTransformer, layer: int, name: str) -> Tensor:
    return (sparse.get_parameter(f"blocks.{layer}.{name}.weight") != 0).cpu()

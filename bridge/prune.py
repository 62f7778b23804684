"""The search for a prompt's circuit: few nodes, kept so that neither their being alone nor random company changes the answer.

The number of kept nodes is made small under two bounds, with D the logit difference that is asked about and U a random set of
the nodes outside C, of density .15, .3, .45, .6, .75 and .9:

    miss(C) = KL(S, S_C) + w ((D_C - D) / max(|D|, 1))^2  <=  .05           w such that D may be a tenth off at the bound
    mean over U of KL(S, S_(C + U))                       <=  .1,  and the largest <= .3

on the next-token distribution at the last position, all half of what `validate` asks for. Without U such a search finds nodes
whose deletions cancel each other (method, section 3); without D it loses the answer to a confident question, whose KL hardly
notices. The phases, as the log names them:

1. candidates   Nodes with no path to the answer are dropped. Channels of the residual stream count as reached wherever they are
                read, since the norm reads all of them, and so does what competes in an AbsTopK with a node that is reached: what
                is left out can change nothing at all. Nodes that AbsTopK silenced are dropped too, if that by itself keeps to
                half the bounds. Where it does not (their means are not 0, and being off can be the news), they are candidates.
2. scores       Integrated gradients: with every candidate at m + alpha (a - m) and the rest at m,
                    score_i = - mean over 8 values of alpha of  d miss(alpha) / d alpha_i
                ranked by magnitude: a node that works against the answer belongs to the circuit as well.
3. masks        tau_i starts from the rank, above 0 for the fewest that get the answer about right. Some steps of Adam on
                    miss(C) / 2 + mean_U KL(S, S_(C + U)) / 2 + lambda |C|,     C = {tau > 0},
                Heaviside forward, sigmoid's derivative backward, a fresh U of every density at each step; lambda rises while
                the bounds are met and falls while they are not. Where C does not meet them in the end, some steps more, with a
                few nodes more if it is near. Then the fewest nodes by tau that meet the bounds. Once more on the nodes that are
                left, if that shed a fifth; or with 4 times as many to begin with, where far more than those above 0 were needed.
4. trims        The nodes on which the objective depends least steeply are deleted, as many at once as the bounds allow, until
                that is but a few.
5. deletions    Every kept node is deleted alone; those that are not missed are deleted together, as many as the bounds allow,
                and the others are tried again, over and over until no node can be spared.

Ranking and bisecting by score alone, which the method proposes for prompts, stops short in models whose nodes interact: on six
prompts of a small coupling it left 83 to 8,486 nodes where the masks left 60 to 251, in the same time. And to hold every single
U to .05, as it proposes too, lets one unlucky draw decide: there are prompts whose answer moves by more than that whenever a
random tenth of the whole model is ablated.

The work is bounded in tokens of masked copies rather than in seconds, so that the same seed finds the same circuit on any day;
where it runs out during the deletions, `complete` is False.

Shape legend: c circuit, r masked copy of the prompt, t token, n nodes of a location, f all nodes of a prompt in one row, k some
nodes, by their place in that row; v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.circuit import Ablations, Circuit, NodeSpace
from bridge.fewest import deleted, fewest, ranks
from bridge.sparse import Location, SparseTransformer

MISS_BOUND = 0.05
COMPANY_BOUND = 0.1
WORST_TIMES = 3  # of that bound, which the largest over U may reach
SHARE = 0.1  # of D, by which a circuit at the bound may be off
DENSITIES = (0.15, 0.3, 0.45, 0.6, 0.75, 0.9)
DRAWS = 2  # of U per density, when a circuit is judged
ALPHAS = 8
STEPS, FEWEST_STEPS = 30, 15  # of Adam; fewer for long prompts
CLOSE, GROWTH = 1.4, 1.1  # times the bounds, times the nodes
REPAIRS, REPAIR_STEPS, REPAIR_RATE = 8, 6, 0.5  # for masks that miss the bounds by a little; the rate relative to the first
RATE, BETA_1, BETA_2 = 0.07, 0.7, 0.95  # tau lives between -4 and 1: the steps can bring any node up or down
STARTS, START_MISS = (500, 1000, 2000, 4000, 8000, 16000), 0.5  # nodes above 0 at first: the fewest that miss no more
SPREAD = 0.2  # how far a factor e in rank sets two nodes apart
COMPANY = 3  # sets U per step, of densities evenly spread
ATTEMPTS = 2
TRIMS = 4
ENOUGH = 200  # nodes; fewer are not put through the masks again
WORK = 14_000  # tokens of masked copies, a gradient counting three: 2 to 3 s on one core for 4 layers 512 wide
WORK_PER_TOKEN = 500  # and as many per token of the prompt, where that is more


@dataclass(frozen=True, eq=False)
class Found:
    """A circuit and how it was found: kept_f, numbers of nodes along the way, whether silenced ones were candidates.

    complete tells whether the deletions went on until no node could be spared.
    """

    circuit: Circuit
    kept_f: Tensor
    n_active: int
    n_candidates: int
    silenced: bool
    complete: bool


def find_circuit(
    ablations: Ablations, *, seed: int = 0, work: int | None = None, progress: Callable[[str], None] | None = None
) -> Found:
    """The circuit of a prompt, by the search that the module describes, within `work` tokens of masked copies."""
    say = progress or (lambda _: None)
    work = max(WORK, WORK_PER_TOKEN * ablations.space.n_tokens) if work is None else work
    judge = _Judge(ablations, work, seed)

    reached_f = reachable(ablations.sparse, ablations.space).to(ablations.value_f.device)
    active_f = (ablations.value_f != 0) & reached_f
    active_1f = active_f[None]
    silenced = float(judge.alone(active_1f)) > MISS_BOUND / 2 or float(judge.company(active_1f)) > COMPANY_BOUND / 2
    candidates_f = reached_f if silenced else active_f
    say(f"candidates: {int(candidates_f.sum()):,} of {ablations.space.size:,} nodes")

    kept_f = _by_masks(judge, candidates_f, ranks(candidates_f, _scores(judge, candidates_f).abs()), seed, say)
    kept_f = _trimmed(judge, kept_f, say)
    kept_f, complete = deleted(judge, kept_f, say)

    losses = {"miss": float(judge.alone(kept_f[None])), "company": float(judge.company(kept_f[None]))}
    circuit = Circuit(ablations.question, ablations.space.split(kept_f), ablations.means, losses)
    return Found(circuit, kept_f, int(active_f.sum()), int(candidates_f.sum()), silenced, complete)


class Alone:
    """Measures circuits alone against a bound on their miss, and counts the tokens that takes."""

    def __init__(self, ablations: Ablations, bound: float, work: float = float("inf")) -> None:
        self.ablations, self.bound, self.work, self.left = ablations, bound, work, work
        self.answer = float(ablations.question.difference(ablations.logits_v))

    def miss(self, logits_rv: Tensor) -> Tensor:
        """miss_r of circuits alone."""
        off_r = (self.ablations.question.difference(logits_rv) - self.answer) / max(abs(self.answer), 1)
        return self.ablations.kl(logits_rv) + MISS_BOUND / SHARE**2 * off_r.square()

    def alone(self, kept_cf: Tensor) -> Tensor:
        """miss_c of every circuit alone."""
        self.left -= len(kept_cf) * self.ablations.space.n_tokens
        return self.miss(self.ablations.logits(kept_cf))

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some circuits that meets the bound; their number where none does."""
        good_c = self.alone(kept_cf) <= self.bound
        return int(good_c.int().argmax()) if bool(good_c.any()) else len(kept_cf)

    def without(self, kept_f: Tensor, node_k: Tensor) -> Tensor:
        """miss_k of the circuit less one node, for each of node_k."""
        self.left -= self.cost(len(node_k))
        return self.miss(self.ablations.logits_without(kept_f, node_k))

    def cost(self, n: int) -> float:
        """Tokens of masked copies; rows start half-way through the model, on average."""
        return n * self.ablations.space.n_tokens // 2

    def slopes(self, kept_rf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """As `Ablations.slopes`."""
        self.left -= 3 * len(kept_rf) * self.ablations.space.n_tokens
        return self.ablations.slopes(kept_rf, loss)


class _Judge(Alone):
    """The judge of the search: of circuits alone and in company."""

    def __init__(self, ablations: Ablations, work: int, seed: int) -> None:
        super().__init__(ablations, MISS_BOUND, work)
        generator = torch.Generator().manual_seed(seed)
        device = ablations.value_f.device
        draw_uf = torch.rand(DRAWS, ablations.space.size, generator=generator).to(device)
        self.company_uf = torch.cat([draw_uf < density for density in DENSITIES])
        length = ablations.space.n_tokens
        self.steps = max(FEWEST_STEPS, min(STEPS, work // 3 // (3 * (1 + COMPANY) * length)))
        self.cost_of_masks = 3 * self.steps * (1 + COMPANY) * length

    def company(self, kept_cf: Tensor) -> Tensor:
        """kl_c of every circuit: the mean over the companies, or a third of the largest, where that is more."""
        count = len(self.company_uf)
        self.left -= len(kept_cf) * count * self.ablations.space.n_tokens
        some = kept_cf.split(max(1, self.ablations.rows // count))
        kl = [self.ablations.kl(self.ablations.logits((each[:, None] | self.company_uf).flatten(0, 1))) for each in some]
        kl_cu = torch.cat(kl).unflatten(0, (-1, count))
        return torch.maximum(kl_cu.mean(1), kl_cu.amax(1) / WORST_TIMES)

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some circuits that meets both bounds; their number where none does."""
        for place in (self.alone(kept_cf) <= MISS_BOUND).nonzero().flatten().tolist():
            if float(self.company(kept_cf[place][None])) <= COMPANY_BOUND:
                return place
        return len(kept_cf)

    def missed(self, kept_f: Tensor) -> float:
        """What a circuit has of the bound that it is furthest above, or nearest to, as a multiple."""
        return max(float(self.alone(kept_f[None])) / MISS_BOUND, float(self.company(kept_f[None])) / COMPANY_BOUND)


def _scores(judge: _Judge, candidates_f: Tensor) -> Tensor:
    alpha_r1 = (torch.arange(ALPHAS, device=candidates_f.device)[:, None] + 0.5) / ALPHAS
    total_f = torch.zeros_like(judge.ablations.value_f)
    for rows_r1 in alpha_r1.split(judge.ablations.rows):
        total_f -= judge.slopes(rows_r1 * candidates_f, judge.miss)[0].sum(0)
    return torch.where(candidates_f, total_f / ALPHAS, 0)


def _by_masks(judge: _Judge, kept_f: Tensor, rank_f: Tensor, seed: int, say: Callable[[str], None]) -> Tensor:
    """The smallest circuit that some attempts find among the kept nodes."""
    best_f, start = kept_f, _start(judge, kept_f, rank_f)
    for attempt in range(ATTEMPTS):
        before = int(kept_f.sum())
        if attempt and (before < ENOUGH or judge.left < judge.cost_of_masks + judge.work // 4):
            break
        tau_f = _masks(judge, kept_f, rank_f, min(start, before // 2), seed + attempt)
        above, tau_rank_f = int((tau_f > 0).sum()), ranks(kept_f, tau_f)
        fewer_f = fewest(judge, torch.zeros_like(kept_f), tau_rank_f.argsort()[:before], above)
        after = int(fewer_f.sum())
        say(f"masks: {after:,} nodes")
        best_f = fewer_f if after < int(best_f.sum()) else best_f
        if after > 2 * above and 4 * start < before:
            start *= 4  # with so few to begin with, it did not find its way
        elif after < 0.8 * before:
            kept_f, rank_f, start = fewer_f, ranks(fewer_f, tau_f), after
        else:
            break
    return best_f


def _start(judge: _Judge, kept_f: Tensor, rank_f: Tensor) -> int:
    """How many of the best-ranked nodes get the answer about right: the more, the more the answer is spread out."""
    sizes = [size for size in STARTS if size < int(kept_f.sum())] or [STARTS[0]]
    good = (judge.alone(torch.stack([kept_f & (rank_f < size) for size in sizes])) <= START_MISS).tolist()
    return sizes[good.index(True) if True in good else -1]


def _masks(judge: _Judge, candidates_f: Tensor, rank_f: Tensor, start: int, seed: int) -> Tensor:
    """tau_f after some steps, and some more while the nodes above 0 do not meet the bounds; below all others no candidates."""
    node_k = candidates_f.nonzero().flatten()
    tau_k = (SPREAD * ((start + 1) / (rank_f[node_k] + 1)).log()).clamp(-4, 1)
    mean_k, square_k = torch.zeros_like(tau_k), torch.zeros_like(tau_k)
    size_weight = 1e-3  # lambda, in units of the loss; Adam makes only its ratio to the slopes matter
    generator = torch.Generator().manual_seed(seed)
    offset_r1 = torch.arange(COMPANY, device=tau_k.device)[:, None] / COMPANY
    kept_rf = torch.zeros(1 + COMPANY, len(candidates_f), dtype=torch.bool, device=tau_k.device)

    def loss(logits_rv: Tensor) -> Tensor:
        return torch.cat([judge.miss(logits_rv[:1]), judge.ablations.kl(logits_rv[1:])])

    step, steps, repairs = 0, judge.steps, REPAIRS
    while step < steps:
        kept_k = tau_k > 0
        draw_k, shift = torch.rand(len(tau_k), generator=generator).to(tau_k.device), float(torch.rand((), generator=generator))
        # one draw serves all rows, turned by a different angle for each
        company_rk = ((draw_k + offset_r1) % 1 < offset_r1 + shift / COMPANY) & ~kept_k
        kept_rf[0, node_k], kept_rf[1:, node_k] = kept_k, kept_k | company_rk
        slope_rf, loss_r = judge.slopes(kept_rf, loss)
        met = max(float(loss_r[0]) / MISS_BOUND, float(loss_r[1:].mean()) / COMPANY_BOUND) < 0.8
        size_weight = min(max(size_weight * (1.2 if met else 0.7), 1e-6), 3e-2)
        sigmoid_k, slope_rk = torch.sigmoid(2 * tau_k), slope_rf[:, node_k]
        # where company has switched a node on, its own mask changes nothing
        slope_k = slope_rk[0] / 2 + torch.where(company_rk, 0, slope_rk[1:]).mean(0) / 2
        slope_k = slope_k * 4 * sigmoid_k * (1 - sigmoid_k) + size_weight
        mean_k = BETA_1 * mean_k + (1 - BETA_1) * slope_k
        square_k = BETA_2 * square_k + (1 - BETA_2) * slope_k.square()
        deviation_k = (square_k / (1 - BETA_2 ** (step + 1))).sqrt() + 1e-8
        rate = RATE * max(1 - step / judge.steps, REPAIR_RATE if step >= judge.steps else 0)
        tau_k = (tau_k - rate * mean_k / (1 - BETA_1 ** (step + 1)) / deviation_k).clamp(-4, 1)
        step += 1
        if step < steps or not repairs or judge.left < judge.work // 4:
            continue
        missed = judge.missed(torch.zeros_like(candidates_f).index_fill_(0, node_k[tau_k > 0], True))
        if missed > 1:
            steps, repairs = steps + REPAIR_STEPS, repairs - 1
        if 1 < missed < CLOSE:  # by a little: rather some nodes more than steps alone
            more = min(len(tau_k), round(GROWTH * int((tau_k > 0).sum())) + 1)
            tau_k = (tau_k - tau_k.kthvalue(len(tau_k) - more + 1).values.clamp_max(0) + 1e-6).clamp(-4, 1)
    return torch.full((len(candidates_f),), -5.0, device=tau_k.device).index_copy_(0, node_k, tau_k)


def _trimmed(judge: _Judge, kept_f: Tensor, say: Callable[[str], None]) -> Tensor:
    """The circuit without those nodes on which, to first order, least depends: as many at once as the bounds allow."""

    def loss(logits_rv: Tensor) -> Tensor:
        rows = len(judge.company_uf)
        return torch.cat([judge.miss(logits_rv[:1]), judge.ablations.kl(logits_rv[1:]) / rows])

    for _ in range(TRIMS):
        before = int(kept_f.sum())
        slope_rf, _ = judge.slopes(torch.cat([kept_f[None], kept_f | judge.company_uf]), loss)
        order_k = ranks(kept_f, slope_rf.sum(0).abs()).argsort()[:before]
        kept_f = fewest(judge, torch.zeros_like(kept_f), order_k, round(0.8 * before))
        say(f"trims: {int(kept_f.sum()):,} nodes")
        if int(kept_f.sum()) > 0.95 * before:
            break
    return kept_f


def reachable(sparse: SparseTransformer, space: NodeSpace) -> Tensor:
    """Which nodes_f can change the logits at the last position, by the nonzero weights and the order of positions alone.

    Backwards through the sublayers, with the positions at which the residual stream still matters: at first only the last.
    """
    reached = {location: torch.zeros(space.n_tokens, n, dtype=torch.bool) for location, n in space.sizes.items()}
    matters_t = torch.zeros(space.n_tokens, dtype=torch.bool)
    matters_t[-1] = True
    layers: dict[int, set[tuple[int, str]]] = {}
    for location in space.sizes:
        part = "mlp" if location.kind.startswith("mlp") else "attention"
        layers.setdefault(sparse.site(location), set()).add((location.layer, part))
    for site in sorted(layers, reverse=True):
        parts = [(_reach_mlp if part == "mlp" else _reach_attention)(sparse, layer, matters_t) for layer, part in layers[site]]
        for location, reached_tn in (item for part in parts for item in part.items()):
            reached[location] = reached_tn
            if location.kind.endswith("_in"):
                matters_t = matters_t | reached_tn.any(1)
    return space.join(reached)


def _reach_mlp(sparse: SparseTransformer, layer: int, matters_t: Tensor) -> dict[Location, Tensor]:
    up, down = (_nonzero(sparse, layer, name).any(0) for name in ("up", "down"))
    here_t1 = matters_t[:, None]
    return {
        Location(layer, "mlp_in"): here_t1 & (up & down.any()),
        Location(layer, "mlp_act"): here_t1 & down,
        Location(layer, "mlp_out"): here_t1.expand(-1, sparse.width),
    }


def _reach_attention(sparse: SparseTransformer, layer: int, matters_t: Tensor) -> dict[Location, Tensor]:
    value = _nonzero(sparse, layer, "o").any(0)
    score = value.unflatten(0, (-1, sparse.shape.head_channels)).any(1).repeat_interleave(sparse.shape.head_channels)
    here_t1 = matters_t[:, None]
    seen_t1 = here_t1.flip(0).cummax(0).values.flip(0)  # positions that something which matters can look back at
    reached = {Location(layer, "attn_out"): here_t1.expand(-1, sparse.width)}
    read_tn = torch.zeros_like(reached[Location(layer, "attn_out")])
    for kind, at_t1, used in (("q", here_t1, score), ("k", seen_t1, score), ("v", seen_t1, value)):
        reached[Location(layer, kind)] = at_t1 & used
        read_tn = read_tn | (at_t1 & (_nonzero(sparse, layer, kind).any(0) & used.any()))
    return {**reached, Location(layer, "attn_in"): read_tn}


def _nonzero(sparse: SparseTransformer, layer: int, name: str) -> Tensor:
    return (sparse.get_parameter(f"blocks.{layer}.{name}.weight") != 0).cpu()

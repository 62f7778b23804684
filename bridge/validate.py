"""Whether a prompt's circuit is what it claims, on the sparse model and on the dense one; every measure beside its control.

    agreement       KL(y_d, y_s) on the prompt, beside its mean over text; the gate is that both models give the same answer and
                    prefer the same of target and contrast
    sufficiency     KL(S, S_C), and the share D_C / D of the logit difference; beside random circuits
    company         KL(S, S_(C + U)) over random sets U of outside nodes, mean and worst; beside random circuits in that company
    necessity       KL(S, S_(not C)), and the share of D that is left when only C is deleted; beside random deletions
    attention       total variation between the patterns of S and S_C, over heads whose values are kept, at tokens where what they
                    write is; beside random circuits
    effect profile  for about 100 nodes, half of them outside: the effect on D of deleting the node in the sparse model, against
                    the transported effect in the dense model; beside the same with the nodes' identities permuted

Random circuits have as many nodes at each location as the circuit, as many of them active, drawn from all nodes that can reach
the answer; random deletions likewise, from the nodes outside. Supersets are drawn afresh: they are not those that the search has
seen.

A node's deletion is carried into the dense model as `transport` says, at the site after its sublayer:

    effect in sparse  = D(S) - D(S less i)
    effect in dense   = D(dense) - D(dense from h + g(x') - g(x) on)

Effects are compared by rank, ties sharing theirs; what lies within RESOLUTION of 0 is 0, so that rounding is not ranked. The
null permutes the nodes within a site: effects of late sites are larger in both models, which proves nothing.

A measure whose control could not be taken has not passed. The verdict follows from the measures and cannot be set: a prompt can
refute a circuit, or show it sufficient on the sparse model ("behavioural"), and say whether its effects are found again in the
dense one; stronger verdicts take counterfactual pairs, several couplings and seeds.

Shape legend: b batch row, r masked copy of the prompt, c circuit, p node of the profile, t token, n nodes of a location, f all
nodes of a prompt in one row, s sparse width, v vocabulary.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuit import Ablations, Circuit, ablation_gate, kl, recording_gate
from bridge.circuits.attention import variation
from bridge.columns import columns
from bridge.prune import reachable
from bridge.sparse import Gate, Location
from bridge.transport import Change, run_changed

# The thresholds, from the table of the method's section 4.
KL_KEPT = 0.1  # nats, for the circuit alone
SHARE_OFF = 0.1  # of D; below one logit, of a logit: shares of next to nothing mean nothing
COMPANY_MEAN, COMPANY_WORST = 0.2, 0.6  # nats
PATTERN = 0.1  # total variation of attention
CORRELATION = 0.6  # rank correlation of the effect profile
NULL_QUANTILE = 0.95  # of the permuted correlations, to be exceeded as well

# How much is drawn.
RANDOM_CIRCUITS = 20
SUPERSETS = 32
PROFILE_NODES = 100
FEWEST_NODES = 10  # below which ranks say nothing
PERMUTATIONS = 2000
RESOLUTION = 1e-4  # logits; float32 logits of a resumed model differ by up to a tenth of this
CORPUS_ROWS = 8

Verdict = Literal["no explanation", "refuted", "undecided", "behavioural"]


@dataclass(frozen=True)
class Control:
    """What a measure is held against: the mean of a number of draws, and the bar, the draw or quantile hardest to beat."""

    what: str
    draws: int
    mean: float
    bar: float
    bar_is: str

    def text(self, number: Callable[[float], str] = "{:.3f}".format) -> str:
        """In words: what it is and its mean, and the bar where that says more."""
        bar = "" if self.bar_is in ("it", "mean") else f" ({self.bar_is} {number(self.bar)})"
        return f"{self.what} {number(self.mean)}{bar}"


@dataclass(frozen=True)
class Measure:
    """One measure beside its control. passed is None where it could not be taken, which the note explains.

    Raises ValueError for a measure that claims to have passed, or not, without a value or a control.
    """

    name: str
    value: float | None
    control: Control | None
    aim: str
    passed: bool | None
    note: str = ""

    def __post_init__(self) -> None:
        if self.passed is not None and (self.value is None or self.control is None):
            raise ValueError(f"{self.name} cannot be judged without a value and its control; leave passed at None and say why")

    @property
    def met(self) -> str:
        """Whether it has passed, in a word."""
        return {True: "yes", False: "NO", None: "?"}[self.passed]

    def row(self, number: Callable[[float], str] = "{:.3f}".format) -> tuple[str, str, str, str, str]:
        """Its cells under EVIDENCE."""
        control = "none" if self.control is None else self.control.text(number)
        return self.name, "-" if self.value is None else number(self.value), self.met, self.aim, control


EVIDENCE = ("EVIDENCE", "here", "met", "aim", "control")


def evidence(measures: Iterable[Measure], width: int, number: Callable[[float], str] = "{:.3f}".format) -> list[str]:
    """Measures as a table for a terminal `width` columns wide, the note of each below it."""
    rows: list[tuple[str, ...]] = [EVIDENCE]
    for measure in measures:
        name, *cells = measure.row(number)
        rows.append((f"  {name}", *cells))
        rows += [(f"    {line}",) for line in textwrap.wrap(measure.note, width - 4)]
    return columns(rows, width)


@dataclass(frozen=True)
class Effect:
    """What deleting one node takes from D, in the sparse model and, transported to `site`, in the dense one."""

    node: str
    inside: bool
    site: int
    sparse: float
    dense: float


@dataclass(frozen=True)
class Faithfulness:
    """Every measure of a prompt's circuit beside its control; the verdict follows from them."""

    agreement: Measure
    kl_kept: Measure
    share_kept: Measure
    company_mean: Measure
    company_worst: Measure
    kl_lost: Measure
    share_lost: Measure
    attention: Measure
    profile: Measure
    profile_interval: tuple[float, float] | None
    profile_p: float | None
    effects: tuple[Effect, ...]

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All measures, in the order in which they are best read."""
        return (
            self.agreement, self.kl_kept, self.share_kept, self.company_mean, self.company_worst, self.kl_lost, self.share_lost,
            self.attention, self.profile,
        )  # fmt: skip

    @property
    def verdict(self) -> Verdict:
        """How far the evidence goes; never further than "behavioural" from one prompt."""
        if not self.agreement.passed:
            return "no explanation"
        needed = (self.kl_kept, self.share_kept, self.company_mean, self.company_worst, self.kl_lost)
        if any(measure.passed is False for measure in needed):
            return "refuted"
        return "undecided" if any(measure.passed is None for measure in needed) else "behavioural"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is what it is, and what the dense model says to it: one sentence each."""
        if self.verdict == "no explanation":
            return (f"{self.agreement.note}, so nothing found in the sparse model explains the dense one here.",)
        needed = (self.kl_kept, self.share_kept, self.company_mean, self.company_worst, self.kl_lost)
        missed = [f"{m.name} is {m.value:.3g}, not {m.aim}" for m in needed if m.passed is False]
        unknown = [f"{m.name} could not be measured ({m.note})" for m in needed if m.passed is None]
        sentences = [f"{sentence[0].upper()}{sentence[1:]}." for sentence in missed + unknown]
        if not sentences:
            kept = "The circuit alone keeps the sparse model's answer, in random company too"
            sentences = [f"{kept}, and to delete it costs more than to delete random nodes."]
        return (*sentences, self._dense_reason())

    def _dense_reason(self) -> str:
        profile = self.profile
        if profile.passed is None:
            return f"Whether the dense model does the same is not known: {profile.note}."
        assert profile.value is not None and profile.control is not None
        numbers = f"rank correlation {profile.value:.2f}, {CORRELATION:g} asked, {profile.control.bar:.2f} by chance"
        if profile.passed:
            return f"In the dense model its nodes have effects that rank as in the sparse one ({numbers})."
        if profile.value > profile.control.bar:
            return f"In the dense model the effects follow in part ({numbers}): this is weak evidence about it."
        return f"In the dense model the effects do not follow ({numbers}): this is evidence about the sparse model only."


@torch.no_grad()
def validate(
    coupling: Coupling,
    ablations: Ablations,
    circuit: Circuit,
    reference_bt: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    sufficient: Callable[[Measure, Measure], None] | None = None,
) -> Faithfulness:
    """Every measure of a prompt's circuit. reference_bt is text for the control of the agreement.

    sufficient(kl_kept, share_kept) is called once these two are known, which is long before the others are.
    """
    say = progress or (lambda _: None)
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # not the draws of the search
    kept_f = ablations.space.join(circuit.kept)
    say(f"controls: {RANDOM_CIRCUITS} random circuits, {SUPERSETS} supersets")
    random_cf = _random_circuits(ablations, kept_f, generator)
    kl_kept, share_kept = _sufficiency(ablations, kept_f, random_cf)
    if sufficient is not None:
        sufficient(kl_kept, share_kept)
    say("agreement: both models on the prompt and on text")
    agreement = _agreement(coupling, ablations, reference_bt)
    company_mean, company_worst = _company(ablations, kept_f, random_cf, generator)
    kl_lost, share_lost = _necessity(ablations, kept_f, generator)
    attention = _attention(ablations, kept_f, random_cf)
    node_p = _profile_nodes(ablations, kept_f, generator)
    say(f"effect profile: {len(node_p)} nodes, in both models")
    effects = effect_profile(coupling, ablations, node_p, kept_f)
    profile, interval, p_value = _correlated(effects, seed)
    return Faithfulness(
        agreement, kl_kept, share_kept, company_mean, company_worst, kl_lost, share_lost, attention, profile, interval, p_value,
        effects,
    )  # fmt: skip


def _agreement(coupling: Coupling, ablations: Ablations, reference_bt: Tensor) -> Measure:
    question, device = ablations.question, ablations.tokens_1t.device
    dense_v = coupling.dense.run(ablations.tokens_1t).logits_btv[0, -1].float()
    value = float(kl(dense_v, ablations.logits_v))
    text_bt = reference_bt[:CORPUS_ROWS].to(device)
    control = coupling.once("agreement", text_bt, lambda: _agreement_on(coupling, text_bt))
    difference = float(question.difference(dense_v)), float(question.difference(ablations.logits_v))
    note = ""
    if int(dense_v.argmax()) != int(ablations.logits_v.argmax()):
        note = "The sparse model gives another answer than the dense one"
    elif difference[0] * difference[1] <= 0:
        note = "The two models disagree on which of target and contrast is the likelier"
    return Measure("KL(dense, sparse)", value, control, "same answer", not note, note)


def _agreement_on(coupling: Coupling, text_bt: Tensor) -> Control:
    corpus = []
    for rows_bt in text_bt.split(2):
        dense_btv, sparse_btv = coupling.dense.run(rows_bt).logits_btv.float(), coupling.sparse.run(rows_bt).logits_btv
        corpus.append(kl(dense_btv, sparse_btv).flatten())
    corpus_n = torch.cat(corpus)
    return Control("text", len(corpus_n), float(corpus_n.mean()), float(corpus_n.quantile(0.9)), "90%")


def _random_circuits(ablations: Ablations, kept_f: Tensor, generator: torch.Generator, *, outside: bool = False) -> Tensor:
    """kept_cf of random circuits: at each location as many nodes as the circuit has, as many of them active, that can matter.

    None of them the circuit's own with `outside`; where a location then has too few, the rest comes from other locations. No
    circuit at all where there are no nodes, or too few to draw from.
    """
    pool_f = reachable(ablations.sparse, ablations.space).to(kept_f.device)
    pool_f = pool_f & ~kept_f if outside else pool_f | kept_f
    active_f = ablations.value_f != 0
    active, kept, pool = (ablations.space.split(x) for x in (active_f, kept_f, pool_f))
    random_cf = torch.zeros(RANDOM_CIRCUITS, len(kept_f), dtype=torch.bool, device=kept_f.device)
    missing = {True: 0, False: 0}
    for location, random_ctn in ablations.space.split(random_cf).items():
        for on, active_tn in ((True, active[location]), (False, ~active[location])):
            wanted = int((kept[location] & active_tn).sum())
            place_2n = (pool[location] & active_tn).nonzero()
            missing[on] += max(0, wanted - len(place_2n))
            for circuit_tn in random_ctn:
                token_n, index_n = some(place_2n, min(wanted, len(place_2n)), generator).unbind(1)
                circuit_tn[token_n, index_n] = True
    for on, count in missing.items():
        for random_f in random_cf:
            left_n1 = (pool_f & (active_f == on) & ~random_f).nonzero()
            if count > len(left_n1):
                return random_cf[:0]
            random_f[some(left_n1, count, generator).flatten()] = True
    return random_cf if kept_f.any() else random_cf[:0]


def _sufficiency(ablations: Ablations, kept_f: Tensor, random_cf: Tensor) -> tuple[Measure, Measure]:
    logits_rv = ablations.logits(torch.cat([kept_f[None], random_cf]))
    (kl, *kl_random), (share, *share_random) = ablations.kl(logits_rv).tolist(), _shares(ablations, logits_rv)
    answer = ablations.answer

    def near(share: float) -> bool:
        return abs(share - 1) * abs(answer) <= SHARE_OFF * max(abs(answer), 1)

    small = "" if abs(answer) >= 1 else f"D is {answer:.2f} logits: within {SHARE_OFF:g} of it is enough"
    easy = sum(map(near, share_random))
    others = f"{easy} of {len(random_cf)} random circuits are within that too" if easy else ""
    note = "; ".join(part for part in (small, others) if part)
    return (
        measured(
            "KL of the circuit alone", kl, control_of("random", kl_random, min, "best"), f"<= {KL_KEPT:g}, below random",
            kl <= KL_KEPT and kl < min(kl_random, default=0),
        ),
        measured(
            "share of D it keeps", share, control_of("random", share_random, _closest_to_1, "best"),
            f"{1 - SHARE_OFF:g} to {1 + SHARE_OFF:g}", near(share), note,
        ),
    )  # fmt: skip


def _company(ablations: Ablations, kept_f: Tensor, random_cf: Tensor, generator: torch.Generator) -> tuple[Measure, Measure]:
    draws = [torch.rand(len(kept_f), generator=generator) < torch.rand((), generator=generator) for _ in range(SUPERSETS)]
    company_rf = torch.stack(draws).to(kept_f.device)
    kl = ablations.kl(ablations.logits(company_rf | kept_f)).tolist()
    kl_random: list[float] = []
    if len(random_cf):
        kl_random = ablations.kl(ablations.logits(company_rf | random_cf[torch.arange(SUPERSETS) % len(random_cf)])).tolist()
    return company_measures(kl, kl_random)


def company_measures(kl: list[float], kl_random: list[float]) -> tuple[Measure, Measure]:
    """Mean and worst KL of a circuit in random company, beside random circuits in the same."""
    mean, worst = average(kl), max(kl)
    return (
        measured(
            "KL in random company, mean", mean, control_of("random", kl_random, average, "mean"),
            f"<= {COMPANY_MEAN:g}, below random", mean <= COMPANY_MEAN and mean < average(kl_random),
        ),
        measured(
            "KL in random company, worst", worst, control_of("random", kl_random, max, "worst"), f"<= {COMPANY_WORST:g}",
            worst <= COMPANY_WORST,
        ),
    )  # fmt: skip


def _necessity(ablations: Ablations, kept_f: Tensor, generator: torch.Generator) -> tuple[Measure, Measure]:
    random_cf = _random_circuits(ablations, kept_f, generator, outside=True)
    logits_rv = ablations.logits(~torch.cat([kept_f[None], random_cf]))
    (kl, *kl_random), (share, *share_random) = ablations.kl(logits_rv).tolist(), _shares(ablations, logits_rv)
    left = "" if share <= 0 else "what is left still prefers the answer"
    on_f = ablations.value_f != 0
    few = f"the circuit has {int((kept_f & on_f).sum()):,} of the {int(on_f.sum()):,} active nodes: too few others to draw from"
    return (
        measured(
            "KL with the circuit deleted", kl, control_of("random", kl_random, max, "worst"), "above random",
            kl > max(kl_random, default=0), why_none=few,
        ),
        measured(
            "share of D left without it", share, control_of("random", share_random, min, "lowest"), "<= 0", share <= 0, left, few,
        ),
    )  # fmt: skip


def _attention(ablations: Ablations, kept_f: Tensor, random_cf: Tensor) -> Measure:
    name, aim = "total variation of attention", f"<= {PATTERN:g}"
    sparse, kept = ablations.sparse, ablations.space.split(kept_f)
    layers = [at.layer for at in kept if at.kind == "v"]
    # heads of which the circuit keeps a value, at the tokens where it keeps something of what they write
    each = [
        kept[Location(layer, "v")].unflatten(-1, (-1, sparse.shape.head_channels)).any(-1).any(0)[:, None]
        & kept[Location(layer, "attn_out")].any(-1)
        for layer in layers
    ]
    used_ht = torch.cat(each)
    if not bool(used_ht.any()):
        return Measure(name, None, None, aim, None, "no head's values are in the circuit")

    def patterns(rows: int, gate: Gate | None = None) -> Tensor:
        """pattern_bhtt of the heads of all layers."""
        values: dict[Location, Tensor] = {}
        sparse.run(ablations.tokens_1t.expand(rows, -1), gate=recording_gate(values, gate), last_only=True)
        return torch.cat([sparse.pattern(at, values[Location(at, "q")], values[Location(at, "k")]) for at in layers], 1)

    whole_1htt, off = patterns(1), list[float]()
    for rows_cf in torch.cat([kept_f[None], random_cf]).split(ablations.rows):
        gate = ablation_gate(ablations.space.split(rows_cf), ablations.means)
        off += variation(whole_1htt, patterns(len(rows_cf), gate))[:, used_ht].mean(1).tolist()
    return measured(name, off[0], control_of("random", off[1:], min, "best"), aim, off[0] <= PATTERN)


def measured(
    name: str, value: float, control: Control | None, aim: str, passed: bool, note: str = "",
    why_none: str = "there are no other nodes to draw as many from",
) -> Measure:  # fmt: skip
    """A measure; one whose control could not be taken has not passed."""
    if control is None:
        return Measure(name, value, None, aim, None, why_none)
    return Measure(name, value, control, aim, passed, note)


def control_of(what: str, draws: list[float], bar: Callable[[list[float]], float], bar_is: str) -> Control | None:
    """The control of some draws; None where there are none."""
    return Control(what, len(draws), average(draws), bar(draws), bar_is) if draws else None


def average(values: list[float]) -> float:
    """The mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def _closest_to_1(shares: list[float]) -> float:
    return min(shares, key=lambda share: abs(share - 1))


def _shares(ablations: Ablations, logits_rv: Tensor) -> list[float]:
    return (ablations.question.difference(logits_rv) / ablations.answer).tolist()


def _profile_nodes(ablations: Ablations, kept_f: Tensor, generator: torch.Generator) -> Tensor:
    """node_p: half of them the circuit's, and as many active ones outside, from the same locations where there are enough."""
    inside_p = some(kept_f.nonzero().flatten(), PROFILE_NODES // 2, generator)
    outside_f = (ablations.value_f != 0) & reachable(ablations.sparse, ablations.space).to(kept_f.device) & ~kept_f
    inside = ablations.space.split(torch.zeros_like(kept_f).index_fill_(0, inside_p, True))
    places = ablations.space.split(torch.where(outside_f, torch.arange(len(kept_f), device=kept_f.device), -1))
    outside = [some(place_tn[place_tn >= 0], int(inside[location].sum()), generator) for location, place_tn in places.items()]
    return torch.cat([inside_p, *outside])


def some(place_n: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """As many of the places as are wanted, or as there are, at random."""
    return place_n[torch.randperm(len(place_n), generator=generator)[:wanted].to(place_n.device)]


@torch.no_grad()
def effect_profile(coupling: Coupling, ablations: Ablations, node_p: Tensor, kept_f: Tensor) -> tuple[Effect, ...]:
    """The effect on D of deleting each node in the sparse model, and of the transported change in the dense one."""
    question, dense = ablations.question, coupling.dense
    plain = dense.run(ablations.tokens_1t)
    whole_f = torch.ones_like(kept_f)
    effects = []
    rows = max(1, min(ablations.rows, 2**26 // (ablations.space.n_tokens * dense.vocabulary)))
    for some_p in node_p.split(rows) if len(node_p) else ():
        kept_rf = whole_f.repeat(1 + len(some_p), 1)  # the first row is the model itself, in the same batch: no rounding between
        kept_rf[torch.arange(len(some_p)) + 1, some_p] = False
        trace = ablations.run(kept_rf)
        difference_r = question.difference(trace.logits_btv[:, -1])
        site_p = ablations.site_f[some_p.cpu()] + 1
        change = Change.between(trace.rows(slice(1)), trace.rows(slice(1, None)), site_p)
        changed = run_changed(coupling, ablations.tokens_1t.expand(len(some_p), -1), plain, site_p, change.decoded(coupling))
        dense_p = question.difference(plain.logits_btv[0, -1].float()) - question.difference(changed.logits_btv[:, -1].float())
        for place, site, sparse_effect, dense_effect in zip(
            some_p.tolist(), site_p.tolist(), (difference_r[0] - difference_r[1:]).tolist(), dense_p.tolist(), strict=True
        ):
            node = ablations.space.node(place)
            effects.append(Effect(str(node), bool(kept_f[place]), site, sparse_effect, dense_effect))
    return tuple(effects)


def _correlated(effects: tuple[Effect, ...], seed: int) -> tuple[Measure, tuple[float, float] | None, float | None]:
    """The rank correlation of the effects as a measure, its bootstrap interval, and its p-value under the null."""
    name, aim = "rank correlation in dense", f">= {CORRELATION:g}, above the null"
    sparse_p, dense_p = (np.array([getattr(effect, side) for effect in effects]) for side in ("sparse", "dense"))
    sparse_p, dense_p = (np.where(np.abs(x) < RESOLUTION, 0.0, x) for x in (sparse_p, dense_p))
    site_p = np.array([effect.site for effect in effects])
    if len(effects) < FEWEST_NODES:
        note = f"{len(effects)} nodes are too few to rank"
        return Measure(name, None, None, aim, None, note), None, None
    if np.ptp(sparse_p) == 0 or np.ptp(dense_p) == 0:
        where = "sparse" if np.ptp(sparse_p) == 0 else "dense"
        return Measure(name, None, None, aim, None, f"no node has an effect in the {where} model"), None, None
    if np.unique(site_p).size == len(effects):
        return Measure(name, None, None, aim, None, "no two nodes are of one site, so nothing can be permuted"), None, None
    generator = np.random.default_rng(seed)
    value = float(rank_correlation(sparse_p, dense_p))
    null = permuted_null(sparse_p, dense_p, site_p, generator)
    bar = float(np.quantile(null, NULL_QUANTILE))
    p_value = float((1 + np.sum(null >= value)) / (1 + len(null)))
    control = Control("permuted", len(null), float(null.mean()), bar, f"{NULL_QUANTILE:.0%}")
    pick = generator.integers(len(effects), size=(PERMUTATIONS, len(effects)))
    booted = rank_correlation(sparse_p[pick], dense_p[pick])
    low, high = np.nanquantile(booted, [0.025, 0.975])
    zeros = int(np.sum((sparse_p == 0) & (dense_p == 0)))
    note = f"{len(effects)} nodes, {sum(effect.inside for effect in effects)} of them the circuit's, {zeros} without any effect"
    return Measure(name, value, control, aim, value >= CORRELATION and value > bar, note), (float(low), float(high)), p_value


def rank_correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Spearman's rank correlation along the last axis, tied values sharing their mean rank; NaN where one side is constant."""
    x, y = (rankdata(values, axis=-1) for values in (x, y))
    x, y = (ranks - ranks.mean(-1, keepdims=True) for ranks in (x, y))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def permuted_null(
    x_p: np.ndarray, y_p: np.ndarray, site_p: np.ndarray, generator: np.random.Generator, draws: int = PERMUTATIONS
) -> np.ndarray:
    """Rank correlations with the values of x permuted among the nodes of the same site."""
    permuted = np.tile(rankdata(x_p), (draws, 1))
    for site in np.unique(site_p):
        here = np.flatnonzero(site_p == site)
        permuted[:, here] = generator.permuted(permuted[:, here], axis=1)
    return rank_correlation(permuted, np.broadcast_to(y_p, permuted.shape))

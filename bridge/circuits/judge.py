"""Whether a task's circuit is what it claims, on held-out prompts; every measure beside its control.

    solved        two-way accuracy of the sparse model; beside chance. The gate: what is not solved is not explained
    sufficiency   KL(S, S_C) on the prompts of the search and on held-out ones; share of D kept; accuracy of S_C alone; beside
                  random circuits
    company       KL(S, S_(C + U)) over random sets U of outside nodes, mean and worst; beside random circuits in that company
    necessity     two-way loss with only C deleted, at least that of chance, log 2, with its interval over the held-out pairs;
                  beside random deletions of as many outside nodes that are on
    size          edges of the circuit; beside those of the dense model, pruned on the same prompts to the same loss
    minimality    share of nodes whose removal raises the loss by more than a hundredth; beside those of a random circuit
    stability     mean overlap (Jaccard) of the seeds' circuits; beside what as many nodes share by chance, of those that are on
    attention     total variation between the patterns of S and S_C, over heads whose values are kept; beside random circuits

S_C is the circuit with its edges, where they were pruned. Random circuits have as many nodes at each location, drawn from those
that are on for some prompt, and all their edges; where a location has too few, the rest comes from other locations.

Verdicts: "unsolved", where the sparse model does not do the task; "refuted", where sufficiency, company or necessity fails;
"behavioural" where they hold. What the dense model does is another question.

Shape legend: b prompt (row), c circuit, f all nodes in one row, t token, h head, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from bridge.bootstrap import Draws
from bridge.circuit import NodeSpace, kl
from bridge.circuits.attention import variation
from bridge.circuits.masks import Goal, random_company, switched_on
from bridge.circuits.subject import SparseSubject, masked_gate, recorded
from bridge.sparse import Location
from bridge.tasks.tokens import Scores
from bridge.validate import (
    KL_KEPT,
    PATTERN,
    SHARE_OFF,
    SUPERSETS,
    Control,
    Measure,
    average,
    company_measures,
    control_of,
    measured,
    some,
)

SOLVED = 0.9  # accuracy
KL_HELD_OUT = 0.25
SMALLER = 16  # times fewer edges than dense
MINIMAL, COSTS = 0.95, 0.01
STABLE = 0.6
RANDOM_CIRCUITS = 10
TRIED_NODES = 50
FEW = 16  # prompts, where there is one run per superset or node
CHANCE = math.log(2)  # of two answers

TaskVerdict = Literal["unsolved", "refuted", "undecided", "behavioural"]


@dataclass(frozen=True)
class TaskFaithfulness:
    """Every measure of a task's circuit beside its control; the verdict follows from them."""

    solved: Measure
    kl_kept: Measure
    kl_held_out: Measure
    share_kept: Measure
    accuracy_kept: Measure
    company_mean: Measure
    company_worst: Measure
    loss_without: Measure
    edges: Measure
    minimal: Measure
    stable: Measure
    attention: Measure

    @property
    def measures(self) -> tuple[Measure, ...]:
        """All measures, in the order in which they are best read."""
        return (
            self.solved, self.kl_kept, self.kl_held_out, self.share_kept, self.accuracy_kept, self.company_mean,
            self.company_worst, self.loss_without, self.edges, self.minimal, self.stable, self.attention,
        )  # fmt: skip

    @property
    def needed(self) -> tuple[Measure, ...]:
        """The measures without which a circuit is refuted."""
        return (
            self.kl_kept, self.kl_held_out, self.share_kept, self.accuracy_kept, self.company_mean, self.company_worst,
            self.loss_without,
        )  # fmt: skip

    @property
    def verdict(self) -> TaskVerdict:
        """How far the evidence goes; never further than "behavioural", since all of it is about the sparse model."""
        if not self.solved.passed:
            return "unsolved"
        if any(measure.passed is False for measure in self.needed):
            return "refuted"
        return "undecided" if any(measure.passed is None for measure in self.needed) else "behavioural"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why the verdict is what it is: one sentence each."""
        if self.verdict == "unsolved":
            return (f"The sparse model answers {self.solved.value:.0%} right, so there is nothing that a circuit could explain.",)
        missed = [f"{m.name} is {m.value:.3g}, not {m.aim}." for m in self.needed if m.passed is False]
        unknown = [f"{m.name} could not be measured ({m.note})." for m in self.needed if m.passed is None]
        sentences = [f"{text[0].upper()}{text[1:]}" for text in missed + unknown]
        kept = "The circuit alone keeps the sparse model's answers, in random company too, and without it they are lost."
        return tuple(sentences) or (kept,)


@dataclass(frozen=True, eq=False)
class Judged:
    """A circuit to be judged: its nodes, and what its edges leave of the model; every seed's nodes; edges, also dense ones."""

    kept_f: Tensor
    pruned: SparseSubject
    seeds_f: Sequence[Tensor]
    n_edges: int
    n_dense_edges: int | None


@torch.no_grad()
def judge(
    searched: Goal,
    held_out: Goal,
    judged: Judged,
    scores: Scores,
    dense: Scores | None,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> TaskFaithfulness:
    """Every measure of a task's circuit, on the prompts of the search where that is said, else on held-out ones."""
    say = progress or (lambda _: None)
    generator = torch.Generator().manual_seed(seed + 1_000_003)  # not the draws of the search
    on_f = switched_on(held_out.subject, held_out.pairs)
    random_cf = random_circuits(held_out.subject.space, judged.kept_f, on_f | judged.kept_f, generator)
    say(f"judging: {len(random_cf)} random circuits")
    alone_bv = _logits(held_out, judged.kept_f, judged.pruned)
    random = [_logits(held_out, kept_f) for kept_f in random_cf]
    kl_kept, kl_held_out = _sufficiency(searched, held_out, judged, random_cf, alone_bv, random)
    share_kept, accuracy_kept = _answers(held_out, alone_bv, random)
    say(f"judging: {SUPERSETS} supersets")
    company_mean, company_worst = _company(_few(held_out), judged, random_cf, generator)
    say("judging: without the circuit")
    loss_without = _necessity(held_out, judged.kept_f, on_f, generator, seed)
    say(f"judging: {TRIED_NODES} nodes one by one")
    minimal = _minimality(_few(held_out), judged, random_cf, generator)
    note = "" if dense is None else f"the dense model {dense.accuracy:.3f}"
    chance = Control("chance", 1, 0.5, 0.5, "it")
    return TaskFaithfulness(
        solved=Measure(
            "accuracy of the sparse model", scores.accuracy, chance, f">= {SOLVED:g}", scores.accuracy >= SOLVED, note
        ),
        kl_kept=kl_kept,
        kl_held_out=kl_held_out,
        share_kept=share_kept,
        accuracy_kept=accuracy_kept,
        company_mean=company_mean,
        company_worst=company_worst,
        loss_without=loss_without,
        edges=_size(judged),
        minimal=minimal,
        stable=_stability(judged, on_f),
        attention=_attention(_few(held_out), judged, random_cf),
    )


def _few(goal: Goal) -> Goal:
    row_b = torch.linspace(0, len(goal.pairs) - 1, min(FEW, len(goal.pairs))).round().long()
    return goal.some(row_b.to(goal.whole_bv.device))


def _logits(goal: Goal, kept_f: Tensor, subject: SparseSubject | None = None) -> Tensor:
    subject = _sparse(goal) if subject is None else subject
    return subject.logits(goal.pairs, masked_gate(subject, kept_f))


def _sparse(goal: Goal) -> SparseSubject:
    assert isinstance(goal.subject, SparseSubject)
    return goal.subject


def random_circuits(
    space: NodeSpace, like_f: Tensor, pool_f: Tensor, generator: torch.Generator, draws: int = RANDOM_CIRCUITS
) -> Tensor:
    """kept_cf: as many nodes as like_f has, drawn from a pool, at each location as many as it has there or as there are.

    What a location lacks is drawn from all others; no circuit where the pool is too small, or like_f empty.
    """
    drawn = []
    like, pool = space.split(like_f), space.split(pool_f)
    if not like_f.any() or int(pool_f.sum()) < int(like_f.sum()):
        return torch.zeros(0, space.size, dtype=torch.bool, device=like_f.device)
    for _ in range(draws):
        parts = {}
        for location, like_tn in like.items():
            place_k = pool[location].flatten().nonzero().flatten()
            picked_k = some(place_k, int(like_tn.sum()), generator)
            parts[location] = torch.zeros_like(like_tn).flatten().index_fill_(0, picked_k, True).view_as(like_tn)
        kept_f = space.join(parts)
        lacking = int(like_f.sum()) - int(kept_f.sum())
        drawn.append(kept_f.index_fill(0, some((pool_f & ~kept_f).nonzero().flatten(), lacking, generator), True))
    return torch.stack(drawn)


def random_deletions(
    space: NodeSpace, kept_f: Tensor, on_f: Tensor, generator: torch.Generator, draws: int = RANDOM_CIRCUITS
) -> tuple[Tensor, str]:
    """gone_cf, beside the deletion of a circuit: as many of the nodes outside it that are on; and a note, or "".

    Where there are fewer, all of them are the one deletion, which the note says; none where there is nothing to delete.
    """
    outside_f = on_f & ~kept_f
    gone_cf = random_circuits(space, kept_f, outside_f, generator, draws)
    if len(gone_cf) or not kept_f.any() or not outside_f.any():
        return gone_cf, ""
    return outside_f[None], f"there are only {int(outside_f.sum()):,} other nodes: all of them deleted"


def _sufficiency(
    searched: Goal, held_out: Goal, judged: Judged, random_cf: Tensor, alone_bv: Tensor, random: list[Tensor]
) -> tuple[Measure, Measure]:
    here = float(kl(searched.whole_bv, _logits(searched, judged.kept_f, judged.pruned)).mean())
    here_random = [float(kl(searched.whole_bv, _logits(searched, kept_f)).mean()) for kept_f in random_cf]
    there = float(kl(held_out.whole_bv, alone_bv).mean())
    there_random = [float(kl(held_out.whole_bv, logits_bv).mean()) for logits_bv in random]
    return (
        measured(
            "KL of the circuit alone", here, control_of("random", here_random, min, "best"), f"<= {KL_KEPT:g}, below random",
            here <= KL_KEPT and here < min(here_random, default=0),
        ),
        measured(
            "the same, held out", there, control_of("random", there_random, min, "best"), f"<= {KL_HELD_OUT:g}, below random",
            there <= KL_HELD_OUT and there < min(there_random, default=0),
        ),
    )  # fmt: skip


def _answers(goal: Goal, alone_bv: Tensor, random: list[Tensor]) -> tuple[Measure, Measure]:
    """Share of D that the circuit keeps, and how often it is right."""
    whole = float(goal.pairs.difference(goal.whole_bv).mean())
    whole = whole if abs(whole) >= 1e-3 else math.copysign(1e-3, whole)
    share, *shares = [float(goal.pairs.difference(x).mean()) / whole for x in (alone_bv, *random)]
    right, *rights = [float((goal.pairs.difference(x) > 0).float().mean()) for x in (alone_bv, *random)]
    return (
        measured(
            "share of D it keeps", share, control_of("random", shares, lambda x: min(x, key=lambda s: abs(s - 1)), "best"),
            f"{1 - SHARE_OFF:g} to {1 + SHARE_OFF:g}", abs(share - 1) * abs(whole) <= SHARE_OFF * max(abs(whole), 1),
            "" if abs(whole) >= 1 else f"D is {whole:.2f} logits: within {SHARE_OFF:g} of it is enough",
        ),
        measured(
            "its accuracy", right, control_of("random", rights, max, "best"), f">= {SOLVED:g}", right >= SOLVED
        ),
    )  # fmt: skip


def _company(goal: Goal, judged: Judged, random_cf: Tensor, generator: torch.Generator) -> tuple[Measure, Measure]:
    company_cf = random_company(SUPERSETS, len(judged.kept_f), generator).to(judged.kept_f.device)
    values = [float(kl(goal.whole_bv, _logits(goal, judged.kept_f | u_f, judged.pruned)).mean()) for u_f in company_cf]
    controls = [
        float(kl(goal.whole_bv, _logits(goal, random_cf[draw % len(random_cf)] | u_f)).mean())
        for draw, u_f in enumerate(company_cf if len(random_cf) else ())
    ]
    return company_measures(values, controls)


def _necessity(goal: Goal, kept_f: Tensor, on_f: Tensor, generator: torch.Generator, seed: int) -> Measure:
    random_cf, note = random_deletions(goal.subject.space, kept_f, on_f, generator)
    loss_b, *others = [goal.pairs.loss(_logits(goal, ~gone_f)).double().cpu() for gone_f in (kept_f, *random_cf)]
    loss, losses = float(loss_b.mean()), [float(other_b.mean()) for other_b in others]
    # both members of a pair are prompts here, and are drawn together
    members = zip(goal.pairs.prompt_bt.tolist(), goal.pairs.counterfactual_bt.tolist(), strict=True)
    pairs = [str(sorted(both)) for both in members]
    bounds = Draws(pairs, seed).interval(lambda weight_kb: weight_kb @ loss_b.numpy() / weight_kb.sum(1))
    told = "" if bounds is None else f"95% interval {bounds[0]:.4f} to {bounds[1]:.4f} over pairs"
    return measured(
        "two-way loss without it", loss, control_of("random", losses, max, "worst"), f">= {CHANCE:.4f}, above random",
        loss >= CHANCE and loss > max(losses, default=math.inf), "; ".join(filter(None, (told, note))),
    )  # fmt: skip


def _size(judged: Judged) -> Measure:
    aim, name = f"{SMALLER} times fewer than dense", "edges"
    if judged.n_dense_edges is None:
        return Measure(name, judged.n_edges, None, aim, None, "the dense model was not pruned")
    control = Control("dense", 1, judged.n_dense_edges, judged.n_dense_edges / SMALLER, f"1/{SMALLER}")
    return Measure(name, judged.n_edges, control, aim, judged.n_edges <= judged.n_dense_edges / SMALLER)


def _minimality(goal: Goal, judged: Judged, random_cf: Tensor, generator: torch.Generator) -> Measure:
    def share(kept_f: Tensor, subject: SparseSubject | None) -> float:
        node_k = kept_f.nonzero().flatten()
        node_k = some(node_k, TRIED_NODES, generator)
        whole = float(goal.measure(_logits(goal, kept_f, subject)).mean())
        costs = 0
        for node in node_k.tolist():
            without_f = kept_f.clone()
            without_f[node] = False
            costs += float(goal.measure(_logits(goal, without_f, subject)).mean()) > whole * (1 + COSTS)
        return costs / len(node_k)

    name, aim = "share of nodes needed", f">= {MINIMAL:g}"
    if not judged.kept_f.any():
        return Measure(name, None, None, aim, None, "the circuit has no nodes")
    value = share(judged.kept_f, judged.pruned)
    controls = [share(kept_f, None) for kept_f in random_cf[:1]]
    return measured(name, value, control_of("random", controls, max, "it"), aim, value >= MINIMAL)


def _stability(judged: Judged, on_f: Tensor) -> Measure:
    name, aim = "overlap of seeds", f">= {STABLE:g}, above chance"
    if len(judged.seeds_f) < 2:
        return Measure(name, None, None, aim, None, "there is one seed; give --seeds 5")
    overlaps, by_chance = [], []
    for one_f, other_f in combinations(judged.seeds_f, 2):
        shared, sizes = int((one_f & other_f).sum()), int(one_f.sum()) + int(other_f.sum())
        expected = expected_overlap(int(one_f.sum()), int(other_f.sum()), int((on_f | one_f | other_f).sum()))
        overlaps.append(shared / max(1, sizes - shared))
        by_chance.append(expected / max(1.0, sizes - expected))
    sizes = ", ".join(str(int(kept_f.sum())) for kept_f in judged.seeds_f)
    value = average(overlaps)
    passed = value >= STABLE and value > max(by_chance)
    return measured(name, value, control_of("chance", by_chance, max, "most"), aim, passed, f"nodes: {sizes}")


def expected_overlap(first: int, second: int, of: int) -> float:
    """How many of `of` things two random sets share on average (hypergeometric)."""
    return first * second / of if of else 0.0


def _attention(goal: Goal, judged: Judged, random_cf: Tensor) -> Measure:
    name, aim = "total variation of attention", f"<= {PATTERN:g}"
    sparse = judged.pruned.sparse
    heads = {at.layer: kept_1n[0].unflatten(0, (-1, sparse.channels)).any(1).repeat_interleave(sparse.group) for at, kept_1n in
             goal.subject.space.split(judged.kept_f).items() if at.kind == "v"}  # fmt: skip
    if not any(bool(kept_h.any()) for kept_h in heads.values()):
        return Measure(name, None, None, aim, None, "no head's values are in the circuit")
    whole = _patterns(goal, _sparse(goal), None, heads)
    there_bt = goal.pairs.there_bt.to(whole[0].device)

    def off(kept_f: Tensor, subject: SparseSubject) -> float:
        total, count = 0.0, 0
        for before_bhtt, after_bhtt in zip(whole, _patterns(goal, subject, kept_f, heads), strict=True):
            variation_bht = variation(before_bhtt, after_bhtt)
            total += float((variation_bht * there_bt[:, None]).sum())
            count += int(there_bt.sum()) * variation_bht.shape[1]
        return total / max(1, count)

    value = off(judged.kept_f, judged.pruned)
    controls = [off(kept_f, _sparse(goal)) for kept_f in random_cf]
    return measured(name, value, control_of("random", controls, min, "best"), aim, value <= PATTERN)


def _patterns(goal: Goal, subject: SparseSubject, kept_f: Tensor | None, heads: dict[int, Tensor]) -> list[Tensor]:
    """pattern_bhtt of some heads of every block."""
    values = recorded(subject, goal.pairs) if kept_f is None else recorded(subject, goal.pairs, masked_gate(subject, kept_f))
    return [
        subject.sparse.pattern(layer, values[Location(layer, "q")], values[Location(layer, "k")])[:, kept_h]
        for layer, kept_h in heads.items()
    ]

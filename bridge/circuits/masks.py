"""Masks for a task: the smallest set of nodes found, of the sparse model or of the dense one, at a bound on the loss.

With tau_f a number per node (channels shared over positions), C = {tau > 0} and U a random set of nodes outside C, of a density
drawn at random, afresh for every prompt and step, the steps make small

    superset (default)   KL(S, S_C) / 2 + KL(S, S_(C + U)) / 2 + lambda |C|
    paper                two-way loss of S_C + lambda |C|                                     (Gao et al. 2025, appendix A.5)

the KL being of the next token after the prompt. A confident answer's KL hardly notices how confident it is, so the default adds
to the first a penalty for the share of the mean logit difference D that is lost, half the bound where that is .05:
bound / 2 ((D_C - D) / max(|D|, 1) / .05)^2. The paper's objective finds circuits that are small and can be wrong: what it
deletes may cancel, and nothing ties the rest to the model. Under the default the whole model is one of the sets that are tried.

1. candidates   Nodes that no prompt switches on, if to leave them out costs no more than a quarter of the bound; else all.
2. masks        The descent of `descent.descend`, of at most 500 steps. It learns from prompts of both splits and is held to
                others of both, since a few templates alone make circuits that fail on others.
3. repairs      Where there is none, and while the nodes above 0 do not meet the bound there, those that the loss's slope
                says help most are added, as many together as lower it most: each for itself, too many would overshoot.
4. threshold    The fewest nodes by tau, then in the order of their addition, that are within the bound on those other prompts
                (fixed ones, fixed U): under the default the mean of both KLs, KL(S, S_C) by itself, and D to .05 of itself.
5. deletions    As for a prompt (`prune.deleted`): every node deleted alone on some prompts, or, where there are too many for
                that, the loss's slope; then as many together as the bound allows, until a try spares next to nothing.

Prompts are put in an order of their own first, so the result does not depend on the one they come in. Work is counted in
products of a token with a weight (`Subject.cost`), not in seconds, so the same seed finds the same circuit on any day.

Shape legend: b prompt (row), c circuit, u alone or in company, f all nodes in one row, k some of them by their place, v
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bridge.circuit import kl
from bridge.circuits.descent import descend
from bridge.circuits.subject import Subject, in_order, masked_gate, recorded
from bridge.fewest import bisected, deleted, fewest, ranks
from bridge.recipe import UserError
from bridge.tasks.tokens import TokenPairs

Objective = Literal["superset", "paper"]
# Nats per prompt: half of what is asked of a circuit there, since other prompts and other company cost more; and the paper's.
TARGETS: dict[str, float] = {"superset": 0.05, "paper": 0.15}
SHARE = 0.05  # of D, by which a circuit at the bound may be off: half of what is asked, for the same reason
STEPS, FEWEST_STEPS = 500, 40
ROWS, FEWEST_ROWS = 16, 4  # of the prompts at each step: on a CPU more steps of fewer prompts settle sooner
LESSONS = 256  # prompts of either split that masks are learnt from
VALIDATION = 32  # others of either split, that the bound is held to
TRIED = 8  # of these, when a node is deleted alone
REPAIRS, REPAIR_SIZES = 12, 8  # rounds at most, and numbers of nodes tried in each: 4, 8, 16 ...
SHARES = (0.7, 0.2)  # of the work: masks; threshold and deletions
GIVEN_UP = 0.25  # of the nodes that a sweep has left, each time that no more could go
_TOKENS = 4096  # in a batch of masked copies


class MaskError(UserError):
    """A task whose circuit cannot be searched, in one line that says what to change."""


class NoCircuitError(MaskError):
    """A search that has found no circuit within the bound."""


@dataclass(frozen=True)
class Aim:
    """What a search makes small, and the bound on it in nats per prompt. Raises MaskError for one that cannot be met."""

    objective: Objective = "superset"
    target: float | None = None

    def __post_init__(self) -> None:
        if self.objective not in TARGETS:
            raise MaskError(f"objective {self.objective!r} is not known; give superset or paper")
        if self.target is not None and not 0 < self.target < float("inf"):
            raise MaskError(f"a target loss of {self.target} cannot be aimed at; give a positive number of nats, such as 0.1")

    @property
    def bound(self) -> float:
        """The bound, which has a default for each objective."""
        return TARGETS[self.objective] if self.target is None else self.target


@dataclass(frozen=True, eq=False)
class FoundNodes:
    """Nodes kept_f, their tau_f, the loss on prompts held out of both splits; whether deletions ran to their end; steps."""

    kept_f: Tensor
    tau_f: Tensor
    loss: float
    n_candidates: int
    complete: bool
    steps: int


class Goal:
    """An aim on fixed prompts with fixed random company: what `fewest` and `deleted` ask about circuits, and the work left."""

    def __init__(self, subject: Subject, pairs: TokenPairs, aim: Aim, *, seed: int = 0, work: float = float("inf")) -> None:
        """`pairs` are prompts (both members of pairs, where both are to count)."""
        self.subject, self.aim, self.bound, self.left = subject, aim, aim.bound, work
        self.pairs = in_order(pairs).to(subject.device)
        self.whole_bv = self._logits(self.pairs)
        generator = torch.Generator().manual_seed(seed + 7_777_777)
        self.whole_difference_b = self.pairs.difference(self.whole_bv)
        self.company_bf = random_company(len(pairs), subject.space.size, generator).to(subject.device)

    def some(self, row_b: Tensor) -> Goal:
        """The same aim on some of the prompts, with their company."""
        part = copy.copy(self)
        part.pairs, part.whole_bv, part.company_bf = self.pairs.rows(row_b), self.whole_bv[row_b], self.company_bf[row_b]
        part.whole_difference_b = self.whole_difference_b[row_b]
        return part

    @torch.no_grad()
    def _logits(self, pairs: TokenPairs, kept_bf: Tensor | None = None) -> Tensor:
        if kept_bf is None:
            return self.subject.logits(pairs)
        return self.subject.logits(pairs, masked_gate(self.subject, kept_bf))

    @property
    def tokens(self) -> int:
        """Tokens of all prompts, padding included."""
        return self.pairs.prompt_bt.numel()

    @property
    def terms(self) -> int:
        """Masked copies of a prompt that the loss takes: with the circuit alone, and in company."""
        return 2 if self.aim.objective == "superset" else 1

    def measure(self, logits_bv: Tensor, row_b: Tensor | None = None) -> Tensor:
        """loss_b of a masked model's logits on the prompts (or on those of row_b): KL to the whole one, or the two-way loss."""
        if self.aim.objective == "paper":
            return (self.pairs if row_b is None else self.pairs.rows(row_b)).loss(logits_bv)
        return kl(self.whole_bv if row_b is None else self.whole_bv[row_b], logits_bv)

    def off(self, difference_cb: Tensor, whole_b: Tensor) -> Tensor:
        """off_c: by how much of itself the mean of D is off; below one logit, of a logit."""
        whole = whole_b.mean()
        return (difference_cb.mean(-1) - whole) / whole.abs().clamp(min=1)

    def loss(self, kept_cf: Tensor) -> Tensor:
        """loss_c of circuits, in units in which all that is held to the bound may be as large as the bound.

        With the paper's objective the two-way loss; else the largest of the KL alone, the mean of alone and in company, and how
        far D is off, at the bound where that is .05.
        """
        rows = len(self.pairs)
        self.left -= len(kept_cf) * self.terms * self.tokens * self.subject.cost
        index_b = torch.arange(rows, device=kept_cf.device)
        losses = []
        for some_cf in kept_cf.split(max(1, _TOKENS // (self.tokens * self.terms))):
            kept_rf = some_cf.repeat_interleave(rows, 0)
            row_r = index_b.repeat(len(some_cf))
            if self.terms == 2:
                kept_rf, row_r = torch.cat([kept_rf, kept_rf | self.company_bf[row_r]]), row_r.repeat(2)
            logits_rv, alone_r = self._logits(self.pairs.rows(row_r), kept_rf), row_r[: len(some_cf) * rows]
            loss_uc = self.measure(logits_rv, row_r).view(self.terms, -1, rows).mean(2)
            loss_c = torch.maximum(loss_uc[0], loss_uc.mean(0))
            if self.terms == 2:
                difference_cb = self.pairs.rows(alone_r).difference(logits_rv[: len(alone_r)]).view(-1, rows)
                off_c = self.off(difference_cb, self.whole_difference_b).abs()
                loss_c = torch.maximum(loss_c, self.bound * off_c / SHARE)
            losses.append(loss_c)
        return torch.cat(losses)

    def first_good(self, kept_cf: Tensor) -> int:
        """The first of some circuits, smaller ones first, that is within the bound where the one before is not; by bisection."""
        return bisected(lambda kept_f: float(self.loss(kept_f[None])) <= self.bound, kept_cf)

    def cost(self, n: int) -> float:
        """The work of `without`: every node deleted alone on a few prompts, or a slope where that would take too much."""
        return min(self._cost_alone(n), self.cost_of_slopes)

    def without(self, kept_f: Tensor, node_k: Tensor) -> Tensor:
        """loss_k of the circuit less one node, for each of node_k, as far as a few prompts or the loss's slope tell."""
        whole = float(self.loss(kept_f[None]))
        if self._cost_alone(len(node_k)) > max(self.cost_of_slopes, self.left / 16):
            return whole - self.slopes(kept_f)[node_k]
        few = self.some(torch.arange(0, len(self.pairs), max(1, len(self.pairs) // TRIED), device=kept_f.device))
        rise = []
        for some_k in node_k.split(max(1, _TOKENS // (few.tokens * self.terms))):
            kept_cf = kept_f.repeat(len(some_k), 1)
            kept_cf[torch.arange(len(some_k)), some_k] = False
            rise.append(few.loss(kept_cf))
        rise_k = torch.cat(rise) - few.loss(kept_f[None])
        self.left -= self._cost_alone(len(node_k))
        return whole + rise_k

    def _cost_alone(self, n: int) -> float:
        return n * TRIED * self.tokens / len(self.pairs) * self.terms * self.subject.cost

    @property
    def cost_of_slopes(self) -> float:
        """The work of a gradient on all prompts."""
        return 3.0 * self.terms * self.tokens * self.subject.cost

    def slopes(self, kept_f: Tensor) -> Tensor:
        """slope_f: how the loss changes with every entry of a mask."""
        self.left -= self.cost_of_slopes
        rows = torch.arange(len(self.pairs), device=kept_f.device).split(ROWS)
        return slopes_on(self, kept_f, [(row_b, self.company_bf[row_b]) for row_b in rows])[1]


def masked_loss(goal: Goal, mask_f: Tensor, row_b: Tensor, company_bf: Tensor) -> Tensor:
    """The mean loss on some prompts of a mask of numbers that gradients flow to, under the company given."""
    mask_rf, row_r = mask_f.expand(len(row_b), -1), row_b
    if goal.terms == 2:  # where company has switched a node on, its own mask changes nothing
        mask_rf = torch.cat([mask_rf, torch.where(company_bf, torch.ones_like(mask_f), mask_f)])
        row_r = row_b.repeat(2)
    logits_rv = goal.subject.logits(goal.pairs.rows(row_r), masked_gate(goal.subject, mask_rf))
    loss = goal.measure(logits_rv, row_r).mean()
    if goal.terms == 2:
        difference_b = goal.pairs.rows(row_b).difference(logits_rv[: len(row_b)])
        loss = loss + goal.bound / 2 * (goal.off(difference_b, goal.whole_difference_b[row_b]) / SHARE).square()
    return loss


def backward(goal: Goal, mask_f: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> float:
    """The mean masked loss over the prompts row_b of all parts, each with its company_bf; its gradients are added up."""
    rows, total = sum(len(row_b) for row_b, _ in parts), 0.0
    with torch.enable_grad():
        for row_b, company_bf in parts:
            loss = masked_loss(goal, mask_f, row_b, company_bf) * (len(row_b) / rows)
            loss.backward()
            total += float(loss.detach())
    return total


def slopes_on(goal: Goal, kept_f: Tensor, parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, Tensor]:
    """(loss, slope_f) of a mask on some prompts in some company: how the loss changes with every entry."""
    mask_f = kept_f.to(torch.get_default_dtype()).requires_grad_()
    loss = backward(goal, mask_f, parts)
    assert mask_f.grad is not None
    return loss, mask_f.grad


def random_company(rows: int, size: int, generator: torch.Generator) -> Tensor:
    """company_bf: for every prompt a random set of nodes, of a density drawn at random."""
    return torch.rand(rows, size, generator=generator) < torch.rand(rows, 1, generator=generator)


class NodeLessons:
    """Nodes, to a descent: the loss of a mask on some of a goal's prompts, in company of its own at every step."""

    def __init__(self, goal: Goal, work: float) -> None:
        self.goal = goal
        per_row = goal.cost_of_slopes / len(goal.pairs)
        self.rows = min(max(FEWEST_ROWS, int(work / FEWEST_STEPS / per_row)), ROWS, len(goal.pairs))
        self.steps = max(FEWEST_STEPS, min(STEPS, int(work / (per_row * self.rows))))

    def slopes_at(self, kept_f: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        """(loss, slope_f) at a mask."""
        return slopes_on(self.goal, kept_f, [drawn(self.goal, self.rows, generator)])


def drawn(goal: Goal, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(row_b, company_bf): some of a goal's prompts, and random company for each."""
    row_b = torch.randperm(len(goal.pairs), generator=generator)[:rows]
    company_bf = random_company(rows, goal.subject.space.size, generator)
    return row_b.to(goal.subject.device), company_bf.to(goal.subject.device)


def switched_on(subject: Subject, pairs: TokenPairs) -> Tensor:
    """Nodes_f that some prompt switches on, at any of its tokens."""
    values = recorded(subject, pairs)
    on = {at: ((values[at] != 0) & pairs.there_bt[..., None]).any((0, 1))[None] for at in subject.space.sizes}
    return subject.space.join(on)


def candidates(goal: Goal) -> Tensor:
    """Nodes_f that some prompt switches on, where leaving out the others costs at most a quarter of the bound; else all."""
    on_f = switched_on(goal.subject, goal.pairs)
    everything_f = torch.ones_like(on_f)
    both = goal.loss(torch.stack([everything_f, on_f]))
    return on_f if float(both[1] - both[0]) <= goal.bound / 4 else everything_f


def not_found(aim: Aim, whole: float) -> NoCircuitError:
    """That no circuit was found within an aim's bound, where the whole model's loss is `whole`."""
    return NoCircuitError(
        f"no circuit within the target of {aim.bound:.3g} was found (the whole model's loss is {whole:.3g}); raise --target-loss"
    )


def find_nodes(
    subject: Subject,
    lessons: TokenPairs,
    held: TokenPairs,
    aim: Aim,
    *,
    seed: int = 0,
    work: float,
    progress: Callable[[str], None] | None = None,
) -> FoundNodes:
    """The nodes of a task, by the search that the module describes: learnt from some prompts, held to the bound on others.

    Raises NoCircuitError where neither the whole model nor what the masks have found meets the bound.
    """
    say = progress or (lambda _: None)
    judge = Goal(subject, held, aim, work=work * SHARES[1])
    learner = NodeLessons(Goal(subject, lessons, aim, seed=seed + 1), work * SHARES[0])
    whole = float(judge.loss(torch.ones(1, subject.space.size, dtype=torch.bool, device=subject.device)))
    candidates_f = candidates(judge)
    say(f"candidates: {int(candidates_f.sum()):,} of {subject.space.size:,} nodes")
    left = judge.left
    learnt = descend(
        learner, lambda kept_f: float(judge.loss(kept_f[None])), candidates_f, aim.bound, learner.steps, seed=seed,
        watch=lambda step, tau_f, loss: say(
            f"masks: step {step} of {learner.steps}, {int((tau_f > 0).sum()):,} nodes, loss {loss:.3f}"
        ),
    )  # fmt: skip
    judge.left, tau_f = left, learnt.tau_f
    worth_f = _repaired(judge, candidates_f, tau_f, say) if whole <= aim.bound else torch.where(tau_f > 0, tau_f, tau_f - 3)
    order_f, n = ranks(candidates_f, worth_f).argsort(), int(candidates_f.sum())
    chosen = int((worth_f > -1.5).sum())
    # The loss need not fall with every node that is added, so where those that were learnt are enough no others are looked at.
    if float(judge.loss((worth_f > -1.5)[None])) <= aim.bound:
        limit = chosen
    elif whole <= aim.bound:
        limit = n if float(judge.loss(candidates_f[None])) <= aim.bound else len(order_f)
    else:
        raise not_found(aim, whole)
    kept_f = fewest(judge, torch.zeros_like(candidates_f), order_f[:limit], max(chosen, 1))
    say(f"threshold: {int(kept_f.sum()):,} nodes")
    kept_f, complete = deleted(judge, kept_f, say, GIVEN_UP)
    return FoundNodes(kept_f, tau_f, float(judge.loss(kept_f[None])), n, complete, learner.steps)


def _repaired(judge: Goal, candidates_f: Tensor, tau_f: Tensor, say: Callable[[str], None]) -> Tensor:
    """worth_f: tau of the nodes above 0; then, between -1.5 and 0, those added by rounds; the others by tau, below -2."""
    kept_f, worth_f = tau_f > 0, torch.where(tau_f > 0, tau_f, tau_f - 3)
    loss = float(judge.loss(kept_f[None]))
    for number in range(REPAIRS):
        if loss <= judge.bound:
            break
        slope_f = judge.slopes(kept_f)
        helps_k = (candidates_f & ~kept_f & (slope_f < 0)).nonzero().flatten()
        helps_k = helps_k[slope_f[helps_k].argsort(stable=True)]
        sizes = sorted({min(len(helps_k), 4 << power) for power in range(REPAIR_SIZES)} - {0})
        if not sizes:
            break
        loss_c = judge.loss(torch.stack([kept_f.index_fill(0, helps_k[:size], True) for size in sizes]))
        best = int(loss_c.argmin())
        if float(loss_c[best]) >= loss:
            break
        loss, helps_k = float(loss_c[best]), helps_k[: sizes[best]]
        kept_f = kept_f.index_fill(0, helps_k, True)
        place_k = torch.arange(len(helps_k), device=helps_k.device) / len(helps_k)
        worth_f[helps_k] = (-(number + place_k) / REPAIRS).to(worth_f.dtype)
        say(f"repairs: {int(kept_f.sum()):,} nodes, loss {loss:.3f}")
    return worth_f


def divided(train: TokenPairs, validation: TokenPairs) -> tuple[TokenPairs, TokenPairs]:
    """The prompts that masks are learnt from and, where there are enough, others that hold the bound; both of both splits."""
    parts = [_apart(split) for split in (train, validation)]
    return tuple(one.and_those(other) for one, other in zip(*parts, strict=True))  # type: ignore[return-value]


def _apart(pairs: TokenPairs) -> tuple[TokenPairs, TokenPairs]:
    """Prompts to learn from and others, evenly from all; the same where there is one."""
    ordered = in_order(pairs)
    held_b = _evenly(len(ordered), min(VALIDATION, (len(ordered) + 1) // 2))
    rest_b = torch.arange(len(ordered))[~torch.isin(torch.arange(len(ordered)), held_b)]
    taken_b = rest_b[_evenly(len(rest_b), LESSONS)] if len(rest_b) else held_b
    device = ordered.last_b.device
    return ordered.rows(taken_b.to(device)), ordered.rows(held_b.to(device))


def spread(pairs: TokenPairs, most: int) -> TokenPairs:
    """At most some prompts, evenly from their own order, so that both answers and all lengths are among them."""
    ordered = in_order(pairs)
    return ordered.rows(_evenly(len(ordered), most).to(ordered.last_b.device))


def _evenly(count: int, most: int) -> Tensor:
    return torch.linspace(0, count - 1, min(most, count)).round().long()

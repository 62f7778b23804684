"""A task -> its circuit in the sparse model, the dense model's circuit at the same loss, and what can be said for them.

    gate        two-way accuracy of the sparse model on held-out prompts; what it does not do has no circuit
    seeds       `masks.find_nodes` for every seed, to a part of the bound
    consensus   with several seeds: nodes by the share of seeds that kept them, then by tau; the fewest of them within the
                bound, and deletions. Where seeds have found different ways to do the task, what they share need not do it at all;
                so where a seed's own nodes are fewer, the circuit is the smallest seed's
    edges       `edges.find_edges`, to the whole bound; learnt from the training split alone and held to the validation split,
                which has other templates: there are many more weights than prompts, and many matter on some templates only.
                Nodes that are above the bound there, where no edge could go, are given others first, by the same order
    dense       the nodes and edges of the dense model, to the same bounds by the same search, in a thread of its own meanwhile
    evidence    `judge.judge`, on the test split

What the seeds and the dense model's search find is kept on the way where a folder for it is named (`parts`).

Nulls run through all of this but the gate, and must not pass (`TaskResult.passed`): `labels` replaces every answer token by one
drawn at random, `weights` permutes the entries of every matrix of the sparse model, `shuffled` deals right and wrong answers out
anew.

Shape legend: b pair (row), c seed, f all nodes in one row.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuit import Circuit
from bridge.circuits.dense_nodes import DenseSubject
from bridge.circuits.edges import FoundEdges, find_edges, pruned_to
from bridge.circuits.judge import SOLVED, Judged, judge
from bridge.circuits.masks import (
    GIVEN_UP,
    LESSONS,
    VALIDATION,
    Aim,
    FoundNodes,
    Goal,
    MaskError,
    divided,
    find_nodes,
    not_found,
    spread,
)
from bridge.circuits.parts import Parts
from bridge.circuits.result import Null, SeedRun, Size, TaskFacts, TaskResult
from bridge.circuits.subject import SparseSubject, Subject, edge_count
from bridge.fewest import deleted, fewest, ranks
from bridge.meanwhile import meanwhile
from bridge.nodes import sparse_fingerprint
from bridge.schema import READ_KINDS, WRITE_KINDS
from bridge.sparse import SparseTransformer
from bridge.tasks.tokens import Resolved, TokenPairs, score
from bridge.wiring import DenseModelError

RULES = 5  # to be raised where the same prompts come to give another circuit: kept nulls are then made again
WORK = 5e12  # products of a token with a weight, per search: a minute or two on two slow cores
MOST_TOKENS = 1_400_000  # of masked copies, where the model is small
EDGE_WORK = 0.5  # of that, again, for the edges
NODE_SHARE = 0.75  # of the way from the whole model's loss to the bound, which nodes may go; edges go the rest
REFERENCE_TOKENS = 4096
JUDGED = 32  # held-out prompts
NOT_ASKED = None, "not asked for"  # the dense model's circuit, and why there is none


class UnsolvedError(MaskError):
    """A task that the sparse model does not do, so that it has no circuit; in one line."""


@dataclass(frozen=True)
class Subjects:
    """The two models of a coupling with their means, made once for any number of tasks."""

    coupling: Coupling
    reference_bt: Tensor

    @staticmethod
    def of(coupling: Coupling) -> Subjects:
        """The models over the coupling's own reference text. Raises MaskError where it has none."""
        reference_bt = coupling.reference_bt
        if reference_bt is None or not reference_bt.numel():
            raise MaskError("the coupling holds no reference text to take corpus means over; fit it again")
        return Subjects(coupling, reference_bt[: max(1, REFERENCE_TOKENS // reference_bt.shape[1])])

    @cached_property
    def sparse(self) -> SparseSubject:
        """The sparse model."""
        return SparseSubject.over(self.coupling.sparse, self.reference_bt)

    @cached_property
    def dense(self) -> DenseSubject:
        """The dense model. Raises DenseModelError where its linear maps cannot be found."""
        return DenseSubject(self.coupling.dense, self.reference_bt)


def model_facts(coupling: Coupling) -> dict[str, str | int]:
    """What tells the models that are searched, and the rules by which, from others."""
    dense, sparse = coupling.dense.fingerprint(), sparse_fingerprint(coupling.sparse)
    return {"dense_fingerprint": dense, "sparse_fingerprint": sparse, "rules": RULES}


def search_facts(coupling: Coupling, aim: Aim, null: str | None, work: float) -> dict[str, str | float | int | None]:
    """What tells a search from others, but for its prompts and its seeds."""
    return {"objective": aim.objective, "target": aim.bound, "null": null, "work": work, **model_facts(coupling)}


def whole_size(subject: Subject) -> Size:
    """Nodes and edges of a whole model."""
    every_f = torch.ones(subject.space.size, dtype=torch.bool, device=subject.device)
    return Size(len(every_f), edge_count(subject, every_f))


def search_task(
    subjects: Subjects,
    task: Resolved,
    aim: Aim | None = None,
    *,
    seeds: int = 1,
    seed: int = 0,
    dense: bool = True,
    null: Null | None = None,
    gated: bool = True,
    work: float = WORK,
    parts: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> TaskResult:
    """The circuit of a task, by the steps that the module describes; without the gate, also of what the model does not do.

    `parts` is a folder in which what is found on the way is kept and, by the same search, found again. Raises UnsolvedError where
    the sparse model does not do the task, MaskError where no circuit is found, CheckpointError where parts cannot be written.
    """
    say, started = progress or (lambda _: None), time.monotonic()
    aim = Aim() if aim is None else aim
    coupling = subjects.coupling
    subject = subjects.sparse
    splits = {name: pairs.to(subject.device) for name, pairs in _splits(task).items()}
    if null == "weights":
        subject = SparseSubject.over(permuted_weights(subject.sparse, seed), subjects.reference_bt)
    elif null == "labels":
        splits = {name: random_labels(pairs, coupling.dense.vocabulary, seed) for name, pairs in splits.items()}
    elif null == "shuffled":
        splits = {name: dealt_anew(pairs, seed + place) for place, (name, pairs) in enumerate(splits.items())}
    say("gate: how well both models do the task")
    scores, dense_scores = score(subject.sparse, splits["test"]), score(coupling.dense, splits["test"])
    if scores.accuracy < SOLVED and null is None and gated:
        raise UnsolvedError(
            f"the sparse model answers {scores.accuracy:.1%} of {task.task} right and {SOLVED:.0%} are asked (dense "
            f"{dense_scores.accuracy:.1%}), so there is no circuit to find; take another task or a better coupling"
        )

    prompts = _Prompts.of(splits)
    lessons, held = prompts.for_nodes
    nodes_aim, nodes_work = _nodes_aim(subject, held, aim), _work(subject, work)
    # how many seeds are taken is nothing to a part; a null's prompts or weights are its first seed's
    of = {"prompts": task.digest, "null_seed": seed if null else None}
    known = Parts(parts, {**search_facts(coupling, aim, null, work), **of})

    def nodes_of(number: int) -> FoundNodes:
        at = f"seed {number}: " if seeds > 1 else ""

        def find() -> FoundNodes:
            return find_nodes(
                subject, lessons, held, nodes_aim, seed=number, work=nodes_work, progress=lambda text: say(f"{at}{text}")
            )  # fmt: skip

        return known.nodes(f"seed-{number}", find, subject.device)

    with meanwhile(lambda tell: _dense(subjects, prompts, aim, seed, work, known, tell) if dense else NOT_ASKED, say) as others:
        found = [nodes_of(seed + number) for number in range(seeds)]
        kept_f = found[0].kept_f if seeds == 1 else _consensus(subject, held, nodes_aim, found, nodes_work, say)
        kept_f = _enough(subject, prompts.for_edges[1], aim, kept_f, found, say)
        edges = _edges(subject, prompts, aim, kept_f, seed, work, say)
        pruned = pruned_to(subject, edges.edges, kept_f)
        other, why_not = others()

    searched = Goal(subject, prompts.for_edges[1], aim)
    held_out = Goal(subject, spread(splits["test"].both(), JUDGED), aim)
    judged = Judged(kept_f, pruned, [one.kept_f for one in found], edges.n, None if other is None else other.edges.n)
    faithfulness = judge(searched, held_out, judged, scores, dense_scores, seed=seed, progress=say)
    inclusion = subject.space.split(torch.stack([one.kept_f for one in found]).float().mean(0))
    losses = {"nodes": float(searched.loss(kept_f[None])), "edges": edges.loss}
    circuit = Circuit(task.task, subject.space.split(kept_f), subject.means, losses, edges.edges)
    facts = TaskFacts(
        task=task.task,
        language=task.language,
        drop_rate=task.drop_rate,
        objective=aim.objective,
        target=aim.bound,
        null=null,
        sparse_scores=scores,
        dense_scores=dense_scores,
        runs=tuple(SeedRun(seed + n, int(one.kept_f.sum()), one.loss, one.steps, one.complete) for n, one in enumerate(found)),
        whole=whole_size(subject),
        before=Size(int(kept_f.sum()), edges.n_before),
        size=Size(int(kept_f.sum()), edges.n),
        entries=_entries(subject, kept_f, splits["test"].both()),
        loss=edges.loss,
        edges_complete=edges.complete,
        dense_whole=None if other is None else whole_size(subjects.dense),
        dense_before=None if other is None else other.before,
        dense=None if other is None else other.size,
        dense_loss=None if other is None else other.edges.loss,
        dense_complete=None if other is None else other.nodes_complete and other.edges.complete,
        why_not_dense=why_not,
        provenance={**coupling.provenance, **model_facts(coupling), "seed": seed, "work": work, "prompts": task.digest},
        seconds=time.monotonic() - started,
    )
    return TaskResult(circuit, {at: share_1n[0] for at, share_1n in inclusion.items()}, faithfulness, facts)


def search_dense(
    subjects: Subjects,
    task: Resolved,
    aim: Aim | None = None,
    *,
    seed: int = 0,
    work: float = WORK,
    progress: Callable[[str], None] | None = None,
) -> Size:
    """The size of the dense model's own circuit of a task, whether or not the sparse model does it; as `search_task` finds it.

    Raises UnsolvedError where the dense model does not do the task, MaskError where no circuit is found, DenseModelError where
    its linear maps cannot be found.
    """
    say = progress or (lambda _: None)
    dense = subjects.dense
    splits = {name: pairs.to(dense.device) for name, pairs in _splits(task).items()}
    scores = score(subjects.coupling.dense, splits["test"])
    if scores.accuracy < SOLVED:
        raise UnsolvedError(
            f"the dense model answers {scores.accuracy:.1%} of {task.task} right and {SOLVED:.0%} are asked, so there is no "
            "circuit to find; take another task"
        )
    aim = Aim() if aim is None else aim
    return _dense_circuit(dense, _Prompts.of(splits), aim, seed, work, say).size


@dataclass(frozen=True, eq=False)
class _Prompts:
    """What nodes and what edges are learnt from, and what their loss is held to."""

    for_nodes: tuple[TokenPairs, TokenPairs]
    for_edges: tuple[TokenPairs, TokenPairs]

    @staticmethod
    def of(splits: Mapping[str, TokenPairs]) -> _Prompts:
        train, validation = splits["train"].both(), splits["validation"].both()
        return _Prompts(divided(train, validation), (spread(train, LESSONS), spread(validation, VALIDATION)))


def _splits(task: Resolved) -> dict[str, TokenPairs]:
    """The three splits; where the tokenizer has left no validation pairs, every fourth of the training ones."""
    splits = dict(task.splits)
    if not len(splits["validation"]) and len(splits["train"]) >= 8:
        row_b = torch.arange(len(splits["train"]))
        splits |= {"validation": splits["train"].rows(row_b[::4]), "train": splits["train"].rows(row_b[row_b % 4 != 0])}
    short = next((name for name in ("train", "validation", "test") if not len(splits[name])), None)
    if short is not None:
        raise MaskError(f"the task {task.task} has no {short} pairs under this tokenizer; take another task, or add examples")
    return {str(name): pairs for name, pairs in splits.items()}


def _nodes_aim(subject: Subject, held: TokenPairs, aim: Aim) -> Aim:
    """The aim of the nodes; its bound is above the whole model's own loss, where that is not beyond the bound already."""
    goal = Goal(subject, held, aim)
    own = float(goal.measure(goal.whole_bv).mean())
    return Aim(aim.objective, own + NODE_SHARE * (aim.bound - own) if own < aim.bound else aim.bound)


def _work(subject: Subject, work: float) -> float:
    return min(work, MOST_TOKENS * float(subject.cost))


def _consensus(
    subject: Subject, held: TokenPairs, aim: Aim, found: list[FoundNodes], work: float, say: Callable[[str], None]
) -> Tensor:
    """The fewest nodes, those that most seeds kept first, that meet the bound, and deletions; or a seed's own, if fewer."""
    goal = Goal(subject, held, aim, work=work / 4)
    share_f = torch.stack([one.kept_f for one in found]).float().mean(0)
    any_f, order_f = share_f > 0, _order(found)
    limit = int(any_f.sum()) if float(goal.loss(any_f[None])) <= aim.bound else len(order_f)
    kept_f = fewest(goal, torch.zeros_like(any_f), order_f[:limit], int((share_f > 0.5).sum()))
    say(f"consensus: {int(kept_f.sum()):,} nodes of {len(found)} seeds")
    return min(deleted(goal, kept_f, say, GIVEN_UP)[0], *(one.kept_f for one in found), key=lambda each_f: int(each_f.sum()))


def _order(found: list[FoundNodes]) -> Tensor:
    """All nodes by their place, those that most seeds kept first, and by tau among them."""
    share_f = torch.stack([one.kept_f for one in found]).float().mean(0)
    tau_f = torch.stack([one.tau_f for one in found]).mean(0)
    # tau is between -1 and 2 (`descent`), and one seed more is to count for more than any of it
    return ranks(torch.ones_like(found[0].kept_f), share_f * 4 * len(found) + tau_f).argsort()


def _enough(
    subject: Subject, held: TokenPairs, aim: Aim, kept_f: Tensor, found: list[FoundNodes], say: Callable[[str], None]
) -> Tensor:
    """The nodes, and where they miss the bound on the prompts that edges are held to, the fewest more that leave edges room.

    Raises NoCircuitError where all nodes together miss it there.
    """
    goal = Goal(subject, held, aim)
    if float(goal.loss(kept_f[None])) <= aim.bound:
        return kept_f
    goal = Goal(subject, held, _nodes_aim(subject, held, aim))
    order_f = _order(found)
    others_k = order_f[~kept_f[order_f]]
    kept_f = fewest(goal, kept_f, others_k, max(1, int(kept_f.sum()) // 20))
    if float(goal.loss(kept_f[None])) > aim.bound:
        raise not_found(aim, float(goal.measure(goal.whole_bv).mean()))
    say(f"nodes: {int(kept_f.sum()):,}, with what other templates need")
    return kept_f


def _edges(
    subject: Subject, prompts: _Prompts, aim: Aim, kept_f: Tensor, seed: int, work: float, say: Callable[[str], None]
) -> FoundEdges:
    lessons, held = prompts.for_edges
    goal = Goal(subject, held, aim, work=EDGE_WORK * _work(subject, work))
    listed = isinstance(subject, SparseSubject)  # the dense model's are counted, and there are hundreds of thousands
    return find_edges(goal, Goal(subject, lessons, aim, seed=seed + 1), kept_f, seed=seed, listed=listed, progress=say)


@dataclass(frozen=True)
class _DenseCircuit:
    nodes: int
    nodes_complete: bool
    edges: FoundEdges

    @staticmethod
    def of(facts: Mapping[str, Any]) -> _DenseCircuit:
        return _DenseCircuit(facts["nodes"], facts["nodes_complete"], FoundEdges(**{**facts["edges"], "edges": ()}))

    @property
    def before(self) -> Size:
        return Size(self.nodes, self.edges.n_before)

    @property
    def size(self) -> Size:
        return Size(self.nodes, self.edges.n)


def _dense(
    subjects: Subjects, prompts: _Prompts, aim: Aim, seed: int, work: float, known: Parts, say: Callable[[str], None]
) -> tuple[_DenseCircuit | None, str]:
    """What the same search finds in the dense model; None, and why, where its maps or a circuit cannot be found."""
    try:
        facts = known.facts(f"dense-{seed}", lambda: asdict(_dense_circuit(subjects.dense, prompts, aim, seed, work, say)))
        return _DenseCircuit.of(facts), ""
    except (DenseModelError, MaskError) as error:
        return None, str(error)


def _dense_circuit(
    dense: DenseSubject, prompts: _Prompts, aim: Aim, seed: int, work: float, say: Callable[[str], None]
) -> _DenseCircuit:
    def say_dense(text: str) -> None:
        say(f"dense: {text}")

    lessons, held = prompts.for_nodes
    nodes_aim = _nodes_aim(dense, held, aim)
    nodes = find_nodes(dense, lessons, held, nodes_aim, seed=seed, work=_work(dense, work), progress=say_dense)
    kept_f = _enough(dense, prompts.for_edges[1], aim, nodes.kept_f, [nodes], say_dense)
    return _DenseCircuit(int(kept_f.sum()), nodes.complete, _edges(dense, prompts, aim, kept_f, seed, work, say_dense))


def _entries(subject: SparseSubject, kept_f: Tensor, prompts: TokenPairs) -> Mapping[str, int]:
    """Embedding, unembedding and bigram weights that the circuit uses on some prompts."""
    kept, sparse = subject.space.split(kept_f), subject.sparse
    width = sparse.width
    read_s = torch.zeros(width, dtype=torch.bool, device=kept_f.device)
    written_s = read_s.clone()
    for location, kept_1n in kept.items():
        if location.kind in READ_KINDS:
            read_s |= kept_1n[0]
        elif location.kind in WRITE_KINDS:
            written_s |= kept_1n[0]
    tokens = prompts.prompt_bt[prompts.there_bt].unique()
    answers = torch.cat([prompts.answer_bk, prompts.wrong_bk], 1).unique()
    answers = answers[answers >= 0]
    return {
        "embedding": int((sparse.embedding[tokens][:, read_s] != 0).sum()),
        "unembedding": int((sparse.unembedding.weight[answers][:, written_s] != 0).sum()),
        "bigram": len(answers) * len(prompts.prompt_bt[torch.arange(len(prompts)), prompts.last_b].unique())
        if sparse.bigram
        else 0,
    }


# -- nulls --------------------------------------------------------------------------------------------------------------


def random_labels(pairs: TokenPairs, vocabulary: int, seed: int) -> TokenPairs:
    """The pairs with every answer token replaced by one drawn at random, the same one everywhere."""
    permuted_v = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed)).to(pairs.answer_bk.device)

    def nonsense(ids_bk: Tensor) -> Tensor:
        return torch.where(ids_bk < 0, ids_bk, permuted_v[ids_bk.clamp(min=0)])

    return replace(pairs, answer_bk=nonsense(pairs.answer_bk), wrong_bk=nonsense(pairs.wrong_bk))


def dealt_anew(pairs: TokenPairs, seed: int) -> TokenPairs:
    """The pairs with the answers of other pairs, right and wrong exchanged in half of them."""
    generator = torch.Generator().manual_seed(seed)
    device = pairs.last_b.device
    from_b = torch.randperm(len(pairs), generator=generator).to(device)
    swap_b = (torch.randperm(len(pairs), generator=generator) % 2 == 0).to(device)
    width = max(pairs.answer_bk.shape[1], pairs.wrong_bk.shape[1])
    right_bk, wrong_bk = (
        torch.nn.functional.pad(ids_bk, (0, width - ids_bk.shape[1]), value=-1)[from_b]
        for ids_bk in (pairs.answer_bk, pairs.wrong_bk)
    )
    right_not_b, wrong_not_b = pairs.answer_not_b[from_b], pairs.wrong_not_b[from_b]
    return replace(
        pairs,
        answer_bk=torch.where(swap_b[:, None], wrong_bk, right_bk),
        wrong_bk=torch.where(swap_b[:, None], right_bk, wrong_bk),
        answer_not_b=torch.where(swap_b, wrong_not_b, right_not_b),
        wrong_not_b=torch.where(swap_b, right_not_b, wrong_not_b),
    )


def permuted_weights(sparse: SparseTransformer, seed: int) -> SparseTransformer:
    """The model with the entries of every matrix in a random order: as many nonzeros, of the same sizes, elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other

"""Search a task's nested circuits in the sparse model, and the dense model's own circuit at the same level, with the evidence.

    gate        two-way accuracy of the sparse model on held-out prompts; a task that it does not do has no circuit
    seeds       `task_search`: the circuit at the opening level for every seed; the smallest one within the bounds is kept, and
                the nested circuits are searched around it
    edges       every weight between kept nodes (`attribution.task_edges`), none pruned
    dense       the dense model's own circuit, of its own nodes, at the same level by the same search
    evidence    `verdicts.task_search`, on the test split

The dense model's answer is explained, with errors at their means if nodes alone reach it, as for prompts. The sparse model's
own answer can be explained instead (explains="sparse"), but its circuits were larger: 2,959, 426 and 484 nodes at F .9 on var_if,
with_as and lambda_func of python-bridge-32, while those of the dense model's answer took 242, 380 and 312 with 2, 3 and 4 errors.

Nulls take all these steps except the gate, and must not pass (`TaskResult.passed`): `labels` replaces every answer token by a
random one, `weights` permutes the entries of every matrix of the sparse model, and `shuffled` gives each pair the answers of
another pair, with right and wrong exchanged in half of the pairs.

Shape legend: b pair (row), f all nodes in one row.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from bridge.circuits.dense_nodes import DenseSubject
from bridge.circuits.error_nodes import reference_means, reference_rows
from bridge.circuits.loss import SearchConfig
from bridge.circuits.subject import SparseSubject, Subject, edge_count
from bridge.circuits.task_search import TASK_SEARCH, SearchError, dense_loss, task_loss, task_losses, with_all_splits
from bridge.data.task_tokens import Resolved, TokenPairs, score
from bridge.display.progress import OnProgress, Phase, ignore_progress, with_prefix
from bridge.graph.attribution import task_edges
from bridge.huggingface.site_discovery import DenseModelError
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Circuit
from bridge.models.sparse import Location
from bridge.nodes.statistics import sparse_fingerprint
from bridge.studies.result import Null, SeedRun, Size, TaskFacts, TaskResult
from bridge.verdicts.null_couplings import permuted_weights
from bridge.verdicts.task_search import SOLVED, gather_task

RULES = 9  # raise it when a change gives another circuit on the same prompts: stored nulls are then run again
NOT_ASKED = "not asked for"  # the reason if the dense model's own circuit was not requested
Explains = Literal["dense", "sparse"]


class UnsolvedError(SearchError):
    """A task that the searched model does not do, so there is no circuit; in one line."""


@dataclass(frozen=True)
class Subjects:
    """The two models of a coupling with their means, computed once for any number of tasks."""

    coupling: CoupledModels
    reference_bt: Tensor

    @staticmethod
    def of(coupling: CoupledModels) -> Subjects:
        """The models, with means over the coupling's own reference text. Raises SearchError if it has none."""
        if coupling.reference_bt is None or not coupling.reference_bt.numel():
            raise SearchError("the coupling", "holds no reference text to take corpus means over", "fit it again")
        return Subjects(coupling, reference_rows(coupling, coupling.reference_bt))

    @property
    def means(self) -> Mapping[Location, Tensor]:
        """The means of every node and error of the sparse model."""
        return reference_means(self.coupling, self.reference_bt)

    @cached_property
    def sparse(self) -> SparseSubject:
        """The sparse model."""
        return SparseSubject(self.coupling.sparse, {at: self.means[at] for at in self.coupling.sparse.locations()})

    @cached_property
    def dense(self) -> DenseSubject:
        """The dense model, or its coupled span of blocks. Raises DenseModelError if its linear maps cannot be found."""
        return DenseSubject(self.coupling.dense, self.reference_bt)


def search_config(level: float = TASK_SEARCH.opens_at, budget: float = 1.0, nested: bool = True) -> SearchConfig:
    """The settings of a task search that opens at `level`, with `budget` times the usual steps; only that level if not `nested`.

    Raises SearchError if the level is none of the nested ones.
    """
    if level not in TASK_SEARCH.levels:
        raise SearchError(
            f"the level F {level:g}", "is not a level of the nested circuits", f"give {', '.join(map(str, TASK_SEARCH.levels))}"
        )
    levels = TASK_SEARCH.levels if nested else (level,)
    return replace(TASK_SEARCH, levels=levels, opens_at=level, steps=max(1, round(budget * TASK_SEARCH.steps)))


def model_facts(coupling: CoupledModels) -> dict[str, str | int]:
    """Fingerprints of the models that are searched, and the version of the search's rules."""
    dense, sparse = coupling.dense.fingerprint(), sparse_fingerprint(coupling.sparse)
    return {"dense_fingerprint": dense, "sparse_fingerprint": sparse, "rules": RULES}


def whole_size(subject: Subject) -> Size:
    """Numbers of nodes and edges of a whole model."""
    every_f = torch.ones(subject.space.size, dtype=torch.bool, device=subject.device)
    return Size(len(every_f), edge_count(subject, every_f))


def search_task(
    subjects: Subjects,
    task: Resolved,
    *,
    level: float = TASK_SEARCH.opens_at,
    explains: Explains = "dense",
    seeds: int = 1,
    seed: int = 0,
    dense: bool = True,
    null: Null | None = None,
    gated: bool = True,
    nested: bool = True,
    budget: float = 1.0,
    progress: OnProgress | None = None,
) -> TaskResult:
    """Search the circuits of a task, by the steps in the module's docstring.

    If not `gated`, a task that the sparse model does not do is searched too. If not `nested`, only the circuit at the opening
    level is searched, in a third of the time. `budget` is a multiple of the usual steps. Raises UnsolvedError if the sparse model
    does not do the task, NoCircuitError if there is nothing to explain, SearchError if a split is empty or the level unknown.
    """
    on_progress, started = progress or ignore_progress, time.monotonic()
    config = replace(search_config(level, budget, nested), seed=seed)
    task = with_all_splits(task)
    if null == "weights":
        permuted = replace(subjects.coupling, sparse=permuted_weights(subjects.coupling.sparse, seed))
        subjects = replace(subjects, coupling=permuted)
    elif null == "labels":
        task = _alter_splits(task, lambda pairs, _: random_labels(pairs, subjects.coupling.dense.vocabulary, seed))
    elif null == "shuffled":
        task = _alter_splits(task, lambda pairs, place: exchange_answers(pairs, seed + place))
    coupling, subject = subjects.coupling, subjects.sparse
    on_progress(Phase("gate: accuracy of both models on the task"))
    of_test = task.splits["test"].to(subject.device)
    scores, dense_scores = score(coupling.sparse, of_test), score(coupling.dense, of_test)
    if scores.accuracy < SOLVED and null is None and gated:
        raise UnsolvedError(
            "the sparse model",
            f"answers {scores.accuracy:.1%} of {task.task} right (the dense model {dense_scores.accuracy:.1%}), less than the "
            f"{SOLVED:.0%} that are required, so there is no circuit to find",
            "take another task or a better coupling",
        )

    loss_on = partial(task_loss, coupling, subjects.means, config=config, dense=explains == "dense")
    losses = task_losses(task, loss_on)
    found = [
        losses.find_opening_circuit(with_prefix(on_progress, f"seed {n}: " if seeds > 1 else ""), n)
        for n in range(seed, seed + seeds)
    ]
    opened = [one.kept(0) for one in found]
    best = min(range(seeds), key=lambda place: (found[place].distances[0] > 1, int(opened[place].sum())))
    nested_search = losses.find_nested_circuits(on_progress, opened[best]) if nested else found[best]
    kept_f, nodes_f = opened[best], losses.test.nodes_f
    on_progress(Phase("edges"))
    edges = task_edges(losses.test.masked, kept_f)
    size, why_not = _try_dense_circuit(subjects, task, config, on_progress) if dense else (None, NOT_ASKED)

    places = range(len(nested_search.levels))
    edge_counts = [edge_count(subject, nested_search.kept(place)[nodes_f]) for place in places]
    report, levels = gather_task(
        losses.test, nested_search, opened, edge_counts, None if size is None else size.edges, scores, dense_scores, seed=seed,
        progress=on_progress,
    )  # fmt: skip
    runs = (
        SeedRun(seed + n, int((one_f & nodes_f).sum()), int((one_f & ~nodes_f).sum()), found[n].distances[0])
        for n, one_f in enumerate(opened)
    )
    kept, space = subject.space.split(kept_f[nodes_f]), losses.test.masked.space
    facts = TaskFacts(
        task=task.task,
        language=task.language,
        drop_rate=task.drop_rate,
        explains=explains,
        null=null,
        search=config,
        sparse_scores=scores,
        dense_scores=dense_scores,
        runs=tuple(runs),
        whole=whole_size(subject),
        levels=levels,
        opening=config.opening,
        errors=tuple(space.node(place).name for place in (kept_f & ~nodes_f).nonzero().flatten().tolist()),
        entries=_count_used_weights(subject, kept, task.splits["test"].both_members().to(subject.device)),
        dense_whole=None if size is None else whole_size(subjects.dense),
        dense=size,
        why_not_dense=why_not,
        provenance={**coupling.provenance, **model_facts(coupling), "seed": seed, "work": budget, "prompts": task.digest},
        seconds=time.monotonic() - started,
    )
    return TaskResult(
        Circuit(task.task, kept, subject.means, edges),
        _split_by_location(subject, nested_search.level_f[nodes_f].to(torch.int8)),
        _split_by_location(subject, torch.stack(opened).float().mean(0)[nodes_f]),
        report,
        facts,
    )


def search_dense(
    subjects: Subjects,
    task: Resolved,
    *,
    level: float,
    budget: float,
    progress: OnProgress,
) -> Size:
    """The size of the dense model's own circuit of a task, as in `search_task`, whether or not the sparse model does the task.

    Raises UnsolvedError if the dense model does not do the task, SearchError if the task cannot be searched, DenseModelError if
    the linear maps of the dense model cannot be found.
    """
    task = with_all_splits(task)
    scores = score(subjects.coupling.dense, task.splits["test"].to(subjects.dense.device))
    if scores.accuracy < SOLVED:
        raise UnsolvedError(
            "the dense model",
            f"answers {scores.accuracy:.1%} of {task.task} right, less than {SOLVED:.0%}, so there is no circuit to find",
            "take another task",
        )
    return _search_dense_circuit(subjects, task, search_config(level, budget), progress)


def _try_dense_circuit(
    subjects: Subjects, task: Resolved, config: SearchConfig, on_progress: OnProgress
) -> tuple[Size | None, str]:
    """The size of the dense model's own circuit, or None with the reason: its maps are not found, or the span is too small."""
    try:
        return _search_dense_circuit(subjects, task, config, on_progress), ""
    except (DenseModelError, SearchError) as error:
        return None, str(error)


def _search_dense_circuit(subjects: Subjects, task: Resolved, config: SearchConfig, on_progress: OnProgress) -> Size:
    losses = task_losses(task, partial(dense_loss, subjects.dense, config=config))
    kept_f = losses.find_opening_circuit(with_prefix(on_progress, "dense: ")).kept(0)
    return Size(int(kept_f.sum()), edge_count(subjects.dense, kept_f))


def _split_by_location(subject: SparseSubject, x_f: Tensor) -> dict[Location, Tensor]:
    return {at: x_1n[0] for at, x_1n in subject.space.split(x_f).items()}


def _alter_splits(task: Resolved, alter: Callable[[TokenPairs, int], TokenPairs]) -> Resolved:
    """The task with the pairs of every split altered by `alter(pairs, index of the split)`."""
    return replace(task, splits={name: alter(pairs, place) for place, (name, pairs) in enumerate(task.splits.items())})


def _count_used_weights(subject: SparseSubject, kept: Mapping[Location, Tensor], prompts: TokenPairs) -> Mapping[str, int]:
    """Numbers of embedding, unembedding and bigram weights that the circuit uses on some prompts."""
    sparse = subject.sparse
    read_s = torch.zeros(sparse.width, dtype=torch.bool, device=subject.device)
    written_s = read_s.clone()
    for location, kept_1n in kept.items():
        if location.kind in ("attn_in", "mlp_in"):
            read_s |= kept_1n[0]
        elif location.kind in ("attn_out", "mlp_out"):
            written_s |= kept_1n[0]
    tokens = prompts.prompt_bt[prompts.is_prompt_bt].unique()
    answers = torch.cat([prompts.answer_bk, prompts.wrong_bk], 1).unique()
    answers = answers[answers >= 0]
    return {
        "embedding": int((sparse.embedding[tokens][:, read_s] != 0).sum()) if len(sparse.embedding) else 0,
        "unembedding": int((sparse.unembedding.weight[answers][:, written_s] != 0).sum()) if len(sparse.embedding) else 0,
        "bigram": len(answers) * len(prompts.prompt_bt[torch.arange(len(prompts)), prompts.last_b].unique())
        if sparse.bigram
        else 0,
    }


# -- nulls --------------------------------------------------------------------------------------------------------------


def random_labels(pairs: TokenPairs, vocabulary: int, seed: int) -> TokenPairs:
    """The pairs with every answer token replaced by one random permutation of the vocabulary."""
    permuted_v = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(seed)).to(pairs.answer_bk.device)

    def nonsense(ids_bk: Tensor) -> Tensor:
        return torch.where(ids_bk < 0, ids_bk, permuted_v[ids_bk.clamp(min=0)])

    return replace(pairs, answer_bk=nonsense(pairs.answer_bk), wrong_bk=nonsense(pairs.wrong_bk))


def exchange_answers(pairs: TokenPairs, seed: int) -> TokenPairs:
    """The pairs with the answers of other pairs; right and wrong are exchanged in half of the pairs."""
    generator = torch.Generator().manual_seed(seed)
    from_b = torch.randperm(len(pairs), generator=generator)
    reversed_b = torch.randperm(len(pairs), generator=generator) % 2 == 0
    dealt = pairs.both_members().rows(from_b + len(pairs) * reversed_b)
    return replace(
        pairs, answer_bk=dealt.answer_bk, wrong_bk=dealt.wrong_bk, answer_not_b=dealt.answer_not_b, wrong_not_b=dealt.wrong_not_b
    )

"""The card of a task's circuit: the gate, the four tests, and what is said beside them.

It is of the circuit that `circuits.search` left, on at most 64 pairs of the test split, every second one the other way round, and
on stress prompts made of the same pairs; sufficiency and the agreement of seeds are from the search's own evidence.

Shape legend: b pair (row), n nodes of a location, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from bridge.bridges import Coupling
from bridge.card.blind import blind_measures
from bridge.card.card import Card, CardError, CardMeasure, NullResult
from bridge.card.case import Case
from bridge.card.loop import loop_measures
from bridge.card.profile import profile_measures
from bridge.card.stress import stress_pairs
from bridge.card.swap import swap_measures
from bridge.evidence.task_sufficiency import SOLVED
from bridge.nodes import sparse_fingerprint
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects
from bridge.tasks.tokens import Resolved, TokenPairs, score
from bridge.validate import Control

PAIRS = 64


@torch.no_grad()
def task_card(
    subjects: Subjects,
    task: Resolved,
    result: TaskResult,
    nulls: tuple[NullResult, ...] | None = None,
    *,
    nulls_note: str = "",
    pairs: TokenPairs | None = None,
    alter: Callable[[TokenPairs], TokenPairs] = lambda pairs: pairs,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Card:
    """The card of a task's circuit. `alter` changes the answers of all pairs that it is tested on, for a null.

    Raises CardError where the circuit is not of this coupling, or the task has no held-out pairs under its tokenizer.
    """
    say, started = progress or (lambda _: None), time.monotonic()
    coupling, whole = subjects.coupling, subjects.sparse
    check_circuit(result, subjects)
    chosen = held_out(task) if pairs is None else pairs
    say("card: the dense model on the task")
    tested = alter(chosen)
    circuit = result.circuit
    case = Case.of(coupling, whole, whole, circuit.kept, tested)
    reference_bt = subjects.reference_bt if coupling.reference_bt is None else coupling.reference_bt
    stress = stress_pairs(
        chosen, coupling.dense.prompts, reference_bt, coupling.context, language=task.language, seed=seed
    )  # fmt: skip
    tests = (
        _gate(coupling, case.pairs),
        *swap_measures(case, seed, say),
        *loop_measures(case, seed, say),
        *profile_measures(case, seed, say),
        *blind_measures(
            case, {kind: replace(some, pairs=alter(some.pairs)) for kind, some in stress.items()}, reference_bt, seed, say
        ),
    )
    report = result.report
    notes = (f"{len(case.pairs)} held-out pairs, and {PAIRS} are asked.",) if len(case.pairs) < PAIRS else ()
    return Card(
        about=task.task,
        kind="task",
        pairs=len(case.pairs),
        sparse=report.verdict,
        stable=report["stable"].passed,
        tests=tests,
        nulls=nulls,
        nulls_note=nulls_note,
        notes=notes,
        provenance={**coupling.provenance, "seed": seed, "nodes": len(circuit.nodes)},
        seconds=time.monotonic() - started,
    )


def held_out(task: Resolved) -> TokenPairs:
    """At most 64 pairs of a task's test split, every second one the other way round. Raises CardError where there are none."""
    pairs = task.splits["test"]
    if not len(pairs):
        raise CardError(f"the task {task.task} has no test pairs under this tokenizer; take another task, or add examples")
    row_b = torch.linspace(0, len(pairs) - 1, min(PAIRS, len(pairs))).round().long()
    count = len(row_b)
    place_b = torch.arange(count)
    return pairs.rows(row_b).both().rows(torch.where(place_b % 2 == 0, place_b, place_b + count))


def check_circuit(result: TaskResult, subjects: Subjects) -> None:
    """Raise CardError where a circuit is not one of this coupling: it was searched in other weights."""
    if result.facts.provenance.get("sparse_fingerprint") != sparse_fingerprint(subjects.coupling.sparse):
        raise CardError(
            f"the circuit of {result.circuit.explains} is not of this coupling: it was searched in other weights; give --bridge "
            "the coupling that it was searched in, or search again"
        )


def _gate(coupling: Coupling, pairs: TokenPairs) -> CardMeasure:
    scores = score(coupling.dense, pairs)
    return CardMeasure(
        "accuracy of the dense model", scores.accuracy, Control("chance", 1, 0.5, 0.5, "it"), f">= {SOLVED:g}",
        scores.accuracy >= SOLVED, test="gate",
    )  # fmt: skip

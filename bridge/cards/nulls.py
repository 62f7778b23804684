"""The nulls of a coupling on tasks: the same search and the same evidence on couplings that must fail them.

    uncoupled, weights   circuits are searched in the null (`null_couplings`)
    bridges              the coupling's own circuits are tested with the null's bridges
    labels               the coupling and its circuits are tested with random answers: one permutation of the vocabulary

A null passes if all tests hold (`evidence.null_task`), whatever its other measures are: if a model does not do a nonsense task,
that shows nothing about the tests. A null fails if the search finds no circuit; a search that cannot be run is an error. If the
uncoupled model does none of the tasks, its null is noted as weak: the model was trained too briefly.

Results are written after every task, so a killed run resumes where it stopped. Results for another coupling, for other prompts
or by other rules are never reused.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from bridge.cards.evidence import NULLS, CardConfig, card_rules_digest, gather_task, held_out_pairs, null_task
from bridge.cards.task_circuit import CardError, TaskCircuit
from bridge.circuits.task_search import NoCircuitError
from bridge.data.task_tokens import Resolved, TokenPairs, score
from bridge.display.progress import OnProgress, with_prefix
from bridge.models.bridges import CoupledModels
from bridge.models.store import read_json
from bridge.studies.result import NULL_DESCRIPTIONS, TaskResult
from bridge.studies.search import Subjects, random_labels, search_task
from bridge.verdicts.null_couplings import NULL_NAMES, null_coupling
from bridge.verdicts.null_table import NullTask, TaskNull, keep_nulls, stored_task_nulls

TASKS = 3  # default number, of the tasks that both models do
WEAK_NOTE = "the uncoupled model does none of these tasks, so this null shows little; train it for longer"
DESCRIPTIONS: Mapping[str, str] = {
    "uncoupled": "a sparse model trained on text and the dense model's answers alone, bridges to it by ridge regression",
    "bridges": "the sparse channels of every bridge in a random order (prediction uses no bridge)",
    "weights": "the sparse model's matrices with their entries permuted, bridges fitted to it by ridge regression",
    "labels": NULL_DESCRIPTIONS["labels"],
}


@dataclass(frozen=True, eq=False)
class Nulls:
    """Inputs of a coupling's nulls: tasks, their circuits, folder and minutes of the uncoupled coupling, search budget, seed."""

    coupling: CoupledModels
    tasks: tuple[Resolved, ...]
    circuits: Callable[[Resolved], TaskResult]
    against: Path
    minutes: float
    budget: float
    seed: int = 0

    def run(self, progress: OnProgress) -> Generator[TaskNull, None, None]:
        """Run every null and yield it when it is done; results stored in the coupling's folder are reused."""
        kept, _ = stored_task_nulls(self.coupling, card_rules_digest(), **self._facts)
        done = {null.name: null for null in kept or ()}
        asked = {resolved.task: resolved for resolved in self.tasks}
        for name in NULLS:
            before = {task.task: task for task in (done[name].tasks if name in done else ())}
            found = [task for task in before.values() if task.task not in asked]
            made = cache(partial(self._subjects, name, progress))
            for task, resolved in asked.items():
                known = before.get(task)
                if known is None or known.prompts != resolved.digest:
                    known = self._test_task(name, made, resolved, progress)
                found.append(known)
                unsolved = name == "uncoupled" and all((one.accuracy or 0) < CardConfig.solved for one in found)
                done[name] = TaskNull(name, DESCRIPTIONS[name], tuple(found), WEAK_NOTE if unsolved else "")
                keep_nulls(self.coupling, "tasks", tuple(done.values()), card_rules_digest(), **self._facts)
            yield done[name]

    @property
    def _facts(self) -> dict[str, str | float | int]:
        """Facts that the results depend on; the digest of the uncoupled model is "" until it has been trained."""
        file = self.against / "coupling.json"
        against = (read_json(file).get("tensors") or {}).get("sha256", "") if file.is_file() else ""
        return {"against": against, "work": self.budget, "seed": self.seed}

    def _subjects(self, name: str, progress: OnProgress) -> Subjects:
        """The models that a null is tested on."""
        if name not in NULL_NAMES:
            return Subjects.of(self.coupling)
        options = {"against": self.against, "minutes": self.minutes, "seed": self.seed}
        return Subjects.of(null_coupling(self.coupling, name, **options, progress=progress))

    def _test_task(self, name: str, made: Callable[[], Subjects], task: Resolved, progress: OnProgress) -> NullTask:
        """The evidence of a null on a task; if there is no circuit, the reason."""
        on_progress = with_prefix(progress, f"{name}, {task.task}: ")

        def alter(pairs: TokenPairs) -> TokenPairs:
            return random_labels(pairs, self.coupling.dense.vocabulary, self.seed) if name == "labels" else pairs

        subjects, coupling = made(), made().coupling
        accuracy = score(coupling.sparse, alter(held_out_pairs(task)).to(coupling.dense.device)).accuracy
        if name in ("bridges", "labels"):
            result = self.circuits(task)
        else:
            try:
                result = search_task(
                    subjects, task, dense=False, gated=False, nested=False, seed=self.seed, budget=self.budget,
                    progress=on_progress,
                )  # fmt: skip
            except NoCircuitError as error:
                return NullTask(task.task, {}, {}, False, accuracy, f"no circuit: {error}", task.digest)
        report = gather_task(coupling, TaskCircuit.of(result, coupling), task, alter, seed=self.seed, progress=on_progress)
        return null_task(task.task, report, accuracy, task.digest)


def solved_tasks(coupling: CoupledModels, tasks: Iterable[Resolved]) -> tuple[Resolved, ...]:
    """The first TASKS tasks that both models of a coupling do. Raises CardError if there are none."""
    solved: list[Resolved] = []
    for task in tasks:
        if len(solved) == TASKS:
            break
        if not len(task.splits["test"]):
            continue
        pairs = held_out_pairs(task).to(coupling.dense.device)
        if min(score(model, pairs).accuracy for model in (coupling.dense, coupling.sparse)) >= CardConfig.solved:
            solved.append(task)
    if not solved:
        raise CardError(
            "the models of this coupling", "do none of the tasks, so the nulls cannot be tested", "name some with ‹tasks›"
        )
    return tuple(solved)

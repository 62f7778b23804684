"""Nulls for the whole card: couplings that must fail it, run once per coupling on a few tasks, and kept in its folder.

    uncoupled   a sparse model of the same shape from a random start, with at least 1/16 of its weights, trained on text and on
                the dense model's answers but on nothing inside it; bridges fitted afterwards by ridge regression on the
                coupling's reference text; circuits searched in it as ever. That it has more weights, and answers to learn from,
                makes it the harder null
    bridges     the coupling with the sparse channels of every bridge in a random order, another at every site (residual streams
                share their channels over sites, so that only to exchange sites would change little); its own circuits
    weights     the entries of every matrix of the sparse model permuted; ridge bridges; circuits searched in it
    labels      the coupling itself and its circuits, every answer token replaced by a random one, the same one everywhere

A null passes where all four tests hold (`Card.tests_hold`), whatever else is to be said of it: that no model does a nonsense task
is no test's merit. A search that finds no circuit fails; one that cannot be run is an error. Where an uncoupled model does none
of the tasks, its null is weak, and says so: it was trained too briefly.

nulls.json holds the results with a fingerprint of what they depend on, and is written after every task: a run that is killed goes
on where it was, and results of another coupling, of other prompts or by other rules are never taken for this one's.

Shape legend: b row, t token, d dense width, s sparse width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bridge.bridges import Coupling, folder_of
from bridge.card.assess import held_out, task_card
from bridge.card.card import NULLS, TESTS, Card, CardError, NullName, NullResult, NullTask, Test
from bridge.card.kept import FILE, FORMAT, Stored, fingerprint, read_stored, rules
from bridge.checkpoint import read_json, write_json
from bridge.circuits.task_search import NoCircuitError
from bridge.evidence.null_couplings import MINUTES, null_coupling
from bridge.evidence.task_sufficiency import SOLVED
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects, random_labels, search_task
from bridge.tasks.tokens import Resolved, TokenPairs, score

TASKS = 3  # by default: of those the coupling solves
WORK_SHARE = 0.2  # of a search's work: it is a null
WEAK = "the uncoupled model does none of these tasks: train it for longer (--minutes), or this null shows little"

Say = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Nulls:
    """What the nulls of a coupling are made with: tasks and their circuits, the uncoupled coupling's folder and budget, seeds."""

    coupling: Coupling
    tasks: tuple[Resolved, ...]
    circuits: Callable[[Resolved], TaskResult]
    against: Path
    minutes: float = MINUTES
    work: float = WORK_SHARE
    seed: int = 0

    @cached_property
    def subjects(self) -> Subjects:
        """The coupling itself."""
        return Subjects.of(self.coupling)

    def run(self, progress: Say) -> Generator[NullResult, None, None]:
        """Every null as it ends; results found in the coupling's folder are taken from there."""
        before = self._kept()
        done: dict[str, NullResult] = dict(before)
        asked = {resolved.task: resolved.digest for resolved in self.tasks}
        for name, what in NULLS.items():
            there = done[name].tasks if name in done else ()
            known = {task.task: task for task in there if asked.get(task.task, task.prompts) == task.prompts}
            found = [task for task in known.values() if task.task not in {resolved.task for resolved in self.tasks}]
            lazily = _Lazily(lambda name=name: self._subjects(name, progress))
            for resolved in self.tasks:
                if resolved.task not in known:
                    found.append(replace(self._card(name, lazily, resolved, progress), prompts=asked[resolved.task]))
                else:
                    found.append(known[resolved.task])
                done[name] = NullResult(name, what, tuple(found), _note(name, found))
                self._keep(done)
            yield done[name]

    def _kept(self) -> dict[str, NullResult]:
        """Results kept of the same settings."""
        file = self._folder / FILE
        if not file.is_file():
            return {}
        stored = read_stored(file)
        if stored is None:
            raise CardError(f"{str(file)!r} cannot be read; remove it, and run the nulls again")
        same = stored.format == FORMAT and dict(stored.fingerprint) == self._settings
        return {null.name: null for null in stored.nulls} if same else {}

    @property
    def _folder(self) -> Path:
        assert self.coupling.path is not None
        return folder_of(self.coupling.path)

    @cached_property
    def _settings(self) -> dict[str, str | int | float | None]:
        against: dict[str, Any] = read_json(self.against / "coupling.json") if (self.against / "coupling.json").is_file() else {}
        return {
            "coupling": fingerprint(self.coupling),
            "rules": rules(),
            "against": (against.get("tensors") or {}).get("sha256", ""),
            "work": self.work,
            "seed": self.seed,
        }

    def _keep(self, done: Mapping[str, NullResult]) -> None:
        self.__dict__.pop("_settings", None)  # the uncoupled model may have come to be since
        values = asdict(Stored(FORMAT, self._settings, tuple(done.values())))
        there: dict[str, Any] = read_json(self._folder / FILE) if (self._folder / FILE).is_file() else {}
        write_json(self._folder / FILE, {**there, **values})  # those of prompts stay

    def _subjects(self, name: NullName, progress: Say) -> Subjects:
        """The coupling of a null."""
        if name != "labels":
            made = null_coupling(
                self.coupling, name, against=self.against, minutes=self.minutes, seed=self.seed, progress=progress
            )
            return replace(self.subjects, coupling=made) if name == "bridges" else Subjects.of(made)
        return self.subjects

    def _card(self, name: NullName, subjects: _Lazily, task: Resolved, progress: Say) -> NullTask:
        """The whole card of a null on a task; where there is no circuit, why."""
        where = f"{name}, {task.task}: "

        def say(text: str) -> None:
            progress(f"{where}{text}")

        def alter(pairs: TokenPairs) -> TokenPairs:
            return random_labels(pairs, self.coupling.dense.vocabulary, self.seed) if name == "labels" else pairs

        pairs = held_out(task)
        of = subjects()
        accuracy = score(of.coupling.sparse, alter(pairs).to(of.coupling.dense.device)).accuracy
        if name in ("bridges", "labels"):
            result = self.circuits(task)
        else:
            try:
                result = search_task(of, task, dense=False, gated=False, seed=self.seed, work=self.work, progress=say)
            except NoCircuitError as error:
                return NullTask(task.task, dict.fromkeys(TESTS), dict.fromkeys(TESTS), False, accuracy, f"no circuit: {error}")
        card = task_card(of, task, result, pairs=pairs, alter=alter, seed=self.seed, progress=say)
        return null_task(card, accuracy)


class _Lazily:
    """A null's coupling, made when its first task needs it."""

    def __init__(self, make: Callable[[], Subjects]) -> None:
        self._make, self._made = make, None

    def __call__(self) -> Subjects:
        self._made = self._made or self._make()
        return self._made


def null_task(card: Card, accuracy: float) -> NullTask:
    """What is kept of a null's card."""
    first: dict[Test, float | None] = {test: next((m.value for m in card.measures(test)), None) for test in TESTS}
    return NullTask(card.about, {test: card.holds(test) for test in TESTS}, first, card.tests_hold, accuracy)


def _note(name: NullName, found: Sequence[NullTask]) -> str:
    unsolved = all((task.accuracy or 0) < SOLVED for task in found)
    return WEAK if name == "uncoupled" and unsolved else ""


def solved_tasks(coupling: Coupling, tasks: Iterable[Resolved], most: int = TASKS) -> tuple[Resolved, ...]:
    """The first tasks that both models of a coupling do. Raises CardError where there are none."""
    solved: list[Resolved] = []
    for task in tasks:
        if len(solved) == most:
            break
        if not len(task.splits["test"]):
            continue
        pairs = held_out(task).to(coupling.dense.device)
        if min(score(model, pairs).accuracy for model in (coupling.dense, coupling.sparse)) >= SOLVED:
            solved.append(task)
    if not solved:
        raise CardError("the models of this coupling do none of the tasks, so there is no card for nulls to fail; name --tasks")
    return tuple(solved)

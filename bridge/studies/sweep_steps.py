"""The steps of a sweep at one point: fit, evaluation, circuits; a result that is in the folder is read (see `sweep`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from bridge.circuits.task_search import SearchError
from bridge.data.task_pairs import TaskError
from bridge.display.progress import OnProgress, Phase, with_prefix
from bridge.errors import RunError, UserError
from bridge.models.bridges import CoupledModels, local_folder
from bridge.models.dense import DenseModel
from bridge.models.store import CheckpointError, read_json, refuse_unreadable, write_json
from bridge.recipe import Recipe, known_names, resolve
from bridge.studies.frontier import CouplingPoint, DensePoint, TaskSize
from bridge.studies.result import Size, TaskResult
from bridge.studies.search import Explains, Subjects, search_dense, whole_size
from bridge.studies.suite import folder_name, resolved, run_suite
from bridge.training.evaluate import Evaluation, evaluate
from bridge.training.loop import finish, train
from bridge.training.prepare import prepare

OnText = Callable[[str], None]
DENSE_FOLDER = "dense-model"
POINT_ERRORS = (UserError, RunError, OSError, MemoryError, torch.OutOfMemoryError)  # errors that lose one point, not the sweep
_EVALUATION = TypeAdapter(Evaluation)


class SweepError(UserError):
    """A sweep that cannot be run as requested, in one line."""


@dataclass(frozen=True)
class PlannedPoint:
    """A planned point: the name of its folder, and the recipe of its fit (as given, and resolved) or a coupling to load."""

    name: str
    values: dict[str, Any] | None = None
    recipe: Recipe | None = None
    load: str | None = None


@dataclass(frozen=True)
class Search:
    """The settings of every circuit search of a sweep, the same for all points; a stored result must have the same settings."""

    level: float
    explains: Explains
    seeds: int
    budget: float
    rows: int


@dataclass(eq=False)
class Steps:
    """The state that the steps of a sweep share: the dense model, once loaded, and the coupling of the current point."""

    model: Any
    dense: DenseModel | None
    out: Path
    tasks: tuple[str, ...]
    search: Search
    options: dict[str, Any]
    on_step_end: OnText
    on_progress: OnProgress
    point_prefix: str = ""
    coupling: CoupledModels | None = None

    def step_ended(self, text: str) -> None:
        """Report that a step has ended."""
        self.on_step_end(f"{self.point_prefix}{text}")

    def progress(self, phase: Phase) -> None:
        """Report the current phase."""
        with_prefix(self.on_progress, self.point_prefix)(phase)

    def measure(self, point: PlannedPoint) -> CouplingPoint:
        """Measure a point, from its first missing step to its last."""
        folder = self.out / point.name
        if point.values is not None and point.recipe is not None:
            self._fit(point.values, point.recipe, folder)
        where = folder if point.load is None else local_folder(point.load)
        facts = self._facts(where, folder, point)
        evaluation = self._evaluated(where, folder)
        tasks = self._search_circuits(where, folder / "circuits")
        return CouplingPoint(
            name=point.name,
            loaded=point.load,
            width=facts["width"],
            l0=facts["nonzeros"] / facts["weights"],
            nonzeros=facts["nonzeros"],
            weights=facts["weights"],
            ce=evaluation.ce_sparse,
            ce_dense=evaluation.ce_dense,
            kl=evaluation.kl_sparse,
            recovered_in=evaluation.recovered_in,
            recovered_out=evaluation.recovered_out,
            tasks=tasks,
        )

    def load_coupling(self, where: Path) -> CoupledModels:
        """The coupling of the current point, with the sweep's dense model. Raises CheckpointError if it is of another model."""
        if self.coupling is None:
            self.coupling = CoupledModels.from_pretrained(where, dense=self.dense, device=self.options["device"])
            self.dense = self.coupling.dense
        return self.coupling

    def _fit(self, values: dict[str, Any], wanted: Recipe, folder: Path) -> None:
        if (folder / "coupling.json").is_file():
            there = _recipe_of(folder)
            if differs := _differences(wanted, there):
                raise SweepError(f"{str(folder)!r}", f"holds a coupling of another {', '.join(differs)}", "name another ‹out›")
            self.step_ended("fit: already done")
            return
        started, last = time.monotonic(), None
        self.progress(Phase("fit"))
        run = prepare(self.model, values, out=folder, resume=True, **self.options)
        for last in train(run):
            ce = last.losses.get("ce", float("nan"))
            self.progress(Phase("fit", last.fraction, 1, f"{last.tokens:,} tokens, CE {ce:.3f}"))
        finish(run)
        tokens = "" if last is None else f"{last.tokens:,} tokens in "
        self.step_ended(f"fit: {tokens}{(time.monotonic() - started) / 60:.1f} minutes")

    def _facts(self, where: Path, folder: Path, point: PlannedPoint) -> dict[str, Any]:
        """The facts in point.json, written if missing: which weights the point's measures are of, and the search's settings."""
        try:
            digest = str(read_json(where / "coupling.json")["tensors"]["sha256"])
        except (KeyError, TypeError, CheckpointError):
            self.load_coupling(where)  # raises an error that says what is wrong
            raise
        file, search = folder / "point.json", asdict(self.search)
        if file.is_file():
            facts = read_json(file)
            if facts.get("sha256") != digest:
                raise SweepError(
                    f"{str(folder)!r}", f"holds measures of other weights than {str(where)!r} has", "name another ‹out›"
                )
            if facts.get("search") != search:
                raise SweepError(
                    f"{str(folder)!r}", f"was searched with {facts.get('search')}, not {search}", "name another ‹out›"
                )
            dense = self.load_coupling(where).dense if self.dense is None else self.dense
            if facts.get("dense") == dense.fingerprint():
                return facts
        coupling = self.load_coupling(where)
        weights = coupling.sparse.n_sparse_weights()
        facts = {
            "name": point.name, "loaded": point.load, "sha256": digest, "dense": coupling.dense.fingerprint(),
            "width": coupling.sparse.width, "nonzeros": round(coupling.sparse.achieved_l0() * weights), "weights": weights,
            "search": search,
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, facts)
        return facts

    def _evaluated(self, where: Path, folder: Path) -> Evaluation:
        file = folder / "eval.json"
        if file.is_file() and (there := _evaluation(file)) is not None:
            self.step_ended(f"evaluation: {_line(there)}; already done")
            return there
        tokens_bt = self.load_coupling(where).reference_bt
        if tokens_bt is None or not tokens_bt.numel():
            raise SweepError(f"the coupling {str(where)!r}", "holds no held-out text to evaluate it on", "fit it again")
        result = evaluate(self.load_coupling(where), tokens_bt[: self.search.rows], on_progress=self.progress)
        write_json(file, result.to_json())
        self.step_ended(f"evaluation: {_line(result)}")
        return result

    def _search_circuits(self, where: Path, circuits: Path) -> tuple[TaskSize, ...]:
        """The sizes of all tasks' circuits, searched if they are missing; their comparison is written last."""
        search = self.search
        files = [circuits / folder_name(name) / "circuit.json" for name in self.tasks]
        end = circuits / "complete.json"
        compared = read_json(end).get("tasks", []) if end.is_file() else []
        if set(self.tasks) <= set(compared) and all(file.is_file() for file in files):
            sizes = tuple(_task_size(file.parent) for file in files)
            self.step_ended(f"circuits: {sum(not one.failed for one in sizes)} of {len(sizes)} tasks solved; already done")
            return sizes
        texts = run_suite(
            Subjects.of(self.load_coupling(where)), self.tasks, out=circuits, progress=self.progress, level=search.level,
            explains=search.explains, seeds=search.seeds, budget=search.budget, dense=False,
        )  # fmt: skip
        found: list[TaskSize] = []
        for file in files:
            next(texts)
            found.append(_task_size(file.parent))
            self.step_ended(f"circuit {len(found)}/{len(files)} {found[-1].task}: {_size_line(found[-1])}")
        next(texts)  # the comparison
        write_json(end, {"tasks": list(self.tasks)})
        return tuple(found)

    def measure_dense(self, point: PlannedPoint, measured: CouplingPoint, *, pruned: bool) -> DensePoint:
        """Measure the dense model's own circuits, with means over the point's text; a failure is reported, not raised."""
        where = self.out / point.name if point.load is None else local_folder(point.load)
        assert self.dense is not None, "a point has been measured"
        name, fingerprint = self.dense.name, self.dense.fingerprint()
        wanted = {**asdict(self.search), "seeds": 1, "dense": fingerprint}
        sizes: list[TaskSize] = []
        why_not = "" if pruned else "not asked for"
        try:
            for number, task in enumerate(self.tasks if pruned else ()):
                file = self.out / DENSE_FOLDER / f"{folder_name(task)}.json"
                facts = read_json(file) if file.is_file() else None
                if facts is not None and facts.get("search") != wanted:
                    raise SweepError(f"{str(file)!r}", f"holds a search with other settings than {wanted}", "name another ‹out›")
                if facts is None:
                    one = self._search_dense_task(Subjects.of(self.load_coupling(where)), task)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    facts = {"search": wanted, **asdict(one)}
                    write_json(file, facts)
                sizes.append(TaskSize(facts["task"], Size(**facts["size"]), facts["failed"]))
                self.step_ended(f"circuit {number + 1}/{len(self.tasks)} {sizes[-1].task}: {_size_line(sizes[-1])}")
        except POINT_ERRORS as error:
            sizes, why_not = [], " ".join(str(error).split()) or type(error).__name__
            self.step_ended(f"no circuits: {why_not}")
        return DensePoint(name, fingerprint, measured.ce_dense, tuple(sizes), why_not)

    def _search_dense_task(self, subjects: Subjects, task: str) -> TaskSize:
        label = folder_name(task)
        try:
            size = search_dense(
                subjects, resolved(subjects, task), level=self.search.level, budget=self.search.budget,
                progress=with_prefix(self.progress, f"{label}: "),
            )  # fmt: skip
        except (SearchError, TaskError) as error:
            return TaskSize(label, whole_size(subjects.dense), str(error))
        return TaskSize(label, size)


# -- what is on disk ----------------------------------------------------------------------------------------------------


def _recipe_of(folder: Path) -> Recipe:
    values = read_json(folder / "coupling.json").get("recipe")
    if not isinstance(values, dict):
        raise CheckpointError(
            f"checkpoint file {str(folder / 'coupling.json')!r}", "is damaged: it holds no recipe", "fit it again"
        )
    return resolve(values)


FILLED_IN_BY_FIT = (  # numbers that a fit fills in if they are not set
    "sparse.width", "sparse.head_channels", "sparse.mlp_ratio", "sparse.mlp", "sparse.keep", "sparse.positions", "sparse.block",
    "data.context", "data.rows", "optimizer.rate",
)  # fmt: skip


def _differences(wanted: Recipe, there: Recipe) -> list[str]:
    """Names of the numbers in which a fitted recipe differs from the wanted one, except those that the fit filled in."""
    found = []
    for name in known_names():
        asked, its = (attrgetter(name)(recipe) for recipe in (wanted, there))
        is_filled_in = asked in (None, "auto") and name in FILLED_IN_BY_FIT
        if asked != its and not is_filled_in and name not in ("dense", "revision"):
            found.append(name)
    return found


def _evaluation(file: Path) -> Evaluation | None:
    """The evaluation in a file; None if it is of another version and has to be repeated."""
    try:
        return _EVALUATION.validate_python(read_json(file))
    except ValidationError:
        return None


def _task_size(folder: Path) -> TaskSize:
    facts = read_json(folder / "circuit.json")
    if "failed" in facts:
        with refuse_unreadable(f"{str(folder)!r}", "result", "delete it, and sweep again"):
            return TaskSize(folder.name, Size(**facts["whole"]), str(facts["failed"]))
    result = TaskResult.load(folder)
    return TaskSize(folder.name, result.facts.size, verdict=result.report.verdict)


def _line(evaluation: Evaluation) -> str:
    recovered = (evaluation.recovered_in + evaluation.recovered_out) / 2
    return f"CE {evaluation.ce_sparse:.3f} (dense {evaluation.ce_dense:.3f}), recovered {recovered:.3f}"


def _size_line(one: TaskSize) -> str:
    if one.failed:
        return f"no circuit, counted at the model's {one.size.edges:,} edges ({one.failed})"
    return f"{one.size.nodes:,} nodes, {one.size.edges:,} edges" + (f", {one.verdict}" if one.verdict else "")

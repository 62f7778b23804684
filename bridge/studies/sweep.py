"""Couplings of one dense model over several L0 and widths, each evaluated and searched for circuits: the points of a frontier.

For every point, in its own folder below `out`, and each step skipped where its result is there:

    fit        `training.fit`, which goes on where it was killed; or a coupling that is there already (`load`), left there
    evaluate   `evaluate.evaluate` on held-out text -> eval.json
    circuits   `suite.run_suite` -> circuits/TASK/, with their overlaps and cross-ablation

and once, after the first point that has come so far, the dense model's own circuits of the same tasks -> dense-model/TASK.json.
After every point sweep.json, sweep.txt and frontier.svg are written anew (`frontier.Frontier`), with the points that the last
call named. point.json records which weights were measured and how, so that no measure is taken for another's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from bridge.circuits.task_search import TASK_SEARCH, SearchError
from bridge.data.task_pairs import TaskError, load_task, task_names
from bridge.errors import RunError, UserError
from bridge.huggingface.site_discovery import DenseModelError
from bridge.models.bridges import Coupling, folder_of
from bridge.models.dense import DenseModel, load_dense
from bridge.models.store import CheckpointError, check_new, read_json, write_json
from bridge.recipe import Recipe, known_names, recipe_values, resolve
from bridge.studies.frontier import DensePoint, Failure, Frontier, Point, TaskSize
from bridge.studies.result import Size, TaskResult
from bridge.studies.search import Explains, Subjects, search_config, search_dense, whole_size
from bridge.studies.suite import folder_name, resolved, run_suite
from bridge.training.evaluate import Evaluation, evaluate
from bridge.training.loop import Progress, fit

OnText = Callable[[str], None]
DENSE_FOLDER = "dense-model"
ROWS = 256
_LOST = (UserError, RunError, OSError, MemoryError, torch.OutOfMemoryError)  # what loses one point, not the sweep
_EVALUATION = TypeAdapter(Evaluation)


class SweepError(UserError):
    """A sweep that cannot be run as it was described, in one line."""


@dataclass(frozen=True)
class Planned:
    """A planned point: the name of its folder, and the recipe of its fit (as given, and resolved) or a coupling to load."""

    name: str
    values: dict[str, Any] | None = None
    recipe: Recipe | None = None
    load: str | None = None


@dataclass(frozen=True)
class Search:
    """The settings of every circuit search of a sweep, the same for all points."""

    tasks: tuple[str, ...]
    level: float
    explains: Explains
    seeds: int
    budget: float
    rows: int

    def to_json(self) -> dict[str, Any]:
        """The settings that a stored result must agree in to be used."""
        return {"level": self.level, "explains": self.explains, "seeds": self.seeds, "budget": self.budget, "rows": self.rows}


def plan(
    l0: Sequence[float] = (), width: Sequence[int] = (), load: Sequence[str | Path] = (), **recipe: Any
) -> tuple[Planned, ...]:
    """The points of a sweep: a fit for every width and L0 (those unsaid are the recipe's), unless there are loads alone; loads.

    `recipe` is what `recipe.recipe_values` takes. Raises RecipeError or SweepError, before anything is run.
    """
    for what, given in (("l0", l0), ("width", width), ("load", [str(path) for path in load])):
        if twice := sorted({value for value in given if list(given).count(value) > 1}):
            raise SweepError(f"{what} {twice[0]} is named twice; name each once")
    points: list[Planned] = []
    if l0 or width or not load:
        for one_width in width or (None,):
            for one_l0 in l0 or (None,):
                values = recipe_values(l0=one_l0, width=one_width, **recipe)
                if not values.get("sparsity"):
                    raise SweepError(
                        "how sparse is not said; give --l0: below 1 the fraction of weights that stay, or their number"
                    )
                wanted = resolve({"dense": "to be named", **values})
                shape = "auto" if wanted.sparse.width is None else wanted.sparse.width
                name = f"w{shape}-l0-{wanted.sparsity.l0:.12g}"
                if any(point.name == name for point in points):
                    raise SweepError(f"two points would be {name}; leave width and L0 out of --set")
                points.append(Planned(name, values, wanted))
    names = [Path(path).name or str(path) for path in load]
    for path, name in zip(load, names, strict=True):
        if names.count(name) > 1:
            name = f"{Path(path).absolute().parent.name}-{name}"
        if name == DENSE_FOLDER or any(point.name == name for point in points):
            raise SweepError(
                f"two results would be written to a folder {name!r}; rename the folder of the coupling {str(path)!r}"
            )
        points.append(Planned(name, load=str(path)))
    return tuple(points)


def sweep(
    model: Any = None,
    *,
    out: str | Path,
    l0: Sequence[float] = (),
    width: Sequence[int] = (),
    load: Sequence[str | Path] = (),
    tasks: Sequence[str] = (),
    tokens: int | None = None,
    minutes: float | None = None,
    recipe: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    data: str | None = None,
    seed: int | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    tokenizer: Any = None,
    level: float = TASK_SEARCH.opens_at,
    explains: Explains = "dense",
    seeds: int = 1,
    dense: bool = True,
    budget: float = 1.0,
    rows: int = ROWS,
    device: str = "auto",
    dtype: str = "float32",
    on_step_end: OnText | None = None,
    progress: OnText | None = None,
) -> Frontier:
    """Fit or load couplings of a dense model and measure capability and circuits of each (paper, figure 3); resumable.

    tokens or minutes bound each fit, budget each search; seed is that of the fits, seeds the number of searches per task; dense:
    search the dense model's own circuits too; on_step_end takes a line as each step ends, progress what it is at. A point that
    fails is in `failures`. Raises UserError where the sweep cannot begin, FitStopped where a fit was asked to stop.
    """
    out, on_step_end, progress = Path(out), on_step_end or (lambda _: None), progress or (lambda _: None)
    given = {"recipe": recipe, "tokens": tokens, "minutes": minutes, "data": data, "seed": seed}
    given |= {"adapter": adapter, "revision": revision, "settings": settings}
    points = plan(l0, width, load, **given)
    search = _search(tasks, level, explains, seeds, budget, rows)
    fits = [point for point in points if point.values is not None]
    if model is None:
        model = next((point.values["dense"] for point in fits if point.values and "dense" in point.values), None)
        if model is None and fits:
            raise SweepError("which model is not said; give a hub id or folder, or a recipe that names one")
    if (out / "sweep.json").is_file():
        there = Frontier.load(out)
        searches = (there.level, there.seeds), (search.level, seeds)
        if there.points and searches[0] != searches[1]:
            raise SweepError(f"--out {str(out)!r} holds a sweep by {searches[0]}, not {searches[1]}; name another")
    else:
        if out.is_dir() and any(out.iterdir()):
            raise SweepError(f"--out {str(out)!r} is not empty and holds no sweep; name a new folder, or a sweep's")
        check_new(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    of_model = None
    if model is not None:  # before anything is written: a model that cannot be had is the whole sweep's failure
        named = next((point.values for point in fits if point.values), {})
        its = {"adapter": named.get("adapter", adapter), "revision": named.get("revision", revision)}
        of_model = load_dense(model, tokenizer=tokenizer, device=device, **its)
    options = {"tokenizer": tokenizer, "device": device, "dtype": dtype}
    run = _Sweep(model, of_model, out, search, options, on_step_end, progress)
    done: list[Point] = []
    failures: list[Failure] = []
    dense_point: DensePoint | None = None

    def state(number: int) -> Frontier:
        missing = tuple(point.name for point in points[number:])
        return Frontier(tuple(done), tuple(failures), missing, dense_point, search.level, seeds)

    if not (out / "sweep.json").is_file():
        state(0).save(out)
    for number, point in enumerate(points):
        run.at = f"[{number + 1}/{len(points)}] {point.name}: "
        try:
            measured = run.measure(point)
        except _LOST as error:
            failures.append(Failure(point.name, " ".join(str(error).split()) or type(error).__name__))
            on_step_end(f"{run.at}FAILED: {failures[-1].why}")
        else:
            done.append(measured)
            if dense_point is None:
                state(number + 1).save(out)
                run.at = "dense model: "
                dense_point = run.measure_dense(point, measured, pruned=dense)
        run.coupling = None
        state(number + 1).save(out)
    return state(len(points))


def _search(tasks: Sequence[str], level: float, explains: Explains, seeds: int, budget: float, rows: int) -> Search:
    for what, value in (("seeds", seeds), ("rows", rows), ("budget", budget)):
        if not value > 0:
            raise SweepError(f"{what} {value} leaves nothing to do; give a positive number")
    names = tuple(str(name) for name in tasks) or task_names("python")
    folders = [folder_name(name) for name in names]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise SweepError(f"two tasks are called {twice!r}; name each once, and rename one of two files")
    for name in names:
        load_task(name)
    search_config(level, budget)
    return Search(names, level, explains, seeds, budget, rows)


class _Sweep:
    """The state that the steps of a sweep share: the dense model, once loaded, and the coupling of the current point."""

    def __init__(
        self,
        model: Any,
        dense: DenseModel | None,
        out: Path,
        search: Search,
        options: dict[str, Any],
        on_step_end: OnText,
        progress: OnText,
    ) -> None:
        self.model, self.dense, self.out, self.search, self.options = model, dense, out, search, options
        self._on_step_end, self._progress = on_step_end, progress
        self.at = ""
        self.coupling: Coupling | None = None

    def step_ended(self, text: str) -> None:
        """Pass on that a step has ended."""
        self._on_step_end(f"{self.at}{text}")

    def progress(self, text: str) -> None:
        """Pass on what is under way."""
        self._progress(f"{self.at}{text}")

    def measure(self, point: Planned) -> Point:
        """Measure a point, from its first missing step to its last."""
        folder = self.out / point.name
        if point.values is not None and point.recipe is not None:
            self._fitted(point.values, point.recipe, folder)
        where = folder if point.load is None else folder_of(point.load)
        facts = self._facts(where, folder, point)
        evaluation = self._evaluated(where, folder)
        tasks = self._searched(where, folder / "circuits")
        return Point(
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

    def loaded(self, where: Path) -> Coupling:
        """The coupling of the current point, with the sweep's dense model. Raises CheckpointError for another model's."""
        if self.coupling is None:
            self.coupling = Coupling.from_pretrained(where, dense=self.dense, device=self.options["device"])
            self.dense = self.coupling.dense
        return self.coupling

    def _fitted(self, values: dict[str, Any], wanted: Recipe, folder: Path) -> None:
        if (folder / "coupling.json").is_file():
            there = _recipe_of(folder)
            if differs := _differences(wanted, there):
                raise SweepError(f"{str(folder)!r} holds a coupling of another {', '.join(differs)}; name another --out")
            self.step_ended("fit: there already")
            return
        started, last = time.monotonic(), None

        def watch(step: Progress) -> None:
            nonlocal last
            last = step
            self.progress(f"fit: {step.fraction:.0%}, {step.tokens:,} tokens, CE {step.losses.get('ce', float('nan')):.3f}")

        self.progress("fit")
        fit(
            self.model, wanted.sparsity.l0, settings=_flat(values), out=folder, resume=True, on_progress=watch, **self.options
        )  # fmt: skip
        tokens = "" if last is None else f"{last.tokens:,} tokens in "
        self.step_ended(f"fit: {tokens}{(time.monotonic() - started) / 60:.1f} minutes")

    def _facts(self, where: Path, folder: Path, point: Planned) -> dict[str, Any]:
        """The facts in point.json: the weights that the point's measures are of, and the search's settings."""
        try:
            digest = str(read_json(where / "coupling.json")["tensors"]["sha256"])
        except (KeyError, TypeError, CheckpointError):
            self.loaded(where)  # which says what is wrong
            raise
        file, search = folder / "point.json", self.search.to_json()
        if file.is_file():
            facts = read_json(file)
            if facts.get("sha256") != digest:
                raise SweepError(f"{str(folder)!r} holds measures of other weights than {str(where)!r} has; name another --out")
            if facts.get("search") != search:
                raise SweepError(f"{str(folder)!r} was searched by {facts.get('search')}, not {search}; name another --out")
            if self.dense is None:
                self.loaded(where)
            if self.dense is not None and facts.get("dense") == self.dense.fingerprint():
                return facts
        coupling = self.loaded(where)
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
            self.step_ended(f"evaluation: {_line(there)}; there already")
            return there
        tokens_bt = self.loaded(where).reference_bt
        if tokens_bt is None or not tokens_bt.numel():
            raise SweepError(f"the coupling {str(where)!r} holds no held-out text to evaluate it on; fit it again")
        result = evaluate(
            self.loaded(where), tokens_bt[: self.search.rows], on_progress=lambda done: self.progress(f"evaluation: {done:.0%}")
        )
        write_json(file, result.to_json())
        self.step_ended(f"evaluation: {_line(result)}")
        return result

    def _searched(self, where: Path, circuits: Path) -> tuple[TaskSize, ...]:
        """The circuits of all tasks, searched where they are missing; their comparison is written last."""
        search = self.search
        files = [circuits / folder_name(name) / "circuit.json" for name in search.tasks]
        end = circuits / "complete.json"
        compared = read_json(end).get("tasks", []) if end.is_file() else []
        if set(search.tasks) <= set(compared) and all(file.is_file() for file in files):
            sizes = tuple(_task_size(file.parent) for file in files)
            self.step_ended(f"circuits: {sum(not one.failed for one in sizes)} of {len(sizes)} tasks solved; there already")
            return sizes
        texts = run_suite(
            Subjects.of(self.loaded(where)), search.tasks, out=circuits, progress=self.progress, level=search.level,
            explains=search.explains, seeds=search.seeds, budget=search.budget, dense=False,
        )  # fmt: skip
        found: list[TaskSize] = []
        for file in files:
            next(texts)
            found.append(_task_size(file.parent))
            self.step_ended(f"circuit {len(found)}/{len(files)} {found[-1].task}: {_size_line(found[-1])}")
        next(texts)  # the comparison
        write_json(end, {"tasks": list(search.tasks)})
        return tuple(found)

    def measure_dense(self, point: Planned, measured: Point, *, pruned: bool) -> DensePoint:
        """Measure the dense model's own circuits, on the means of the point's text; a failure is reported."""
        where = self.out / point.name if point.load is None else folder_of(point.load)
        assert self.dense is not None, "a point has been measured"
        name, fingerprint, search = self.dense.name, self.dense.fingerprint(), self.search
        wanted = {**search.to_json(), "seeds": 1, "dense": fingerprint}
        sizes: list[TaskSize] = []
        why_not = "" if pruned else "not asked for"
        try:
            for number, task in enumerate(search.tasks if pruned else ()):
                file = self.out / DENSE_FOLDER / f"{folder_name(task)}.json"
                facts = read_json(file) if file.is_file() else None
                if facts is not None and facts.get("search") != wanted:
                    raise SweepError(f"{str(file)!r} holds another search than {wanted}; name another --out")
                if facts is None:
                    one = self._dense_size(Subjects.of(self.loaded(where)), task)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    facts = {"search": wanted, **asdict(one)}
                    write_json(file, facts)
                sizes.append(TaskSize(facts["task"], Size(**facts["size"]), facts["failed"]))
                self.step_ended(f"circuit {number + 1}/{len(search.tasks)} {sizes[-1].task}: {_size_line(sizes[-1])}")
        except _LOST as error:
            sizes, why_not = [], " ".join(str(error).split()) or type(error).__name__
            self.step_ended(f"not pruned: {why_not}")
        return DensePoint(name, fingerprint, measured.ce_dense, tuple(sizes), why_not)

    def _dense_size(self, subjects: Subjects, task: str) -> TaskSize:
        label = folder_name(task)
        try:
            size = search_dense(
                subjects, resolved(subjects, task), level=self.search.level, budget=self.search.budget,
                progress=lambda text: self.progress(f"{label}: {text}"),
            )  # fmt: skip
        except DenseModelError:
            raise
        except (SearchError, TaskError) as error:
            return TaskSize(label, whole_size(subjects.dense), str(error))
        return TaskSize(label, size)


# -- what is on disk ----------------------------------------------------------------------------------------------------


def _recipe_of(folder: Path) -> Recipe:
    values = read_json(folder / "coupling.json").get("recipe")
    if not isinstance(values, dict):
        raise CheckpointError(f"checkpoint file {str(folder / 'coupling.json')!r} is damaged: it holds no recipe; fit it again")
    return resolve(values)


OF_THE_DENSE_MODEL = (  # what a fit fills in where it is not said
    "sparse.width", "sparse.head_channels", "sparse.mlp_ratio", "sparse.mlp", "sparse.keep", "sparse.positions", "sparse.block",
    "data.context", "data.rows", "optimizer.rate",
)  # fmt: skip


def _differences(wanted: Recipe, there: Recipe) -> list[str]:
    """Names of the numbers in which a fitted recipe differs from the wanted one, except those that the dense model decides."""
    found = []
    for name in known_names():
        values = []
        for recipe in (wanted, there):
            value: Any = recipe
            for part in name.split("."):
                value = getattr(value, part)
            values.append(value)
        unsaid = values[0] in (None, "auto") and name in OF_THE_DENSE_MODEL
        if values[0] != values[1] and not unsaid and name not in ("dense", "revision"):
            found.append(name)
    return found


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """Nested recipe values by their full names."""
    flat = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _evaluation(file: Path) -> Evaluation | None:
    """The evaluation in a file; None where it is of another version and has to be repeated."""
    try:
        return _EVALUATION.validate_python(read_json(file))
    except ValidationError:
        return None


def _task_size(folder: Path) -> TaskSize:
    facts = read_json(folder / "circuit.json")
    try:
        if "failed" in facts:
            return TaskSize(folder.name, Size(**facts["whole"]), str(facts["failed"]))
    except (KeyError, TypeError):
        raise CheckpointError(
            f"{str(folder)!r} is no result that this version of bridge reads; delete it, and sweep again"
        ) from None
    result = TaskResult.load(folder)
    return TaskSize(folder.name, result.facts.size, verdict=result.report.verdict)


def _line(evaluation: Evaluation) -> str:
    recovered = (evaluation.recovered_in + evaluation.recovered_out) / 2
    return f"CE {evaluation.ce_sparse:.3f} (dense {evaluation.ce_dense:.3f}), recovered {recovered:.3f}"


def _size_line(one: TaskSize) -> str:
    if one.failed:
        return f"none, counted at full size, {one.size.edges:,} edges ({one.failed})"
    return f"{one.size.nodes:,} nodes, {one.size.edges:,} edges" + (f", {one.verdict}" if one.verdict else "")

"""Couplings of one dense model over several L0 and widths, each evaluated and searched for circuits: the points of a frontier.

Every point has its own folder below `out`. Each of its steps is skipped if the result is there:

    fit        `training.loop`, resumed if it was killed; or an existing coupling (`load`), which stays in its own folder
    evaluate   `evaluate.evaluate` on held-out text -> eval.json
    circuits   `suite.run_suite` -> circuits/TASK/, with their overlaps and cross-ablation

After the first point that succeeds, the dense model's own circuits of the same tasks are searched once -> dense-model/TASK.json.
After every point sweep.json, sweep.txt and frontier.svg are written again (`frontier.Frontier`), with the points that the latest
call named. point.json records which weights were measured and how, so a measure is never used for other weights or settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bridge.circuits.task_search import TASK_SEARCH
from bridge.data.task_pairs import load_task, task_names
from bridge.display.progress import OnProgress, ignore_progress
from bridge.models.dense import load_dense
from bridge.models.store import check_new_folder
from bridge.recipe import recipe_values, resolve
from bridge.studies.frontier import CouplingPoint, DensePoint, Failure, Frontier
from bridge.studies.search import Explains, search_config
from bridge.studies.suite import folder_name
from bridge.studies.sweep_steps import DENSE_FOLDER, POINT_ERRORS, OnText, PlannedPoint, Search, Steps, SweepError

ROWS = 256
UNNAMED_MODEL = "to be named"  # the dense model in a fit's recipe if the caller names it


def plan_points(
    l0: Sequence[float] = (), width: Sequence[int] = (), load: Sequence[str | Path] = (), **recipe: Any
) -> tuple[PlannedPoint, ...]:
    """The points of a sweep: a fit for each width and L0 (default the recipe's), unless only `load` is given; then the loads.

    `recipe` takes the arguments of `recipe.recipe_values`. Raises RecipeError or SweepError, before anything is run.
    """
    for what, given in (("l0", l0), ("width", width), ("load", [str(path) for path in load])):
        if twice := sorted({value for value in given if list(given).count(value) > 1}):
            raise SweepError(f"{what} {twice[0]}", "is given twice", "give each value once")
    points: list[PlannedPoint] = []
    if l0 or width or not load:
        for one_width in width or (None,):
            for one_l0 in l0 or (None,):
                values = recipe_values(l0=one_l0, width=one_width, **recipe)
                if not values.get("sparsity"):
                    raise SweepError(
                        "the sparsity", "is missing", "give ‹l0›, the fraction of weights to keep if below 1, or their number"
                    )
                wanted = resolve({"dense": UNNAMED_MODEL, **values})
                shape = "auto" if wanted.sparse.width is None else wanted.sparse.width
                name = f"w{shape}-l0-{wanted.sparsity.l0:.12g}"
                if any(point.name == name for point in points):
                    raise SweepError("two points", f"would both be named {name}", "leave width and L0 out of ‹settings›")
                points.append(PlannedPoint(name, values, wanted))
    names = [Path(path).name or str(path) for path in load]
    for path, name in zip(load, names, strict=True):
        if names.count(name) > 1:
            name = f"{Path(path).absolute().parent.name}-{name}"
        if name == DENSE_FOLDER or any(point.name == name for point in points):
            raise SweepError(
                "two results", f"would be written to a folder {name!r}", f"rename the folder of the coupling {str(path)!r}"
            )
        points.append(PlannedPoint(name, load=str(path)))
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
    progress: OnProgress | None = None,
) -> Frontier:
    """Fit or load couplings of a dense model, and measure capability and circuits of each (paper, figure 3); resumable.

    tokens or minutes bound each fit, budget each search; seed is the seed of the fits, seeds the number of searches per task. If
    `dense`, the dense model's own circuits are searched too. on_step_end takes a line when a step ends, progress every phase. A
    point that fails is in `failures`. Raises UserError if the sweep cannot begin, FitStopped if a fit was asked to stop.
    """
    out, on_step_end, progress = Path(out), on_step_end or (lambda _: None), progress or ignore_progress
    points = plan_points(
        l0, width, load, recipe=recipe, tokens=tokens, minutes=minutes, data=data, seed=seed, adapter=adapter, revision=revision,
        settings=settings,
    )  # fmt: skip
    search = Search(level, explains, seeds, budget, rows)
    names = _check_tasks(tasks, search)
    wanted = next((point.recipe for point in points if point.recipe is not None), None)
    if wanted is not None:
        model, adapter, revision = wanted.dense if model is None else model, wanted.adapter, wanted.revision
        if model == UNNAMED_MODEL:
            raise SweepError("the model", "is missing", "give a hub id or folder, or a recipe that names one")
    if (out / "sweep.json").is_file():
        stored_frontier = Frontier.load(out)
        searches = (stored_frontier.level, stored_frontier.seeds), (search.level, seeds)
        if stored_frontier.points and searches[0] != searches[1]:
            raise SweepError(
                f"‹out› {str(out)!r}", f"holds a sweep of level and seeds {searches[0]}, not {searches[1]}", "name another folder"
            )
    else:
        if out.is_dir() and any(out.iterdir()):
            raise SweepError(f"‹out› {str(out)!r}", "is not empty and holds no sweep", "name a new folder, or a sweep's")
        check_new_folder(out)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    of_model = None
    if model is not None:  # before anything is written, since the whole sweep fails if the model cannot be loaded
        of_model = load_dense(model, adapter=adapter, revision=revision, tokenizer=tokenizer, device=device)
    options = {"tokenizer": tokenizer, "device": device, "dtype": dtype}
    run = Steps(model, of_model, out, names, search, options, on_step_end, progress)
    done: list[CouplingPoint] = []
    failures: list[Failure] = []
    dense_point: DensePoint | None = None

    def state(number: int) -> Frontier:
        missing = tuple(point.name for point in points[number:])
        return Frontier(tuple(done), tuple(failures), missing, dense_point, search.level, seeds)

    if not (out / "sweep.json").is_file():
        state(0).save(out)
    for number, point in enumerate(points):
        run.point_prefix = f"[{number + 1}/{len(points)}] {point.name}: "
        try:
            measured = run.measure(point)
        except POINT_ERRORS as error:
            failures.append(Failure(point.name, " ".join(str(error).split()) or type(error).__name__))
            on_step_end(f"{run.point_prefix}FAILED: {failures[-1].why}")
        else:
            done.append(measured)
            if dense_point is None:
                state(number + 1).save(out)
                run.point_prefix = "dense model: "
                dense_point = run.measure_dense(point, measured, pruned=dense)
        run.coupling = None
        state(number + 1).save(out)
    return state(len(points))


def _check_tasks(tasks: Sequence[str], search: Search) -> tuple[str, ...]:
    """The tasks, by default those in python. Raises UserError if one is unknown, or if a setting leaves nothing to do."""
    for what in ("seeds", "rows", "budget"):
        if not (value := getattr(search, what)) > 0:
            raise SweepError(f"{what} {value}", "leaves nothing to do", "give a positive number")
    names = tuple(str(name) for name in tasks) or task_names("python")
    folders = [folder_name(name) for name in names]
    if twice := next((folder for folder in folders if folders.count(folder) > 1), None):
        raise SweepError("two tasks", f"are called {twice!r}", "name each task once, or rename one of the task files")
    for name in names:
        load_task(name)
    search_config(search.level, search.budget)
    return names

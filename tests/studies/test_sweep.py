"""A sweep end to end on tiny models, killed and resumed at every level; its means, its table and its plot."""

from __future__ import annotations

import importlib
import json
import math
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.cli_cases import assert_refused, run
from support.models import CONTEXT, tiny_gpt2, tiny_tokenizer, untrained
from support.studies_suite_cases import bridge_folder, task_file  # noqa: F401  fixtures

import bridge
from bridge.data.task_pairs import TaskError
from bridge.display.plots import svg
from bridge.display.progress import OnProgress, Phase
from bridge.errors import UserError
from bridge.models.dense import load_dense
from bridge.models.store import CheckpointError
from bridge.recipe import RecipeError
from bridge.studies import search as task_circuit
from bridge.studies import suite, sweep_steps
from bridge.studies.frontier import CouplingPoint, DensePoint, Failure, Frontier, TaskSize, frontier_figure, render_frontier
from bridge.studies.result import Size
from bridge.studies.sweep import plan_points
from bridge.studies.sweep_steps import SweepError
from bridge.training import loop as training

SETTINGS = {"sparse.head_channels": 8, "data.rows": 4}
STEPS = 10


@pytest.fixture
def described(dense_folder: Path, text_file: Path, task_file: Path, bridge_folder: Path) -> dict[str, Any]:  # noqa: F811
    """Two fits of ten steps, and a loaded coupling that does the task."""
    return {
        "model": str(dense_folder), "l0": (0.25, 0.125), "width": (32,), "load": (bridge_folder,), "tasks": (str(task_file),),
        "tokens": STEPS * 4 * CONTEXT, "data": str(text_file), "settings": SETTINGS, "level": 0.9,
        "explains": "sparse", "budget": 0.2, "rows": 4, "device": "cpu",
    }  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each expensive step is begun."""
    counts: Counter[str] = Counter()

    def count(home: Any, name: str) -> None:
        original = getattr(home, name)

        def counting(*arguments: Any, **options: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(home, name, counting)

    for name in ("prepare", "evaluate", "search_dense"):
        count(sweep_steps, name)
    count(suite, "search_task")
    return counts


def sizes(*edges: int, failed: int = 0) -> tuple[TaskSize, ...]:
    done = tuple(TaskSize(f"t{place}", Size(2 * n, n)) for place, n in enumerate(edges))
    return done + tuple(TaskSize(f"f{place}", Size(5_000, 40_000), "unsolved") for place in range(failed))


def point(name: str, width: int, l0: float, ce: float, tasks: tuple[TaskSize, ...], **parts: Any) -> CouplingPoint:
    return CouplingPoint(
        name, parts.pop("loaded", None), width, l0, 100, 1600, ce, parts.pop("ce_dense", 2.5), 0.5, 0.7, 0.8, tasks
    )


def example() -> Frontier:
    points = (
        point("w256-l0-0.0625", 256, 0.0625, 3.5, sizes(900, 400)),
        point("w256-l0-0.0156", 256, 0.015625, 4.2, sizes(80, failed=1)),
        point("w512-l0-0.0625", 512, 0.0625, 3.1, sizes(700, 500)),
        point("a<b&c", 512, 0.3, 3.11, sizes(720, 500), loaded="runs/a<b&c"),
    )
    dense = DensePoint("tiny", "f" * 64, 2.5, sizes(9_000, 7_000))
    return Frontier(points, (Failure("w512-l0-0.5", "it diverged"),), (), dense, 0.9, 1)


# -- end to end ---------------------------------------------------------------------------------------------------------


def test_a_sweep_end_to_end_and_again(described: dict[str, Any], counted: Counter[str], tmp_path: Path) -> None:
    lines: list[str] = []
    result = bridge.sweep(**described, out=tmp_path / "sweep", on_step_end=lines.append)
    assert isinstance(result, bridge.Frontier)
    assert [p.name for p in result.points] == ["w32-l0-0.25", "w32-l0-0.125", "bridge"] and not result.failures
    for p, l0 in zip(result.points, (0.25, 0.125), strict=False):
        folder = tmp_path / "sweep" / p.name
        assert (folder / "coupling.json").is_file() and (folder / "circuits" / "planted" / "circuit.json").is_file()
        assert (
            p.width == 32 and p.loaded is None and p.l0 == pytest.approx(l0, abs=0.01) and p.nonzeros == round(p.l0 * p.weights)
        )
        evaluation = json.loads((folder / "eval.json").read_text())
        assert (p.ce, p.kl, p.recovered_in) == (evaluation["ce_sparse"], evaluation["kl_sparse"], evaluation["recovered_in"])
        assert p.solved == 0 and p.edges == pytest.approx(p.tasks[0].size.edges) and "unsolved" not in p.tasks[0].verdict
    loaded = result.points[-1]
    assert loaded.loaded == str(described["load"][0]) and loaded.solved == 1 and loaded.edges == pytest.approx(4)
    assert not (tmp_path / "sweep" / "bridge" / "coupling.json").exists() and not (described["load"][0] / "eval.json").exists()
    assert result.dense is not None and result.dense.ce == result.points[0].ce_dense and len(result.dense.tasks) == 1
    assert Frontier.load(tmp_path / "sweep") == result
    assert (tmp_path / "sweep" / "sweep.txt").read_text() == f"{result}\n"
    assert any(line.startswith("[1/3] w32-l0-0.25: fit: 640 tokens in") for line in lines), lines
    assert any("[3/3] bridge: circuit 1/1 planted: 6 nodes, 4 edges, behavioural" in line for line in lines), lines
    assert counted == {"prepare": 2, "evaluate": 3, "search_task": 3, "search_dense": 1}

    again = bridge.sweep(**described, out=tmp_path / "sweep", on_step_end=lines.append)
    assert again == result and sum(counted.values()) == 9
    more = bridge.sweep(**{**described, "l0": (0.125, 0.0625)}, out=tmp_path / "sweep")
    assert counted["prepare"] == 3 and [p.name for p in more.points] == ["w32-l0-0.125", "w32-l0-0.0625", "bridge"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_at_every_level(
    described: dict[str, Any], counted: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    seen: list[str] = []

    def killed_at(word: str) -> OnProgress:
        def say(phase: Phase) -> None:
            seen.append(str(phase))
            if word in seen[-1]:
                raise KeyboardInterrupt

        return say

    out = tmp_path / "sweep"
    for word in ("w32-l0-0.25: fit: 50%", "w32-l0-0.125: fit: 30%", "bridge: evaluation", "bridge: planted: edges"):
        with pytest.raises(KeyboardInterrupt):
            bridge.sweep(**described, out=out, progress=killed_at(word))
    assert (out / "w32-l0-0.125" / "coupling.json").is_file() and Frontier.load(out).missing == ("bridge",)
    seen.clear()
    result = bridge.sweep(**described, out=out, progress=killed_at("nothing"))
    assert len(result.points) == 3 and not any("fit:" in text for text in seen)
    # each fit begun twice, the second time where it was; nothing that was finished is begun again
    assert counted == {"prepare": 4, "evaluate": 4, "search_task": 4, "search_dense": 1}
    steps = [json.loads(line)["step"] for line in (out / "w32-l0-0.25" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    whole = bridge.sweep(**described, out=tmp_path / "unkilled")
    assert [p.ce for p in whole.points] == [p.ce for p in result.points]


def test_a_fit_under_way_goes_on(described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    said: list[str] = []

    def say(phase: Phase) -> None:
        said.append(str(phase))
        if "fit: 60%" in said[-1]:
            raise KeyboardInterrupt

    alone = {**described, "l0": (0.25,), "load": ()}
    with pytest.raises(KeyboardInterrupt):
        bridge.sweep(**alone, out=tmp_path / "sweep", progress=say)
    said.clear()
    bridge.sweep(**alone, out=tmp_path / "sweep", progress=lambda phase: said.append(str(phase)))
    fits = [text.partition("fit: ")[2].partition(",")[0] for text in said if "fit: " in text]
    assert fits == ["60%", "70%", "80%", "90%", "100%"]  # the state saved last was that of the fifth step


def test_a_failing_point_is_reported_and_the_others_measured(
    described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = sweep_steps.prepare

    def prepare(model: Any, values: dict[str, Any], **options: Any) -> Any:
        if values["sparsity"]["l0"] == 0.25:
            raise training.FitError("stopped at step 3:\n it diverged")
        return original(model, values, **options)

    monkeypatch.setattr(sweep_steps, "prepare", prepare)
    other = tmp_path / "other"
    replace(untrained(load_dense(tiny_gpt2(seed=7), tokenizer=tiny_tokenizer()))).save_pretrained(other)
    lines: list[str] = []
    loads = (described["load"][0], other, tmp_path / "absent")
    result = bridge.sweep(**{**described, "load": loads}, out=tmp_path / "sweep", on_step_end=lines.append, dense=False)
    assert [p.name for p in result.points] == ["w32-l0-0.125", "bridge"]
    assert [failure.name for failure in result.failures] == ["w32-l0-0.25", "other", "absent"]
    assert result.failures[0].why == "stopped at step 3: it diverged" and "not the one" in result.failures[1].why
    assert "[1/5] w32-l0-0.25: FAILED: stopped at step 3: it diverged" in lines
    assert "FAILED: stopped at step 3: it diverged" in (tmp_path / "sweep" / "sweep.txt").read_text()
    assert result.dense is not None and result.dense.edges is None and result.dense.why_not == "not asked for"
    assert all("\n" not in line for line in lines)


def test_measures_are_not_taken_for_anothers(described: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    only = {**described, "l0": (0.25,), "load": (), "dense": False}
    bridge.sweep(**only, out=out)
    changed = bridge.sweep(**{**only, "tokens": 1280}, out=out)
    assert "another budget.tokens; name another out=" in changed.failures[0].why and not changed.points
    rows = bridge.sweep(**{**only, "rows": 2}, out=out)
    assert "was searched with" in rows.failures[0].why
    bridge.sweep(**only, out=out)
    with pytest.raises(SweepError, match="holds a sweep of level and seeds"):
        bridge.sweep(**{**only, "level": 0.95}, out=out)
    facts = json.loads((out / "w32-l0-0.25" / "point.json").read_text())
    (out / "w32-l0-0.25" / "point.json").write_text(json.dumps({**facts, "sha256": "0"}))
    assert "measures of other weights" in bridge.sweep(**only, out=out).failures[0].why


def test_the_dense_models_own_circuits(
    described: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, counted: Counter[str]
) -> None:
    monkeypatch.setattr(task_circuit, "SOLVED", 0.0)
    monkeypatch.setattr(task_circuit, "TASK_SEARCH", replace(task_circuit.TASK_SEARCH, least_span=-1.0))  # of a random model
    only = {**described, "l0": (), "width": (), "model": None}
    result = bridge.sweep(**only, out=tmp_path / "sweep")
    dense = result.dense
    assert dense is not None and not dense.tasks[0].failed and dense.edges == pytest.approx(dense.tasks[0].size.edges)
    assert dense.tasks[0].size.nodes > 0 and str(dense.tasks[0].size.edges) in str(result).replace(",", "")
    assert bridge.sweep(**only, out=tmp_path / "sweep") == result and counted["search_dense"] == 1


# -- arguments ----------------------------------------------------------------------------------------------------------


def test_the_points_of_a_plan(tmp_path: Path) -> None:
    assert [p.name for p in plan_points((0.1, 0.01), (64, 32))] == ["w64-l0-0.1", "w64-l0-0.01", "w32-l0-0.1", "w32-l0-0.01"]
    assert [p.name for p in plan_points((100_000,))] == ["wauto-l0-100000"]
    recipe = tmp_path / "one.toml"
    recipe.write_text('dense = "x"\n[sparse]\nwidth = 48\n[sparsity]\nl0 = 0.2\n')
    assert [p.name for p in plan_points(recipe=recipe)] == ["w48-l0-0.2"]
    assert [p.name for p in plan_points(load=["runs/a", "runs/b"], recipe=recipe)] == ["a", "b"]
    assert [p.name for p in plan_points(load=["one/a", "two/a"])] == ["one-a", "two-a"]
    for problem, options in (
        ("give l0=", {}),
        ("l0 0.1 is given twice", {"l0": (0.1, 0.1)}),
        ("width 32 is given twice", {"l0": (0.1,), "width": (32, 32)}),
        ("is not a multiple of sparse.head_channels", {"l0": (0.1,), "width": (33,), "settings": {"sparse.head_channels": 8}}),
        ("two points would both be named", {"l0": (0.1, 0.2), "settings": {"sparsity.l0": 0.3}}),
        ("two results would be written to a folder", {"load": ("x/y/a", "z/y/a")}),
        ("two results would be written to a folder", {"load": ("runs/dense-model",)}),
        ("must keep some weights", {"l0": (-1.0,)}),
    ):
        with pytest.raises(UserError, match=problem) as caught:
            plan_points(**options)  # pyright: ignore[reportArgumentType]
        assert "\n" not in str(caught.value)


def test_wrong_arguments_are_refused_before_anything_is_written(described: dict[str, Any], tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "notes.txt").write_text("mine")
    file = tmp_path / "for_while.jsonl"
    file.write_text("")
    for kind, problem, options in (
        (TaskError, "there is no task 'no_such'", {"tasks": ("no_such",)}),
        (SweepError, "two tasks are called 'for_while'", {"tasks": ("for_while", str(file))}),
        (SweepError, "seeds 0", {"seeds": 0}),
        (SweepError, "is not empty and holds no sweep", {"out": full}),
        (SweepError, "the model is missing", {"model": None}),
        (UserError, "nowhere", {"model": str(tmp_path / "nowhere")}),
        (RecipeError, "recipe .* does not exist", {"recipe": tmp_path / "none.toml"}),
    ):
        with pytest.raises(kind, match=problem) as caught:
            bridge.sweep(**{**described, "out": tmp_path / "sweep", **options})
        assert "\n" not in str(caught.value) and not (tmp_path / "sweep").exists()


def test_the_command(described: dict[str, Any], dense_folder: Path, text_file: Path, tmp_path: Path) -> None:
    common = ("--width", 32, "--tokens", 640, "--data", text_file, "--set", "sparse.head_channels=8", "--set", "data.rows=4")
    common += (
        "--explains",
        "sparse",
        "--budget",
        0.1,
        "--rows",
        4,
        "--no-dense",
        "--device",
        "cpu",
        "--tasks",
        *described["tasks"],
    )
    out = tmp_path / "sweep"
    result = run("sweep", "--l0", 0.25, 0.125, dense_folder, *common, "--load", described["load"][0], "--out", out)
    assert result.exit_code == 0, result.output
    assert "[2/3] w32-l0-0.125: evaluation: CE" in result.stdout and "wrote" in result.stdout
    assert [p.name for p in Frontier.load(out).points] == ["w32-l0-0.25", "w32-l0-0.125", "bridge"]
    partly = run("sweep", dense_folder, "--l0", 0.25, *common, "--load", tmp_path / "a", "--out", out)
    assert partly.exit_code == 1 and "1 of 2 points failed; run the same command to try them again" in partly.stderr
    assert "[2/2] a: FAILED:" in partly.stdout and "[1/2] w32-l0-0.25: fit: already done" in partly.stdout
    assert_refused(run("sweep", dense_folder, "--l0", 0.1), "give --out FOLDER")
    assert_refused(run("sweep", dense_folder, "--out", tmp_path / "new"), "give --l0")
    assert_refused(run("sweep", dense_folder, "--l0", 0.1, "--tasks", "x", "--out", tmp_path / "new"), "there is no task 'x'")
    assert_refused(run("sweep", "--l0", 0.1, "--out", tmp_path / "new"), "the model is missing")
    assert not (tmp_path / "new").exists()


# -- values, table, plot ------------------------------------------------------------------------------------------------


def test_the_geometric_mean_counts_failed_tasks_at_full_size() -> None:
    one = point("p", 32, 0.1, 3.0, sizes(10, 200, failed=2))
    literal = math.prod([10, 200, 40_000, 40_000]) ** (1 / 4)
    assert one.edges == pytest.approx(literal) and one.solved == 2
    assert one.nodes == pytest.approx(math.prod([20, 400, 5_000, 5_000]) ** (1 / 4))
    assert point("p", 32, 0.1, 3.0, sizes(0, 100)).edges == pytest.approx(10)  # an empty circuit counts as one edge


def test_saved_and_loaded(tmp_path: Path) -> None:
    frontier = example()
    frontier.save(tmp_path / "new")
    assert Frontier.load(tmp_path / "new") == frontier
    values = json.loads((tmp_path / "new" / "sweep.json").read_text())
    assert values["points"][0]["edges"] == pytest.approx(600) and values["points"][1]["solved"] == 1
    assert values["dense"]["edges"] == pytest.approx(math.sqrt(63e6))
    with pytest.raises(CheckpointError, match="holds no sweep.json"):
        Frontier.load(tmp_path)
    (tmp_path / "new" / "sweep.json").write_text('{"format": 1, "points": 3}')
    with pytest.raises(CheckpointError, match="is no sweep that this version reads"):
        Frontier.load(tmp_path / "new")


def test_the_table() -> None:
    text = render_frontier(example())
    rows = [line.split() for line in text.splitlines()]
    assert rows[1][:6] == ["w256-l0-0.0625", "256", "0.0625", "100", "3.500", "0.750"] and rows[1][6:9] == ["2", "of", "2"]
    assert rows[1][-2:] == ["600", "7,937"] and "w512-l0-0.5     FAILED: it diverged" in text
    assert "different text" not in text
    other = replace(example(), points=(*example().points, point("o", 64, 0.5, 4.0, sizes(3), ce_dense=2.9)))
    assert "the dense model's CE is 2.500 to 2.900" in render_frontier(other)


def test_the_plot_holds_every_point() -> None:
    frontier = example()
    ce, recovered = frontier_figure(frontier).axes
    for axis, value in ((ce, lambda p: p.ce), (recovered, lambda p: p.recovered)):
        assert {text.get_gid(): text.xy for text in axis.texts} == {p.name: (value(p), p.edges) for p in frontier.points}
        rings = {(x, y) for line in axis.lines if line.get_markerfacecolor() == "none" for x, y in line.get_xydata().tolist()}
        assert rings == {(value(p), p.edges) for p in frontier.points if p.loaded is not None}
        assert axis.get_yscale() == "log" and len([line for line in axis.lines if line.get_linestyle() == "--"]) == 2  # dense
    assert recovered.xaxis_inverted() and not ce.xaxis_inverted()
    labels = {text.get_gid(): text.get_text() for text in ce.texts}
    assert labels["w512-l0-0.0625"] == "1/16" and labels["w256-l0-0.0156"] == "1/64 (1/2)"  # solved, where not all are
    assert len({line.get_color() for line in ce.lines if line.get_linestyle() == "-" and len(line.get_xdata())}) == 2  # widths
    text = svg(frontier_figure(frontier))
    ElementTree.fromstring(text)
    assert text == svg(frontier_figure(frontier)) and "1/64 (1/2)" in text
    for some in (replace(frontier, points=(), dense=None), replace(frontier, points=frontier.points[:1], dense=None)):
        ElementTree.fromstring(svg(frontier_figure(some)))


def test_functions_named_like_their_modules_stay_functions() -> None:
    for name, module in (("sweep", "studies.sweep"), ("evaluate", "training.evaluate")):
        home = importlib.import_module(f"bridge.{module}")
        assert getattr(bridge, name) is getattr(home, name) and callable(getattr(bridge, name))

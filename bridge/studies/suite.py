"""Search tasks one after another: write each result when it is found, skip tasks that have one, and compare all at the end.

`out` gets a folder for each task, and `comparison.json`, `comparison.txt` and `cross_ablation.svg`. A killed run resumes where it
stopped: a task's folder is complete once its circuit.json is there. A circuit that is there must come from the same search.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge.circuits.task_search import TASK_SEARCH, NoCircuitError, SearchError, held_out_prompts
from bridge.data.task_pairs import load_task
from bridge.data.task_tokens import Resolved, resolve
from bridge.display.columns import columns
from bridge.display.plots import can_plot
from bridge.display.progress import OnProgress, with_prefix
from bridge.huggingface.site_discovery import DenseModelError
from bridge.models.store import read_json, write_json
from bridge.nodes.description import node_labels
from bridge.studies.compare import Sizes, compare, heat_map, mean_sizes, render_comparison
from bridge.studies.result import NULL_DESCRIPTIONS, Size, TaskResult, render_text, save_failure
from bridge.studies.search import NOT_ASKED, Subjects, UnsolvedError, model_facts, search_task, whole_size


def resolved(subjects: Subjects, name: str) -> Resolved:
    """A task resolved by the coupling's tokenizer. Raises TaskError."""
    coupling = subjects.coupling
    return resolve(load_task(name), coupling.dense.prompts, context=coupling.context)


def folder_name(name: str) -> str:
    """Name of a task's folder: the name of a built-in task, the stem of a task file."""
    return Path(name).stem


def run_task(subjects: Subjects, name: str, *, out: Path | None, progress: OnProgress, width: int = 100, **options: Any) -> str:
    """Search one task, write the result to `out`, and return its text. A null that finds no circuit has failed, as it must.

    Raises UnsolvedError, SearchError or TaskError.
    """
    null, task = options.get("null"), resolved(subjects, name)
    try:
        result = search_task(subjects, task, progress=progress, **options)
    except NoCircuitError as error:
        if null is None:
            raise
        if out is not None:
            save_failure(out, name, str(error), whole_size(subjects.sparse), None, _search_identity(subjects, task, options))
        return f"NULL      {null}: {NULL_DESCRIPTIONS[null]}. It fails, as it must: {error}."
    if out is not None:
        result.save(out)
    return render_text(result, width, node_labels(subjects.coupling, result.circuit.nodes))


def run_suite(
    subjects: Subjects, names: Sequence[str], *, out: Path | None, progress: OnProgress, width: int = 100, **options: Any
) -> Generator[str, None, None]:
    """Search every task; yield a text when each ends, then the comparison's text. Raises TaskError before the first search."""
    results: list[TaskResult] = []
    tasks, failed = {name: resolved(subjects, name) for name in names}, 0
    for name, task in tasks.items():
        folder = None if out is None else out / folder_name(name)
        on_progress = with_prefix(progress, f"{folder_name(name)}: ")
        asked = _search_identity(subjects, task, options)
        if folder is not None and (folder / "circuit.json").is_file():
            facts = read_json(folder / "circuit.json")
            if "failed" not in facts:
                results.append(_check_same_search(TaskResult.load(folder), asked, folder))
                size, verdict = results[-1].facts.size, results[-1].report.verdict
                yield f"task      {name}: {size.nodes:,} nodes, {size.edges:,} edges, {verdict}; already searched"
                continue
            if facts.get("search") == asked:
                failed += 1
                yield f"task      {name}: no circuit in the earlier search ({facts['failed']})"
                continue
        try:
            result = search_task(subjects, task, progress=on_progress, **options)
        except SearchError as error:
            failed += 1
            if folder is not None:
                save_failure(folder, name, str(error), whole_size(subjects.sparse), _whole_dense_size(subjects, options), asked)
            yield f"task      {name}: {'unsolved' if isinstance(error, UnsolvedError) else 'no circuit'}: {error}"
            continue
        results.append(result)
        if folder is not None:
            result.save(folder)
        yield render_text(result, width, node_labels(subjects.coupling, result.circuit.nodes))
    yield _compared(subjects, results, {task.task: task for task in tasks.values()}, failed, out, progress, options)


def _search_identity(subjects: Subjects, task: Resolved, options: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that identify a search: the models, the prompts, the rules, and all settings that a user may choose."""
    return {
        **model_facts(subjects.coupling),
        "level": options.get("level", TASK_SEARCH.opens_at),
        "explains": options.get("explains", "dense"),
        "null": options.get("null"),
        "work": options.get("budget", 1.0),
        "prompts": task.digest,
        "seeds": options.get("seeds", 1),
        "seed": options.get("seed", 0),
        "dense_circuit": options.get("dense", True),
        "nested": options.get("nested", True),
    }


def _check_same_search(result: TaskResult, asked: Mapping[str, Any], folder: Path) -> TaskResult:
    """The result, if it comes from the search that was asked for. Raises SearchError otherwise."""
    facts = result.facts
    there = {
        "level": facts.search.opens_at, "explains": facts.explains, "null": facts.null, "seeds": len(facts.runs),
        "dense_circuit": facts.why_not_dense != NOT_ASKED, "nested": len(facts.levels) > 1, **facts.provenance,
    }  # fmt: skip
    differ = [key for key, value in asked.items() if there.get(key) != value]
    if differ:
        differences = "; ".join(f"{'budget' if key == 'work' else key} {there.get(key)}, not {asked[key]}" for key in differ)
        raise SearchError(f"{str(folder)!r}", f"holds the result of another search ({differences})", "name another ‹out›")
    return result


def _whole_dense_size(subjects: Subjects, options: dict[str, Any]) -> Size | None:
    try:
        return whole_size(subjects.dense) if options.get("dense", True) else None
    except DenseModelError:
        return None


def _compared(
    subjects: Subjects,
    results: Sequence[TaskResult],
    tasks: Mapping[str, Resolved],
    failed: int,
    out: Path | None,
    progress: OnProgress,
    options: dict[str, Any],
) -> str:
    dense = [result.facts.dense for result in results if result.facts.dense is not None]
    sparse = [result.facts.size for result in results]
    sizes = mean_sizes(sparse, dense, failed, whole_size(subjects.sparse), _whole_dense_size(subjects, options))
    lines = [_table(results), "", _means(sizes)]
    if solved := [] if options.get("null") else [result for result in results if result.circuit.nodes]:
        prompts = {task: held_out_prompts(tasks[task]) for task in (result.facts.task for result in solved)}
        comparison = compare(subjects.sparse, solved, prompts, seed=options.get("seed", 0), progress=progress)
        lines += ["", render_comparison(comparison)]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "comparison.json", {**comparison.to_json(), "sizes": asdict(sizes)})
            if can_plot():
                (out / "cross_ablation.svg").write_text(heat_map(comparison), encoding="utf-8")
            (out / "comparison.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if null := options.get("null"):
        passed = [result.facts.task for result in results if result.passed]
        verdict = f"PASSES for {', '.join(passed)}: a failure of the method" if passed else "fails for every task, as it must"
        lines += ["", f"NULL {null}: {NULL_DESCRIPTIONS[null]}. It {verdict}."]
    return "\n".join(lines)


def _table(results: Sequence[TaskResult]) -> str:
    rows: list[tuple[str, ...]] = [
        ("task", "nodes", "edges", "errors", "F", "worst", "matched", "left", "dense nodes", "edges", "ratio", "verdict")
    ]
    for result in results:
        f, opened = result.facts, result.facts.opened
        c = opened.circuit
        beside = ("-",) * 3
        if f.dense is not None:
            beside = f"{f.dense.nodes:,}", f"{f.dense.edges:,}", f"{f.dense.edges / max(1, f.size.edges):.1f}"
        matched = "-" if opened.matched is None else f"{opened.matched:.2f}"
        numbers = f"{c.faithfulness:.2f}", f"{c.supersets_worst:.2f}", matched, f"{c.left:.2f}"
        rows.append((f.task, f"{c.nodes:,}", f"{opened.edges:,}", f"{c.errors}", *numbers, *beside, result.report.verdict))
    return "\n".join(columns(rows, 200))


def _means(sizes: Sizes) -> str:
    text = (
        f"geometric mean over {sizes.tasks} tasks, {sizes.failed} of them failed and counted at full size: "
        f"{sizes.sparse_nodes:,.0f} nodes, {sizes.sparse_edges:,.0f} edges"
    )
    if sizes.dense_edges is None:
        return f"{text}; the dense model's own circuits are not known for all"
    return f"{text}; dense {sizes.dense_edges:,.0f} edges, {sizes.dense_edges / max(1, sizes.sparse_edges):.1f} times as many"

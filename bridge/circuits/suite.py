"""Tasks one after another: each result written as it comes, those there already skipped, all compared at the end.

A folder per task under `out`; beside them `comparison.json`, `comparison.txt` and `cross_ablation.svg`. A run that is killed goes
on where it was: a task's folder is complete once its circuit.json is there, and `parts` in it is what was found on the way. What
is there must be of the same search, or of fewer seeds, to which the others are added; that there was no circuit is taken from the
same search only.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bridge.checkpoint import read_json, write_json
from bridge.circuits.compare import Sizes, compare, heat_map, mean_sizes, render_comparison
from bridge.circuits.masks import Aim, MaskError, NoCircuitError, spread
from bridge.circuits.result import NULLS, Size, TaskResult, render_text, save_failure
from bridge.circuits.search import (
    JUDGED,
    NOT_ASKED,
    WORK,
    Subjects,
    UnsolvedError,
    search_facts,
    search_task,
    whole_size,
)
from bridge.node_page import node_labels
from bridge.tasks.pairs import load_task
from bridge.tasks.tokens import Resolved, resolve
from bridge.wiring import DenseModelError

Say = Callable[[str], None]


def resolved(subjects: Subjects, name: str, seed: int = 0) -> Resolved:
    """A task under the coupling's tokenizer. Raises TaskError."""
    coupling = subjects.coupling
    return resolve(load_task(name, seed=seed), coupling.dense.prompts, context=coupling.context)


def folder_name(name: str) -> str:
    """What a task's folder is called: a built-in task's name, the stem of a file's."""
    return Path(name).stem


def run_task(
    subjects: Subjects, name: str, aim: Aim, *, out: Path | None, progress: Say, width: int = 100, **options: Any
) -> str:
    """One task's search: its text, the result written to `out`. A null that finds nothing has failed, as it must.

    Raises UnsolvedError, MaskError or TaskError.
    """
    null, task = options.get("null"), resolved(subjects, name)
    try:
        result = search_task(subjects, task, aim, parts=_parts(out), progress=progress, **options)
    except NoCircuitError as error:
        if null is None:
            raise
        if out is not None:
            save_failure(out, name, str(error), whole_size(subjects.sparse), None, _asked(subjects, task, aim, options))
        return f"NULL      {null}: {NULLS[null]}. It fails, as it must: {error}."
    if out is not None:
        result.save(out)
    return render_text(result, width, node_labels(subjects.coupling, result.circuit.nodes))


def _parts(folder: Path | None) -> Path | None:
    return None if folder is None else folder / "parts"


def run_suite(
    subjects: Subjects, names: Sequence[str], aim: Aim, *, out: Path | None, progress: Say, width: int = 100, **options: Any
) -> Generator[str, None, None]:
    """Every task's search, a text for each as it ends, then the comparison's. Raises TaskError before any of them."""
    results: list[TaskResult] = []
    tasks, failed = {name: resolved(subjects, name) for name in names}, 0
    for name, task in tasks.items():
        folder = None if out is None else out / folder_name(name)
        where = f"{folder_name(name)}: "

        def say(text: str, where: str = where) -> None:
            progress(f"{where}{text}")

        asked = _asked(subjects, task, aim, options)
        if folder is not None and (folder / "circuit.json").is_file():
            facts = read_json(folder / "circuit.json")
            if "failed" not in facts:
                if (there := _same(TaskResult.load(folder), asked, folder)) is not None:
                    results.append(there)
                    yield f"task      {name}: {_line(there)}; there already"
                    continue
            elif facts.get("search") == asked:
                failed += 1
                yield f"task      {name}: no circuit, found so before ({facts['failed']})"
                continue
        try:
            result = search_task(subjects, task, aim, parts=_parts(folder), progress=say, **options)
        except MaskError as error:
            failed += 1
            if folder is not None:
                save_failure(folder, name, str(error), whole_size(subjects.sparse), _dense_size(subjects, options), asked)
            yield f"task      {name}: {'unsolved' if isinstance(error, UnsolvedError) else 'no circuit'}: {error}"
            continue
        results.append(result)
        if folder is not None:
            result.save(folder)
        yield render_text(result, width, node_labels(subjects.coupling, result.circuit.nodes))
    yield _compared(subjects, results, {task.task: task for task in tasks.values()}, failed, out, progress, options)


def _asked(subjects: Subjects, task: Resolved, aim: Aim, options: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a search from others: the models, the prompts, the rules, and all that a user may choose."""
    return {
        **search_facts(subjects.coupling, aim, options.get("null"), options.get("work", WORK)),
        "prompts": task.digest,
        "seeds": options.get("seeds", 1),
        "seed": options.get("seed", 0),
        "dense_circuit": options.get("dense", True),
    }


def _same(result: TaskResult, asked: Mapping[str, Any], folder: Path) -> TaskResult | None:
    """The result as that of the search asked for; None where that is the same over more seeds. Raises MaskError for another's."""
    facts = result.facts
    there = {
        "objective": facts.objective, "target": facts.target, "null": facts.null, "seeds": len(facts.runs),
        "dense_circuit": facts.why_not_dense != NOT_ASKED[1], **facts.provenance,
    }  # fmt: skip
    differ = [key for key, value in asked.items() if there.get(key) != value]
    if differ == ["seeds"] and len(facts.runs) < asked["seeds"]:
        return None
    if differ:
        said = "; ".join(f"{key} {there.get(key)}, not {asked[key]}" for key in differ)
        raise MaskError(f"{str(folder)!r} holds the result of another search ({said}); name another --out")
    return result


def _line(result: TaskResult) -> str:
    return f"{result.facts.size.nodes:,} nodes, {result.facts.size.edges:,} edges, {result.faithfulness.verdict}"


def _dense_size(subjects: Subjects, options: dict[str, Any]) -> Size | None:
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
    progress: Say,
    options: dict[str, Any],
) -> str:
    dense = [result.facts.dense for result in results if result.facts.dense is not None]
    sparse = [result.facts.size for result in results]
    sizes = mean_sizes(sparse, dense, failed, whole_size(subjects.sparse), _dense_size(subjects, options))
    lines = [_table(results), "", _means(sizes)]
    if solved := [] if options.get("null") else [result for result in results if result.circuit.nodes]:
        prompts = {task: spread(tasks[task].splits["test"].both(), JUDGED) for task in (result.facts.task for result in solved)}
        comparison = compare(subjects.sparse, solved, prompts, seed=options.get("seed", 0), progress=progress)
        lines += ["", render_comparison(comparison)]
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            write_json(out / "comparison.json", {**comparison.to_json(), "sizes": asdict(sizes)})
            (out / "cross_ablation.svg").write_text(heat_map(comparison), encoding="utf-8")
            (out / "comparison.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if null := options.get("null"):
        passed = [result.facts.task for result in results if result.passed]
        verdict = f"PASSES for {', '.join(passed)}: a failure of the method" if passed else "fails for every task, as it must"
        lines += ["", f"NULL {null}: {NULLS[null]}. It {verdict}."]
    return "\n".join(lines)


def _table(results: Sequence[TaskResult]) -> str:
    width = max((len(result.facts.task) for result in results), default=4)
    lines = [
        f"{'task':<{width}}  {'nodes':>7} {'edges':>8}  {'dense nodes':>11} {'edges':>9}  {'ratio':>6}  {'loss':>6}  verdict"
    ]
    for result in results:
        f = result.facts
        nodes, edges = ("-", "-") if f.dense is None else (f"{f.dense.nodes:,}", f"{f.dense.edges:,}")
        ratio = "-" if f.dense is None else f"{f.dense.edges / max(1, f.size.edges):.1f}"
        lines.append(
            f"{f.task:<{width}}  {f.size.nodes:>7,} {f.size.edges:>8,}  {nodes:>11} {edges:>9}  {ratio:>6}  {f.loss:>6.3f}  "
            f"{result.faithfulness.verdict}"
        )
    return "\n".join(lines)


def _means(sizes: Sizes) -> str:
    text = (
        f"geometric mean over {sizes.tasks} tasks, {sizes.failed} of them failed and counted at full size: "
        f"{sizes.sparse_nodes:,.0f} nodes, {sizes.sparse_edges:,.0f} edges"
    )
    if sizes.dense_edges is None:
        return f"{text}; the dense model was not pruned for all"
    return f"{text}; dense {sizes.dense_edges:,.0f} edges, {sizes.dense_edges / max(1, sizes.sparse_edges):.1f} times as many"

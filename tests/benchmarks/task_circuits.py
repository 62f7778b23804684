"""Search the circuits of tasks and print the tables of docs/measurements.md, with the commands that make them.

    python tests/benchmarks/task_circuits.py [--bridge DIR] [--out runs/circuits] [--tasks NAME ...] [--seeds 2]

runs, one after another, the commands whose results are not in `--out` yet (a killed run continues),

    bridge circuit --task T --seeds N --out OUT/dense/T                        every task, with the dense model's own circuit
                                                                               (the first at all levels, others at one)
    bridge circuit --task T --explains sparse --no-dense --out OUT/sparse/T    for the first of the tasks
    bridge circuit --task T --null labels|weights|shuffled --no-dense --out OUT/NULL/T

and prints the circuits at the opening level, all levels, the circuits for the sparse model's own answers, the nulls, and overlap
and cross-ablation of the circuits (heat map in OUT/cross_ablation.svg); then medians as JSON. `--print` searches nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median

from bridge.circuits.task_search import held_out_prompts
from bridge.models.bridges import CoupledModels
from bridge.models.store import CheckpointError, write_json, write_text
from bridge.studies.compare import compare, heat_map, render_comparison
from bridge.studies.result import NULL_DESCRIPTIONS, TaskResult
from bridge.studies.search import Subjects
from bridge.studies.suite import resolved

TASKS = (
    "var_if", "while_return_true", "with_as", "else_elif", "if_equals", "lambda_func", "single_double_quote", "fstring_brace",
    "for_while", "indent_for", "bracket_brace",
)  # fmt: skip
NESTED, FOLLOWED, NULLED = 1, 3, 1  # of the tasks, the first few: all levels, the sparse model's own answers, nulls


def command(*arguments: str) -> None:
    """Run one command of bridge without its output."""
    print("bridge", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "bridge.cli.main", *arguments], stdout=subprocess.DEVNULL, check=False)


def search(options: argparse.Namespace, folder: Path, task: str, *more: str) -> None:
    """Search one circuit, unless it is there."""
    if not (folder / "circuit.json").is_file():
        command("circuit", "--bridge", options.bridge, "--task", task, "--out", str(folder), *more)


def read(folder: Path) -> TaskResult | None:
    """Return a task's result, None if there is none."""
    try:
        return TaskResult.load(folder)
    except CheckpointError:
        return None


def number(x: float | None) -> str:
    """Format a number with two decimals, without a zero before the point."""
    return "-" if x is None else f"{x:.2f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.2f}"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def circuits(found: Iterable[TaskResult]) -> str:
    """Return the table of circuits, with the dense model's own and the measures on held-out prompts."""
    header = (
        "task", "nodes", "errors", "edges", "dense: nodes", "edges", "ratio", "F", "supersets", "worst", "matched", "left",
        "miss", "KL", "seeds", "verdict",
    )  # fmt: skip
    rows = []
    for one in found:
        facts, opened = one.facts, one.facts.opened
        c, dense = opened.circuit, ("-",) * 3
        if facts.dense is not None:
            dense = f"{facts.dense.nodes:,}", f"{facts.dense.edges:,}", f"{facts.dense.edges / max(1, opened.edges):.1f}"
        measured = (
            c.faithfulness, c.supersets_mean, c.supersets_worst, opened.matched, c.left, c.miss, c.kl, one.report["stable"].value,
        )  # fmt: skip
        sizes = f"{c.nodes:,}", c.errors, f"{opened.edges:,}"
        rows.append((facts.task, *sizes, *dense, *map(number, measured), one.report.verdict))
    return table(header, rows)


def levels(found: Iterable[TaskResult]) -> str:
    """Return the table of nodes and errors at every level, for tasks with all levels."""
    rows = [
        (one.facts.task, *(f"{level.circuit.nodes:,} + {level.circuit.errors}" for level in one.facts.levels))
        for one in found
        if len(one.facts.levels) > 1
    ]
    return table(("task", "F .8", ".9", ".95", ".99"), rows)


def nulls(out: Path, tasks: Sequence[str]) -> str:
    """Return the table of the searches that must fail."""
    rows = []
    for null in NULL_DESCRIPTIONS:
        for task in tasks:
            one = read(out / null / task)
            if one is not None:
                rows.append((null, task, "PASSES" if one.passed else "fails", f"{one.facts.size.nodes:,}", one.report.verdict))
            elif (out / null / task / "circuit.json").is_file():
                rows.append((null, task, "fails", "-", "nothing to explain"))
    return table(("null", "task", "", "nodes", "verdict"), rows)


def disentangled(options: argparse.Namespace, results: Sequence[TaskResult]) -> str:
    """Measure every task with every circuit deleted, and the circuits' overlap; return both as text."""
    subjects = Subjects.of(CoupledModels.from_pretrained(options.bridge))
    prompts = {one.facts.task: held_out_prompts(resolved(subjects, one.facts.task)) for one in results}
    comparison = compare(subjects.sparse, results, prompts)
    write_text(options.out / "cross_ablation.svg", heat_map(comparison))
    write_json(options.out / "comparison.json", comparison.to_json())
    return render_comparison(comparison)


def main() -> None:
    """Search what is missing, then print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default="checkpoints/python-bridge-32")
    parser.add_argument("--out", type=Path, default=Path("runs/circuits"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--no-dense", action="store_true", help="without the dense model's own circuits, which take most of the time"
    )
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    out, tasks = options.out, options.tasks
    if not options.only_print:
        more = ["--seeds", str(options.seeds), *(["--no-dense"] if options.no_dense else [])]
        for place, task in enumerate(tasks):
            search(options, out / "dense" / task, task, *more, *([] if place < NESTED else ["--no-nested"]))
        for task in tasks[:FOLLOWED]:
            search(options, out / "sparse" / task, task, "--explains", "sparse", "--no-dense", "--no-nested")
        for null in NULL_DESCRIPTIONS:
            for task in tasks[:NULLED]:
                search(options, out / null / task, task, "--null", null, "--no-dense", "--no-nested")
    found = [one for task in tasks if (one := read(out / "dense" / task)) is not None]
    own = [one for task in tasks if (one := read(out / "sparse" / task)) is not None]
    print(circuits(found), levels(found), "the sparse model's own answers", circuits(own), nulls(out, tasks), sep="\n")
    if found:
        print(disentangled(options, found))
        sizes = [(one.facts.size.nodes, one.facts.size.edges) for one in found]
        print(json.dumps({"tasks": len(found), "nodes": median(n for n, _ in sizes), "edges": median(e for _, e in sizes)}))


if __name__ == "__main__":
    main()

"""The tables of task circuits in docs/measurements.md, from the commands that make them.

    python tests/benchmarks/circuits.py [--bridge DIR] [--out runs/circuits] [--tasks NAME ...] [--seeds 5]

runs, one after another, whatever `--out` does not hold yet (it may be killed and goes on),

    bridge circuit --task T --seeds N --out OUT/superset/T              every task, the dense model's circuit beside it
    bridge circuit --task T --objective paper --no-dense --out OUT/paper/T
    bridge circuit --task T --null labels|weights|shuffled --no-dense --out OUT/NULL/T        for the first of the tasks

and prints five tables: the circuits, the overlap of seeds, the two objectives, the nulls, and what the circuits share and do to
one another when deleted, with the heat map in OUT/cross_ablation.svg (as `bridge circuit --all` ends, which asks for the same
number of seeds everywhere). `--print` searches nothing.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bridge.circuits.masks import spread

from bridge.bridges import Coupling
from bridge.checkpoint import read_json, write_json, write_text
from bridge.studies.compare import compare, heat_map, render_comparison
from bridge.studies.result import NULLS, TaskResult
from bridge.studies.search import JUDGED, Subjects
from bridge.studies.suite import resolved

TASKS = (
    "while_return_true", "var_if", "with_as", "else_elif", "if_equals", "lambda_func", "single_double_quote", "fstring_brace",
    "for_while", "indent_for", "bracket_brace",
)  # fmt: skip
PAPER, NULLED = 8, 1  # of the tasks, the first few


def command(*arguments: str) -> None:
    """One command of bridge's, without what it prints."""
    print("bridge", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "bridge.cli", *arguments], stdout=subprocess.DEVNULL, check=False)


def search(options: argparse.Namespace, folder: Path, task: str, *more: str) -> None:
    """One circuit, unless it is there."""
    if not (folder / "circuit.json").is_file():
        command("circuit", "--bridge", options.bridge, "--task", task, "--out", str(folder), *more)


def read(folder: Path) -> dict[str, Any] | None:
    """A circuit's facts and measures; None where there is none."""
    return read_json(folder / "circuit.json") if (folder / "circuit.json").is_file() else None


def number(x: float | None) -> str:
    """Two digits, without a zero before the point."""
    return "-" if x is None else f"{x:.2f}".replace("0.", ".", 1) if abs(x) < 1 else f"{x:.2f}"


def marked(measure: dict[str, Any]) -> str:
    """A measure's value, bold where it misses its aim."""
    text = number(measure["value"])
    return f"**{text}**" if measure["passed"] is False else text


def value(found: dict[str, Any], name: str) -> str:
    """One of a circuit's measures, as `marked`."""
    return marked(found["faithfulness"][name])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def circuits(found: dict[str, dict[str, Any]]) -> str:
    """Sizes beside the dense model's, and what was measured on held-out prompts."""
    rows, ratios = [], []
    for task, one in sorted(found.items(), key=lambda item: item[1]["facts"]["size"]["edges"]):
        facts = one["facts"]
        before, size, dense_before, dense = (facts[name] for name in ("before", "size", "dense_before", "dense"))
        beside = ("-",) * 4  # of a circuit that was found without the dense model's
        if dense is not None:
            ratios.append((dense_before["edges"] / before["edges"], dense["edges"] / size["edges"]))
            beside = f"{dense_before['edges']:,}", f"{dense['edges']:,}", f"{ratios[-1][0]:.1f}", f"{ratios[-1][1]:.1f}"
        rows.append((
            task, f"{size['nodes']:,}", f"{before['edges']:,}", f"{size['edges']:,}", *beside, value(one, "kl_kept"),
            value(one, "kl_held_out"), value(one, "company_worst"), value(one, "share_kept"), value(one, "loss_without"),
            one["verdict"],
        ))  # fmt: skip
    logs = [[math.log(pair[which]) for pair in ratios] for which in (0, 1)]
    means = [math.exp(sum(log) / max(1, len(log))) for log in logs]
    header = (
        "task", "nodes", "edges between", "edges", "dense: between", "edges", "ratio between", "ratio", "KL (.1)",
        "held out (.25)", "company (.6)", "D kept (.9 to 1.1)", "without it (.69)", "verdict",
    )  # fmt: skip
    return table(header, rows) + f"geometric means of the ratios: {means[0]:.1f} between the nodes, {means[1]:.1f} of the edges\n"


def overlaps(found: dict[str, dict[str, Any]]) -> str:
    """How far the circuits of several seeds are the same."""
    rows = []
    for task, one in found.items():
        if len(one["facts"]["runs"]) > 1:
            sizes = ", ".join(f"{run['nodes']:,}" for run in one["facts"]["runs"])
            stable = one["faithfulness"]["stable"]
            rows.append((task, sizes, f"{stable['value']:.2f}", f"{stable['control']['mean']:.3f}"))
    return table(("task", "nodes by seed", "overlap (.6)", "by chance"), rows)


def objectives(found: dict[str, dict[str, Any]], paper: dict[str, dict[str, Any]]) -> str:
    """The default objective and the paper's, the same tasks and budget."""
    rows = []
    for task, other in paper.items():
        for name, one in (("superset", found.get(task)), ("paper", other)):
            if one is not None:
                size = one["facts"]["size"]
                measures = (value(one, m) for m in ("kl_held_out", "company_mean", "company_worst", "accuracy_kept", "attention"))
                rows.append((task, name, f"{size['nodes']:,}", f"{size['edges']:,}", *measures, one["verdict"]))
    header = ("task", "objective", "nodes", "edges", "KL held out", "company", "its worst", "accuracy", "attention", "verdict")
    return table(header, rows)


def nulls(out: Path, tasks: Sequence[str]) -> str:
    """What became of the searches that must fail."""
    rows = []
    for null in NULLS:
        for task in tasks:
            if (one := read(out / null / task)) is None:
                continue
            if "failed" in one:
                rows.append((null, task, "no circuit", "", one["failed"]))
            else:
                missed = [name for name, measure in one["faithfulness"].items() if measure["passed"] is False]
                nodes = f"{one['facts']['size']['nodes']:,} nodes"
                passed = TaskResult.load(out / null / task).passed
                rows.append((null, task, "PASSES" if passed else "fails", nodes, ", ".join(missed)))
    return table(("null", "task", "", "found", "misses"), rows)


def disentangled(options: argparse.Namespace, tasks: Sequence[str]) -> str:
    """Every circuit deleted, every task measured; and what the circuits share."""
    coupling = Coupling.from_pretrained(options.bridge)
    subjects = Subjects.of(coupling)
    results = [TaskResult.load(options.out / "superset" / task) for task in tasks]
    prompts = {task: spread(resolved(subjects, task).splits["test"].both(), JUDGED) for task in tasks}
    comparison = compare(subjects.sparse, results, prompts)
    write_text(options.out / "cross_ablation.svg", heat_map(comparison))
    write_json(options.out / "comparison.json", comparison.to_json())
    return render_comparison(comparison)


def main() -> None:
    """Search what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default="checkpoints/python-bridge")
    parser.add_argument("--out", type=Path, default=Path("runs/circuits"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    out, tasks = options.out, options.tasks
    if not options.only_print:
        for task in tasks:
            search(options, out / "superset" / task, task, "--seeds", str(options.seeds))
        for task in tasks[:PAPER]:
            search(options, out / "paper" / task, task, "--objective", "paper", "--no-dense")
        for null in NULLS:
            for task in tasks[:NULLED]:
                search(options, out / null / task, task, "--null", null, "--no-dense")
    superset = {task: one for task in tasks if (one := read(out / "superset" / task)) is not None and "failed" not in one}
    paper = {task: one for task in tasks if (one := read(out / "paper" / task)) is not None and "failed" not in one}
    print(circuits(superset), overlaps(superset), objectives(superset, paper), nulls(out, tasks), sep="\n")
    print(disentangled(options, list(superset)))


if __name__ == "__main__":
    main()

"""The uncoupled null with bridges trained as the coupling's own last were, beside those by ridge regression of `bridge nulls`.

Whether bridges that learn to carry changes carry them for a model that has nothing in common with the dense one, too.

    python tests/benchmarks/uncoupled.py --against DIR [--bridge DIR] [--recipe FILE] [--minutes 30] [--out DIR] [--tasks T ...]

The first DIR is the uncoupled model that `bridge nulls --against DIR` has left. In --out: `start`, that model with bridges by
ridge regression; `trained`, from there by the recipe's losses, the sparse model as it is; for every task a circuit of it. It may
be killed and goes on; what is printed is a table, with the coupling's kept null beside it.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from task_circuits import number, table

import bridge
from bridge.cards.evidence import TESTS, gather_task, null_task, rules
from bridge.cards.nulls import BUDGET_SHARE
from bridge.cards.task_circuit import TaskCircuit
from bridge.models.bridges import Coupling
from bridge.studies.result import TaskResult
from bridge.studies.search import Subjects, search_task
from bridge.studies.suite import resolved
from bridge.verdicts.null_couplings import MOST_TOKENS, ridge_bridges
from bridge.verdicts.null_table import stored_task_nulls


def trained(coupling: Coupling, options: argparse.Namespace) -> Coupling:
    """The uncoupled model with bridges that have learnt."""
    start, end = options.out / "start", options.out / "trained"
    other = Coupling.from_pretrained(options.against, dense=coupling.dense)
    if not (start / "coupling.json").is_file():
        assert coupling.reference_bt is not None
        fitted = ridge_bridges(replace(coupling, sparse=other.sparse), coupling.reference_bt)
        replace(other, bridges=fitted).save_pretrained(start)
    if not (end / "coupling.json").is_file():
        shape = {f"sparse.{key}": value for key, value in other.recipe.sparse.model_dump().items()}
        settings = {**shape, "sparse.start": str(start), "sparsity.embed_l0": other.recipe.sparsity.embed_l0}
        bridge.fit(
            coupling.dense.name, other.recipe.sparsity.l0, recipe=options.recipe, minutes=options.minutes, tokens=MOST_TOKENS,
            settings=settings, out=end, resume=end.exists(),
        )  # fmt: skip
    return Coupling.from_pretrained(end, dense=coupling.dense)


def main() -> None:
    """Run what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default="checkpoints/python-bridge")
    parser.add_argument("--recipe", default="recipes/python-bridge.toml")
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/uncoupled-bridges"))
    parser.add_argument("--tasks", nargs="+", default=["var_if", "if_equals", "else_elif"])
    parser.add_argument("--minutes", type=float, default=30)
    options = parser.parse_args()
    coupling = Coupling.from_pretrained(options.bridge)
    subjects = Subjects.of(trained(coupling, options))
    kept = {null.name: null for null in stored_task_nulls(coupling, rules())[0] or ()}
    ridge = {task.task: task for task in kept["uncoupled"].tasks} if "uncoupled" in kept else {}
    rows: list[tuple[str, ...]] = []
    for name in options.tasks:
        task, folder = resolved(subjects, name), options.out / name
        if not (folder / "circuit.json").is_file():
            search_task(subjects, task, dense=False, gated=False, budget=BUDGET_SHARE, progress=print).save(folder)
        circuit = TaskCircuit.of(TaskResult.load(folder), subjects.coupling)
        report = gather_task(subjects.coupling, circuit, task, progress=print)
        for bridges, found in (("ridge regression", ridge.get(name)), ("trained", null_task(name, report, 0.0))):
            if found is not None:
                cells = (f"{number(found.values[test])}{'' if found.holds[test] else ' fails'}" for test in TESTS)
                rows.append((name, bridges, *cells, "PASSES" if found.passed else "fails"))
    print(table(("task", "bridges", *TESTS, "all"), rows))


if __name__ == "__main__":
    main()

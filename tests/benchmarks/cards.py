"""Make the cards of tasks and print them as a table, with the commands that make them.

    python tests/benchmarks/cards.py [--bridge DIR] [--out runs/circuits/dense] [--tasks NAME ...] [--seeds 2]

takes the circuits that `task_circuits.py` left in `--out` and runs, one after another, the commands whose results are not there
yet (a killed run continues),

    bridge circuit --task T --seeds N --no-dense --out OUT/T
    bridge card --circuit OUT/T --json OUT/T/card.json

and prints a table: the circuit, its measures on held-out prompts in the sparse model, and the tests on the dense one. The nulls
come from `bridge nulls DIR --circuits OUT`; a card shows those that exist when it is made. `--print` runs nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from task_circuits import command, number, search, table

from bridge.cards.card import Card
from bridge.models.store import read_json
from bridge.studies.result import TaskResult

TASKS = (
    "if_equals", "with_as", "var_if", "fstring_brace", "indent_for", "lambda_func", "single_double_quote", "else_elif",
    "bracket_brace", "while_return_true", "for_while",
)  # fmt: skip
HEADER = (
    "task", "nodes", "edges", "F held out", "supersets (worst)", "left", "overlap of seeds",
    "patching, of all nodes' (rotated; matched)", "dense over sparse loss (all nodes)", "substitution (all nodes; matched)",
    "complement", "rank correlation", "R^2 on 240 (bigram)", "sign agreement", "verdict",
)  # fmt: skip


def row(circuit: TaskResult, card: Card) -> tuple[str, ...]:
    """Return a task's row; values that miss their bounds are bold."""

    def of(key: str, *beside: float | None) -> str:
        measure = card.report[key]
        text = number(measure.value)
        text = f"**{text}**" if measure.passed is False else text
        shown = "; ".join(map(number, beside))
        return f"{text} ({shown})" if shown else text

    def control(key: str) -> float | None:
        found = card.report[key].control
        return None if found is None else found.mean

    opened = circuit.facts.opened.circuit
    return (
        card.task, f"{opened.nodes:,}", f"{circuit.facts.opened.edges:,}", number(opened.faithfulness),
        f"{number(opened.supersets_mean)} ({number(opened.supersets_worst)})", number(opened.left),
        number(circuit.report["stable"].value), of("patching", control("patching_rotated"), control("patching")),
        of("dense_ratio", card.report["dense_ratio"].ceiling),
        of("substitution", card.report["substitution"].ceiling, control("substitution")), of("complement"),
        of("profile"), of("prediction", control("prediction")), of("signs"), card.report.verdict,
    )  # fmt: skip


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default="checkpoints/python-bridge-32")
    parser.add_argument("--out", type=Path, default=Path("runs/circuits/dense"))
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", default="2")
    parser.add_argument("--print", action="store_true", dest="only_print")
    options = parser.parse_args()
    rows = []
    for task in options.tasks:
        folder = options.out / task
        circuit, card = folder / "circuit.json", folder / "card.json"
        if not options.only_print:
            search(options, folder, task, "--seeds", options.seeds, "--no-dense")
            if circuit.is_file() and not card.is_file():
                command("card", "--bridge", options.bridge, "--circuit", str(folder), "--json", str(card))
        if card.is_file():
            rows.append(row(TaskResult.load(folder), Card.from_json(read_json(card))))
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()

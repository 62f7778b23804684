"""A walk through bridge, cell by cell: run it whole, or open it as a notebook (VS Code, Spyder and jupytext read `# %%`).

    python recipes/example.py

It uses a coupling that ships; the environment variables `EXAMPLE_BRIDGE`, `EXAMPLE_PROMPT` and `EXAMPLE_TASK` choose others, and
`EXAMPLE_OUT` the folder for its files. In a notebook, the result at the end of a cell is shown as a small page.
"""
# pyright: reportUnusedExpression=false

# %% A coupling: a dense model, a weight-sparse model trained to follow it, and a bridge between them at every sublayer.
import os
from pathlib import Path

import networkx as nx

import bridge

shipped = Path(__file__).resolve().parent.parent / "checkpoints" / "python-bridge-32"
out = Path(os.environ.get("EXAMPLE_OUT", "runs/example"))
coupling = bridge.load(os.environ.get("EXAMPLE_BRIDGE", shipped))
print(f"{coupling.dense.name}: {coupling.n_sites} sites, {coupling.sparse.achieved_l0():.1%} of the sparse weights nonzero")

# %% How faithful is the sparse model on held-out text? The evaluation is by site, in both directions.
assert coupling.reference_bt is not None
evaluation = coupling.evaluate(coupling.reference_bt[:16])
print(f"\nKL of sparse to dense {evaluation.kl_sparse:.2f} nats; CE recovered {evaluation.recovered_in:.2f} in, out ", end="")
print(f"{evaluation.recovered_out:.2f}")
evaluation

# %% Why does the dense model give its answer? Nested circuits of the sparse model that give the same one, with the evidence.
explanation = coupling.explain(os.environ.get("EXAMPLE_PROMPT", "def read(self):\n    while True"))
explanation

# %% The verdict follows from the measures and their controls by a table of rules, and cannot be set.
print(f"\n{explanation.report.verdict.upper()}.", *explanation.report.reasons)
for measure in explanation.report.measures:
    value = "-" if measure.value is None else f"{measure.value:.3f}"
    beside = "none" if measure.control is None else f"{measure.control.what} {measure.control.mean:.3f}"
    print(f"  {measure.name:<42} {value:>8}  control: {beside}; criterion: {measure.criterion or 'none'}")

# %% Nested circuits: from few nodes that keep most of the answer to many that keep the whole distribution. One is drawn.
# F is normalised faithfulness; errors are the parts of the dense residual that the sparse model misses.
for circuit in explanation.nested:
    level = "all" if circuit.asked is None else f"F {circuit.asked:g}"
    print(f"  {level:<7} {circuit.nodes:>7,} nodes, {circuit.errors} errors: F {circuit.faithfulness:.3f}, KL {circuit.kl:.3f}")

# %% Its nodes in groups by the job they do, and the loss of the answer's log-odds when each group is ablated, in both models.
for group in sorted(explanation.groups, key=lambda group: -abs(group.effect))[:8]:
    dense = "-" if group.dense_effect is None else f"{group.dense_effect:+.2f}"
    print(f"  {group.effect:+.2f} {dense:>6}  {group.name} ({len(group.nodes)} nodes)")

# %% The circuit as a networkx graph, for questions about graphs: which tokens does the answer depend on?
graph = bridge.to_networkx(explanation)
for answer in (name for name, kind in graph.nodes(data="kind") if kind == "answer"):
    behind = nx.ancestors(graph, answer)
    read = sorted({graph.nodes[name]["position"] for name in behind})
    print(f"\n{len(behind)} nodes lead to {answer}, at", *(repr(explanation.tokens[position].text) for position in read))

# %% The circuit of a task: the channels that solve it on many prompts, judged on prompts that the search has not seen.
# The search is the same. With `dense` at its default True, the dense model's own circuit at the same level is searched too; with
# `budget` at its default 1, the circuit is smaller.
result = None
try:
    result = coupling.circuit(os.environ.get("EXAMPLE_TASK", "while_return_true"), dense=False, budget=0.5)
    print(f"\n{result.facts.task}: {result.facts.size.nodes} of {result.facts.whole.nodes} nodes, {result.report.verdict}")
except bridge.UserError as error:  # a task that the sparse model does not solve has no circuit
    print(f"\n{error}")
result

# %% Export it for other programs, each in its own format; its JSON has the whole explanation and can be loaded again.
out.mkdir(parents=True, exist_ok=True)
drawn = bridge.export(explanation, out / "circuit-tracer", "circuit-tracer")
print(f"\n{drawn.file}: {drawn.nodes} nodes, {drawn.links} links; to see it:", *drawn.next, sep="\n  ")
bridge.export(explanation, out / "explanation.graphml", "graphml")

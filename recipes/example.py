"""A walk through bridge, cell by cell: run it whole, or open it as a notebook (VS Code, Spyder and jupytext read `# %%`).

    python recipes/example.py

It takes the coupling that ships; `EXAMPLE_BRIDGE`, `EXAMPLE_PROMPT` and `EXAMPLE_TASK` in the environment name others, and
`EXAMPLE_OUT` a folder for what it leaves. In a notebook the result that a cell ends with shows as a small page of its own.
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
print(f"{coupling.dense.name}: {coupling.n_sites} sites, {coupling.sparse.achieved_l0():.1%} of the sparse weights not 0")

# %% How faithful the sparse model is on held-out text: site by site, in both directions.
assert coupling.reference_bt is not None
evaluation = coupling.evaluate(coupling.reference_bt[:16])
print(f"\nKL of sparse to dense {evaluation.kl_sparse:.2f} nats; CE recovered {evaluation.recovered_in:.2f} in, out ", end="")
print(f"{evaluation.recovered_out:.2f}")
evaluation

# %% Why does the dense model say what it says? Nested circuits of the sparse model that follow it, with the evidence on them.
explanation = coupling.explain(os.environ.get("EXAMPLE_PROMPT", "def read(self):\n    while True"))
explanation

# %% The verdict follows from the measures by a table of rules, each beside its control, and cannot be set.
print(f"\n{explanation.report.verdict.upper()}.", *explanation.report.reasons)
for measure in explanation.report.measures:
    value = "-" if measure.value is None else f"{measure.value:.3f}"
    beside = "nothing" if measure.control is None else f"{measure.control.what} {measure.control.mean:.3f}"
    print(f"  {measure.name:<42} {value:>8}  beside {beside}; asked: {measure.criterion or 'nothing'}")

# %% Nested circuits, from few nodes that keep most of the answer to many that keep the whole distribution; one is drawn.
# F is normalised faithfulness; errors, where there are any, are what the sparse model misses of the dense one.
for circuit in explanation.nested:
    level = "all" if circuit.asked is None else f"F {circuit.asked:g}"
    print(f"  {level:<7} {circuit.nodes:>7,} nodes, {circuit.errors} errors: F {circuit.faithfulness:.3f}, KL {circuit.kl:.3f}")

# %% Its nodes by the job they do, and what the answer's log-odds lose without each, in the sparse model and in the dense one.
for group in sorted(explanation.groups, key=lambda group: -abs(group.effect))[:8]:
    dense = "-" if group.dense_effect is None else f"{group.dense_effect:+.2f}"
    print(f"  {group.effect:+.2f} {dense:>6}  {group.name} ({len(group.nodes)} nodes)")

# %% The same as a networkx graph, for what one likes to ask of graphs: which tokens does the answer rest on?
graph = bridge.to_networkx(explanation)
for answer in (name for name, kind in graph.nodes(data="kind") if kind == "answer"):
    behind = nx.ancestors(graph, answer)
    read = sorted({graph.nodes[name]["position"] for name in behind})
    print(f"\n{len(behind)} nodes lead to {answer}, at", *(repr(explanation.tokens[position].text) for position in read))

# %% Not one prompt but a task: the channels that do it on many, judged on prompts that the search has not seen.
# The search is the same. With `dense` left at True, the dense model's own circuit at the same level is found beside it; with
# `work` left alone, a smaller one.
result = None
try:
    result = coupling.circuit(os.environ.get("EXAMPLE_TASK", "while_return_true"), dense=False, budget=0.5)
    print(f"\n{result.facts.task}: {result.facts.size.nodes} of {result.facts.whole.nodes} nodes, {result.report.verdict}")
except bridge.UserError as error:  # what the sparse model does not do has no circuit
    print(f"\n{error}")
result

# %% Keep it. The JSON is the whole explanation and comes back as it was; other programs draw it from formats of their own.
out.mkdir(parents=True, exist_ok=True)
drawn = bridge.export(explanation, out / "circuit-tracer", "circuit-tracer")
print(f"\n{drawn.file}: {drawn.nodes} nodes, {drawn.links} links; to see it:", *drawn.next, sep="\n  ")
bridge.export(explanation, out / "explanation.graphml", "graphml")

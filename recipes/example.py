"""A walk through bridge, cell by cell: run it whole, or open it as a notebook (VS Code, Spyder and jupytext read `# %%`).

    python recipes/example.py

It takes the coupling that ships; `EXAMPLE_BRIDGE`, `EXAMPLE_PROMPT` and `EXAMPLE_TASK` in the environment name others, and
`EXAMPLE_OUT` a folder for what it leaves. In a notebook the result that a cell ends with shows as a small page of its own.
"""
# pyright: reportUnusedExpression=false

# %% A coupling: a dense model, a weight-sparse model trained to stand for it, and a bridge between them at every sublayer.
import os
from pathlib import Path

import networkx as nx

import bridge

shipped = Path(__file__).resolve().parent.parent / "checkpoints" / "python-bridge"
out = Path(os.environ.get("EXAMPLE_OUT", "runs/example"))
coupling = bridge.load(os.environ.get("EXAMPLE_BRIDGE", shipped))
print(f"{coupling.dense.name}: {coupling.n_sites} sites, {coupling.sparse.achieved_l0():.1%} of the sparse weights not 0")

# %% How good a stand-in it is, on text that neither was trained on: site by site, in both directions.
assert coupling.reference_bt is not None
evaluation = coupling.evaluate(coupling.reference_bt[:16])
print(f"\nKL of sparse to dense {evaluation.kl_sparse:.2f} nats; CE recovered {evaluation.recovered_in:.2f} in, out ", end="")
print(f"{evaluation.recovered_out:.2f}")
evaluation

# %% Why does the dense model say what it says? A circuit of the sparse model, with what speaks for it and what against.
explanation = coupling.explain(os.environ.get("EXAMPLE_PROMPT", "def read(self):\n    while True"))
explanation

# %% The verdict follows from the measures, each beside its control, and cannot be set.
print(f"\n{explanation.faithfulness.verdict.upper()}.", *explanation.faithfulness.reasons)
for measure in explanation.faithfulness.measures:
    value = "-" if measure.value is None else f"{measure.value:.3f}"
    beside = "nothing" if measure.control is None else f"{measure.control.what} {measure.control.mean:.3f}"
    print(f"  {measure.name:<30} {value:>8}  beside {beside}; asked: {measure.aim}")

# %% The circuit: channels of the sparse model at tokens of the prompt, and what deleting one of them takes from the answer.
strongest = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))
print(f"\n{len(explanation.nodes)} nodes; the largest effects on D, the logit of the answer less that of the next best:")
for node in strongest[:8]:
    token = explanation.tokens[node.position].text
    print(f"  {node.name:<16} at {token!r:<12} {node.activation:+.2f}; D owes it {node.effect or 0:+.2f}")

# %% The same as a networkx graph, for what one likes to ask of graphs: which tokens does the answer rest on?
graph = bridge.to_networkx(explanation)
for answer in (name for name, kind in graph.nodes(data="kind") if kind == "answer"):
    behind = nx.ancestors(graph, answer)
    read = sorted({graph.nodes[name]["position"] for name in behind})
    print(f"\n{len(behind)} nodes lead to {answer}, at", *(repr(explanation.tokens[position].text) for position in read))

# %% Not one prompt but a task: the circuit that does it on many, judged on prompts that the search has not seen. With `dense`
# left at True, the dense model's own circuit at the same loss is found beside it; with `work` left alone, a smaller one.
result = None
try:
    result = coupling.circuit(os.environ.get("EXAMPLE_TASK", "while_return_true"), dense=False, work=1e11)
    print(f"\n{result.facts.task}: {result.facts.size.nodes} of {result.facts.whole.nodes} nodes, {result.faithfulness.verdict}")
except bridge.UserError as error:  # what the sparse model does not do has no circuit
    print(f"\n{error}")
result

# %% Keep it. The JSON is the whole explanation and comes back as it was; other programs draw it from formats of their own.
out.mkdir(parents=True, exist_ok=True)
drawn = bridge.export(explanation, out / "circuit-tracer", "circuit-tracer")
print(f"\n{drawn.file}: {drawn.nodes} nodes, {drawn.links} links; to see it:", *drawn.next, sep="\n  ")
bridge.export(explanation, out / "explanation.graphml", "graphml")

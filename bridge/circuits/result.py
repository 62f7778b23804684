"""What a search for a task's circuit leaves: the circuit, what was measured about it, and both saved and loaded exactly.

A folder holds `circuit.json` with everything a person reads, and a safetensors file with masks, means, edges and inclusion
frequencies (`checkpoint.write_folder`). A task that could not be searched leaves a `circuit.json` alone, which says why; in means
over tasks it counts at the model's full size.

Shape legend: n nodes of a location, e edges in one row.
"""

from __future__ import annotations

import json
import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from bridge import display
from bridge.checkpoint import CheckpointError, read_folder, read_json, write_folder, write_json
from bridge.circuit import Circuit, Edge, Node
from bridge.circuits.judge import TaskFaithfulness
from bridge.circuits.masks import Objective
from bridge.schema import ATTENTION_KINDS, MLP_KINDS
from bridge.sparse import Location
from bridge.tasks.tokens import Scores
from bridge.validate import EVIDENCE, Measure, evidence

FORMAT = 1
Null = Literal["labels", "weights", "shuffled"]
NULLS: dict[Null, str] = {
    "labels": "every answer token replaced by one drawn at random, the same one everywhere",
    "weights": "every matrix of the sparse model with its entries permuted",
    "shuffled": "the names that are right and wrong answers dealt out anew among the prompts",
}
LABELLED = 24  # nodes of which the text says what they do
_EDGE_KINDS = ("weight", "value")


@dataclass(frozen=True)
class Size:
    """How large something is: nodes, and edges as nonzero weights between them."""

    nodes: int
    edges: int


@dataclass(frozen=True)
class SeedRun:
    """What one seed found: nodes, their loss on prompts held out of both splits, steps of the masks, whether deletions ended."""

    seed: int
    nodes: int
    loss: float
    steps: int
    complete: bool


@dataclass(frozen=True)
class TaskFacts:
    """A task's circuit in numbers.

    whole and dense_whole are the sizes of the models, before what the nodes alone left, size the circuit's; entries counts
    embedding, unembedding and bigram weights that it reads, which are no edges; dense_before and dense are the same of the dense
    model's circuit at the same bound, None where that was not searched. The losses are those of the search, per prompt, in nats.
    """

    task: str
    language: str
    drop_rate: float
    objective: Objective
    target: float
    null: Null | None
    sparse_scores: Scores
    dense_scores: Scores
    runs: tuple[SeedRun, ...]
    whole: Size
    before: Size
    size: Size
    entries: Mapping[str, int]
    loss: float
    edges_complete: bool
    dense_whole: Size | None
    dense_before: Size | None
    dense: Size | None
    dense_loss: float | None
    dense_complete: bool | None
    why_not_dense: str
    provenance: Mapping[str, str | float | int | None]
    seconds: float


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A task's circuit, the share of seeds that kept each node (inclusion_n), its measures and its numbers."""

    circuit: Circuit
    inclusion: Mapping[Location, Tensor]
    faithfulness: TaskFaithfulness
    facts: TaskFacts

    @property
    def passed(self) -> bool:
        """Whether the circuit passes for an explanation, be the task done by the whole model or not; a null must not."""
        return all(measure.passed is True for measure in self.faithfulness.needed)

    def to_json(self) -> dict[str, Any]:
        """Everything but the masks and means as plain JSON values, the verdict written out."""
        return json.loads(
            json.dumps(
                {
                    "format": FORMAT,
                    "facts": asdict(self.facts),
                    "faithfulness": asdict(self.faithfulness),
                    "verdict": self.faithfulness.verdict,
                    "reasons": list(self.faithfulness.reasons),
                    "nodes": [str(node) for node in self.circuit.nodes],
                    "losses": dict(self.circuit.losses),
                },
                allow_nan=False,
            )
        )

    def save(self, path: str | Path) -> None:
        """Write the result to a folder. Raises CheckpointError where that fails; nothing is half-written."""
        tensors = {f"inclusion.{at}": share_n for at, share_n in self.inclusion.items()}
        write_folder(path, "circuit", tensors | circuit_tensors(self.circuit), self.to_json())

    @staticmethod
    def load(path: str | Path) -> TaskResult:
        """The result that `save` wrote. Raises CheckpointError where it is missing, damaged, or of a task that has no circuit."""
        if (Path(path) / "circuit.json").is_file() and "failed" in (facts := read_json(Path(path) / "circuit.json")):
            raise CheckpointError(f"{str(path)!r} holds no circuit: {facts['failed']}")
        tensors, facts = read_folder(path, "circuit")
        try:
            task_facts = _FACTS.validate_python(facts["facts"])
            circuit = circuit_of(task_facts.task, tensors, facts["losses"])
            measures = {f.name: Measure(**_measure(facts["faithfulness"][f.name])) for f in fields(TaskFaithfulness)}
        except (KeyError, TypeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise CheckpointError(
                f"{str(path)!r} is no circuit that this version of bridge reads ({first}); search again"
            ) from None
        return TaskResult(circuit, _by_location("inclusion", tensors), TaskFaithfulness(**measures), task_facts)

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        facts, faith = self.facts, self.faithfulness
        sizes = f"{facts.size.nodes:,} of {facts.whole.nodes:,} nodes, {facts.size.edges:,} edges; loss {facts.loss:.3f} nats"
        table = display.table(("", *EVIDENCE[1:]), (measure.row(_number) for measure in faith.measures))
        return display.card(
            f"circuit of {facts.task}",
            f"{display.verdict(faith.verdict)} {display.text(' '.join(faith.reasons))}",
            display.text(sizes),
            display.fold("evidence", table),
            display.fold("everything, as text", display.text(str(self))),
        )


_FACTS = TypeAdapter(TaskFacts)


def _measure(values: dict[str, Any]) -> dict[str, Any]:
    from bridge.validate import Control

    return {**values, "control": None if values["control"] is None else Control(**values["control"])}


def circuit_tensors(circuit: Circuit) -> dict[str, Tensor]:
    """A task's circuit as named tensors: masks, means, and edges by the locations they connect."""
    tensors = {f"kept.{at}": kept_1n[0] for at, kept_1n in circuit.kept.items()}
    tensors |= {f"means.{at}": mean_n for at, mean_n in circuit.means.items()}
    if circuit.edges is None:
        return tensors
    places = {location: place for place, location in enumerate(circuit.kept)}
    rows = [
        [places[e.source.location], e.source.index, places[e.target.location], e.target.index, _EDGE_KINDS.index(e.kind)]
        for e in circuit.edges
    ]
    tensors["edges.ends"] = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    tensors["edges.values"] = torch.tensor([[e.weight, e.effect] for e in circuit.edges], dtype=torch.float64).view(-1, 2)
    return tensors


def circuit_of(task: str, tensors: Mapping[str, Tensor], losses: Mapping[str, float]) -> Circuit:
    """The circuit that `circuit_tensors` wrote. Raises KeyError or ValueError where something is missing."""
    kept = {at: kept_n[None] for at, kept_n in _by_location("kept", tensors).items()}
    edges = None
    if "edges.ends" in tensors:
        places = list(kept)
        edges = tuple(
            Edge(Node(places[a], i), Node(places[b], j), _EDGE_KINDS[kind], weight, effect)
            for (a, i, b, j, kind), (weight, effect) in zip(
                tensors["edges.ends"].tolist(), tensors["edges.values"].tolist(), strict=True
            )
        )
    return Circuit(task, kept, _by_location("means", tensors), dict(losses), edges)


def _by_location(prefix: str, tensors: Mapping[str, Tensor]) -> dict[Location, Tensor]:
    """The tensors of a prefix by location, in the order of the computation."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            layer, kind = name.removeprefix(f"{prefix}.").split(".", 1)
            found[Location(int(layer), kind)] = tensor
    order = ("embedding", *ATTENTION_KINDS[:-1], "attended", ATTENTION_KINDS[-1], *MLP_KINDS)
    return dict(sorted(found.items(), key=lambda item: (item[0].layer, order.index(item[0].kind))))


def save_failure(path: Path, task: str, why: str, full: Size, dense: Size | None, search: Mapping[str, Any]) -> None:
    """Write that a task has no circuit, why, and what search has found none."""
    path.mkdir(parents=True, exist_ok=True)
    sizes = {"whole": asdict(full), "dense_whole": None if dense is None else asdict(dense)}
    write_json(path / "circuit.json", {"format": FORMAT, "task": task, "failed": why, "search": dict(search), **sizes})


def render_text(result: TaskResult, width: int = 100, labels: Mapping[str, str] | None = None) -> str:
    """The result as a person reads it; labels are a few words on nodes, by name."""
    facts, faith = result.facts, result.faithfulness
    lines = [
        f"task      {facts.task} ({facts.language}; {facts.sparse_scores.pairs} held-out pairs, {facts.drop_rate:.0%} dropped)",
        f"solved    dense {facts.dense_scores.accuracy:.1%} (two-way loss {facts.dense_scores.loss:.3f}), "
        f"sparse {facts.sparse_scores.accuracy:.1%} ({facts.sparse_scores.loss:.3f})",
        f"search    objective {facts.objective}, loss at most {facts.target:g} nats; "
        + "; ".join(
            f"seed {r.seed}: {r.nodes:,} nodes, {r.steps} steps{'' if r.complete else ', cut short'}" for r in facts.runs
        ),
    ]
    if facts.null is not None:
        passes = "PASSES, which is a failure of the method" if result.passed else "fails, as it must"
        lines.append(f"NULL      {facts.null}: {NULLS[facts.null]}. It {passes}.")
    lines += [
        "",
        *textwrap.wrap(f"VERDICT   {faith.verdict.upper()}. {' '.join(faith.reasons)}", width, subsequent_indent=" " * 10),
    ]
    edges = f"{facts.size.edges:,} edges (of {facts.before.edges:,} between its nodes)"
    lines += ["", f"CIRCUIT   {facts.size.nodes:,} of {facts.whole.nodes:,} nodes; {edges}; loss {facts.loss:.3f}"]
    entries = ", ".join(f"{count:,} {name}" for name, count in facts.entries.items())
    lines.append(f"          beside the edges: {entries} entries")
    if facts.dense is not None and facts.dense_before is not None and facts.dense_whole is not None:
        lines += [
            f"DENSE     {facts.dense.nodes:,} of {facts.dense_whole.nodes:,} nodes; {facts.dense.edges:,} edges (of "
            f"{facts.dense_before.edges:,} between its nodes); loss {facts.dense_loss:.3f}"
            + ("" if facts.dense_complete else "; deletions cut short"),
            f"          {facts.dense.edges / max(1, facts.size.edges):.1f} times the edges, "
            f"{facts.dense_before.edges / max(1, facts.before.edges):.1f} times those between the nodes",
        ]
    else:
        lines.append(f"DENSE     not pruned: {facts.why_not_dense}")
    nodes = [*_nodes(result, width), *_labelled(result, labels or {}, width)]
    return "\n".join([*lines, "", *nodes, "", *evidence(faith.measures, width, _number), "", f"{facts.seconds:.0f} s"])


def _nodes(result: TaskResult, width: int) -> list[str]:
    """The nodes by location, with their inclusion where seeds differ."""
    several = len(result.facts.runs) > 1
    lines = [f"NODES{'' if not several else ' and the share of seeds that kept each'}"]
    for location, kept_1n in result.circuit.kept.items():
        index_k = kept_1n[0].nonzero().flatten().tolist()
        if not index_k:
            continue
        share_n = result.inclusion[location]
        names = [f"{index} {share_n[index]:.0%}" if several else str(index) for index in index_k]
        text = f"  {f'L{location.layer}.{location.kind}':<13} {len(names):>4}: {', '.join(names)}"
        lines.append(textwrap.shorten(text.strip(), 2 * width, placeholder=" ...").join(("  ", "")))
    return lines


def _labelled(result: TaskResult, labels: Mapping[str, str], width: int) -> list[str]:
    """The nodes with labels whose edges have the largest effects in sum, and what is said of them."""
    effect: defaultdict[str, float] = defaultdict(float)
    for edge in result.circuit.edges or ():
        for end in (edge.source, edge.target):
            effect[end.name] += abs(edge.effect)
    known = [node.name for node in result.circuit.nodes if node.name in labels]
    told = sorted(known, key=lambda name: -effect[name])[:LABELLED]
    lines = [f"  {name:<15} {labels[name]}"[:width] for name in told]
    return ["", "WHAT THEY DO, by rule (`bridge nodes --circuit` says more)", *lines] if told else []


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 or (value == int(value) and abs(value) >= 10) else f"{value:.3f}"

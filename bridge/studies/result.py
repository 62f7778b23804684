"""Result of a search for a task's circuit: nested circuits and their measures, saved and loaded exactly.

A folder holds `circuit.json` with everything a person reads, and a safetensors file with levels, means, edges and inclusion
frequencies (`store.write_folder`). For a task without a circuit there is only a `circuit.json`, which states the reason; in means
over tasks it counts at the model's full size.

Shape legend: n nodes of a location, e edges in one row.
"""

from __future__ import annotations

import textwrap
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import Tensor

from bridge.circuits.loss import SearchConfig
from bridge.data.task_tokens import Scores
from bridge.display import html as display
from bridge.display.columns import columns
from bridge.evidence.measures import Report, evidence_table
from bridge.models.circuit import Circuit, Edge, Node
from bridge.models.schema import ATTENTION_KINDS, MLP_KINDS
from bridge.models.sparse import Location
from bridge.models.store import CheckpointError, as_json, read_folder, read_json, refuse_unreadable, write_folder, write_json
from bridge.verdicts.task_search import TaskLevel

FORMAT = 2
Null = Literal["labels", "weights", "shuffled"]
NULL_DESCRIPTIONS: dict[Null, str] = {
    "labels": "every answer token replaced by one drawn at random, the same one everywhere",
    "weights": "every matrix of the sparse model with its entries permuted",
    "shuffled": "every pair given the answers of another pair, right and wrong exchanged in half of the pairs",
}
LABELLED = 24  # nodes, at most, whose labels the text lists
_EDGE_KINDS = ("weight", "value")


@dataclass(frozen=True)
class Size:
    """Size of a circuit or model: nodes, and edges as nonzero weights between them."""

    nodes: int
    edges: int


@dataclass(frozen=True)
class SeedRun:
    """Circuit of one seed at the opening level; off is its distance from the bounds on the search's prompts (<= 1: within)."""

    seed: int
    nodes: int
    errors: int
    off: float


@dataclass(frozen=True)
class TaskFacts:
    """A task's circuits in numbers.

    explains names the model whose answers are explained. levels are the nested circuits on held-out prompts; opening is the index
    of the circuit that all other fields are about, errors the names of its error nodes, entries its numbers of embedding,
    unembedding and bigram weights, which are no edges. whole and dense_whole are the models' sizes, dense is the size of the
    dense model's own circuit at the same level (None if it was not searched).
    """

    task: str
    language: str
    drop_rate: float
    explains: Literal["dense", "sparse"]
    null: Null | None
    search: SearchConfig
    sparse_scores: Scores
    dense_scores: Scores
    runs: tuple[SeedRun, ...]
    whole: Size
    levels: tuple[TaskLevel, ...]
    opening: int
    errors: tuple[str, ...]
    entries: Mapping[str, int]
    dense_whole: Size | None
    dense: Size | None
    why_not_dense: str
    provenance: Mapping[str, str | float | int | None]
    seconds: float

    @property
    def opened(self) -> TaskLevel:
        """The opening level."""
        return self.levels[self.opening]

    @property
    def size(self) -> Size:
        """Nodes and edges of the circuit."""
        return Size(self.opened.circuit.nodes, self.opened.edges)


@dataclass(frozen=True, eq=False)
class TaskResult:
    """A task's circuit at the opening level, the evidence on it, and its numbers.

    level_n is, for each node, the index of the first level whose circuit has it (the number of levels if none has it), and
    inclusion_n the share of seeds that kept it.
    """

    circuit: Circuit
    level: Mapping[Location, Tensor]
    inclusion: Mapping[Location, Tensor]
    report: Report
    facts: TaskFacts

    @property
    def passed(self) -> bool:
        """Whether all measures that the rules need pass, except that the model solves the task. A null must not pass."""
        needed = {key for rule in self.report.rules for key in rule.needs} - {"solved"}
        return all(self.report[key].passed is True for key in needed)

    def to_json(self) -> dict[str, Any]:
        """The result without masks and means as plain JSON values, with the verdict and its reasons."""
        return {
            "format": FORMAT, "facts": as_json(self.facts), "report": as_json(self.report), "verdict": self.report.verdict,
            "reasons": list(self.report.reasons), "nodes": [str(node) for node in self.circuit.nodes],
        }  # fmt: skip

    def save(self, path: str | Path) -> None:
        """Write the result to a folder. Raises CheckpointError if that fails; nothing is left half-written."""
        tensors = {f"inclusion.{at}": share_n for at, share_n in self.inclusion.items()}
        tensors |= {f"level.{at}": level_n for at, level_n in self.level.items()}
        write_folder(path, "circuit", tensors | _circuit_tensors(self.circuit), self.to_json())

    @staticmethod
    def load(path: str | Path) -> TaskResult:
        """The result that `save` wrote. Raises CheckpointError if it is missing or damaged, or if the task has no circuit."""
        if (Path(path) / "circuit.json").is_file():
            facts = read_json(Path(path) / "circuit.json")
            if "failed" in facts:
                raise CheckpointError(f"{str(path)!r}", f"holds no circuit: {facts['failed']}")
        tensors, facts = read_folder(path, "circuit")
        with refuse_unreadable(f"{str(path)!r}", "circuit", "search again"):
            if facts.get("format") != FORMAT:
                raise ValueError(f"format {facts.get('format')!r}, not {FORMAT}")
            found = _READER.validate_python({"facts": facts["facts"], "report": facts["report"]})
            task_facts, level = found.facts, _read_by_location("level", tensors)
            circuit = _circuit_of(task_facts.task, {at: level_n <= task_facts.opening for at, level_n in level.items()}, tensors)
        return TaskResult(circuit, level, _read_by_location("inclusion", tensors), found.report, task_facts)

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        facts, report, opened = self.facts, self.report, self.facts.opened
        sizes = (
            f"{facts.size.nodes:,} of {facts.whole.nodes:,} nodes, {facts.size.edges:,} edges; "
            f"F {opened.circuit.faithfulness:.2f}"
        )
        return display.card(
            f"circuit of {facts.task}",
            f"{display.verdict(report.verdict)} {display.text(' '.join(report.reasons))}",
            display.text(sizes),
            display.fold("everything, as text", display.listing(str(self))),
        )


@dataclass(frozen=True)
class _Read:
    facts: TaskFacts
    report: Report


_READER = TypeAdapter(_Read)


def _circuit_tensors(circuit: Circuit) -> dict[str, Tensor]:
    """The means by location; the edges as rows of both ends and the kind, with rows of weight and effect."""
    tensors = {f"means.{at}": mean_n for at, mean_n in circuit.means.items()}
    places, edges = {location: place for place, location in enumerate(circuit.kept)}, circuit.edges or ()
    rows = [
        [places[e.source.location], e.source.index, places[e.target.location], e.target.index, _EDGE_KINDS.index(e.kind)]
        for e in edges
    ]
    tensors["edges.ends"] = torch.tensor(rows, dtype=torch.int32).view(-1, 5)
    tensors["edges.values"] = torch.tensor([[e.weight, e.effect] for e in edges], dtype=torch.float64).view(-1, 2)
    return tensors


def _circuit_of(task: str, kept: Mapping[Location, Tensor], tensors: Mapping[str, Tensor]) -> Circuit:
    """The circuit of masks `kept` and the tensors of `_circuit_tensors`. Raises KeyError or ValueError if some are missing."""
    places = list(kept)
    edges = tuple(
        Edge(Node(places[a], i), Node(places[b], j), _EDGE_KINDS[kind], weight, effect)
        for (a, i, b, j, kind), (weight, effect) in zip(
            tensors["edges.ends"].tolist(), tensors["edges.values"].tolist(), strict=True
        )
    )
    return Circuit(task, {at: kept_n[None] for at, kept_n in kept.items()}, _read_by_location("means", tensors), edges)


def _read_by_location(prefix: str, tensors: Mapping[str, Tensor]) -> dict[Location, Tensor]:
    """The tensors whose names start with a prefix, by location, in the order of the computation."""
    found = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{prefix}."):
            layer, kind = name.removeprefix(f"{prefix}.").split(".", 1)
            found[Location(int(layer), kind)] = tensor
    order = (*ATTENTION_KINDS, *MLP_KINDS)
    return dict(sorted(found.items(), key=lambda item: (item[0].layer, order.index(item[0].kind))))


def save_failure(path: Path, task: str, why: str, full: Size, dense: Size | None, search: Mapping[str, Any]) -> None:
    """Write the circuit.json of a task without a circuit: the reason, the models' sizes, and the settings of the search."""
    path.mkdir(parents=True, exist_ok=True)
    sizes = {"whole": asdict(full), "dense_whole": None if dense is None else asdict(dense)}
    write_json(path / "circuit.json", {"format": FORMAT, "task": task, "failed": why, "search": dict(search), **sizes})


# -- as text ------------------------------------------------------------------------------------------------------------


def render_text(result: TaskResult, width: int = 100, labels: Mapping[str, str] | None = None) -> str:
    """The result as text; labels are short descriptions of nodes, by name."""
    facts, report = result.facts, result.report
    runs = "; ".join(f"seed {run.seed}: {run.nodes:,} nodes{'' if run.off <= 1 else ', beyond the bounds'}" for run in facts.runs)
    lines = [
        f"task      {facts.task} ({facts.language}; {facts.sparse_scores.pairs} held-out pairs, {facts.drop_rate:.0%} dropped)",
        f"solved    dense {facts.dense_scores.accuracy:.1%} (two-way loss {facts.dense_scores.loss:.3f}), "
        f"sparse {facts.sparse_scores.accuracy:.1%} ({facts.sparse_scores.loss:.3f})",
        f"search    the {facts.explains} model's answers, opened at F {facts.search.opens_at:g}; {runs}",
    ]
    if facts.null is not None:
        passes = "PASSES, which is a failure of the method" if result.passed else "fails, as it must"
        lines.append(f"NULL      {facts.null}: {NULL_DESCRIPTIONS[facts.null]}. It {passes}.")
    lines += [
        "",
        *textwrap.wrap(f"VERDICT   {report.verdict.upper()}. {' '.join(report.reasons)}", width, subsequent_indent=" " * 10),
        "",
        *_levels(facts, width),
    ]
    entries = ", ".join(f"{count:,} {name}" for name, count in facts.entries.items())
    summary = (
        f"> is the circuit, out of {facts.whole.nodes:,} nodes and {facts.whole.edges:,} edges. It also uses {entries} weights."
    )
    if facts.errors:
        summary += f" {facts.opened.circuit.error_share:.0%} of the span flows through errors at {', '.join(facts.errors)}."
    lines += textwrap.wrap(f"          {summary}", width, subsequent_indent=" " * 10)
    if facts.dense is not None and facts.dense_whole is not None:
        lines.append(
            f"DENSE     own circuit at F {facts.search.opens_at:g}: {facts.dense.nodes:,} of {facts.dense_whole.nodes:,} "
            f"nodes; {facts.dense.edges:,} edges, {facts.dense.edges / max(1, facts.size.edges):.1f} times as many"
        )
    else:
        lines += textwrap.wrap(f"DENSE     own circuit: {facts.why_not_dense}", width, subsequent_indent=" " * 10)
    nodes = [*_nodes(result, width), *_labelled(result, labels or {}, width)]
    return "\n".join([*lines, "", *nodes, "", *evidence_table(report.measures, width), "", f"{facts.seconds:.0f} s"])


def _levels(facts: TaskFacts, width: int) -> list[str]:
    """The nested circuits as a table."""
    rows: list[tuple[str, ...]] = [
        ("CIRCUITS  ", "nodes", "errors", "edges", "F", "miss", "KL", "supersets", "rms", "worst", "matched", "left")
    ]
    for place, level in enumerate(facts.levels):
        c = level.circuit
        mark = f"{'>' if place == facts.opening else ' '}{' ' if c.within else '!'}F {c.asked:g}"
        numbers = (
            f"{c.faithfulness:.3f}", f"{c.miss:.2f}", f"{c.kl:.3f}", f"{c.supersets_mean:.3f}", f"{c.supersets_rms:.2f}",
            f"{c.supersets_worst:.2f}", "-" if level.matched is None else f"{level.matched:.2f}", f"{c.left:.2f}",
        )  # fmt: skip
        rows.append((mark, f"{c.nodes:,}", f"{c.errors}", f"{level.edges:,}", *numbers))
    missed = any(not level.circuit.within for level in facts.levels)
    note = "! marks circuits that miss the bounds of the search on these prompts, which it has not seen." if missed else ""
    return [*columns(rows, width), *textwrap.wrap(note, width, initial_indent=" " * 10, subsequent_indent=" " * 10)]


def _nodes(result: TaskResult, width: int) -> list[str]:
    """The nodes by location; if there are several seeds, with the share of seeds that kept each."""
    several = len(result.facts.runs) > 1
    lines = [f"NODES{'' if not several else ', each with the share of seeds that kept it'}"]
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
    """The labelled nodes whose edges have the largest absolute effects in sum, each with its label."""
    effect: defaultdict[str, float] = defaultdict(float)
    for edge in result.circuit.edges or ():
        for end in (edge.source, edge.target):
            effect[end.name] += abs(edge.effect)
    known = [node.name for node in result.circuit.nodes if node.name in labels]
    listed = sorted(known, key=lambda name: -effect[name])[:LABELLED]
    lines = [f"  {name:<15} {labels[name]}"[:width] for name in listed]
    return ["", "LABELS of nodes with large effects, made by rule (`bridge nodes` prints more)", *lines] if listed else []

"""Export an explanation to files for other programs: circuit-tracer's front end, Neuronpedia, and readers of GraphML.

    circuit-tracer   a folder for its local front end: DIR/SLUG.json, DIR/features/N.json, and DIR/graph-metadata.json, in which
                     a graph with the same slug is replaced; two rows per block, for attention and MLP
    neuronpedia      one file to upload, with one row per block; next to it `features/`, if they can be hosted
    graphml          the explanation unchanged, as a networkx graph: nodes and edges with their own names and all numbers

`viewer_graph` describes the contents of the first two formats, and the weight of a link. In GraphML, texts are written as JSON
strings, because XML does not allow control characters.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import networkx as nx

from bridge.explanations.explanation import ExplainError, Explanation, check_coupling
from bridge.explanations.viewer_graph import ExportError, features_json, graph_json, graph_metadata, parse_end
from bridge.models.bridges import CoupledModels
from bridge.models.schema import ERROR
from bridge.models.store import CheckpointError, read_json, write_json, write_text
from bridge.nodes.description import NodePage, describe_node
from bridge.nodes.statistics import parse_node, stored_facts

Format = Literal["circuit-tracer", "neuronpedia", "graphml"]
FORMATS: tuple[Format, ...] = get_args(Format)
SHOWN = 0.8  # cumulative influence; nodes up to it are shown at first
SMALLEST, LARGEST = 1 << 10, 100 << 20  # size limits of Neuronpedia in bytes
LOCAL_SCAN = "./data/features"  # where the local front end looks for features, relative to the address of DIR
PORT = 8041  # default of `circuit-tracer start-server`
_SLUG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")  # characters that the viewers allow; a leading dot would hide the file


@dataclass(frozen=True)
class Exported:
    """Result of an export: its main file, the number of nodes, links and features, and the next steps for the user."""

    file: Path
    nodes: int
    links: int
    features: int
    next: tuple[str, ...]


def export(
    explanation: Explanation,
    path: str | Path,
    to: Format = "circuit-tracer",
    *,
    slug: str | None = None,
    scan: str | None = None,
    features_url: str | None = None,
    pages: Mapping[str, NodePage] | None = None,
) -> Exported:
    """Write an explanation for another program; `path` is a folder for circuit-tracer, and a file otherwise.

    slug names the graph (default: from the prompt and a digest). scan is Neuronpedia's id of the model, features_url the address
    at which `features/` will be hosted, if any. pages, by node name, fill the features (see `node_pages`). Raises ExportError.
    """
    path = Path(path)
    if to not in FORMATS:
        raise ExportError(f"there is no format {to!r}", remedy=f"‹to› is one of {', '.join(FORMATS)}")
    if to != "neuronpedia" and (scan is not None or features_url is not None):
        raise ExportError("‹scan› and ‹features_url›", f"are for Neuronpedia only, and ‹to› is {to}", "leave them out")
    try:
        if to == "graphml":
            return _write_graphml(explanation, path)
        slug = _check_slug("slug", slug or _slug(explanation))
        if to == "circuit-tracer":
            return _write_local(explanation, path, slug, pages or {})
        if scan is None:
            raise ExportError(
                "Neuronpedia", "lists graphs under its own model ids, and none was given", "give ‹scan›, such as gpt2-small"
            )
        return _write_neuronpedia(explanation, path, slug, _check_slug("scan", scan), features_url, pages or {})
    except OSError as error:
        raise ExportError(f"could not write {str(path)!r} ({error.strerror or error})", remedy="name another path") from None


def node_pages(coupling: CoupledModels, explanation: Explanation) -> dict[str, NodePage] | None:
    """Return a page for each channel of the opening circuit, by name; None if no node facts are stored with the coupling.

    Raises ExplainError if the coupling is not the explanation's.
    """
    check_coupling(explanation, coupling)
    facts = stored_facts(coupling)
    if facts is None:
        return None
    sizes = coupling.sparse.locations()
    names = {node.name for node in explanation.opening_nodes if node.kind != ERROR}
    return {name: describe_node(coupling, facts, parse_node(name, sizes)) for name in names}


def pages_for(explanation: Explanation, path: str | None = None, *, dense: str | None = None) -> dict[str, NodePage] | None:
    """Return the pages from the coupling at `path` (default: the explanation's own, if it still exists); None without facts.

    dense is the coupling's dense model, if it is no longer where it was.
    """
    if path is not None:
        return node_pages(CoupledModels.from_pretrained(path, dense=dense), explanation)
    own = explanation.provenance.coupling
    if own is None or not (Path(own) / "nodes.json").is_file():
        return None
    try:
        return node_pages(CoupledModels.from_pretrained(own, dense=dense), explanation)
    except ExplainError:  # another coupling has replaced it
        return None


# -- networkx and GraphML -----------------------------------------------------------------------------------------------------


def to_networkx(explanation: Explanation) -> nx.DiGraph:
    """Return the opening circuit as a networkx graph; texts are JSON strings, and attributes that are None are left out."""
    graph = nx.DiGraph(
        prompt=json.dumps(explanation.prompt),
        answer=json.dumps(explanation.answer.text),
        dense_d=explanation.dense_d,
        sparse_d=explanation.sparse_d,
        nothing_d=explanation.nothing_d,
        verdict=explanation.report.verdict,
    )
    if explanation.contrast is not None:
        graph.graph["contrast"] = json.dumps(explanation.contrast.text)
    for node in explanation.opening_nodes:
        known = {"activation": node.activation, "mean": node.mean, "effect": node.effect}
        label = {} if node.label is None else {"label": json.dumps(node.label)}
        names = None if node.group is None else explanation.groups[node.group]
        group = {} if names is None else {"group": node.group, "group_name": json.dumps(names.label or names.name)}
        graph.add_node(
            node.id, layer=node.layer, kind=node.kind, index=node.index, position=node.position, level=node.level,
            **{k: float(v) for k, v in known.items() if v is not None}, **label, **group,
        )  # fmt: skip
    for edge in explanation.edges:
        for end in (edge.source, edge.target):
            if end not in graph:
                where = parse_end(explanation, end)
                graph.add_node(end, **where, token=json.dumps(explanation.tokens[where["position"]].text))
        graph.add_edge(edge.source, edge.target, kind=edge.kind, weight=float(edge.weight), effect=float(edge.effect))
    return graph


def _write_graphml(explanation: Explanation, path: Path) -> Exported:
    graph = to_networkx(explanation)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(nx.generate_graphml(graph)) + "\n")
    how = f'in Python: networkx.read_graphml("{path}"); or open it in Gephi, Cytoscape or yEd'
    return Exported(path, len(graph), graph.number_of_edges(), 0, (how,))


# -- the graph format of circuit-tracer and Neuronpedia -----------------------------------------------------------------------


def _write_local(explanation: Explanation, folder: Path, slug: str, pages: Mapping[str, NodePage]) -> Exported:
    listed = folder / "graph-metadata.json"
    graphs = _read_graph_list(listed) if listed.exists() else []
    settings = {**graph_metadata(explanation), "pruning_settings": {"node_threshold": 1.0}}
    graph = graph_json(explanation, slug, LOCAL_SCAN, rows=2, extra={"schema_version": 1, "node_threshold": 1.0, **settings})
    for other in graphs:
        if other.get("scan") == LOCAL_SCAN and other.get("generation_settings") != settings["generation_settings"]:
            raise ExportError(
                f"{str(folder)!r}",
                f"holds graphs of another coupling ({other.get('slug')!r}), whose features have the same numbers",
                "name another folder",
            )
    features = features_json(explanation, pages, rows=2)
    (folder / "features").mkdir(parents=True, exist_ok=True)
    for number, feature in features.items():
        write_json(folder / "features" / f"{number}.json", feature)
    write_json(folder / f"{slug}.json", graph)
    write_json(listed, {"graphs": [*(other for other in graphs if other.get("slug") != slug), graph["metadata"]]})
    query = {"slug": slug, "pruningThreshold": SHOWN, "supernodes": json.dumps(graph["qParams"]["supernodes"])}
    steps = (
        f"circuit-tracer start-server --graph_file_dir {folder}",
        f"http://localhost:{PORT}/index.html?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}",
    )
    return Exported(folder / f"{slug}.json", len(graph["nodes"]), len(graph["links"]), len(features), steps)


def _write_neuronpedia(
    explanation: Explanation, file: Path, slug: str, scan: str, features_url: str | None, pages: Mapping[str, NodePage]
) -> Exported:
    if all(node.layer == 0 for node in explanation.opening_nodes if node.kind != ERROR):
        raise ExportError(
            "no node", "is above block 0, and Neuronpedia does not open such a graph", "export ‹to› circuit-tracer or graphml"
        )
    extra: dict[str, Any] = {"node_threshold": SHOWN, **graph_metadata(explanation)}
    if features_url is None:
        extra["schema_version"] = 1
    elif re.fullmatch(r"https://[^\s<>\"]+", features_url):
        extra["feature_details"] = {"feature_json_base_url": features_url.rstrip("/")}
    else:
        raise ExportError(f"{features_url!r}", "is no address that Neuronpedia fetches features from", "give an https:// address")
    graph = graph_json(explanation, slug, scan, rows=1, extra=extra)
    text = json.dumps(graph, allow_nan=False)
    if not SMALLEST <= len(text) <= LARGEST:
        raise ExportError(
            "the graph", f"is {len(text):,} bytes, and Neuronpedia takes {SMALLEST:,} to {LARGEST:,}", "use ‹to› graphml"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {} if features_url is None else features_json(explanation, pages, rows=1)
    for number, feature in features.items():
        (file.parent / "features").mkdir(exist_ok=True)
        write_json(file.parent / "features" / f"{number}.json", feature)
    write_text(file, text)
    hosted = (
        () if features_url is None else (f"host {file.parent / 'features'} at {features_url}, with CORS open to all origins",)
    )
    steps = (
        *hosted,
        "check it at https://www.neuronpedia.org/graph/validator, and upload it there",
        f"https://www.neuronpedia.org/{scan}/graph?slug={slug}",
    )
    return Exported(file, len(graph["nodes"]), len(graph["links"]), len(features), steps)


def _read_graph_list(file: Path) -> list[dict[str, Any]]:
    try:
        graphs = read_json(file).get("graphs")
    except CheckpointError:
        graphs = None
    if not isinstance(graphs, list) or not all(isinstance(graph, dict) for graph in graphs):
        raise ExportError(f"{str(file)!r}", "is no list of graphs as circuit-tracer writes it", "fix it, or name another folder")
    return graphs


def _slug(explanation: Explanation) -> str:
    """Return a slug that is valid in an address: the end of the prompt, and a digest of the question and the coupling."""
    where, contrast = explanation.provenance, explanation.contrast
    question = explanation.prompt, explanation.answer.id, None if contrast is None else contrast.id
    asked = (*question, where.coupling, where.dense_fingerprint, where.seed)
    words = re.sub(r"[^A-Za-z0-9]+", "-", explanation.prompt)[-32:].strip("-").lower()
    return f"{words or 'prompt'}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"


def _check_slug(role: str, text: str) -> str:
    if text == "graph-metadata":
        raise ExportError(f"‹{role}› {text!r}", "is the name of the list of graphs, graph-metadata.json", "give another name")
    if _SLUG.fullmatch(text) is None:
        raise ExportError(
            f"‹{role}› {text!r}", "is not valid", "give at most 100 letters, digits, _ . and -, without a leading dot"
        )
    return text

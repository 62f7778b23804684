"""An explanation -> files that other programs draw: circuit-tracer's front end, Neuronpedia, and whatever reads GraphML.

    graphml          the explanation one to one, as a networkx graph: nodes and edges under their own names, with every number
    circuit-tracer   a folder for its local front end: DIR/SLUG.json, DIR/features/N.json, and DIR/graph-metadata.json, in which
                     a graph of the same slug is replaced; two rows to a block, attention and MLP
    neuronpedia      one file to upload, a row to a block; beside it `features/`, if one has a place to host them

A link's weight is the edge's `effect`: what D, the logit of the target less that of the contrast, owes to it, in logits, to first
order. An edge into the answer is two links, half of the effect into the target and minus half into the contrast, whose difference
is the effect. What a token's embedding channels and its bigram entry do is summed into one node per token; links of effect 0 (into
what AbsTopK silences) are left out. GraphML has both weight and effect of every edge.

Both viewers colour activations from 0 up, and show a feature by a number. A channel is therefore two features, of its positive and
of its negative values, numbered apart from every other channel of the row, and the activation shown is the magnitude:

    index    = (8 channel + kind) 2 + (value < 0)                    kind by its place in ATTENTION_KINDS + MLP_KINDS
    feature  = (row + index)(row + index + 1) / 2 + index            the Cantor pair of row and index
    influence                 share of the summed |effect| that nodes of larger |effect| have, and the node itself

A node whose deletion was not measured has the influence 1. Both viewers put labels and tokens into the page as HTML, so a `<` that
would open a tag becomes the fullwidth one there; `metadata.prompt` and GraphML have the text as it is. In GraphML texts are written
as JSON writes them, because XML has no place for control characters.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import urllib.parse
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import networkx as nx
import numpy as np

from bridge.bridges import Coupling
from bridge.checkpoint import CheckpointError, read_json, write_json, write_text
from bridge.explanation import ExplainedNode, Explanation, Token
from bridge.node_page import Excerpt, NodePage, describe_node
from bridge.nodes import parse_node, stored_facts
from bridge.recipe import UserError
from bridge.sparse import ATTENTION_KINDS, MLP_KINDS

Format = Literal["circuit-tracer", "neuronpedia", "graphml"]
FORMATS: tuple[Format, ...] = get_args(Format)
KINDS = ATTENTION_KINDS + MLP_KINDS
PINNED = 12  # nodes of the subgraph that is open at first
SHOWN = 0.8  # cumulative influence up to which nodes are shown at first
SMALLEST, LARGEST = 1 << 10, 100 << 20  # bytes that Neuronpedia takes
LOCAL_SCAN = "./data/features"  # where the local front end looks for features, under the address that it serves DIR at
PORT = 8041  # that `circuit-tracer start-server` serves on unless told otherwise
_SLUG = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")  # the viewers' alphabet; a dot in front would hide the file, or leave DIR
_END = re.compile(r"(?:L(\d+)\.)?(\w+)\[(\d+)\]@(\d+)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


class ExportError(UserError):
    """An explanation, a name or a place that cannot be exported, in one line that says what to change."""


@dataclass(frozen=True)
class Exported:
    """What an export left: its main file, how many nodes, links and features, and what a person does next."""

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
    """Write an explanation for another program: `path` is a folder for circuit-tracer, a file for the others.

    slug names the graph, by default after prompt and target; scan is Neuronpedia's id of the model, and features_url where
    `features/` will be hosted, if anywhere; pages, by node name, fill the features (see `node_pages`). Raises ExportError.
    """
    path = Path(path)
    if to not in FORMATS:
        raise ExportError(f"there is no format {to!r}; --to is one of {', '.join(FORMATS)}")
    if to != "neuronpedia" and (scan is not None or features_url is not None):
        raise ExportError(f"--scan and --features-url are Neuronpedia's, and --to is {to}; leave them out")
    try:
        if to == "graphml":
            return _write_graphml(explanation, path)
        slug = _checked("slug", slug or _slug(explanation))
        if to == "circuit-tracer":
            return _write_local(explanation, path, slug, pages or {})
        if scan is None:
            raise ExportError("which of Neuronpedia's models the graph is of is not said; give --scan, such as gpt2-small")
        return _write_neuronpedia(explanation, path, slug, _checked("scan", scan), features_url, pages or {})
    except OSError as error:
        raise ExportError(f"could not write {str(path)!r} ({error.strerror or error}); name another place") from None


def node_pages(coupling: Coupling, explanation: Explanation) -> dict[str, NodePage] | None:
    """A page for every channel of the explanation, by its name, from the facts beside the coupling; None without any.

    Raises ExportError for a coupling to another dense model.
    """
    if coupling.dense.fingerprint() != explanation.provenance.dense_fingerprint:
        raise ExportError(f"the explanation is not of {coupling.dense.name!r}, to which {coupling.path!r} is coupled; name its own")
    facts = stored_facts(coupling)
    if facts is None:
        return None
    sizes = coupling.sparse.locations()
    return {name: describe_node(coupling, facts, parse_node(name, sizes)) for name in {n.name for n in explanation.nodes}}


# -- networkx and GraphML -----------------------------------------------------------------------------------------------------


def to_networkx(explanation: Explanation) -> nx.DiGraph:
    """The explanation as a networkx graph, texts written as JSON does; attributes that are None in it are absent."""
    graph = nx.DiGraph(
        prompt=json.dumps(explanation.prompt),
        target=json.dumps(explanation.target.text),
        contrast=json.dumps(explanation.contrast.text),
        dense_difference=explanation.dense_difference,
        sparse_difference=explanation.sparse_difference,
        verdict=explanation.faithfulness.verdict,
    )
    for node in explanation.nodes:
        known = {"activation": node.activation, "mean": node.mean, "importance": node.importance, "effect": node.effect}
        label = {} if node.label is None else {"label": json.dumps(node.label)}
        graph.add_node(node.id, **_place(explanation, node.id), **{k: float(v) for k, v in known.items() if v is not None}, **label)
    for edge in explanation.edges:
        for end in (edge.source, edge.target):
            if end not in graph:
                graph.add_node(end, **_place(explanation, end))
        graph.add_edge(edge.source, edge.target, kind=edge.kind, weight=float(edge.weight), effect=float(edge.effect))
    return graph


def _place(explanation: Explanation, name: str) -> dict[str, str | int]:
    """Where a node is, as its name says; the ends of edges that are no nodes (embedding, bigram, answer) are named likewise."""
    match = _END.fullmatch(name)
    if match is None or int(match[4]) >= len(explanation.tokens):
        raise ExportError(f"the explanation has a node {name!r} that is at no token of its prompt; explain again")
    layer, position = int(match[1] or -1), int(match[4])
    token = json.dumps(explanation.tokens[position].text)
    return {"layer": layer, "kind": match[2], "index": int(match[3]), "position": position, "token": token}


def _write_graphml(explanation: Explanation, path: Path) -> Exported:
    graph = to_networkx(explanation)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(nx.generate_graphml(graph)) + "\n")
    how = f'in Python: networkx.read_graphml("{path}"); or open it in Gephi, Cytoscape or yEd'
    return Exported(path, len(graph), graph.number_of_edges(), 0, (how,))


# -- the graph format of circuit-tracer and Neuronpedia -----------------------------------------------------------------------


def _write_local(explanation: Explanation, folder: Path, slug: str, pages: Mapping[str, NodePage]) -> Exported:
    listed = folder / "graph-metadata.json"
    graphs = _listed(listed) if listed.exists() else []
    settings = {**_origin(explanation), "pruning_settings": {"node_threshold": 1.0}}
    graph = _graph(explanation, slug, LOCAL_SCAN, rows=2, extra={"schema_version": 1, "node_threshold": 1.0, **settings})
    for other in graphs:
        if other.get("scan") == LOCAL_SCAN and other.get("generation_settings") != settings["generation_settings"]:
            raise ExportError(
                f"{str(folder)!r} holds graphs of another coupling ({other.get('slug')!r}), whose features have the same "
                f"numbers; name another folder"
            )
    features = _features(explanation, pages, rows=2)
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
    if all(node.layer == 0 for node in explanation.nodes):
        raise ExportError("no node is above block 0, and Neuronpedia opens no such graph; export --to circuit-tracer or graphml")
    extra: dict[str, Any] = {"node_threshold": SHOWN, **_origin(explanation)}
    if features_url is None:
        extra["schema_version"] = 1
    elif re.fullmatch(r"https://[^\s<>\"]+", features_url):
        extra["feature_details"] = {"feature_json_base_url": features_url.rstrip("/")}
    else:
        raise ExportError(f"{features_url!r} is no place that Neuronpedia fetches features from; give an https:// address")
    graph = _graph(explanation, slug, scan, rows=1, extra=extra)
    text = json.dumps(graph, allow_nan=False)
    if not SMALLEST <= len(text) <= LARGEST:
        raise ExportError(f"the graph is {len(text):,} bytes, and Neuronpedia takes {SMALLEST:,} to {LARGEST:,}; use --to graphml")
    file.parent.mkdir(parents=True, exist_ok=True)
    features = {} if features_url is None else _features(explanation, pages, rows=1)
    for number, feature in features.items():
        (file.parent / "features").mkdir(exist_ok=True)
        write_json(file.parent / "features" / f"{number}.json", feature)
    write_text(file, text)
    hosted = () if features_url is None else (f"host {file.parent / 'features'} at {features_url}, with CORS open to all origins",)
    steps = (
        *hosted,
        "check it at https://www.neuronpedia.org/graph/validator, and upload it there",
        f"https://www.neuronpedia.org/{scan}/graph?slug={slug}",
    )
    return Exported(file, len(graph["nodes"]), len(graph["links"]), len(features), steps)


def _graph(explanation: Explanation, slug: str, scan: str, *, rows: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The graph: metadata, the state of the page, nodes and links; `rows` to a block."""
    if len(explanation.tokens) < 2:
        raise ExportError("the prompt is a single token, of which the viewers drop every node; export --to graphml")
    graph = to_networkx(explanation)  # checks the names
    last, answer = len(explanation.tokens) - 1, rows * (1 + max((node.layer for node in explanation.nodes), default=0)) + 1
    target, contrast = (f"{answer}_{token.id}_{last}" for token in (explanation.target, explanation.contrast))
    names = {node.id: _node_id(node, rows) for node in explanation.nodes}
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for edge in explanation.edges:
        position = graph.nodes[edge.source]["position"]
        source = names.get(edge.source, f"E_{explanation.tokens[position].id}_{position}")
        halves = ((target, 0.5), (contrast, -0.5))
        for end, share in ((names[edge.target], 1.0),) if edge.target in names else halves:
            weights[source, end] += share * edge.effect
    links = [{"source": source, "target": end, "weight": weight} for (source, end), weight in weights.items() if weight]

    given: dict[str, float] = defaultdict(float)  # what D owes to a token, through whichever of its channels
    for (source, _), weight in weights.items():
        given[source] += abs(weight)
    nodes = [_token_node(position, token.id, given) for position, token in enumerate(explanation.tokens)]
    nodes += [_feature_node(node, rows) for node in explanation.nodes]
    scores = [node.pop("score") for node in nodes]
    nodes = [node | {"influence": share} for node, share in zip(nodes, _cumulative(scores), strict=True)]
    strongest = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:PINNED]
    nodes += [_logit_node(explanation, explanation.target, answer), _logit_node(explanation, explanation.contrast, answer)]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": [_plain(token.text) for token in explanation.tokens],
            "prompt": explanation.prompt,
            **extra,
        },
        "qParams": {
            "pinnedIds": [*(names[node.id] for node in strongest), target, contrast],
            "supernodes": _supernodes(strongest, rows),
            "linkType": "both",
            "clickedId": target,
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def _row(node: ExplainedNode, rows: int) -> int:
    if node.kind not in KINDS:
        raise ExportError(f"the explanation has a node {node.id!r} of a kind {node.kind!r} that there is not; explain again")
    return rows * node.layer + (rows > 1 and node.kind in MLP_KINDS)


def _index(node: ExplainedNode) -> int:
    return 2 * (len(KINDS) * node.index + KINDS.index(node.kind)) + (node.activation < 0)


def _feature(node: ExplainedNode, rows: int) -> int:
    row, index = _row(node, rows), _index(node)
    return (row + index) * (row + index + 1) // 2 + index


def _node_id(node: ExplainedNode, rows: int) -> str:
    return f"{_row(node, rows)}_{_index(node)}_{node.position}"


def _feature_node(node: ExplainedNode, rows: int) -> dict[str, Any]:
    name, told = _node_id(node, rows), f": {node.label}" if node.label else ""
    return {
        "node_id": name,
        "jsNodeId": name,  # which some versions of the viewers take for the id, so as unique
        "feature": _feature(node, rows),
        "layer": str(_row(node, rows)),
        "ctx_idx": node.position,
        "feature_type": "cross layer transcoder",  # the only type that opens the feature's panel
        "clerp": _plain(f"{node.name} {node.activation:+.2f}{told}"),
        "activation": abs(node.activation),
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "score": abs(node.effect or 0.0),
    }


def _token_node(position: int, token: int, given: Mapping[str, float]) -> dict[str, Any]:
    name = f"E_{token}_{position}"
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": position,
        "layer": "E",
        "ctx_idx": position,
        "feature_type": "embedding",
        "clerp": "",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "score": given.get(name, 0.0),
    }


def _logit_node(explanation: Explanation, token: Token, row: int) -> dict[str, Any]:
    last, probability = len(explanation.tokens) - 1, _probability(explanation, token)
    shown = _plain(token.text).replace("(p=", "(p\u2060=")  # the viewers read the probability behind the first of these
    return {
        "node_id": f"{row}_{token.id}_{last}",
        "jsNodeId": f"{row}_{token.id}_{last}",
        "feature": token.id,
        "layer": str(row),
        "ctx_idx": last,
        "feature_type": "logit",
        "clerp": f'Output "{shown}" (p={probability:.3f})',
        "token_prob": probability,
        "is_target_logit": token.id == explanation.target.id,
        "influence": 0.0,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
    }


def _probability(explanation: Explanation, token: Token) -> float:
    """A token's probability in the dense model: as listed, else from the other's and D; 0 where neither is listed."""
    listed = {answer.token.id: answer.probability for answer in explanation.dense}
    other, sign = (explanation.contrast, 1) if token.id == explanation.target.id else (explanation.target, -1)
    return listed.get(token.id, listed.get(other.id, 0.0) * math.exp(sign * explanation.dense_difference))


def _cumulative(scores: list[float]) -> list[float]:
    """For each score the share of the sum that scores above it have, and itself; 1 for those of 0. In (0, 1]."""
    score_n = np.array(scores)
    order_n = np.argsort(-score_n, kind="stable")
    share_n = np.ones(len(score_n))
    if score_n.sum() > 0:
        share_n[order_n] = np.minimum(score_n[order_n].cumsum() / score_n.sum(), 1)
    return np.where(score_n > 0, share_n, 1.0).tolist()


def _supernodes(nodes: Iterable[ExplainedNode], rows: int) -> list[list[str]]:
    """Nodes of one sublayer at one position, where there are several, as one group."""
    groups: dict[str, list[str]] = defaultdict(list)
    for node in nodes:
        groups[f"L{node.layer} {'mlp' if node.kind in MLP_KINDS else 'attn'} @{node.position}"].append(_node_id(node, rows))
    return [[label, *members] for label, members in groups.items() if len(members) > 1]


def _origin(explanation: Explanation) -> dict[str, Any]:
    """What a graph says of where it comes from, folders by their names alone; and how its numbers are meant."""
    where, faithfulness = explanation.provenance, explanation.faithfulness
    question = f"why {explanation.target.text!r} rather than {explanation.contrast.text!r}"
    told = (
        f"{faithfulness.verdict.upper()}. {' '.join(faithfulness.reasons)} Asked: {question}. D is the logit of the first less that "
        f"of the second. Links are what D owes to an edge, in logits; into the answer, half to each logit. Nodes are channels of a "
        f"weight-sparse model coupled to the dense one, two features each: positive and negative values, shown as magnitudes."
    )
    settings: dict[str, Any] = {"dense": Path(where.dense).name, "dense_fingerprint": where.dense_fingerprint, "l0": where.l0}
    if where.coupling is not None:
        settings["coupling"] = Path(where.coupling).name
    return {
        "info": {"description": told, "generator": {"name": "bridge", "version": where.version}},
        "generation_settings": settings,
    }


def _listed(file: Path) -> list[dict[str, Any]]:
    try:
        graphs = read_json(file).get("graphs")
    except CheckpointError:
        graphs = None
    if not isinstance(graphs, list) or not all(isinstance(graph, dict) for graph in graphs):
        raise ExportError(f"{str(file)!r} is no list of graphs as circuit-tracer writes it; mend it, or name another folder")
    return graphs


def _slug(explanation: Explanation) -> str:
    """The end of the prompt as far as it can stand in an address, and a digest of what was asked of what."""
    where = explanation.provenance
    asked = (explanation.prompt, explanation.target.id, explanation.contrast.id, where.coupling, where.dense_fingerprint, where.seed)
    words = re.sub(r"[^A-Za-z0-9]+", "-", explanation.prompt)[-32:].strip("-").lower()
    return f"{words or 'prompt'}-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]}"


def _checked(role: str, text: str) -> str:
    if _SLUG.fullmatch(text) is None or text == "graph-metadata":
        raise ExportError(f"--{role} {text!r} cannot be one: letters, digits, _ . and -, at most 100, no dot in front; mend it")
    return text


def _plain(text: str) -> str:
    return _TAG.sub("\uff1c", text)


# -- features -----------------------------------------------------------------------------------------------------------------


def _features(explanation: Explanation, pages: Mapping[str, NodePage], *, rows: int) -> dict[int, dict[str, Any]]:
    """Every feature of the graph by its number: from the channel's page, or of this prompt alone where there is none."""
    nodes: dict[int, list[ExplainedNode]] = defaultdict(list)
    for node in explanation.nodes:
        nodes[_feature(node, rows)].append(node)
    return {
        number: _from_page(number, same[0], pages[same[0].name]) if same[0].name in pages else _from_prompt(number, same, explanation)
        for number, same in nodes.items()
    }


def _from_prompt(number: int, nodes: list[ExplainedNode], explanation: Explanation) -> dict[str, Any]:
    values = [0.0] * len(explanation.tokens)
    for node in nodes:
        values[node.position] = abs(node.activation)
    tokens = [token.text for token in explanation.tokens]
    strongest = int(np.argmax(values))
    example = {"tokens": tokens, "tokens_acts_list": values, "train_token_ind": strongest, "is_repeated_datapoint": False}
    return _feature_json(number, nodes[0].name, {"a prompt that was explained": [example]}, max(values))


def _from_page(number: int, node: ExplainedNode, page: NodePage) -> dict[str, Any]:
    sign = -1 if node.activation < 0 else 1
    strongest = page.high if sign > 0 else page.low
    between = [each for each in page.quantiles if each.value * sign > 0]
    more, less = (page.promotes, page.demotes)[::sign]
    top, bottom = ([each.text for each in tokens] if page.tokens == "promoted" else [] for tokens in (more, less))
    examples = {"strongest": map(_example, strongest), "of all where it is not 0": map(_example, between)}
    known = [abs(each.value) for each in (*between, *strongest[:1])]
    most = max(known, default=0.0)
    spread = {}
    if known:  # a few values, from all over the text: percentiles as far as they tell
        spread["quantile_values"] = np.quantile(known, np.linspace(0.01, 1, 100)).tolist()
        spread["histogram"] = np.histogram(known, bins=10, range=(0, most))[0].astype(float).tolist()
    feature = _feature_json(number, node.name, {name: list(found) for name, found in examples.items()}, most)
    return feature | {"top_logits": top, "bottom_logits": bottom, "activation_frequency": page.active, **spread}


def _example(excerpt: Excerpt) -> dict[str, Any]:
    return {
        "tokens": [excerpt.before, excerpt.token, excerpt.after],
        "tokens_acts_list": [0.0, abs(excerpt.value), 0.0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }


def _feature_json(number: int, name: str, examples: Mapping[str, list[dict[str, Any]]], most: float) -> dict[str, Any]:
    return {
        "index": number,
        "transcoder_id": name,
        "examples_quantiles": [{"quantile_name": title, "examples": found} for title, found in examples.items() if found],
        "top_logits": [],
        "bottom_logits": [],
        "act_min": 0.0,
        "act_max": most or 1.0,
    }

"""An explanation as the graph that circuit-tracer's front end and Neuronpedia draw, and the features of its nodes, as plain JSON.

A link's weight is the edge's `effect`: what D, the logit of the target less that of the contrast, owes to it, in logits, to
first order. An edge into the answer is two links, half of the effect into the target and minus half into the contrast, whose
difference is the effect. What a token's embedding channels and its bigram entry do is summed into one node per token; links of
effect 0 (into what AbsTopK silences) are left out.

Both viewers colour activations from 0 up, and show a feature by a number. A channel is therefore two features, of its positive
and of its negative values, numbered apart from all others of the row, and the activation shown is the magnitude:

    index       (8 channel + kind) 2 + (value < 0)                   kind by its place in ATTENTION_KINDS + MLP_KINDS
    feature     (row + index)(row + index + 1) / 2 + index           the Cantor pair of row and index
    influence   share of the summed |effect| that the nodes of larger |effect| have, and the node itself

A node whose deletion was not measured has the influence 1. Both viewers put labels and tokens into the page as HTML, so a `<`
that would open a tag becomes the fullwidth one there; `metadata.prompt` has the text as it is.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.explanation import ExplainedNode, Explanation, Token
from bridge.node_page import Excerpt, NodePage
from bridge.recipe import UserError
from bridge.sparse import ATTENTION_KINDS, MLP_KINDS

KINDS = ATTENTION_KINDS + MLP_KINDS
PINNED = 12  # nodes of the subgraph that is open at first
_END = re.compile(r"(?:L(\d+)\.)?(\w+)\[(\d+)\]@(\d+)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


class ExportError(UserError):
    """An explanation, a name or a place that cannot be exported, in one line that says what to change."""


def place(explanation: Explanation, name: str) -> dict[str, Any]:
    """Layer (-1: none), kind, index and position of a node, or of an end of an edge that is none (embedding, bigram, answer)."""
    match = _END.fullmatch(name)
    if match is None or int(match[4]) >= len(explanation.tokens):
        raise ExportError(f"the explanation has a node {name!r} that is at no token of its prompt; explain again")
    return {"layer": int(match[1] or -1), "kind": match[2], "index": int(match[3]), "position": int(match[4])}


def graph_json(explanation: Explanation, slug: str, scan: str, *, rows: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The graph: metadata, the state of the page, nodes and links; `rows` to a block."""
    if len(explanation.tokens) < 2:
        raise ExportError("the prompt is a single token, of which the viewers drop every node; export --to graphml")
    last, answer = len(explanation.tokens) - 1, rows * (1 + max((node.layer for node in explanation.nodes), default=0)) + 1
    target, contrast = (f"{answer}_{token.id}_{last}" for token in (explanation.target, explanation.contrast))
    names = {node.id: _node_id(node, rows) for node in explanation.nodes}
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for edge in explanation.edges:
        position = place(explanation, edge.source)["position"]
        source = names.get(edge.source, f"E_{explanation.tokens[position].id}_{position}")
        answers = ((target, 0.5), (contrast, -0.5))
        for end, share in ((names[edge.target], 1.0),) if edge.target in names else answers:
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


def _plain(text: str) -> str:
    return _TAG.sub("\uff1c", text)


def origin(explanation: Explanation) -> dict[str, Any]:
    """What a graph says of where it comes from, folders by their names alone; and how its numbers are meant."""
    where, faithfulness = explanation.provenance, explanation.faithfulness
    question = f"why {explanation.target.text!r} rather than {explanation.contrast.text!r}"
    told = (
        f"{faithfulness.verdict.upper()}. {' '.join(faithfulness.reasons)} Asked: {question}. D is the logit of the first "
        "less that of the second. Links are what D owes to an edge, in logits; into the answer, half to each logit. Nodes are "
        "channels of a weight-sparse model coupled to the dense one, two features each: of positive and of negative values."
    )
    settings: dict[str, Any] = {"dense": Path(where.dense).name, "dense_fingerprint": where.dense_fingerprint, "l0": where.l0}
    if where.coupling is not None:
        settings["coupling"] = Path(where.coupling).name
    return {
        "info": {"description": told, "generator": {"name": "bridge", "version": where.version}},
        "generation_settings": settings,
    }


# -- features -----------------------------------------------------------------------------------------------------------------


def features_json(explanation: Explanation, pages: Mapping[str, NodePage], *, rows: int) -> dict[int, dict[str, Any]]:
    """Every feature of the graph by its number: from the channel's page, or of this prompt alone where there is none."""
    nodes: dict[int, list[ExplainedNode]] = defaultdict(list)
    for node in explanation.nodes:
        nodes[_feature(node, rows)].append(node)
    return {
        number: _from_page(number, same[0], pages[same[0].name])
        if same[0].name in pages
        else _from_prompt(number, same, explanation)
        for number, same in nodes.items()
    }


def _from_prompt(number: int, nodes: list[ExplainedNode], explanation: Explanation) -> dict[str, Any]:
    values = [0.0] * len(explanation.tokens)
    for node in nodes:
        values[node.position] = abs(node.activation)
    tokens = [_one_line(token.text) for token in explanation.tokens]
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
        "tokens": [_one_line(text) for text in (excerpt.before, excerpt.token, excerpt.after)],
        "tokens_acts_list": [0.0, abs(excerpt.value), 0.0],
        "train_token_ind": 1,
        "is_repeated_datapoint": False,
    }


def _one_line(text: str) -> str:
    """Text as circuit-tracer shows it on one line."""
    return text.translate({10: "\u23ce", 9: "\u2192", 13: "\u21b5"})


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

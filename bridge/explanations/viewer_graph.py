"""Convert an explanation to the graph and the features that circuit-tracer's front end and Neuronpedia draw, as plain JSON.

The weight of a link is the edge's `effect`: its contribution to d, the log-odds of the answer, in nats, to first order. If the
answer is compared with a contrast, an edge into the answer becomes two links: half of the effect into the answer, and minus half
into the contrast, so that their difference is the effect. A token's embedding channels and its bigram entry are summed into one
node per token. Links of effect 0 (into nodes that AbsTopK zeroes) are left out. The graph has the nodes of the opening circuit,
errors as error nodes, and groups as supernodes.

Both viewers colour activations from 0 up, and identify a feature by a number. Therefore a channel is two features, one for its
positive and one for its negative values, with distinct numbers, and the activation shown is the magnitude:

    index       (9 channel + kind) 2 + (value < 0)                   kind is its index in schema.NODE_KINDS
                1,000,000 + site                                     for an error
    feature     (row + index)(row + index + 1) / 2 + index           the Cantor pair of row and index
    influence   share of the summed |effect| that belongs to the node and to nodes of larger |effect|; 1 if not measured

Both viewers insert labels and tokens into the page as HTML, so a `<` that would open a tag is replaced by the fullwidth one;
`metadata.prompt` has the unchanged text.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bridge.errors import UserError
from bridge.explanations.explanation import Explanation
from bridge.explanations.parts import ExplainedNode, Token
from bridge.explanations.text import question
from bridge.models.schema import ERROR, MLP_KINDS, NODE_KINDS
from bridge.nodes.description import Excerpt, NodePage

FIRST_ERROR_INDEX = 1_000_000  # errors have the index FIRST_ERROR_INDEX + site, which is larger than the index of any channel
MAX_PINNED_NODES = 120  # number of nodes in the subgraph that is open at first, the strongest ones
_END = re.compile(r"(?:L(\d+)\.)?(\w+)\[(\d+)\]@(\d+)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


class ExportError(UserError):
    """An explanation, a name or a path that cannot be exported. The message is one line with the remedy."""


def parse_end(explanation: Explanation, name: str) -> dict[str, Any]:
    """Return layer (-1: none), kind, index and position of a node, or of an edge's end (also embedding, bigram or answer)."""
    match = _END.fullmatch(name)
    if match is None or int(match[4]) >= len(explanation.tokens):
        raise ExportError("the explanation", f"has a node {name!r} that is at no token of its prompt", "explain again")
    return {"layer": int(match[1] or -1), "kind": match[2], "index": int(match[3]), "position": int(match[4])}


def graph_json(explanation: Explanation, slug: str, scan: str, *, rows: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Return the graph: metadata, the state of the page, nodes and links; `rows` is the number of rows per block."""
    if len(explanation.tokens) < 2:
        raise ExportError("the prompt", "is a single token, and the viewers draw no node of such a prompt", "export ‹to› graphml")
    last, answer = len(explanation.tokens) - 1, _answer_row(explanation, rows)
    asked = (explanation.answer, *(() if explanation.contrast is None else (explanation.contrast,)))
    logits = [f"{answer}_{token.id}_{last}" for token in asked]
    into_answer = list(zip(logits, (0.5, -0.5) if len(logits) == 2 else (1.0,), strict=True))
    drawn = explanation.opening_nodes
    names = {node.id: _node_id(node, rows, answer) for node in drawn}
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for edge in explanation.edges:
        position = parse_end(explanation, edge.source)["position"]
        source = names.get(edge.source, f"E_{explanation.tokens[position].id}_{position}")
        for end, share in ((names[edge.target], 1.0),) if edge.target in names else into_answer:
            weights[source, end] += share * edge.effect
    links = [{"source": source, "target": end, "weight": weight} for (source, end), weight in weights.items() if weight]

    given: dict[str, float] = defaultdict(float)  # summed |weight| of the links from each node
    for (source, _), weight in weights.items():
        given[source] += abs(weight)
    nodes = [_token_node(position, token.id, given) for position, token in enumerate(explanation.tokens)]
    nodes += [_circuit_node(node, rows, answer) for node in drawn]
    scores = [node.pop("score") for node in nodes]
    nodes = [node | {"influence": share} for node, share in zip(nodes, _cumulative(scores), strict=True)]
    nodes += [_logit_node(explanation, token, answer) for token in asked]
    strongest = sorted(drawn, key=lambda node: -abs(node.effect or 0))[:MAX_PINNED_NODES]
    return {
        "metadata": {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": [_escape_tags(token.text) for token in explanation.tokens],
            "prompt": explanation.prompt,
            **extra,
        },
        "qParams": {
            "pinnedIds": [*(names[node.id] for node in strongest), *logits],
            "supernodes": _supernodes(explanation, {node.id: names[node.id] for node in strongest}),
            "linkType": "both",
            "clickedId": logits[0],
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def _answer_row(explanation: Explanation, rows: int) -> int:
    """Return the row above all blocks of the sparse model; their number is inferred from nodes and from edges into the answer."""
    answers = [parse_end(explanation, edge.target) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    above = [1 + node.layer for node in explanation.nodes if node.kind != ERROR]
    return rows * max([1, *above, *(answer["layer"] for answer in answers)]) + 1


def _row_and_index(node: ExplainedNode, rows: int, answer: int) -> tuple[int, int]:
    if node.kind == ERROR:  # in the row of the sublayer that reads its site, if blocks have two; the last below the answer
        return min(node.layer * rows // 2, answer - 1), FIRST_ERROR_INDEX + node.layer
    if node.kind not in NODE_KINDS:
        raise ExportError("the explanation", f"has a node {node.id!r} of the unknown kind {node.kind!r}", "explain again")
    row = rows * node.layer + (rows > 1 and node.kind in MLP_KINDS)
    return row, 2 * (len(NODE_KINDS) * node.index + NODE_KINDS.index(node.kind)) + (node.activation < 0)


def _feature(row: int, index: int) -> int:
    return (row + index) * (row + index + 1) // 2 + index


def _node_id(node: ExplainedNode, rows: int, answer: int) -> str:
    row, index = _row_and_index(node, rows, answer)
    return f"{row}_{index}_{node.position}"


def _node(name: str, feature: int, row: int | str, position: int, kind: str, clerp: str, **more: Any) -> dict[str, Any]:
    """Return a node in both viewers' format. jsNodeId is unique too, because some versions use it as the id."""
    return {
        "node_id": name,
        "jsNodeId": name,
        "feature": feature,
        "layer": str(row),
        "ctx_idx": position,
        "feature_type": kind,
        "clerp": clerp,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        **more,
    }


def _circuit_node(node: ExplainedNode, rows: int, answer: int) -> dict[str, Any]:
    if node.kind == ERROR:  # the viewers draw this type without a feature, and an error has no feature file
        kind, clerp = "mlp reconstruction error", f"error at site {node.layer}"
    else:  # only this type opens the panel of the feature
        label = f": {node.label}" if node.label else ""
        kind, clerp = "cross layer transcoder", _escape_tags(f"{node.name} {node.activation:+.2f}{label}")
    row, index = _row_and_index(node, rows, answer)
    numbers = {"activation": abs(node.activation), "score": abs(node.effect or 0.0)}
    return _node(_node_id(node, rows, answer), _feature(row, index), row, node.position, kind, clerp, **numbers)


def _token_node(position: int, token: int, given: Mapping[str, float]) -> dict[str, Any]:
    name = f"E_{token}_{position}"
    return _node(name, position, "E", position, "embedding", "", score=given.get(name, 0.0))


def _logit_node(explanation: Explanation, token: Token, row: int) -> dict[str, Any]:
    last, probability = len(explanation.tokens) - 1, _probability(explanation, token)
    shown = _escape_tags(token.text).replace("(p=", "(p\u2060=")  # the viewers read the probability after the first "(p="
    name, clerp = f"{row}_{token.id}_{last}", f'Output "{shown}" (p={probability:.3f})'
    known = {"token_prob": probability, "is_target_logit": token.id == explanation.answer.id, "influence": 0.0}
    return _node(name, token.id, row, last, "logit", clerp, **known)


def _probability(explanation: Explanation, token: Token) -> float:
    """Return a token's probability in the dense model: as listed; otherwise from d alone, or with a contrast, from d and the
    other token's listed probability (0 if it is not listed).
    """
    listed = {answer.token.id: answer.probability for answer in explanation.dense}
    if token.id in listed:
        return listed[token.id]
    if explanation.contrast is None:
        return 1 / (1 + math.exp(-explanation.dense_d))
    other, sign = (explanation.contrast, 1) if token.id == explanation.answer.id else (explanation.answer, -1)
    return listed.get(other.id, 0.0) * math.exp(sign * explanation.dense_d)


def _cumulative(scores: list[float]) -> list[float]:
    """Return, for each score, the share of the sum in scores that are at least as large, in (0, 1]; 1 for scores of 0."""
    score_n = np.array(scores)
    order_n = np.argsort(-score_n, kind="stable")
    share_n = np.ones(len(score_n))
    if score_n.sum() > 0:
        share_n[order_n] = np.minimum(score_n[order_n].cumsum() / score_n.sum(), 1)
    return np.where(score_n > 0, share_n, 1.0).tolist()


def _supernodes(explanation: Explanation, names: Mapping[str, str]) -> list[list[str]]:
    """Return the groups with at least two of the nodes in `names`, which maps ids to names in the graph."""
    groups = ((group, [names[node] for node in group.nodes if node in names]) for group in explanation.groups)
    return [[_encode_for_address(group.label or group.name), *members] for group, members in groups if len(members) > 1]


def _encode_for_address(text: str) -> str:
    """Return a label encoded for the page's address, which the viewers decode twice."""
    return _escape_tags(text.replace("%", "\uff05").encode(errors="replace").decode())


def _escape_tags(text: str) -> str:
    return _TAG.sub("\uff1c", text)


def graph_metadata(explanation: Explanation) -> dict[str, Any]:
    """Return the metadata of a graph: its origin, with the last part of paths only, and the meaning of its numbers."""
    where, report = explanation.provenance, explanation.report
    against = "" if explanation.contrast is None else "An edge into the answer is two links, half to each logit. "
    description = (
        f"{report.verdict.upper()}. {' '.join(report.reasons)} Question: {question(explanation)}. d is the log-odds in question. "
        f"A link's weight is what its edge adds to d, in nats. {against}Nodes are channels of a weight-sparse model coupled to "
        "the dense one; a channel has two features, one for its positive and one for its negative values. Errors are the parts "
        "of the dense residual that the sparse model misses."
    )
    settings: dict[str, Any] = {"dense": Path(where.dense).name, "dense_fingerprint": where.dense_fingerprint, "l0": where.l0}
    if where.coupling is not None:
        settings["coupling"] = Path(where.coupling).name
    return {
        "info": {"description": description, "generator": {"name": "bridge", "version": where.version}},
        "generation_settings": settings,
    }


# -- features -----------------------------------------------------------------------------------------------------------------


def features_json(explanation: Explanation, pages: Mapping[str, NodePage], *, rows: int) -> dict[int, dict[str, Any]]:
    """Return the features of the graph by number: from the channel's page, or from this prompt alone if it has no page."""
    nodes: dict[int, list[ExplainedNode]] = defaultdict(list)
    answer = _answer_row(explanation, rows)
    for node in explanation.opening_nodes:
        if node.kind != ERROR:
            nodes[_feature(*_row_and_index(node, rows, answer))].append(node)
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
    examples = {"strongest": map(_example, strongest), "over all nonzero values": map(_example, between)}
    known = [abs(each.value) for each in (*between, *strongest[:1])]
    most = max(known, default=0.0)
    spread = {}
    if known:  # only a few values from the whole text, so the percentiles are approximate
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
    """Return text on one line, as circuit-tracer shows it."""
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

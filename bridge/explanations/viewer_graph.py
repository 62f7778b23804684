"""An explanation as the graph that circuit-tracer's front end and Neuronpedia draw, and the features of its nodes, as plain JSON.

A link's weight is the edge's `effect`: what d, the log-odds of the answer, owes to it, in nats, to first order. Where the answer
is compared with a contrast, an edge into it is two links, half of the effect into the answer and minus half into the contrast,
whose difference is the effect. A token's embedding channels and its bigram entry are summed into one node per token; links of
effect 0 (into nodes that AbsTopK zeroes) are left out. The graph has the nodes of the opening circuit. Errors are error nodes,
groups are supernodes.

Both viewers colour activations from 0 up, and show a feature by a number. A channel is therefore two features, of its positive
and of its negative values, numbered apart from all others of the row, and the activation shown is the magnitude:

    index       (9 channel + kind) 2 + (value < 0)                   kind by its place in schema.KINDS
                1,000,000 + site                                     of an error
    feature     (row + index)(row + index + 1) / 2 + index           the Cantor pair of row and index
    influence   share of the summed |effect| that the nodes of larger |effect| have, and the node itself

A node whose ablation was not measured has the influence 1. Both viewers put labels and tokens into the page as HTML, so a `<`
that would open a tag becomes the fullwidth one there; `metadata.prompt` has the text as it is.
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
from bridge.models.schema import ERROR, KINDS, MLP_KINDS
from bridge.nodes.description import Excerpt, NodePage

ERRORS = 1_000_000  # the index from which on errors are numbered, by site: more than there are channels
PINNED = 120  # nodes of the subgraph that is open at first, the strongest
_END = re.compile(r"(?:L(\d+)\.)?(\w+)\[(\d+)\]@(\d+)")
_TAG = re.compile(r"<(?=[A-Za-z/!?])")


class ExportError(UserError):
    """An explanation, a name or a place that cannot be exported, in one line with the remedy."""


def place(explanation: Explanation, name: str) -> dict[str, Any]:
    """Layer (-1: none), kind, index and position of a node, or of an end of an edge that is none (embedding, bigram, answer)."""
    match = _END.fullmatch(name)
    if match is None or int(match[4]) >= len(explanation.tokens):
        raise ExportError("the explanation", f"has a node {name!r} that is at no token of its prompt", "explain again")
    return {"layer": int(match[1] or -1), "kind": match[2], "index": int(match[3]), "position": int(match[4])}


def graph_json(explanation: Explanation, slug: str, scan: str, *, rows: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The graph: metadata, the state of the page, nodes and links; `rows` to a block."""
    if len(explanation.tokens) < 2:
        raise ExportError("the prompt", "is a single token, of which the viewers drop every node", "export ‹to› graphml")
    last, answer = len(explanation.tokens) - 1, _answer_row(explanation, rows)
    asked = (explanation.answer, *(() if explanation.contrast is None else (explanation.contrast,)))
    logits = [f"{answer}_{token.id}_{last}" for token in asked]
    into_answer = list(zip(logits, (0.5, -0.5) if len(logits) == 2 else (1.0,), strict=True))
    drawn = opened(explanation)
    names = {node.id: _node_id(node, rows, answer) for node in drawn}
    weights: dict[tuple[str, str], float] = defaultdict(float)
    for edge in explanation.edges:
        position = place(explanation, edge.source)["position"]
        source = names.get(edge.source, f"E_{explanation.tokens[position].id}_{position}")
        for end, share in ((names[edge.target], 1.0),) if edge.target in names else into_answer:
            weights[source, end] += share * edge.effect
    links = [{"source": source, "target": end, "weight": weight} for (source, end), weight in weights.items() if weight]

    given: dict[str, float] = defaultdict(float)  # what d owes to a token, through whichever of its channels
    for (source, _), weight in weights.items():
        given[source] += abs(weight)
    nodes = [_token_node(position, token.id, given) for position, token in enumerate(explanation.tokens)]
    nodes += [_circuit_node(node, rows, answer) for node in drawn]
    scores = [node.pop("score") for node in nodes]
    nodes = [node | {"influence": share} for node, share in zip(nodes, _cumulative(scores), strict=True)]
    nodes += [_logit_node(explanation, token, answer) for token in asked]
    strongest = sorted(drawn, key=lambda node: -abs(node.effect or 0))[:PINNED]
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
            "pinnedIds": [*(names[node.id] for node in strongest), *logits],
            "supernodes": _supernodes(explanation, {node.id: names[node.id] for node in strongest}),
            "linkType": "both",
            "clickedId": logits[0],
            "sg_pos": "",
        },
        "nodes": nodes,
        "links": links,
    }


def opened(explanation: Explanation) -> list[ExplainedNode]:
    """The nodes of the opening circuit, errors included; nodes of the larger circuits are listed, not drawn."""
    return [node for node in explanation.nodes if node.level <= explanation.opening]


def _answer_row(explanation: Explanation, rows: int) -> int:
    """The row above those of all blocks of the sparse model, as far as edges into the answer or nodes show how many there are."""
    answers = [place(explanation, edge.target) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    above = [1 + node.layer for node in explanation.nodes if node.kind != ERROR]
    return rows * max([1, *above, *(answer["layer"] for answer in answers)]) + 1


def _row_and_index(node: ExplainedNode, rows: int, answer: int) -> tuple[int, int]:
    if node.kind == ERROR:  # before the sublayer that reads its site, where blocks have two; the last below the answer
        return min(node.layer * rows // 2, answer - 1), ERRORS + node.layer
    if node.kind not in KINDS:
        raise ExportError("the explanation", f"has a node {node.id!r} of a kind {node.kind!r} that there is not", "explain again")
    row = rows * node.layer + (rows > 1 and node.kind in MLP_KINDS)
    return row, 2 * (len(KINDS) * node.index + KINDS.index(node.kind)) + (node.activation < 0)


def _feature(row: int, index: int) -> int:
    return (row + index) * (row + index + 1) // 2 + index


def _node_id(node: ExplainedNode, rows: int, answer: int) -> str:
    row, index = _row_and_index(node, rows, answer)
    return f"{row}_{index}_{node.position}"


def _node(name: str, feature: int, row: int | str, position: int, kind: str, clerp: str, **more: Any) -> dict[str, Any]:
    """A node as both viewers read it; some versions take jsNodeId for the id, so it is unique too."""
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
    if node.kind == ERROR:  # a type that the viewers draw without a feature, of which there is no file
        kind, clerp = "mlp reconstruction error", f"error at site {node.layer}"
    else:  # the only type that opens the feature's panel
        label = f": {node.label}" if node.label else ""
        kind, clerp = "cross layer transcoder", _plain(f"{node.name} {node.activation:+.2f}{label}")
    row, index = _row_and_index(node, rows, answer)
    numbers = {"activation": abs(node.activation), "score": abs(node.effect or 0.0)}
    return _node(_node_id(node, rows, answer), _feature(row, index), row, node.position, kind, clerp, **numbers)


def _token_node(position: int, token: int, given: Mapping[str, float]) -> dict[str, Any]:
    name = f"E_{token}_{position}"
    return _node(name, position, "E", position, "embedding", "", score=given.get(name, 0.0))


def _logit_node(explanation: Explanation, token: Token, row: int) -> dict[str, Any]:
    last, probability = len(explanation.tokens) - 1, _probability(explanation, token)
    shown = _plain(token.text).replace("(p=", "(p\u2060=")  # the viewers read the probability behind the first of these
    name, clerp = f"{row}_{token.id}_{last}", f'Output "{shown}" (p={probability:.3f})'
    known = {"token_prob": probability, "is_target_logit": token.id == explanation.answer.id, "influence": 0.0}
    return _node(name, token.id, row, last, "logit", clerp, **known)


def _probability(explanation: Explanation, token: Token) -> float:
    """A token's probability in the dense model: as listed, else from d, or from the other token's if that is d's contrast.

    0 where neither is known.
    """
    listed = {answer.token.id: answer.probability for answer in explanation.dense}
    if token.id in listed:
        return listed[token.id]
    if explanation.contrast is None:
        return 1 / (1 + math.exp(-explanation.dense_d))
    other, sign = (explanation.contrast, 1) if token.id == explanation.answer.id else (explanation.answer, -1)
    return listed.get(other.id, 0.0) * math.exp(sign * explanation.dense_d)


def _cumulative(scores: list[float]) -> list[float]:
    """Share of the sum in scores of at least each score's size; 1 for scores of 0. In (0, 1]."""
    score_n = np.array(scores)
    order_n = np.argsort(-score_n, kind="stable")
    share_n = np.ones(len(score_n))
    if score_n.sum() > 0:
        share_n[order_n] = np.minimum(score_n[order_n].cumsum() / score_n.sum(), 1)
    return np.where(score_n > 0, share_n, 1.0).tolist()


def _supernodes(explanation: Explanation, names: Mapping[str, str]) -> list[list[str]]:
    """The groups that have several of some nodes, whose names are given by id."""
    groups = ((group, [names[node] for node in group.nodes if node in names]) for group in explanation.groups)
    return [[_in_address(group.label or group.name), *members] for group, members in groups if len(members) > 1]


def _in_address(text: str) -> str:
    """A label encoded for the page's address, which is decoded twice."""
    return _plain(text.replace("%", "\uff05").encode(errors="replace").decode())


def _plain(text: str) -> str:
    return _TAG.sub("\uff1c", text)


def origin(explanation: Explanation) -> dict[str, Any]:
    """The metadata of a graph: its origin, folders by their names alone, and the meaning of its numbers."""
    where, report = explanation.provenance, explanation.report
    against = "" if explanation.contrast is None else "into the answer, half to each logit. "
    description = (
        f"{report.verdict.upper()}. {' '.join(report.reasons)} Asked: {question(explanation)}. d is the log-odds in question. "
        f"Links are what d owes to an edge, in nats; {against}Nodes are channels of a weight-sparse model coupled to the dense "
        "one, two features each: of positive and of negative values. Errors are what that model misses of the dense one."
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
    """Every feature of the graph by number: from the channel's page, or from this prompt alone where there is none."""
    nodes: dict[int, list[ExplainedNode]] = defaultdict(list)
    answer = _answer_row(explanation, rows)
    for node in opened(explanation):
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
    """Text as circuit-tracer shows it, on one line."""
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

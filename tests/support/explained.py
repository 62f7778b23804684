"""Page data made up for tests of what shows it: the shape of an explanation's JSON, of any size, with none of its meaning."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

KINDS = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out")
READ_BY = {
    "attn_in": ("q", "k", "v"),
    "v": ("attn_out",),
    "mlp_in": ("mlp_act",),
    "mlp_act": ("mlp_out",),
    "attn_out": ("mlp_in",),
}
LEVELS = (0.8, 0.9, 0.95, 0.99, None)
OPENING = 1
SIZES = (0.6, 1.0, 2.5, 40.0, 400.0)  # of the nested circuits, in multiples of the opening one


def made_up(
    nodes: int = 20,
    tokens: int = 9,
    *,
    layers: int = 4,
    above: float = 1.5,
    errors: int = 1,
    contrast: bool = False,
    attention: bool = True,
    backup: bool = False,
    explained: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The data of a page: an opening circuit of so many nodes (errors among them) on a prompt of so many tokens.

    `above` times as many nodes are listed of the level above it. Where not `explained` nothing was searched: the span is too
    small. Every text of it is harmless, and `Explanation.from_json` reads it.
    """
    draw = random.Random(seed)
    nodes = nodes if explained else 0
    texts = [draw.choice(("def", " read", "(", "self", "):", "\n    ", " while", " True", "x1")) for _ in range(tokens)]
    opened = [_node(draw, place, tokens, layers, place < nodes - min(errors, nodes)) for place in range(nodes)]
    opened = list({node["id"]: node for node in opened}.values())
    more = [_node(draw, nodes + place, tokens, layers, True, opened=False) for place in range(int(above * nodes))]
    listed = sorted(opened + more, key=lambda node: (node["layer"], (*KINDS, "error").index(node["kind"]), node["position"]))
    for place, node in enumerate(sorted(opened, key=lambda node: -abs(node["effect"]))):
        node["level"] = 0 if place < SIZES[0] * len(opened) else OPENING
    groups = _groups(draw, [node for node in listed if node["effect"] is not None])
    edges = _edges(draw, [node for node in listed if node["effect"] is not None], tokens, layers)
    n_errors = sum(node["kind"] == "error" for node in opened)
    nested = (
        [_nested(place, len(opened), len(listed), n_errors) for place in range(len(LEVELS))]
        if explained
        else [_nested(1, 0, 0, 0)]
    )
    nothing = -7.2 if explained else 1.8
    explanation: dict[str, Any] = {
        "format": 3,
        "prompt": "".join(texts),
        "tokens": [{"id": place, "text": text} for place, text in enumerate(texts)],
        "answer": {"id": 900, "text": ":"},
        "contrast": {"id": 901, "text": " and"} if contrast else None,
        "dense": [_answer(900, ":", 0.9), _answer(901, " and", 0.05), _answer(902, " or", 0.01)],
        "sparse": [_answer(900, ":", 0.7), _answer(901, " and", 0.1), _answer(903, " is", 0.05)],
        "dense_d": 2.2,
        "sparse_d": 1.9,
        "nothing_d": nothing,
        "report": _report(draw, explained, [node["name"] for node in opened[:40]]),
        "nested": nested,
        "opening": OPENING if explained else 0,
        "nodes": listed,
        "edges": edges,
        "groups": groups,
        "group_edges": _group_edges(edges, {node["id"]: node for node in listed}, tokens),
        "attention": [_head(draw, layer, tokens) for layer in range(layers)] if attention and explained else [],
        "attention_left_out": 3 if explained else 0,
        "counts": {
            "nodes": len(opened), "errors": n_errors, "edges": 3 * nodes, "edges_before": 5 * nodes,
            "edges_faithfulness": 0.9 if nodes else None, "weights": 2 * nodes, "embedding": 1, "unembedding": 1, "bigram": 1,
            "active": 400 * max(1, nodes),
        },
        "replacement": 0.71,
        "completeness": 0.88,
        "backup": {"left": 0.4, "nodes": 31, "strongest": ["L1.mlp_out[3]@2", "L2.attn_out[4]@5"]} if backup else None,
        "config": _config(),
        "provenance": {
            "dense": "checkpoints/dense", "dense_fingerprint": "d" * 64, "coupling": "checkpoints/bridge", "l0": 0.03, "seed": 0,
            "version": "0.1.0", "reference": "4096 tokens of held-out text", "coupling_fingerprint": f"{seed:064}",
        },
        "agree": True,
        "span": 2.2 - nothing,
    }  # fmt: skip
    pages = {node["name"]: _page(draw, node) for node in listed[:500] if node["kind"] != "error"}
    return {"explanation": explanation, "nodes": pages, "labels": {}, "served": False, "job": None}


def _answer(token: int, text: str, probability: float) -> dict[str, Any]:
    return {"token": {"id": token, "text": text}, "probability": probability}


def _node(draw: random.Random, place: int, tokens: int, layers: int, is_node: bool, *, opened: bool = True) -> dict[str, Any]:
    layer = draw.randrange(layers)
    kind, index = (draw.choice(KINDS), place) if is_node else ("error", 0)
    position = max(0, tokens - 1 - int(draw.expovariate(1.2)))
    name = f"L{layer}.{kind}[{index}]" if is_node else f"error[{layer}]"  # of an error the layer is its site
    return {
        "id": f"{name}@{position}", "name": name, "layer": layer, "kind": kind, "index": index, "position": position,
        "activation": draw.gauss(0, 3), "mean": draw.gauss(0, 0.5), "effect": draw.gauss(0, 1) ** 3 / 4 if opened else None,
        "level": OPENING if opened else OPENING + 1, "group": None, "label": f"after 'x{place}'" if is_node else None,
    }  # fmt: skip


def _nested(place: int, opened: int, listed: int, errors: int) -> dict[str, Any]:
    asked = LEVELS[place]
    reached = 0.999 if asked is None else asked + 0.02 * (1 - asked)
    first = max(0, round(SIZES[0] * opened) - errors)
    within = (first, opened - errors, listed - errors)  # what is listed; larger ones are only counted
    return {
        "asked": asked, "nodes": within[place] if place < 3 else round(SIZES[place] * opened), "errors": errors if place else 0,
        "faithfulness": reached, "miss": 9.4 * (1 - reached), "kl": 0.5 / (1 + place) ** 2, "supersets_mean": reached - 0.01,
        "supersets_rms": 1.5 * (1 - reached), "supersets_worst": reached - 0.2, "adversary": 0.4 if place == OPENING else None,
        "left": 0.15, "error_share": 0.06 if place else 0.0, "within": True,
    }  # fmt: skip


def _groups(draw: random.Random, nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups of nodes of one layer, kind and position (attention and mlp are kinds), every error one; nodes are told theirs."""
    parted: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for node in nodes:
        part = "error" if node["kind"] == "error" else "mlp" if node["kind"].startswith("mlp") else "attention"
        parted.setdefault((node["layer"], part, node["position"]), []).append(node)
    groups = []
    for number, ((layer, part, position), members) in enumerate(parted.items()):
        for node in members:
            node["group"] = number
        name = f"error at {position}" if part == "error" else f"L{layer} {part} at {position}: promotes ':'"
        groups.append(
            {
                "id": number, "name": name, "nodes": [node["id"] for node in members],
                "positions": [position], "layers": [layer], "kind": part, "effect": sum(node["effect"] for node in members),
                "dense_effect": None if number % 4 == 3 else draw.gauss(0, 0.5),
                "sparse_effect": None if number % 4 == 3 else draw.gauss(0, 0.5), "label": None,
            }
        )  # fmt: skip
    return groups


def _group_edges(edges: list[dict[str, Any]], node_of: dict[str, dict[str, Any]], tokens: int) -> list[dict[str, Any]]:
    def end(node_id: str) -> str:
        name, _, position = node_id.partition("@")
        if name.startswith(("embedding", "bigram")):
            return f"input:{position}"
        if ".answer[" in name:
            return "answer"
        node = node_of[node_id]
        return f"error:{node['layer']}@{position}" if node["kind"] == "error" else f"group:{node['group']}"

    sums: dict[tuple[str, str], tuple[float, int]] = {}
    for edge in edges:
        ends = end(edge["source"]), end(edge["target"])
        effect, count = sums.get(ends, (0.0, 0))
        if ends[0] != ends[1]:
            sums[ends] = effect + edge["effect"], count + 1
    found = [{"source": s, "target": t, "effect": effect, "edges": n} for (s, t), (effect, n) in sums.items()]
    return sorted(found, key=lambda edge: -abs(edge["effect"]))


def _edges(draw: random.Random, nodes: list[dict[str, Any]], tokens: int, layers: int) -> list[dict[str, Any]]:
    last = f"L{layers}.answer[900]@{tokens - 1}"
    by_kind: dict[tuple[int, str], list[str]] = {}
    for node in nodes:
        by_kind.setdefault((node["layer"], node["kind"]), []).append(node["id"])
    inside = [node for node in nodes if node["kind"] != "error"]
    edges = [("embedding[3]@0", inside[0]["id"], "embedding"), (f"bigram[7]@{tokens - 1}", last, "bigram")] if inside else []
    for node in nodes:
        for kind in READ_BY.get(node["kind"], ()):
            targets = by_kind.get((node["layer"], kind), [])
            edges += [(node["id"], target, "weight") for target in draw.sample(targets, min(3, len(targets)))]
        later = [
            id for (layer, kind), ids in by_kind.items() if layer > node["layer"] and kind in ("attn_in", "mlp_in") for id in ids
        ]
        if node["kind"] in ("attn_out", "mlp_out", "error"):
            edges += [(node["id"], target, "residual") for target in draw.sample(later, min(2, len(later)))]
        if node["kind"] in ("attn_in", "mlp_in"):
            edges.append((f"embedding[{node['index'] % 8}]@{node['position']}", node["id"], "embedding"))
        if node["kind"] in ("attn_out", "mlp_out", "error"):
            edges.append((node["id"], last, "unembedding"))
    found = [
        {"source": source, "target": target, "kind": kind, "weight": draw.gauss(0, 1), "effect": draw.gauss(0, 0.4) ** 3}
        for source, target, kind in edges
    ]
    return sorted(found, key=lambda edge: -abs(edge["effect"]))[:5000]


def _measure(key: str, name: str, value: float | None, op: str, bound: float, **more: Any) -> dict[str, Any]:
    control = None if value is None else {"what": "matched", "draws": 8, "mean": 0.05, "bar": 0.3, "bar_is": "best"}
    criterion = {"op": op, "bound": bound, "beyond_control": False, "control_bound": None}
    passed = None if value is None else value >= bound if op == ">=" else value <= bound
    given = {"criterion": criterion, "control": control, "interval": None, "ceiling": None, "note": "", "points": []}
    return {"key": key, "name": name, "value": value, **given, **more, "passed": passed}


def _report(draw: random.Random, explained: bool, names: Iterable[str]) -> dict[str, Any]:
    """Some measures of the form that evidence has; their keys and rules are made up as well."""
    if not explained:
        span = _measure("span", "span to explain, nats", 0.4, ">=", 1.0, control=None)
        rule = {"verdict": "undecided", "needs": ["span"], "says": "There is something to explain.", "refuted": "no explanation"}
        reasons = ["Span to explain, nats is 0.4, not >= 1."]
        return {"measures": [span], "rules": [rule], "verdict": "no explanation", "reasons": reasons}
    sites = [{"label": f"site {site}", "values": {"dense": 0.6 + site / 100, "sparse": 0.8}} for site in range(1, 9)]
    nodes = [{"label": name, "values": {"sparse": draw.gauss(0, 1), "dense": draw.gauss(0, 1)}} for name in names]
    measures = [
        _measure("span", "span to explain, nats", 9.4, ">=", 1.0, control=None),
        _measure("faithfulness", "faithfulness of the circuit alone", 0.93, ">=", 0.9),
        _measure("supersets_mean", "faithfulness in random supersets, mean", 0.95, ">=", 0.9),
        _measure("supersets_worst", "faithfulness in random supersets, worst", 0.74, ">=", 0.6),
        _measure("adversary", "faithfulness, adversarial superset", 0.41, ">=", 0.0, criterion=None) | {"passed": None},
        _measure("left", "share of the span left without it", 0.15, "<=", 0.2, note="matched nodes deleted leave .97"),
        _measure("dense_loss", "dense over sparse loss, least site", 0.71, ">=", 0.6, interval=[0.6, 0.8], points=sites),
        _measure("profile", "rank correlation of effects", 0.64, ">=", 0.6, interval=[0.46, 0.79], points=nodes),
        _measure("patching", "share of the interchange", None, ">=", 0.5, ceiling=None, note="no counterfactual was given"),
    ]
    rules = [
        {"verdict": "undecided", "needs": ["span"], "says": "There is something to explain.", "refuted": "no explanation"},
        {
            "verdict": "behavioural", "needs": ["faithfulness", "supersets_mean", "supersets_worst", "left"],
            "says": "The circuit alone keeps the answer.", "refuted": "refuted",
        },
        {"verdict": "representational", "needs": ["dense_loss"], "says": "Its deletion takes the dense answer.", "refuted": None},
        {"verdict": "mechanistic support", "needs": ["profile", "patching"], "says": "All tests hold.", "refuted": None},
    ]  # fmt: skip
    reasons = [
        "Its deletion takes the dense answer.",
        "Share of the interchange could not be judged (no counterfactual was given).",
    ]
    return {"measures": measures, "rules": rules, "verdict": "representational", "reasons": reasons}


def _config() -> dict[str, Any]:
    return {
        "levels": [0.8, 0.9, 0.95, 0.99], "opens_at": 0.9, "kl": 0.05, "superset_mean": 1.0, "superset_rms": 2.0,
        "superset_worst": 3.5, "left": 0.2, "least_span": 1.0, "room": 0.7, "densities": [0.15, 0.3, 0.45, 0.6, 0.75, 0.9],
        "alphas": 8, "steps": 30, "error_price": 1000, "supersets": 3, "rate": 0.1, "attempts": 2,
        "rounds": 8, "sweeps": 2, "seed": 0,
    }  # fmt: skip


def _head(draw: random.Random, layer: int, tokens: int) -> dict[str, Any]:
    weights = [draw.random() ** 4 for _ in range(tokens)]
    reads = [
        {
            "position": position, "weight": 0.8 * weight / sum(weights), "score": draw.gauss(0, 2),
            "terms": [{"channel": 3, "query_value": 1.5, "key_value": -2.0, "product": -3.0}],
            "moved": [{"node": f"L{layer}.v[7]@{position}", "value": 1.2, "effect": 0.3}],
            "others": 0.1, "effect": 0.3,
        }
        for position, weight in enumerate(weights)
    ]  # fmt: skip
    effects = {"effect": 0.7, "pattern_effect": 0.4, "value_effect": 0.2, "interaction": 0.1}
    return {"layer": layer, "head": layer, "query": tokens - 1, "sink": 0.2, "reads": reads, **effects}


def _page(draw: random.Random, node: dict[str, Any]) -> dict[str, Any]:
    def context(value: float) -> dict[str, Any]:
        return {
            "value": value,
            "quantile": None,
            "row": 0,
            "position": 9,
            "before": "def f(x):\n    ",
            "token": "while",
            "after": " x:",
        }

    token = {"id": 1, "text": " if", "score": 0.4}
    return {
        "name": node["name"], "head": 0 if node["kind"] in "qkv" else None, "n_tokens": 32768, "mean": 0.1, "deviation": 1.2,
        "active": 0.3, "high": [context(9 - place + draw.random()) for place in range(8)], "low": [context(-3.0)],
        "tokens": "promoted", "promotes": [token] * 6, "demotes": [token] * 6,
        "dense": {"site": 1, "read_by": "mlp", "length": 0.2, "promotes": [token] * 6, "demotes": [token] * 6},
        "quantiles": [], "inputs": [], "outputs": [], "n_inputs": 0, "n_outputs": 0, "label": node["label"],
        "summary": f"at 'while' ({node['name']})",
    }  # fmt: skip


def hostile_texts(count: int = 500, seed: int = 0) -> list[str]:
    """Strings that would do harm as markup, as script, as JSON, or to the text around them; the first ones known attacks."""
    known = [
        "<script>alert(1)</script>", "</script><script>alert(1)</script>", "</title><script>alert(1)</script>", "<!--", "-->",
        "]]>", "<!--<script>", "<img src=x onerror=alert(1)>", "<svg/onload=alert(1)>", "\"><b onmouseover=alert(1)>",
        "' onfocus='alert(1)", "javascript:alert(1)", "${alert(1)}", "`;alert(1)//", "\\u003cscript\\u003e", "&lt;script&gt;",
        "&#x3C;", "{{data}}", "{{script}}", "\u2028alert(1)", "\u2029", "\u202egnp.exe", "\u2066\u2067", "\x00", "\x1b[31m",
        "\x0d\x0a", "\ud800", "\udfff\ud800", "\ufeff", "e\u0301" * 40, "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "__proto__", "constructor", "toString", "", " ", "\xa0", "a" * 400, "</style><style>*{display:none}</style>",
        "<base href=//evil>", "<meta http-equiv=refresh content=0>", "<iframe srcdoc=x>",
    ]  # fmt: skip
    draw = random.Random(seed)
    alphabet = "<>&\"'`/\\={}()[]$;:!-abx \n\t\u2028\u202e\u0301\ufffe\U0001f600"
    made = ["".join(draw.choice(alphabet) for _ in range(draw.randrange(1, 24))) for _ in range(count - len(known))]
    return known + made


def hostile(data: dict[str, Any]) -> dict[str, Any]:
    """Page data in which every text that may come from a user, a model or a corpus is hostile."""
    texts = hostile_texts()
    explanation = data["explanation"]
    for place, token in enumerate(explanation["tokens"]):
        token["text"] = texts[place % len(texts)]
    explanation["prompt"] = "".join(token["text"] for token in explanation["tokens"])
    for place, answer in enumerate([*explanation["dense"], *explanation["sparse"]]):
        answer["token"]["text"] = texts[place]
    explanation["answer"]["text"], explanation["contrast"] = texts[0], {"id": 901, "text": texts[7]}
    explanation["report"]["reasons"] = texts[:4]
    for place, measure in enumerate(explanation["report"]["measures"]):
        measure["note"] = texts[place % len(texts)]
        for point in measure["points"]:
            point["label"] = texts[place % len(texts)]
    for place, group in enumerate(explanation["groups"]):
        group["name"], group["label"] = texts[place % len(texts)], texts[(place + 1) % len(texts)]
    explanation["backup"] = {"left": 0.4, "nodes": 31, "strongest": texts[:5]}
    explanation["provenance"]["dense"] = texts[1]
    for place, node in enumerate(explanation["nodes"]):
        node["label"] = texts[place % len(texts)]
    for place, page in enumerate(data["nodes"].values()):
        page["label"] = page["summary"] = page["description"] = texts[place % len(texts)]
        for context in (*page["high"], *page["low"]):
            context["before"], context["token"], context["after"] = (texts[(place + step) % len(texts)] for step in range(3))
        page["promotes"] = [{"id": place, "text": texts[place % len(texts)], "score": 1.0}]
    data["labels"] = {node["name"]: texts[place] for place, node in enumerate(explanation["nodes"][:10])}
    return data

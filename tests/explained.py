"""Page data made up for tests of what shows it: the shape of an explanation's JSON, of any size, with none of its meaning."""

from __future__ import annotations

import random
from typing import Any

KINDS = ("attn_in", "q", "k", "v", "attn_out", "mlp_in", "mlp_act", "mlp_out")
READ_BY = {
    "attn_in": ("q", "k", "v"),
    "v": ("attn_out",),
    "mlp_in": ("mlp_act",),
    "mlp_act": ("mlp_out",),
    "attn_out": ("mlp_in",),
}


def made_up(
    nodes: int = 20,
    tokens: int = 9,
    *,
    layers: int = 4,
    levels: int = 3,
    attention: bool = True,
    card: bool = True,
    seed: int = 0,
) -> dict[str, Any]:
    """The data of a page: a circuit of so many nodes on a prompt of so many tokens, every text of it harmless."""
    draw = random.Random(seed)
    texts = [draw.choice(("def", " read", "(", "self", "):", "\n    ", " while", " True", "x1")) for _ in range(tokens)]
    listed = [_node(draw, place, tokens, layers, nodes) for place in range(nodes)]
    listed = list({node["id"]: node for node in listed}.values())
    for place, node in enumerate(sorted(listed, key=lambda node: -abs(node["effect"] or 0))):
        node["level"] = min(levels - 1, place * levels // max(1, len(listed)))
    explanation: dict[str, Any] = {
        "prompt": "".join(texts),
        "tokens": [{"id": place, "text": text} for place, text in enumerate(texts)],
        "target": {"id": 900, "text": ":"},
        "contrast": {"id": 901, "text": " and"},
        "dense": [_answer(900, ":", 0.9), _answer(901, " and", 0.05), _answer(902, " or", 0.01)],
        "sparse": [_answer(900, ":", 0.7), _answer(901, " and", 0.1), _answer(903, " is", 0.05)],
        "dense_difference": 2.9,
        "sparse_difference": 1.9,
        "agree": True,
        "faithfulness": _faithfulness(draw, listed),
        "nodes": listed,
        "edges": _edges(draw, listed, tokens, layers),
        "counts": {"nodes": len(listed), "edges": 3 * nodes, "weights": 2 * nodes, "embedding": 1, "unembedding": 1, "bigram": 1},
        "searched": {"active": 10 * nodes, "candidates": 20 * nodes, "silenced": True, "complete": True},
        "provenance": {
            "dense": "checkpoints/dense", "dense_fingerprint": "d" * 64, "coupling": "checkpoints/bridge", "l0": 0.03, "seed": 0,
            "version": "0.1.0", "reference": "4096 tokens of held-out text", "coupling_fingerprint": f"{seed:064}",
        },
    }  # fmt: skip
    if levels > 1:
        counts = [sum(node["level"] <= level for node in listed) for level in range(levels)]
        explanation["levels"] = [{"nodes": count, "kl": 0.5 / (1 + level), "share": 0.9} for level, count in enumerate(counts)]
    explanation["attention"] = [_head(draw, layer, tokens) for layer in range(layers)] if attention else []
    explanation["card"] = _card() if card else None
    pages = {node["name"]: _page(draw, node) for node in listed[:500]}
    return {"explanation": explanation, "nodes": pages, "labels": {}, "served": False, "job": None, "pending": False}


def _answer(token: int, text: str, probability: float) -> dict[str, Any]:
    return {"token": {"id": token, "text": text}, "probability": probability}


def _node(draw: random.Random, place: int, tokens: int, layers: int, nodes: int) -> dict[str, Any]:
    layer, kind, index = draw.randrange(layers), draw.choice(KINDS), place
    position = max(0, tokens - 1 - int(draw.expovariate(1.2)))
    effect = draw.gauss(0, 1) ** 3 / 4 if place < max(10, 3 * nodes // 4) else None
    name = f"L{layer}.{kind}[{index}]"
    return {
        "id": f"{name}@{position}", "name": name, "layer": layer, "kind": kind, "index": index, "position": position,
        "activation": draw.gauss(0, 3), "mean": draw.gauss(0, 0.5), "importance": None if effect is None else abs(effect) / 3,
        "effect": effect, "label": f"after 'x{place}'",
    }  # fmt: skip


def _edges(draw: random.Random, nodes: list[dict[str, Any]], tokens: int, layers: int) -> list[dict[str, Any]]:
    last = f"L{layers}.answer[900]@{tokens - 1}"
    by_kind: dict[tuple[int, str], list[str]] = {}
    for node in nodes:
        by_kind.setdefault((node["layer"], node["kind"]), []).append(node["id"])
    edges = [("embedding[3]@0", nodes[0]["id"], "embedding"), (f"bigram[7]@{tokens - 1}", last, "bigram")] if nodes else []
    for node in nodes:
        for kind in READ_BY.get(node["kind"], ()):
            targets = by_kind.get((node["layer"], kind), [])
            edges += [(node["id"], target, "weight") for target in draw.sample(targets, min(3, len(targets)))]
        if node["kind"] in ("attn_out", "mlp_out"):
            edges.append((node["id"], last, "unembedding"))
    found = [
        {"source": source, "target": target, "kind": kind, "weight": draw.gauss(0, 1), "effect": draw.gauss(0, 0.4) ** 3}
        for source, target, kind in edges
    ]
    return sorted(found, key=lambda edge: -abs(edge["effect"]))[:5000]


def _measure(
    name: str, value: float | None, mean: float, bar: float, aim: str, passed: bool | None, **more: Any
) -> dict[str, Any]:
    control = None if value is None else {"what": "random", "draws": 20, "mean": mean, "bar": bar, "bar_is": "best"}
    return {"name": name, "value": value, "control": control, "aim": aim, "passed": passed, "note": "", **more}


def _faithfulness(draw: random.Random, nodes: list[dict[str, Any]]) -> dict[str, Any]:
    effects = [
        {"node": node["id"], "inside": True, "site": node["layer"] + 1, "sparse": node["effect"], "dense": draw.gauss(0, 0.3)}
        for node in nodes[:60]
        if node["effect"] is not None
    ]
    return {
        "agreement": _measure("KL(dense, sparse)", 0.22, 0.39, 0.8, "same answer", True),
        "kl_kept": _measure("KL of the circuit alone", 0.024, 4.2, 2.9, "<= 0.1, below random", True),
        "share_kept": _measure("share of D it keeps", 0.99, 1.2, 0.98, "0.9 to 1.1", True),
        "company_mean": _measure("KL in random company, mean", 0.06, 3.0, 3.0, "<= 0.2, below random", True),
        "company_worst": _measure("KL in random company, worst", 0.19, 3.0, 5.1, "<= 0.6", True),
        "kl_lost": _measure("KL with the circuit deleted", 4.8, 0.24, 0.74, "above random", True),
        "share_lost": _measure("share of D left without it", 1.3, 0.96, 0.68, "<= 0", False),
        "profile": _measure("rank correlation in dense", 0.64, 0.02, 0.18, ">= 0.6, above the null", True),
        "profile_interval": [0.46, 0.79],
        "profile_p": 0.0005,
        "effects": effects,
        "verdict": "behavioural",
        "reasons": ["The circuit alone keeps the answer.", "In the dense model its effects rank alike."],
    }


def _head(draw: random.Random, layer: int, tokens: int) -> dict[str, Any]:
    weights = [draw.random() ** 4 for _ in range(tokens)]
    reads = [
        {
            "position": position, "weight": 0.8 * weight / sum(weights), "score": draw.gauss(0, 2),
            "terms": [{"channel": 3, "query_value": 1.5, "key_value": -2.0, "product": -3.0}],
            "moved": [{"node": f"L{layer}.v[7]@{position}", "value": 1.2, "effect": 0.3}],
        }
        for position, weight in enumerate(weights)
    ]  # fmt: skip
    effects = {"effect": 0.7, "pattern_effect": 0.4, "value_effect": 0.2, "interaction": 0.1}
    return {"layer": layer, "head": layer, "query": tokens - 1, "sink": 0.2, "reads": reads, **effects}


def _card() -> dict[str, Any]:
    ceiling = {"what": "all nodes", "draws": 64, "mean": 0.9, "bar": 0.9, "bar_is": "mean"}
    tests = [
        _measure(
            "share of the full swap",
            0.61,
            0.01,
            0.08,
            ">= 0.5, above random",
            True,
            interval=[0.5, 0.7],
            ceiling=ceiling,
            test="swap",
        ),
        _measure("D kept in the loop", None, 0, 0, ">= 0.8", None, interval=None, ceiling=None, test="loop"),
    ]
    return {
        "tests": tests,
        "nulls": None,
        "verdict": "representational",
        "reasons": ["The nodes' changes change the dense answer."],
    }


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
    explanation["target"]["text"], explanation["contrast"]["text"] = texts[0], texts[7]
    explanation["faithfulness"]["reasons"] = texts[:4]
    explanation["faithfulness"]["agreement"]["note"] = texts[1]
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

"""A group's name, made by rule from its members: what they read, and which answers ablating them would change.

    reads      The tokens from whose positions most flows into the group, by the effects of its incoming edges: an embedding's
               token, or the token at the position of another group. If mainly groups at its own position feed it, it is `at` its
               token. A group that no kept node and no token feeds writes the same on every prompt: it is `constant` at the last
               position, elsewhere `at` its token. `full model reads` adds what its attention heads read if every node is kept.
    like       If a group reads its own token's embedding: the tokens that would feed it most, by (E_v - mean E) times the
               gradients of its reads. Given only if the prompt's own token is in the first MAX_OWN_RANK, which it is if read.
    promotes   With p the circuit's next-token probabilities and p' those with the group ablated: the tokens with the largest
               p - p', and `over` the answer if the group takes most from the answer itself.

If `bridge nodes` was run, `reads` is the label of the labelled member with the largest effect: the contexts it is active in. A
name describes; what a group does to the answer is measured (`groups.ablate_groups`).

Shape legend: g group, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from bridge.graph.attention import attention_reads
from bridge.graph.attribution import Edges
from bridge.graph.flow import Flow, flow_through
from bridge.graph.groups import Ablated, Group, GroupEdge, group_edges, node_effects
from bridge.huggingface.prompts import Prompts
from bridge.models.circuit import EMBEDDING
from bridge.models.schema import ERROR, READ_KINDS

LONGEST = 60  # characters of a name
_TOKEN = 14  # characters of a token in a name
_READS = 2  # tokens read that are named
_SHARE = 0.25  # of the strongest source or token: others are named if they have at least this share
MAX_OWN_RANK = 20
_LIKE = 2  # tokens that are named
_LEAST = 1e-3  # change in probability, below which `promotes` is left out


def group_names(
    flow: Flow, edges: Edges, groups: Sequence[Group], ablated: Ablated, prompts: Prompts, labels: Mapping[str, str]
) -> tuple[str, ...]:
    """Return a name for each group; labels are by a channel's node name without position, with its sign in front if any."""
    into: dict[str, list[GroupEdge]] = {}
    for edge in group_edges(flow, edges, groups):
        into.setdefault(edge.target, []).append(edge)
    strength = node_effects(edges)
    whole = cache(lambda: flow_through(flow.masked, flow.kept_f, torch.ones_like(flow.kept_f)))
    names = []
    for number, group in enumerate(groups):
        known = ""
        if group.kind == ERROR:
            site = group.layers[0]
            reads = f"error at site {site}" if site < flow.sparse.n_sites else "error of the logits"
        else:
            known = _label(flow, group, strength, labels)
            reads = known or _reads(flow, whole, group, groups, into.get(f"group:{number}", []), prompts)
        does = _promotes(flow, ablated, number, prompts)
        like = "" if known or group.kind == ERROR else _like(flow, group, prompts)
        every = (f"{reads}{also}{', ' if does else ''}{does}" for also in (like, ""))
        cut = f"{reads}, {does}"[: LONGEST - 3].rstrip()
        names.append(next((name for name in every if len(name) <= LONGEST), f"{cut}..."))
    return tuple(names)


def _label(flow: Flow, group: Group, strength: Mapping[int, float], labels: Mapping[str, str]) -> str:
    """Return the label of the member with the largest effect that has one; '' if none has."""
    for node in sorted(group.nodes, key=lambda node: -abs(strength.get(flow.masked.space.index_of(node), 0.0))):
        value = float(flow.value[node.location][node.position, node.index])
        label = labels.get(f"{'+' if value > 0 else '-'}{node.name}", labels.get(node.name))
        if label:
            return label.partition("; promotes")[0]
    return ""


def _reads(
    flow: Flow, whole: Callable[[], Flow], group: Group, groups: Sequence[Group], into: Sequence[GroupEdge], prompts: Prompts
) -> str:
    """Return the name of the positions that flow into a group; if none does, into its attention in the flow through all nodes."""
    own = group.positions[-1]
    by_position: dict[int, float] = {}
    for edge in into:
        kind, _, where = edge.source.partition(":")
        position = int(where) if kind == "input" else int(where.partition("@")[2]) if kind == "error" else -1
        if kind == "group":
            position = groups[int(where)].positions[-1]
            position = -1 if position == own else position
        by_position[position] = by_position.get(position, 0.0) + abs(edge.effect)
    there = f"at {_token(flow, own, prompts)}"
    if not into:
        there = there if own < len(flow.tokens_t) - 1 else "constant"
        read_t = attention_reads(whole(), [node for node in group.nodes if node.location.kind == "attn_out"]).abs()
        most_read = int(read_t.argmax())
        return f"{there} (full model reads {_token(flow, most_read, prompts)})" if read_t[most_read] > 0 else there
    positions = sorted(by_position, key=lambda position: (-by_position[position], position))
    most = by_position[positions[0]]
    named = [position for position in positions[:_READS] if position >= 0 and by_position[position] >= _SHARE * most]
    return f"reads {' and '.join(_token(flow, position, prompts) for position in named)}" if named else there


def _like(flow: Flow, group: Group, prompts: Prompts) -> str:
    """Return the other tokens that would feed a group as its own does; '' if its own is not among the first."""
    own, pull_s = group.positions[-1], torch.zeros_like(flow.answer_ts[0])
    for node in group.nodes:
        if node.location.kind in READ_KINDS:
            scale = flow.scale[flow.sparse.site(node.location)][own]
            pull_s[node.index] += flow.gradient[node.location][own, node.index] * scale
    entry_vs = flow.sparse.embedding
    if not len(entry_vs):  # a span's tokens write through the dense model
        return ""
    token = int(flow.tokens_t[own])
    if not bool((pull_s * entry_vs[token]).any()):
        return ""
    pull_v = (entry_vs - flow.masked.means[EMBEDDING]) @ pull_s
    if float(pull_v[token]) <= 0 or int((pull_v > pull_v[token]).sum()) >= MAX_OWN_RANK:
        return ""
    ranked = [other for other in pull_v.topk(_LIKE + 1).indices.tolist() if other != token][:_LIKE]
    others = [_text(prompts, other) for other in ranked if pull_v[other] >= _SHARE * pull_v[token]]
    return f" (like {', '.join(others)})" if others else ""


def _promotes(flow: Flow, ablated: Ablated, number: int, prompts: Prompts) -> str:
    gained_v = flow.logits_v.softmax(-1) - ablated.logits_gv[number].softmax(-1)
    if float(gained_v.abs().sum()) / 2 < _LEAST:
        return ""
    gain_k, token_k = gained_v.topk(2)
    tokens = [token for token, gain in zip(token_k.tolist(), gain_k.tolist(), strict=True) if gain >= _SHARE * float(gain_k[0])]
    answer = flow.masked.question.answer
    over = f" over {_text(prompts, answer)}" if int(gained_v.argmin()) == answer else ""
    return f"promotes {', '.join(_text(prompts, token) for token in tokens[: 1 if over else 2])}{over}"


def _token(flow: Flow, position: int, prompts: Prompts) -> str:
    return f"{_text(prompts, int(flow.tokens_t[position]))}@{position}"


def _text(prompts: Prompts, token: int) -> str:
    """Return a token in quotes; if it is indentation its spaces are counted, and a long one's middle is left out."""
    text = prompts.text(token)
    lines = text.rstrip(" ")
    if not lines.strip("\n") and len(text) - len(lines) > 3:  # two such tokens differ in how far they indent
        return f"{lines!r}+{len(text) - len(lines)} spaces" if lines else f"{len(text)} spaces"
    text = repr(text)
    return text if len(text) <= _TOKEN else f"{text[: _TOKEN - 4]}...{text[-1]}"

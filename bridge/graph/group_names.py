"""A group's name, made by rule of what its members do: what they read, and which answers ablating them would change.

    reads      The tokens from whose positions most flows into the group: by the effects of its incoming edges, an embedding's
               token, or, of a group at another position, the token there. Where only groups at its own position feed it, it is
               `at` its token. A group that no kept node and no token feeds writes the same on every prompt: `constant`; where
               it is of attention, what its heads bring it where every node is kept is named beside that: `in full reads`.
    like       Where a group reads its own token's embedding: the tokens that would feed it most, by (E_v - mean E) times the
               gradients of what it reads; said where the prompt's own is among the FIT first, as it is if that is what it reads.
    promotes   With p the circuit's next-token probabilities and p' those with the group ablated: the tokens whose p - p' is
               largest, and where what it takes most from is the answer itself, that it does so.

Where `bridge nodes` was run, the label of the member with the largest effect says what it reads: the contexts it is active in.
It describes; what a group does to the answer is measured (`groups.ablate_groups`).

Shape legend: g group, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from bridge.graph.attention import read_by
from bridge.graph.attribution import Edges
from bridge.graph.flow import Flow, flow_through
from bridge.graph.groups import Ablated, Group, GroupEdge, group_edges, node_effects
from bridge.huggingface.prompts import Prompts
from bridge.models.circuit import EMBEDDING
from bridge.models.schema import ERROR, READ_KINDS

LONGEST = 60  # characters of a name
_TOKEN = 14  # and of a token in it
_READS = 2  # tokens
_SHARE = 0.25  # of the strongest source or token, at least, that is named as well
FIT = 20
_LIKE = 2  # tokens
_LEAST = 1e-3  # probability moved, below which it is not said where to


def group_names(
    flow: Flow, edges: Edges, groups: Sequence[Group], ablated: Ablated, prompts: Prompts, labels: Mapping[str, str]
) -> tuple[str, ...]:
    """A name for each group; labels are those of channels, by a node's name without position, with its sign in front if any."""
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
    """The label of the member with the largest effect that has one."""
    for node in sorted(group.nodes, key=lambda node: -abs(strength.get(flow.masked.space.place(node), 0.0))):
        value = float(flow.value[node.location][node.position, node.index])
        label = labels.get(f"{'+' if value > 0 else '-'}{node.name}", labels.get(node.name))
        if label:
            return label.partition("; promotes")[0]
    return ""


def _reads(
    flow: Flow, whole: Callable[[], Flow], group: Group, groups: Sequence[Group], into: Sequence[GroupEdge], prompts: Prompts
) -> str:
    """Name of the positions that flow into a group; where none does, into its attention in the flow through all nodes."""
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
        read_t = read_by(whole(), [node for node in group.nodes if node.location.kind == "attn_out"]).abs()
        most_read = int(read_t.argmax())
        return f"{there} (in full reads {_token(flow, most_read, prompts)})" if read_t[most_read] > 0 else there
    positions = sorted(by_position, key=lambda position: (-by_position[position], position))
    most = by_position[positions[0]]
    named = [position for position in positions[:_READS] if position >= 0 and by_position[position] >= _SHARE * most]
    return f"reads {' and '.join(_token(flow, position, prompts) for position in named)}" if named else there


def _like(flow: Flow, group: Group, prompts: Prompts) -> str:
    """Other tokens that would feed a group as its own does; '' where its own is not among them."""
    own, pull_s = group.positions[-1], torch.zeros_like(flow.answer_ts[0])
    for node in group.nodes:
        if node.location.kind in READ_KINDS:
            scale = flow.scale[flow.sparse.site(node.location)][own]
            pull_s[node.index] += flow.gradient[node.location][own, node.index] * scale
    entry_vs = flow.sparse.embedding
    if not len(entry_vs):  # a span's tokens write by way of the dense model
        return ""
    token = int(flow.tokens_t[own])
    if not bool((pull_s * entry_vs[token]).any()):
        return ""
    pull_v = (entry_vs - flow.masked.means[EMBEDDING]) @ pull_s
    if float(pull_v[token]) <= 0 or int((pull_v > pull_v[token]).sum()) >= FIT:
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
    """A token in quotes, its spaces counted where it is made of them, its middle left out where it is long."""
    text = prompts.text(token)
    lines = text.rstrip(" ")
    if not lines.strip("\n") and len(text) - len(lines) > 3:  # how far a line is indented tells two such tokens apart
        return f"{lines!r}+{len(text) - len(lines)} spaces" if lines else f"{len(text)} spaces"
    text = repr(text)
    return text if len(text) <= _TOKEN else f"{text[: _TOKEN - 4]}...{text[-1]}"

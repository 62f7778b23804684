"""Groups of nodes that do one job in a prompt's circuit, the edges between groups, and the effect of ablating a group.

Grouping is deterministic, by what flows into a node's sublayer at its position and what flows out again:

1. profiles    Four for each node, rows of signed shares whose magnitudes sum to at most 1:
                   in    from outside: the tokens, errors, and sublayers (at their positions) whose edges come in
                   out   to outside: the sublayers (at their positions) and the answer that its edges go to
                   first, last   the nodes through which this flow enters the sublayer and leaves it
               A share is an edge's effect divided by the summed magnitudes of all effects on that side. Between nodes of one
               sublayer, profiles are passed on with unsigned shares, so that a read, the neurons that it feeds, and what these
               write have the same profiles if they form one chain.
2. distance    1 - mean of the four cosines; for nodes of two adjacent sublayers 1 + half of that, so that these join only if
               `most` requires it.
3. linkage     Complete, at each position separately. Errors, nodes of different positions, and nodes of sublayers that are not
               adjacent are never joined.
4. cut         At `distance`; above it as far as `most` groups require and the guards allow. A group larger than `largest` is
               split into the two parts that it was joined from.

A circuit of more than `clustered` nodes is not for reading: a group there is a sublayer at a position. Sizes are never hidden.

Shape legend: g group, k node of the circuit, m k's of one position, e edge, f all nodes in one row, v vocabulary, p column of a
profile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import linkage
from scipy.sparse import csr_matrix, diags, identity
from torch import Tensor

from bridge.graph.attribution import Edges
from bridge.graph.flow import Flow
from bridge.models.circuit import Node, NodeSpace
from bridge.models.schema import ATTENTION_KINDS, ERROR
from bridge.models.sparse import Location

_NEVER_JOINED = 9.0  # the distance of nodes that are never joined
_INNER = 3  # edges, at most, that follow each other in one sublayer: read, value, write

Array = np.ndarray


@dataclass(frozen=True)
class GroupConfig:
    """Settings of the grouping of nodes; see the module's docstring."""

    most: int = 12
    distance: float = 0.501  # two writes with the same sources and targets, but no chain in common, are .5 apart
    largest: int = 40
    clustered: int = 2000


@dataclass(frozen=True)
class Group:
    """Nodes of a circuit that do one job, in the order of the computation; kind is attention, mlp, both, or error."""

    nodes: tuple[Node, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    kind: str

    @staticmethod
    def of(nodes: Sequence[Node]) -> Group:
        """Return the group of some nodes."""
        positions = sorted({node.position for node in nodes if node.position is not None})
        kinds = sorted({_part(node.location) for node in nodes})
        return Group(tuple(nodes), tuple(positions), tuple(sorted({node.location.layer for node in nodes})), " and ".join(kinds))

    def places(self, space: NodeSpace, device: torch.device) -> Tensor:
        """Return place_k, the indices of its nodes in the row of all."""
        return torch.tensor([space.index_of(node) for node in self.nodes], device=device)


@dataclass(frozen=True)
class GroupEdge:
    """Effect of one group (or the input at a token) on another, or on the answer: the summed effects of the edges between them.

    source and target are `group:3`, `input:7` (the embedding of token 7), `error:4@7` (an error) or `answer`.
    """

    source: str
    target: str
    effect: float
    edges: int


@dataclass(frozen=True, eq=False)
class Ablated:
    """A circuit's groups ablated, one at a time: effect_g, the loss of d, and logits_gv, the logits that result."""

    effect_g: tuple[float, ...]
    logits_gv: Tensor


def group_nodes(flow: Flow, edges: Edges, config: GroupConfig | None = None) -> tuple[Group, ...]:
    """Return the groups of a circuit, in the order of their first nodes; every node is in exactly one."""
    config = config or GroupConfig()
    nodes, place_k = _nodes(flow)
    if not nodes:
        return ()
    sublayer_k, position_k = _sublayers(flow, nodes), np.array([node.position for node in nodes], dtype=int)
    bucket_k = np.unique(np.stack([position_k, sublayer_k]), axis=1, return_inverse=True)[1].reshape(-1)
    if len(nodes) > config.clustered:
        return _groups_by_label(nodes, bucket_k)
    similar = _Profiles(edges, place_k, bucket_k)
    here = [(position_k == position).nonzero()[0] for position in np.unique(position_k)]
    trees = [(here_m, _tree(similar.distances(here_m), sublayer_k[here_m])) for here_m in here]
    cut = _cut(trees, config)
    clusters = [here_m[members] for here_m, tree in trees for members in _clusters(len(here_m), tree, cut, config.largest)]
    label_k = np.zeros(len(nodes), dtype=int)
    for label, members_k in enumerate(clusters):
        label_k[members_k] = label
    return _groups_by_label(nodes, label_k)


def group_edges(flow: Flow, edges: Edges, groups: Sequence[Group]) -> tuple[GroupEdge, ...]:
    """Return the edges between groups, inputs, errors and the answer, largest effect first; edges within a group are left out."""
    names = {}
    for number, group in enumerate(groups):
        for node in group.nodes:
            error = f"error:{node.location.layer}@{node.position}"
            names[flow.masked.space.index_of(node)] = error if group.kind == ERROR else f"group:{number}"
    token_e = edges.ends.inputs(edges.source_e).tolist()
    found: dict[tuple[str, str], list[float]] = {}
    for source, target, token, effect in zip(
        edges.source_e.tolist(), edges.target_e.tolist(), token_e, edges.effect_e.tolist(), strict=True
    ):
        key = f"input:{token}" if token >= 0 else names[source], names.get(target, "answer")
        if key[0] != key[1]:
            found.setdefault(key, []).append(effect)
    sums = (GroupEdge(*key, sum(effects), len(effects)) for key, effects in found.items())
    return tuple(sorted(sums, key=lambda edge: (-abs(edge.effect), edge.source, edge.target)))


@torch.no_grad()
def ablate_groups(flow: Flow, groups: Sequence[Group]) -> Ablated:
    """Ablate all of each group from the circuit, by intervention, and return the answers."""
    sets = [group.places(flow.masked.space, flow.kept_f.device) for group in groups]
    logits_gv = flow.masked.logits_without(flow.kept_f, sets)
    d_g = flow.masked.question.difference(logits_gv)
    return Ablated(tuple((flow.difference - d_g).tolist()), logits_gv)


def node_effects(edges: Edges) -> dict[int, float]:
    """Return the summed effects of the outgoing edges of every node, by its index in the row of all, in terms of d."""
    place_k, place_e = edges.source_e.unique(return_inverse=True)
    effect_k = torch.zeros(len(place_k), dtype=edges.effect_e.dtype, device=place_k.device).index_add_(0, place_e, edges.effect_e)
    return dict(zip(place_k.tolist(), effect_k.tolist(), strict=True))


# -- parts ------------------------------------------------------------------------------------------------------------------


def _part(at: Location) -> str:
    """Return the half of a block, or other part, that a location belongs to."""
    return ERROR if at.kind == ERROR else "attention" if at.kind in ATTENTION_KINDS else "mlp"


def _nodes(flow: Flow) -> tuple[list[Node], Tensor]:
    """Return the circuit's nodes and errors, and their indices; logit errors at positions not asked about are left out."""
    end = Location(flow.sparse.n_sites, ERROR), len(flow.tokens_t) - 1
    nodes, places = [], []
    for place in flow.kept_f.nonzero().flatten().tolist():
        node = flow.masked.space.node(place)
        if node.location != end[0] or node.position == end[1]:
            nodes.append(node)
            places.append(place)
    return nodes, torch.tensor(places, dtype=torch.long)


def _sublayers(flow: Flow, nodes: Sequence[Node]) -> Array:
    """Return the sublayer of every node, in the order of the computation; errors have other numbers, far from all."""
    parts = dict.fromkeys((at.layer, _part(at)) for at in flow.sparse.locations())
    order = {key: place for place, key in enumerate(parts)}
    far = len(order) + 1
    keys = ((node.location.layer, _part(node.location)) for node in nodes)
    return np.array([order[key] if key in order else 2 * (far + key[0]) for key in keys], dtype=int)


def _groups_by_label(nodes: Sequence[Node], label_k: Array) -> tuple[Group, ...]:
    members: dict[int, list[Node]] = {}
    for node, label in zip(nodes, label_k.tolist(), strict=True):
        members.setdefault(label, []).append(node)
    return tuple(map(Group.of, members.values()))


class _Profiles:
    """The four profiles of every node (see the module's docstring), as rows of unit length, or 0; bucket_k numbers the pairs of
    position and sublayer that occur.
    """

    def __init__(self, edges: Edges, place_k: Tensor, bucket_k: Array) -> None:
        count = len(place_k)
        sorted_k, order_k = place_k.sort()
        source_e, target_e = edges.source_e.cpu(), edges.target_e.cpu()
        from_e, to_e = (_index(sorted_k, order_k, end_e) for end_e in (source_e, target_e))
        token_e, effect_e = edges.ends.inputs(source_e).numpy(), edges.effect_e.double().cpu().numpy()
        inner_e = (from_e >= 0) & (to_e >= 0) & (bucket_k[from_e] == bucket_k[to_e])
        buckets, tokens = int(bucket_k.max()) + 1, edges.ends.n_tokens
        wide = buckets + tokens + 1  # sublayers at positions, tokens, the answer
        outside_from_e = np.where(from_e >= 0, bucket_k[from_e], buckets + np.maximum(token_e, 0))
        outside_to_e = np.where(to_e >= 0, bucket_k[to_e], wide - 1)
        self.profiles = []
        for mine_e, other_e, outside_e in ((to_e, from_e, outside_from_e), (from_e, to_e, outside_to_e)):
            there_e = mine_e >= 0
            total_k = np.bincount(mine_e[there_e], np.abs(effect_e[there_e]), count)
            share_e = effect_e / np.where(total_k > 0, total_k, 1)[mine_e]
            outer_e, chain_e = there_e & ~inner_e, there_e & inner_e
            outer = csr_matrix((share_e[outer_e], (mine_e[outer_e], outside_e[outer_e])), shape=(count, wide))
            chain = csr_matrix((np.abs(share_e[chain_e]), (mine_e[chain_e], other_e[chain_e])), shape=(count, count))
            ends = diags((np.bincount(mine_e[chain_e], minlength=count) == 0).astype(float)) @ identity(count)
            for part in (outer, csr_matrix(ends)):
                handed = part
                for _ in range(_INNER):
                    handed = part + chain @ handed
                self.profiles.append(_unit(csr_matrix(handed)))

    def distances(self, here_m: Array) -> Array:
        """Return distance_mm of some nodes, by what flows in and out alone; the cosine of two empty profiles is 1."""
        similar_mm = np.zeros((len(here_m), len(here_m)))
        for profile in self.profiles:
            rows = profile[here_m]
            empty_m = np.diff(rows.indptr) == 0
            similar_mm += (rows @ rows.T).toarray() + np.outer(empty_m, empty_m)
        return np.clip(1 - similar_mm / len(self.profiles), 0, 2)


def _index(sorted_k: Tensor, order_k: Tensor, end_e: Tensor) -> Array:
    """Return the index k of the node that an end is; -1 if it is none of them."""
    at_e = torch.searchsorted(sorted_k, end_e).clamp(max=len(sorted_k) - 1)
    return torch.where(sorted_k[at_e] == end_e, order_k[at_e], -1).numpy()


def _unit(rows: csr_matrix) -> csr_matrix:
    rows.eliminate_zeros()
    length_k = np.sqrt(np.asarray(rows.multiply(rows).sum(1)).reshape(-1))
    return csr_matrix(diags(1 / np.where(length_k > 0, length_k, 1)) @ rows)


def _tree(distance_mm: Array, sublayer_m: Array) -> Array:
    """Return the complete linkage of a position's nodes, in scipy's format."""
    apart_mm = np.abs(sublayer_m[:, None] - sublayer_m)
    guarded_mm = np.where(apart_mm == 0, distance_mm, np.where(apart_mm == 1, 1 + distance_mm / 2, _NEVER_JOINED))
    upper = np.triu_indices(len(sublayer_m), 1)
    return linkage(guarded_mm[upper], "complete") if len(sublayer_m) > 1 else np.zeros((0, 4))


def _cut(trees: list[tuple[Array, Array]], config: GroupConfig) -> float:
    """Return the height of the cut: `distance`, or the lowest above it that leaves at most `most` groups (or the fewest)."""
    heights = np.concatenate([tree[:, 2] for _, tree in trees])
    heights = [config.distance, *np.unique(heights[(heights > config.distance) & (heights < _NEVER_JOINED)]).tolist()]
    low, high = 0, len(heights) - 1
    while low < high:
        middle = (low + high) // 2
        count = sum(len(_clusters(len(here_m), tree, heights[middle], config.largest)) for here_m, tree in trees)
        low, high = (low, middle) if count <= config.most else (middle + 1, high)
    return float(heights[low])


def _clusters(count: int, tree: Array, cut: float, largest: int) -> list[list[int]]:
    """Return the members of every cluster of a tree cut at a height, none larger than `largest`."""
    members: list[list[int]] = [[place] for place in range(count)]
    parents: list[tuple[int, ...]] = [()] * count
    for left, right, _, _ in tree:
        members.append(members[int(left)] + members[int(right)])
        parents.append((int(left), int(right)))
    heights = [0.0] * count + tree[:, 2].tolist()
    left_to_do, found = [len(members) - 1], []
    while left_to_do:
        place = left_to_do.pop()
        if heights[place] <= cut and len(members[place]) <= largest or not parents[place]:
            found.append(sorted(members[place]))
        else:
            left_to_do += parents[place]
    return sorted(found)

"""Replacement and completeness are those of their definition, written out edge by edge."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.circuit_cases import PARALLEL, SEQUENTIAL, model
from support.circuits_attribution_cases import masked_model, some_kept

from bridge.circuits.masked_model import MaskedModel
from bridge.graph.attribution import draw_edges
from bridge.graph.flow import flow_through
from bridge.graph.scores import replacement_and_completeness
from bridge.models.circuit import Edge, Node
from bridge.models.schema import ERROR


def literal(edges: tuple[Edge, ...]) -> tuple[float, float]:
    """Both scores, by recursion from every node to the answer."""

    def name(node: Node) -> str:
        kind = node.location.kind
        return "answer" if kind == "answer" else f"token {node.position}" if kind in ("embedding", "bigram") else str(node)

    sums: dict[tuple[str, str], float] = {}
    for edge in edges:
        key = name(edge.source), name(edge.target)
        sums[key] = sums.get(key, 0.0) + edge.weight
    into: dict[str, float] = {}
    for (_, target), weight in sums.items():
        into[target] = into.get(target, 0.0) + abs(weight)
    share = {key: abs(weight) / into[key[1]] for key, weight in sums.items() if into[key[1]]}
    nodes = {each for key in sums for each in key}

    @cache
    def influence(node: str) -> float:
        """Of a node on the answer, itself left out."""
        return sum(part * (influence(target) + (target == "answer")) for (s, target), part in share.items() if s == node)

    tokens = sum(influence(node) for node in nodes if node.startswith("token"))
    errors = sum(influence(node) for node in nodes if node.startswith("error"))
    reach = {node: influence(node) + (node == "answer") for node in nodes}
    lost = {node: sum(part for (s, target), part in share.items() if target == node and s.startswith("error")) for node in nodes}
    complete = sum(reach[node] * (1 - lost[node]) for node in nodes) / sum(reach.values())
    return tokens / (tokens + errors), complete


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
@pytest.mark.parametrize("contrast", [None, 4])
def test_scores_are_those_of_the_definition(kinds: tuple[str, ...], contrast: int | None) -> None:
    masked = masked_model(model(kinds), contrast=contrast)
    kept_f = some_kept(masked, 0.2)
    flow = flow_through(masked, kept_f | masked.is_error_f, torch.ones_like(kept_f))
    edges = draw_edges(flow).strongest
    errors = {(edge.source.location.layer, edge.source.position) for edge in edges if edge.source.location.kind == ERROR}
    assert (masked.sparse.n_sites, 5) in errors and len(errors) > 10
    found = replacement_and_completeness(masked, kept_f)
    assert found == pytest.approx(literal(edges), abs=1e-9)
    assert all(0 < score < 1 for score in found)


def test_without_errors_all_flows_through_nodes() -> None:
    masked = masked_model(model(), errors=False)
    assert replacement_and_completeness(masked, some_kept(masked, 0.3)) == (1.0, 1.0)


def test_errors_that_are_larger_leave_less_to_nodes() -> None:
    masked = masked_model(model())
    assert masked.errors is not None
    kept_f = some_kept(masked, 0.3)
    small = {at: masked.means[at] + 1e-6 * error_bts for at, error_bts in masked.errors.items()}
    little = MaskedModel(masked.sparse, masked.question, masked.means, small)
    less, more = (replacement_and_completeness(each, kept_f) for each in (masked, little))
    # a node that reads errors alone reads them however small they are
    assert more[0] > less[0] and more[1] > less[1]

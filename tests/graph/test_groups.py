"""Groups partition a circuit within their guards, whatever the order of edges; effects, edges and paths are literal ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.circuit_cases import PARALLEL, SEQUENTIAL, model
from support.circuits_attribution_cases import Frozen, masked_model, some_kept
from support.models import planted_sparse, tiny_tokenizer

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.graph import group_names as naming
from bridge.graph.attribution import Edges, draw_edges
from bridge.graph.flow import Flow, flow_through
from bridge.graph.group_names import group_names
from bridge.graph.groups import (
    GroupConfig,
    GroupEdge,
    ablate_groups,
    group_edges,
    group_nodes,
    node_effects,
)
from bridge.graph.paths import strongest_paths
from bridge.huggingface.prompts import Prompts
from bridge.models.circuit import EMBEDDING, corpus_means
from bridge.models.dense import DenseModel
from bridge.models.schema import ATTENTION_KINDS, ERROR
from bridge.models.sparse import Location


def drawn(kinds: tuple[str, ...] = SEQUENTIAL, density: float = 0.3) -> tuple[Flow, Edges]:
    masked = masked_model(model(kinds))
    flow = flow_through(masked, some_kept(masked, density))
    return flow, draw_edges(flow)


def part(location: Location) -> tuple[int, str]:
    return location.layer, ERROR if location.kind == ERROR else "attention" if location.kind in ATTENTION_KINDS else "mlp"


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
@pytest.mark.parametrize("most", [1, 12, 40, 1000])
def test_every_node_is_in_one_group_and_groups_keep_their_guards(kinds: tuple[str, ...], most: int) -> None:
    flow, edges = drawn(kinds)
    config = GroupConfig(most=most)
    groups = group_nodes(flow, edges, config)
    space, last = flow.masked.space, len(flow.tokens_t) - 1
    expected = {space.node(place) for place in flow.kept_f.nonzero().flatten().tolist()}
    expected -= {node for node in expected if node.location == Location(flow.sparse.n_sites, ERROR) and node.position != last}
    assert Counter(node for group in groups for node in group.nodes) == Counter(expected)
    order = list(dict.fromkeys(part(at) for at in flow.sparse.locations()))
    for group in groups:
        assert group.positions == (group.nodes[0].position,) and {node.position for node in group.nodes} == set(group.positions)
        assert group.layers == tuple(sorted({node.location.layer for node in group.nodes}))
        parts = {part(node.location) for node in group.nodes}
        assert group.kind == " and ".join(sorted({kind for _, kind in parts}))
        assert len(group.nodes) <= config.largest
        if group.kind == ERROR:
            assert len(group.nodes) == len(group.layers) == len(group.positions) == 1
        else:
            places = [order.index(each) for each in parts]
            assert max(places) - min(places) <= 1


def test_groups_do_not_depend_on_the_order_of_edges() -> None:
    flow, edges = drawn()
    order_e = torch.randperm(len(edges.kind_e), generator=torch.Generator().manual_seed(0))
    names = ("kind_e", "source_e", "target_e", "weight_e", "effect_e")
    shuffled = replace(edges, **{name: getattr(edges, name)[order_e] for name in names})
    assert group_nodes(flow, shuffled) == group_nodes(flow, edges) == group_nodes(flow, edges)


def test_more_groups_are_left_where_more_are_asked_for_and_none_is_too_large() -> None:
    flow, edges = drawn(density=0.6)
    counts = [len(group_nodes(flow, edges, GroupConfig(most=most, distance=-1, largest=1000))) for most in (1, 30, 60, 100)]
    assert counts == sorted(counts) and counts[0] < counts[-1] <= 100
    small = group_nodes(flow, edges, GroupConfig(largest=3))
    assert max(len(group.nodes) for group in small) == 3
    sublayers = group_nodes(flow, edges, GroupConfig(clustered=10))
    nodes = [node for group in sublayers for node in group.nodes]
    assert len(sublayers) == len({(part(node.location), node.position) for node in nodes}) < len(nodes)


def test_an_empty_circuit_has_no_groups() -> None:
    flow, edges = drawn(density=-1.0)
    assert group_nodes(flow, edges) == () and ablate_groups(flow, ()).effect_g == ()
    assert all(edge.target == "answer" for edge in group_edges(flow, edges, ()))


def test_a_groups_effect_is_what_ablating_its_nodes_does() -> None:
    flow, edges = drawn()
    groups = group_nodes(flow, edges)
    ablated = ablate_groups(flow, groups)
    question = flow.masked.question
    for group, effect, logits_v in zip(groups, ablated.effect_g, ablated.logits_gv, strict=True):
        kept_f = flow.kept_f.clone()
        parts = flow.masked.space.split(kept_f)
        for node in group.nodes:
            parts[node.location][node.position, node.index] = False
        left_v = Frozen(flow.masked, kept_f).trace.logits_btv[0, -1]
        torch.testing.assert_close(logits_v, left_v)
        assert effect == pytest.approx(flow.difference - float(question.difference(left_v[None])), abs=1e-9)


def test_edges_between_groups_are_sums_of_edges() -> None:
    flow, edges = drawn()
    groups = group_nodes(flow, edges)
    of = {node: number for number, group in enumerate(groups) for node in group.nodes}
    expected: dict[tuple[str, str], list[float]] = {}
    for edge in edges.strongest:
        ends = []
        for node in (edge.source, edge.target):
            kind = node.location.kind
            if kind == ERROR:
                ends.append(f"error:{node.location.layer}@{node.position}")
            elif kind in ("embedding", "bigram"):
                ends.append(f"input:{node.position}")
            else:
                ends.append("answer" if kind == "answer" else f"group:{of[node]}")
        if ends[0] != ends[1]:
            expected.setdefault((ends[0], ends[1]), []).append(edge.effect)
    found = group_edges(flow, edges, groups)
    assert [abs(edge.effect) for edge in found] == sorted((abs(edge.effect) for edge in found), reverse=True)
    assert {(edge.source, edge.target): edge.edges for edge in found} == {ends: len(sums) for ends, sums in expected.items()}
    for edge in found:
        assert edge.effect == pytest.approx(sum(expected[edge.source, edge.target]))
    leaving: dict[int, float] = {}
    for edge in edges.strongest:
        if edge.source.location in flow.masked.space.sizes:
            place = flow.masked.space.index_of(edge.source)
            leaving[place] = leaving.get(place, 0.0) + edge.effect
    for place, effect in node_effects(edges).items():
        if place < flow.masked.space.size:
            assert effect == pytest.approx(leaving[place])


def two_chains(dense: DenseModel) -> Flow:
    """Token 2 writes channels 0 and 1; neuron 0 reads the one and writes for answer 4, neuron 1 reads the other, against it."""
    sparse = planted_sparse(dense).double()
    with torch.no_grad():
        sparse.embedding[2, 1] = 3
    tokens_bt = torch.randint(6, sparse.vocabulary, (8, 8), generator=torch.Generator().manual_seed(1))
    masked = MaskedModel(sparse, Question.of_prompt(torch.tensor([7, 9, 2]), 4, 5), corpus_means(sparse, tokens_bt))
    kept = {at: torch.zeros(3, n, dtype=torch.bool) for at, n in masked.space.sizes.items()}
    for kind, channels in (("mlp_in", (0, 1)), ("mlp_act", (0, 1)), ("mlp_out", (2, 3))):
        kept[Location(0, kind)][2, list(channels)] = True
    return flow_through(masked, masked.space.join(kept))


def test_chains_that_do_different_jobs_are_different_groups(dense: DenseModel) -> None:
    flow = two_chains(dense)
    edges = draw_edges(flow)
    groups = group_nodes(flow, edges)
    assert [tuple(str(node) for node in group.nodes) for group in groups] == [
        ("L0.mlp_in[0]@2", "L0.mlp_act[0]@2", "L0.mlp_out[2]@2"),
        ("L0.mlp_in[1]@2", "L0.mlp_act[1]@2", "L0.mlp_out[3]@2"),
    ]
    ablated = ablate_groups(flow, groups)
    assert ablated.effect_g[0] > 0 > ablated.effect_g[1]
    tokenizer = Prompts(tiny_tokenizer())
    names = group_names(flow, edges, groups, ablated, tokenizer, {})
    assert names[0].startswith("reads 'w2'@2, promotes 'w4'") and names[1] == "reads 'w2'@2, promotes 'w5' over 'w4'"
    labels = {"L0.mlp_act[0]": "at words; promotes 'w9'", "+L0.mlp_in[1]": "after 'w7'", "-L0.mlp_in[1]": "never"}
    told = group_names(flow, edges, groups, ablated, tokenizer, labels)
    assert told[0].startswith("at words, promotes 'w4'") and told[1] == "after 'w7', promotes 'w5' over 'w4'"
    assert (groups[0].layers, groups[0].kind, groups[0].positions) == ((0,), "mlp", (2,))


def test_names_are_short_and_say_what_is_an_error_and_what_reads_nothing() -> None:
    flow, edges = drawn(density=0.1)
    groups = group_nodes(flow, edges)
    names = group_names(flow, edges, groups, ablate_groups(flow, groups), Prompts(None), {})
    assert len(names) == len(groups) and all(0 < len(name) <= naming.LONGEST for name in names)
    fed = {edge.target for edge in group_edges(flow, edges, groups)}
    last = len(flow.tokens_t) - 1
    for number, (group, name) in enumerate(zip(groups, names, strict=True)):
        if group.kind == ERROR:
            site = group.layers[0]
            assert name.startswith("error of the logits" if site == flow.sparse.n_sites else f"error at site {site}")
        else:
            alone = f"group:{number}" not in fed and group.positions == (last,)
            assert name.startswith("constant") == alone
            assert alone or name.startswith(("reads '#", "at '#"))


def all_paths(edges: list[GroupEdge]) -> dict[tuple[str, ...], float]:
    """Every path by recursion, with its effect."""
    into: dict[str, list[GroupEdge]] = {}
    for edge in edges:
        into.setdefault(edge.target, []).append(edge)
    found: dict[tuple[str, ...], float] = {}

    def follow(steps: tuple[str, ...], effect: float) -> None:
        if steps[0] not in into:
            found[steps] = effect
        for edge in into.get(steps[0], []):
            if edge.source not in steps:
                total = sum(abs(each.effect) for each in into[edge.target])
                share = edge.effect if edge.target == "answer" else edge.effect / total
                follow((edge.source, *steps), effect * share)

    follow(("answer",), 1.0)
    return found


def test_paths_are_the_strongest_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["input:0", "input:1", "error:2@1", *(f"group:{number}" for number in range(6)), "answer"]
    edges = [
        GroupEdge(source, target, float(torch.randn((), generator=generator)), 1)
        for place, target in enumerate(names)
        for source in names[:place]
        if target[0] in "ga" and (source, target) != ("group:0", "group:1")
    ]
    edges.append(GroupEdge("group:4", "group:2", 0.7, 1))  # groups of two sublayers can feed each other
    expected = sorted(all_paths(edges).items(), key=lambda item: -abs(item[1]))
    found = strongest_paths(edges, 8)
    assert [path.steps for path in found] == [steps for steps, _ in expected[:8]]
    assert [path.effect for path in found] == pytest.approx([effect for _, effect in expected[:8]])
    assert strongest_paths([]) == ()


def test_embedding_is_the_end_of_a_tokens_edges() -> None:
    flow, edges = drawn()
    tokens = {
        int(edges.ends.inputs(end[None])[0]): edges.ends.node(int(end))
        for end in edges.source_e
        if int(edges.ends.inputs(end[None])[0]) >= 0
    }
    assert tokens and all(node.position == token for token, node in tokens.items())
    assert {node.location.kind for node in tokens.values()} <= {EMBEDDING.kind, "bigram"}


def test_a_name_says_which_other_tokens_would_be_read(dense: DenseModel) -> None:
    flow = two_chains(dense)
    sparse = flow.sparse
    with torch.no_grad():
        sparse.embedding[11, 0], sparse.embedding[12, 1] = 2, 2
    flow = flow_through(flow.masked, flow.kept_f)
    edges = draw_edges(flow)
    groups = group_nodes(flow, edges)
    names = group_names(flow, edges, groups, ablate_groups(flow, groups), Prompts(tiny_tokenizer()), {})
    assert names[0].startswith("reads 'w2'@2 (like 'w11'), ")
    told = group_names(flow, edges, groups, ablate_groups(flow, groups), Prompts(tiny_tokenizer()), {"L0.mlp_act[0]": "at words"})
    assert "like" not in told[0]

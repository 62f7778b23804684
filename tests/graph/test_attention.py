"""Attention: scores, patterns and what is moved are those written out by hand; the effect of a head, an intervention finds."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from support.circuit_cases import PARALLEL, SEQUENTIAL, model
from support.circuits_attribution_cases import Frozen, edges_of, masked_model, some_kept
from torch import Tensor

from bridge.graph import attention as module
from bridge.graph.attention import ExplainedHead, attention_reads, explain_attention
from bridge.graph.flow import Flow, flow_through
from bridge.models.circuit import Node
from bridge.models.sparse import Location, SparseTransformer
from bridge.recipe import BlockShape


def random_flow(sparse: SparseTransformer, density: float = 0.7) -> Flow:
    masked = masked_model(sparse)
    return flow_through(masked, some_kept(masked, density))


def nodes_of(flow: Flow) -> dict[Location, Tensor]:
    return {at: value_1tn[0] for at, value_1tn in Frozen(flow.masked, flow.kept_f).values.items()}


def score(sparse: SparseTransformer, q_n: Tensor, k_n: Tensor, head: int, query: int, position: int) -> float:
    """q times k by the root of the channels; with rotary positions as complex numbers that are turned by the distance."""
    channels = sparse.channels
    q, k = (x[head * channels : (head + 1) * channels].tolist() for x in (q_n, k_n))
    if sparse.shape.positions != "rotary":
        return sum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(channels)
    half, total = channels // 2, 0.0
    for place in range(half):
        turn = cmath.exp(1j * (query - position) * 10_000 ** (-place / half))
        total += (complex(q[place], q[place + half]) * complex(k[place], k[place + half]).conjugate() * turn).real
    return total / math.sqrt(channels)


def pattern(sparse: SparseTransformer, layer: int, q_tn: Tensor, k_tn: Tensor, head: int, query: int) -> list[float]:
    """Weights on positions 0 to query."""
    parts = [math.exp(score(sparse, q_tn[query], k_tn[p], head, query, p)) for p in range(query + 1)]
    sink = math.exp(float(sparse.get_parameter(f"blocks.{layer}.sinks")[head])) if sparse.shape.sinks else 0.0
    return [part / (sum(parts) + sink) for part in parts]


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every head, position and channel is listed."""
    monkeypatch.setattr(module, "READS", 100)
    monkeypatch.setattr(module, "TERMS", 100)


SHAPES = [{"positions": "learned"}, {"positions": "rotary"}, {"positions": "none", "sinks": False}]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape["positions"])
@pytest.mark.usefixtures("everything")
def test_scores_and_weights_are_the_literal_ones(shape: dict) -> None:
    sparse = model(**shape)
    flow = random_flow(sparse)
    values = nodes_of(flow)
    heads, _ = explain_attention(flow, most=1000)
    assert {head.layer for head in heads} == {0, 1} and len(heads) > 8
    for head in heads:
        q_tn, k_tn = values[Location(head.layer, "q")], values[Location(head.layer, "k")]
        weights = pattern(sparse, head.layer, q_tn, k_tn, head.head, head.query)
        assert head.sink == pytest.approx(1 - sum(weights), abs=1e-6)
        assert sorted(read.position for read in head.reads) == list(range(head.query + 1))
        assert [read.weight for read in head.reads] == sorted((read.weight for read in head.reads), reverse=True)
        for read in head.reads:
            assert read.weight == pytest.approx(weights[read.position], abs=1e-6)
            expected = score(sparse, q_tn[head.query], k_tn[read.position], head.head, head.query, read.position)
            assert read.score == pytest.approx(expected, abs=1e-6) and read.others == pytest.approx(0, abs=1e-6)
            assert sum(term.product for term in read.terms) == pytest.approx(expected, abs=1e-6)
            for term in read.terms:
                assert term.product == pytest.approx(term.query_value * term.key_value / 2, abs=1e-6)
                assert term.channel // 4 == head.head
                if shape["positions"] != "rotary":
                    assert term.query_value == pytest.approx(float(q_tn[head.query, term.channel]))
                    assert term.key_value == pytest.approx(float(k_tn[read.position, term.channel]))


def without(flow: Flow, head: ExplainedHead, kinds: str) -> float:
    """d of S_C with what the head writes at the query worked out by hand from its ablated nodes."""
    sparse, masked = flow.sparse, flow.masked
    values, layer, p = nodes_of(flow), head.layer, head.query
    part = slice(head.head * 4, head.head * 4 + 4)
    held = {kind: values[Location(layer, kind)].clone() for kind in "qkv"}
    z_n = torch.cat([_read(sparse, layer, held, other, p) for other in range(sparse.width // 4)])
    for kind in kinds:
        held[kind][:, part] = masked.means[Location(layer, kind)][part]
    z_n[part] = _read(sparse, layer, held, head.head, p)
    out_n = sparse.get_parameter(f"blocks.{layer}.o.weight") @ z_n + sparse.get_parameter(f"blocks.{layer}.o.bias")
    top = out_n.abs().topk(round(sparse.keep * len(out_n))).indices
    out_n = torch.zeros_like(out_n).scatter(0, top, out_n[top])
    at = Location(layer, "attn_out")
    out_n = torch.where(flow.kept[at][p], out_n, masked.means[at])
    keep, correct = masked.gates(flow.kept_f[None])

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        x_btn = keep(location, x_btn).clone()
        if location == at:
            x_btn[0, p] = out_n
        return x_btn

    logits_1v = sparse.run(masked.question.prompt_bt, gate=gate, correct=correct).logits_btv[:, -1]
    return float(masked.question.difference(logits_1v))


def _read(sparse: SparseTransformer, layer: int, held: dict[str, Tensor], head: int, query: int) -> Tensor:
    weights = pattern(sparse, layer, held["q"], held["k"], head, query)
    return sum((w * held["v"][p, head * 4 : head * 4 + 4] for p, w in enumerate(weights)), torch.zeros(4).double())


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_the_effect_of_a_head_is_what_an_intervention_finds(kinds: tuple[str, ...]) -> None:
    sparse = model(kinds)
    flow = random_flow(sparse)
    whole = without(flow, ExplainedHead(0, 0, 0, 0, (), 0, 0, 0, 0), "")
    heads, _ = explain_attention(flow)
    assert len(heads) == module.HEADS and len({head.layer for head in heads}) == 2
    for head in heads:
        for kinds_deleted, effect in (("qkv", head.effect), ("qk", head.pattern_effect), ("v", head.value_effect)):
            assert effect == pytest.approx(whole - without(flow, head, kinds_deleted), abs=1e-9)
        assert head.pattern_effect + head.value_effect + head.interaction == pytest.approx(head.effect)
    sizes = [max(abs(h.effect), abs(h.pattern_effect), abs(h.value_effect)) for h in heads]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1e-3


@pytest.mark.usefixtures("everything")
def test_what_is_moved_is_the_sum_of_value_edges() -> None:
    sparse = model()
    flow = random_flow(sparse)
    edges = [edge for edge in edges_of(flow.masked, flow.kept_f).strongest if edge.kind == "value"]
    assert edges
    heads, _ = explain_attention(flow, most=1000)
    told: dict[tuple[str, int | None], float] = {
        (term.node, head.query): term.effect for head in heads for read in head.reads for term in read.moved
    }
    expected: dict[tuple[str, int | None], float] = {}
    for edge in edges:
        key = str(edge.source), edge.target.position
        expected[key] = expected.get(key, 0.0) + edge.effect
    for key, effect in expected.items():
        assert told.get(key, 0.0) == pytest.approx(effect, abs=1e-9)
    for head in heads:
        for read in head.reads:
            assert read.effect == pytest.approx(sum(term.effect for term in read.moved), abs=1e-9)


@pytest.mark.parametrize("kv_heads", [None, 2])
def test_what_nodes_read_from_a_position_is_moved_by_every_query_head(kv_heads: int | None) -> None:
    sparse = model(block=BlockShape(heads=4, kv_heads=kv_heads))
    flow = random_flow(sparse)
    at = {kind: Location(1, kind) for kind in ("q", "k", "v", "attn_out")}
    size_tn = flow.gradient[at["attn_out"]].abs()
    nodes = [Node(at["attn_out"], int(size_tn[position].argmax()), position) for position in (2, 5)]
    values, channels = nodes_of(flow), sparse.channels
    change_tn = values[at["v"]] - flow.masked.means[at["v"]]
    weight_mn = sparse.get_parameter("blocks.1.o.weight")
    expected = [0.0] * len(flow.tokens_t)
    for node in nodes:
        assert node.position is not None
        gradient = float(flow.gradient[at["attn_out"]][node.position, node.index])
        for head in range(sparse.heads_of_queries):
            group = head // sparse.group
            k_tn = values[at["k"]][:, group * channels : (group + 1) * channels].repeat(1, sparse.heads_of_queries)
            for position, read in enumerate(pattern(sparse, 1, values[at["q"]], k_tn, head, node.position)):
                for channel in range(channels):
                    moved = float(change_tn[position, group * channels + channel])
                    expected[position] += read * moved * float(weight_mn[node.index, head * channels + channel]) * gradient
    assert max(map(abs, expected)) > 1e-4
    assert attention_reads(flow, nodes).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_only_the_heads_that_matter_most_are_told() -> None:
    sparse = model()
    flow = random_flow(sparse)
    (every, none_left), (some, left_out) = explain_attention(flow, most=1000), explain_attention(flow, most=3)
    assert none_left == 0 and len(some) == 3 and left_out == len(every) - 3
    assert all(len(head.reads) <= module.READS for head in some)
    assert all(len(read.terms) <= module.TERMS and len(read.moved) <= module.TERMS for h in some for read in h.reads)
    told = [read for head in some for read in head.reads]
    assert all(read.score == pytest.approx(read.others + sum(term.product for term in read.terms)) for read in told)


def test_an_empty_circuit_has_no_heads() -> None:
    sparse = model()
    assert explain_attention(random_flow(sparse, density=-1)) == ((), 0)


def test_rows_in_batches_are_the_same_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = random_flow(model())
    whole, _ = explain_attention(flow)
    monkeypatch.setattr("bridge.circuits.masked_model._ROW_TOKENS", 24)
    assert flow.masked.rows_per_batch == 4
    for head, same in zip(whole, explain_attention(flow)[0], strict=True):
        assert same.effect == pytest.approx(head.effect, abs=1e-12) and same.query == head.query

"""Attention: scores, patterns and what is moved are those written out by hand; what a head is worth, an intervention finds."""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from test_circuit import PARALLEL, SEQUENTIAL, VOCABULARY, model, prompt
from torch import Tensor

from bridge import attention as module
from bridge.attention import Attention, ExplainedHead, explain_attention, variation
from bridge.circuit import Circuit, Question, corpus_means, recording_gate
from bridge.flow import draw_edges
from bridge.sparse import Location, SparseTransformer


def random_circuit(sparse: SparseTransformer, density: float = 0.7, length: int = 6) -> Circuit:
    tokens_bt = torch.randint(VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(1))
    means = {at: mean_n.double() for at, mean_n in corpus_means(sparse, tokens_bt).items()}
    generator = torch.Generator().manual_seed(2)
    kept = {at: torch.rand(length, n, generator=generator) < density for at, n in sparse.locations().items()}
    return Circuit(Question(prompt(length), 3, 4), kept, means, {})


def nodes_of(sparse: SparseTransformer, circuit: Circuit) -> dict[Location, Tensor]:
    values: dict[Location, Tensor] = {}
    sparse.run(circuit.question.tokens_t[None], gate=recording_gate(values, circuit.gate))
    return {at: value_1tn[0] for at, value_1tn in values.items()}


def score(sparse: SparseTransformer, q_n: Tensor, k_n: Tensor, head: int, query: int, position: int) -> float:
    """q times k by the root of the channels; with rotary positions as complex numbers that are turned by the distance."""
    channels = sparse.shape.head_channels
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
    circuit = random_circuit(sparse)
    values = nodes_of(sparse, circuit)
    heads = explain_attention(sparse, circuit, most=1000).heads
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


def without(sparse: SparseTransformer, circuit: Circuit, head: ExplainedHead, kinds: str) -> float:
    """D of S_C with what the head writes at the query worked out by hand from its deleted nodes."""
    values, layer, p = nodes_of(sparse, circuit), head.layer, head.query
    part = slice(head.head * 4, head.head * 4 + 4)
    held = {kind: values[Location(layer, kind)].clone() for kind in "qkv"}
    z_n = torch.cat([_read(sparse, layer, held, other, p) for other in range(sparse.width // 4)])
    for kind in kinds:
        held[kind][:, part] = circuit.means[Location(layer, kind)][part]
    z_n[part] = _read(sparse, layer, held, head.head, p)
    out_n = sparse.get_parameter(f"blocks.{layer}.o.weight") @ z_n + sparse.get_parameter(f"blocks.{layer}.o.bias")
    top = out_n.abs().topk(round(sparse.shape.keep * len(out_n))).indices
    out_n = torch.zeros_like(out_n).scatter(0, top, out_n[top])
    at = Location(layer, "attn_out")
    out_n = torch.where(circuit.kept[at][p], out_n, circuit.means[at])

    def gate(location: Location, x_btn: Tensor) -> Tensor:
        x_btn = circuit.gate(location, x_btn).clone()
        if location == at:
            x_btn[0, p] = out_n
        return x_btn

    return float(circuit.question.difference(sparse.run(circuit.question.tokens_t[None], gate=gate).logits_btv[0, -1]))


def _read(sparse: SparseTransformer, layer: int, held: dict[str, Tensor], head: int, query: int) -> Tensor:
    weights = pattern(sparse, layer, held["q"], held["k"], head, query)
    return sum((w * held["v"][p, head * 4 : head * 4 + 4] for p, w in enumerate(weights)), torch.zeros(4).double())


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_what_a_head_is_worth_is_what_an_intervention_finds(kinds: tuple[str, ...]) -> None:
    sparse = model(kinds)
    circuit = random_circuit(sparse)
    whole = without(sparse, circuit, ExplainedHead(0, 0, 0, 0, (), 0, 0, 0, 0), "")
    heads = explain_attention(sparse, circuit).heads
    assert len(heads) == module.HEADS and len({head.layer for head in heads}) == 2
    for head in heads:
        for kinds_deleted, effect in (("qkv", head.effect), ("qk", head.pattern_effect), ("v", head.value_effect)):
            assert effect == pytest.approx(whole - without(sparse, circuit, head, kinds_deleted), abs=1e-9)
        assert head.pattern_effect + head.value_effect + head.interaction == pytest.approx(head.effect)
    sizes = [max(abs(h.effect), abs(h.pattern_effect), abs(h.value_effect)) for h in heads]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > 1e-3


@pytest.mark.usefixtures("everything")
def test_what_is_moved_is_the_sum_of_value_edges() -> None:
    sparse = model()
    circuit = random_circuit(sparse)
    edges = [edge for edge in draw_edges(sparse, circuit).strongest if edge.kind == "value"]
    assert edges
    heads = explain_attention(sparse, circuit, most=1000).heads
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


def test_only_the_heads_that_matter_most_are_told() -> None:
    sparse = model()
    circuit = random_circuit(sparse)
    every, some = explain_attention(sparse, circuit, most=1000), explain_attention(sparse, circuit, most=3)
    assert every.left_out == 0 and len(some.heads) == 3 and some.left_out == len(every.heads) - 3
    assert all(len(head.reads) <= module.READS for head in some.heads)
    assert all(len(read.terms) <= module.TERMS and len(read.moved) <= module.TERMS for h in some.heads for read in h.reads)
    told = [read for head in some.heads for read in head.reads]
    assert all(read.score == pytest.approx(read.others + sum(term.product for term in read.terms)) for read in told)


def test_an_empty_circuit_has_no_heads() -> None:
    sparse = model()
    assert explain_attention(sparse, random_circuit(sparse, density=-1)) == Attention((), 0)


def test_variation_counts_the_sink() -> None:
    before, after = torch.tensor([0.5, 0.3]), torch.tensor([0.1, 0.4])  # sinks .2 and .5
    literal = 0.5 * (0.4 + 0.1 + 0.3)
    assert float(variation(before[None, None, None], after[None, None, None])) == pytest.approx(literal)

"""Edges of a prompt's circuit, errors included: each is what an intervention finds, and what the answer owes to its target."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.circuit_cases import PARALLEL, SEQUENTIAL, model
from support.circuits_attribution_cases import Frozen, edges_of, masked_model, some_edges, some_kept
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.graph.attribution import draw_edges
from bridge.graph.flow import flow_through
from bridge.models.circuit import COUNTED, EMBEDDING, KINDS, Edge, Node
from bridge.models.schema import ERROR
from bridge.models.sparse import Location


def test_a_weight_is_one_wherever_it_is_used():
    sparse = model()
    masked = masked_model(sparse)
    drawn = edges_of(masked, some_kept(masked))
    edges = drawn.strongest
    assert drawn.count(*KINDS) == len(edges) and [abs(e.effect) for e in edges] == sorted(
        (abs(e.effect) for e in edges), reverse=True
    )
    assert drawn.count(*COUNTED) == sum(edge.kind in COUNTED for edge in edges)
    ends = {(e.source.location, e.source.index, e.target.location, e.target.index) for e in edges if e.kind in COUNTED}
    assert drawn.distinct(*COUNTED) == len(ends) < drawn.count(*COUNTED)


@pytest.mark.parametrize("most", [1, 5, 40])
def test_the_strongest_edges_are_those_of_all_and_all_are_counted(most: int):
    sparse = model()
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    every, some = edges_of(masked, kept_f), edges_of(masked, kept_f, most)
    assert some.strongest == every.strongest[:most] and len(every.strongest) > 4 * most
    assert some.number == every.number and some.weights == every.weights


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_weight_value_and_score_edges_are_what_an_intervention_finds(kinds: tuple[str, ...], positions: str):
    # all values are kept here, so that a gate sees what a target is before AbsTopK
    sparse = model(kinds, keep=1.0, positions=positions)
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    frozen, edges = Frozen(masked, kept_f), edges_of(masked, kept_f).strongest
    for edge in some_edges(edges, "weight"):
        if edge.target.location.kind == "mlp_act":
            layer = edge.target.location.layer
            read_n = frozen.values[Location(layer, "mlp_in")][0, edge.target.position]
            up, bias = sparse.get_parameter(f"blocks.{layer}.up.weight"), sparse.get_parameter(f"blocks.{layer}.up.bias")
            before = float(up[edge.target.index] @ read_n + bias[edge.target.index])
            after = F.gelu(torch.tensor(before - edge.weight, dtype=torch.float64), approximate="tanh")
            assert frozen.target(edge, 1) == pytest.approx(float(after), abs=1e-9)
        else:
            assert frozen.target(edge, 0) - frozen.target(edge, 1) == pytest.approx(edge.weight, abs=1e-9)
    for edge in some_edges(edges, "value"):
        assert edge.source.location.kind == "v" and edge.target.location.kind == "attn_out"
        assert frozen.target(edge, 0) - frozen.target(edge, 1) == pytest.approx(edge.weight, abs=1e-9)
    for edge in some_edges(edges, "score"):
        slope = (frozen.target(edge, -1e-5) - frozen.target(edge, 1e-5)) / 2e-5
        assert slope == pytest.approx(edge.weight, abs=1e-6)


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_every_nonzero_weight_between_kept_nodes_is_an_edge_and_nothing_else(kinds: tuple[str, ...]):
    sparse = model(kinds, l0=0.2)
    masked = masked_model(sparse)
    kept_f = some_kept(masked, density=0.3)
    edges = edges_of(masked, kept_f).strongest
    drawn = {(edge.source, edge.target) for edge in edges if edge.kind in COUNTED}
    assert len(drawn) == sum(edge.kind in COUNTED for edge in edges)
    expected = set()
    readers = {"attn_in": "qkv", "mlp_in": ("up",), "mlp_act": ("down",), "v": ("o",)}
    reads = {"up": "mlp_act", "down": "mlp_out", "o": "attn_out"}
    nodes = [masked.space.node(place) for place in kept_f.nonzero().flatten().tolist()]
    for source in nodes:
        for name in readers.get(source.location.kind, ()):
            weight = sparse.get_parameter(f"blocks.{source.location.layer}.{name}.weight")
            for target in nodes:
                assert target.position is not None and source.position is not None
                same = target.position == source.position or (name == "o" and target.position > source.position)
                there = target.location == Location(source.location.layer, reads.get(name, name)) and same
                if there and weight[target.index, source.index] != 0:
                    expected.add((source, target))
    assert drawn == expected


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_residual_edges_are_what_a_write_adds_to_a_later_read(kinds: tuple[str, ...]):
    sparse = model(kinds)
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    frozen, edges = Frozen(masked, kept_f), edges_of(masked, kept_f).strongest
    for edge in some_edges(edges, "residual"):
        assert edge.source.index == edge.target.index and edge.source.position == edge.target.position

        def without(location: Location, x_btn: Tensor, edge: Edge = edge) -> Tensor:
            x_btn = frozen.values[location].clone()
            if location == edge.source.location:
                x_btn[0, edge.source.position, edge.source.index] -= frozen.deviation(edge.source)
            return x_btn

        site = sparse.site(edge.target.location)
        changed = sparse.run(frozen.tokens_1t, gate=without, correct=frozen.correct).residuals[site][0, edge.target.position]
        whole = frozen.trace.residuals[site][0, edge.target.position]
        rms = (whole.square().mean() + 1e-6).sqrt()
        assert float((whole - changed)[edge.target.index] / rms) == pytest.approx(edge.weight, abs=1e-9)
    entry_ts = sparse.embed(masked.question.prompt_bt)[0]
    for edge in some_edges(edges, "embedding"):
        token = int(masked.question.tokens_t[edge.source.position])
        assert sparse.embedding[token, edge.source.index] != 0
        site = sparse.site(edge.target.location)
        rms = (frozen.trace.residuals[site][0, edge.target.position].square().mean() + 1e-6).sqrt()
        change = entry_ts[edge.source.position, edge.source.index] - masked.means[EMBEDDING][edge.source.index]
        assert float(change / rms) == pytest.approx(edge.weight, abs=1e-9)


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_errors_are_sources_wherever_the_stream_has_them(kinds: tuple[str, ...]) -> None:
    sparse = model(kinds)
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    frozen, edges = Frozen(masked, kept_f), edges_of(masked, kept_f).strongest
    found = [edge for edge in edges if edge.kind == "error"]
    assert found and all((edge.kind == "error") == (edge.source.location.kind == ERROR) for edge in edges)
    nodes = [masked.space.node(place) for place in kept_f.nonzero().flatten().tolist()]
    reads = [node for node in nodes if node.location.kind in ("attn_in", "mlp_in")]
    errors = [node for node in nodes if node.location.kind == ERROR]
    expected = {
        (error, read)
        for error in errors
        for read in reads
        if error.position == read.position and error.location.layer <= sparse.site(read.location)
    }
    assert {(edge.source, edge.target) for edge in found if edge.target.location.kind != "answer"} == expected
    assert str(errors[0]) == f"error[{errors[0].location.layer}]@{errors[0].position}"

    def held(location: Location, x_btn: Tensor) -> Tensor:
        return frozen.values[location]

    for edge in found[::5]:
        if edge.target.location.kind == "answer":
            continue
        site = sparse.site(edge.target.location)
        less = sparse.run(frozen.tokens_1t, gate=held, correct=frozen.correction(edge.source))
        change_s = (frozen.trace.residuals[site] - less.residuals[site])[0, edge.target.position]
        rms = (frozen.trace.residuals[site][0, edge.target.position].square().mean() + 1e-6).sqrt()
        assert float(change_s[edge.target.index] / rms) == pytest.approx(edge.weight, abs=1e-9)


def test_edges_into_the_answer_add_up_to_it() -> None:
    sparse = model()
    masked = masked_model(sparse, contrast=4)
    frozen, flow = Frozen(masked, some_kept(masked, 1.0)), flow_through(masked, some_kept(masked, 1.0))
    into = [edge for edge in draw_edges(flow).strongest if edge.target.location.kind == "answer"]
    assert {edge.kind for edge in into} == {"unembedding", "error", "bigram"}
    assert sum(edge.source.location == Location(sparse.n_sites, ERROR) for edge in into) == 1
    # what is left is what the final residual would say if all that is written were at its mean
    tokens_t, last = masked.question.tokens_t, len(masked.question.tokens_t) - 1
    baseline_s = masked.means[EMBEDDING].clone()
    entries = sparse.embedding[tokens_t[last]] == 0
    baseline_s[entries] = sparse.embed(tokens_t[None])[0, last][entries]  # an entry that is 0 is no edge
    for location, mean_n in masked.means.items():
        if location.kind in ("attn_out", "mlp_out") or (location.kind == ERROR and location.layer < sparse.n_sites):
            baseline_s += mean_n
    rms = (frozen.trace.residuals[-1][0, last].square().mean() + 1e-6).sqrt()
    constant_v = sparse.unembedding.weight @ baseline_s / rms + sparse.unembedding.bias
    constant_v = constant_v + masked.means[Location(sparse.n_sites, ERROR)]
    expected = flow.difference - float(constant_v[3] - constant_v[4])
    assert sum(edge.weight for edge in into) == pytest.approx(expected, abs=1e-9)
    assert flow.difference == pytest.approx(float(frozen.trace.logits_btv[0, -1, 3] - frozen.trace.logits_btv[0, -1, 4]))
    assert all(edge.effect == edge.weight for edge in into)


def test_edges_into_log_odds_are_first_order() -> None:
    sparse = model()
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    frozen, flow = Frozen(masked, kept_f), flow_through(masked, kept_f)
    logits_v = frozen.trace.logits_btv[0, -1]

    def odds(logits_v: Tensor) -> float:
        p_v = logits_v.softmax(-1)
        return float((p_v[3] / (1 - p_v[3])).log())

    assert flow.difference == pytest.approx(odds(logits_v))
    x_s, rms = frozen.trace.residuals[-1][0, -1], (frozen.trace.residuals[-1][0, -1].square().mean() + 1e-6).sqrt()
    assert masked.errors is not None
    checked = set()
    for edge in draw_edges(flow).strongest:
        if edge.target.location.kind != "answer" or edge.kind == "bigram":
            continue
        at, change_v = edge.source.location, None
        change_s = torch.zeros_like(x_s)
        if at == Location(sparse.n_sites, ERROR):
            change_v = masked.errors[at][0, 0] - masked.means[at]
        elif at.kind == ERROR:
            change_s = masked.errors[at][0, -1] - masked.means[at]
        elif at == EMBEDDING:
            change_s[edge.source.index] = (sparse.embed(masked.question.prompt_bt)[0, -1] - masked.means[at])[edge.source.index]
        else:
            change_s[edge.source.index] = frozen.deviation(edge.source)
        direction_v = sparse.unembedding.weight @ change_s / rms if change_v is None else change_v
        gradient = (odds(logits_v + 1e-5 * direction_v) - odds(logits_v - 1e-5 * direction_v)) / 2e-5
        assert gradient == pytest.approx(edge.weight, rel=1e-5, abs=1e-8)
        checked.add(edge.kind)
    assert checked == {"unembedding", "error"}


def test_effects_are_weights_times_what_the_answer_owes_to_the_target():
    sparse = model()
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    edges = edges_of(masked, kept_f).strongest
    assert [abs(edge.effect) for edge in edges] == sorted((abs(edge.effect) for edge in edges), reverse=True)
    gate, correct = masked.gates(kept_f[None])
    tokens_1t = masked.question.prompt_bt

    def answer(target: Node, step: float) -> float:
        def stepped(location: Location, x_btn: Tensor) -> Tensor:
            if location == target.location and x_btn[0, target.position, target.index] != 0:
                x_btn = x_btn.clone()
                if location.kind == "mlp_act":  # step is before GELU: invert it by bisection
                    low, high = torch.tensor(-0.7, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)
                    for _ in range(60):
                        middle = (low + high) / 2
                        above = F.gelu(middle, approximate="tanh") > x_btn[0, target.position, target.index]
                        low, high = (low, middle) if above else (middle, high)
                    x_btn[0, target.position, target.index] = F.gelu(low + step, approximate="tanh")
                else:
                    x_btn[0, target.position, target.index] += step
            return gate(location, x_btn)

        return float(masked.question.difference(sparse.run(tokens_1t, gate=stepped, correct=correct).logits_btv[:, -1]))

    kinds = (("weight", 12), ("value", 6), ("residual", 6), ("error", 6))
    into = [edge for kind, count in kinds for edge in some_edges(edges, kind, count) if edge.target.location.kind != "answer"]
    for edge in into:
        slope = (answer(edge.target, 1e-6) - answer(edge.target, -1e-6)) / 2e-6
        if edge.target.location.kind == "mlp_act" and edge.effect != 0 and abs(slope) < 1e-7:
            continue  # on GELU's falling branch, which the inversion does not follow
        assert slope * edge.weight == pytest.approx(edge.effect, rel=1e-4, abs=1e-6)


def test_a_mean_of_the_embedding_that_is_missing_is_an_error() -> None:
    masked = masked_model(model())
    means = {at: mean for at, mean in masked.means.items() if at != EMBEDDING}
    fewer = MaskedModel(masked.sparse, masked.question, means, masked.errors)
    with pytest.raises(ValueError, match=r"no corpus mean for -1\.embedding"):
        flow_through(fewer, some_kept(masked))


def test_an_empty_circuit_has_the_tokens_edges_alone() -> None:
    masked = masked_model(model(), errors=False)
    edges = edges_of(masked, some_kept(masked, -1.0)).strongest
    assert {edge.kind for edge in edges} == {"unembedding", "bigram"}
    assert all(edge.source.location.layer < 0 for edge in edges)


def test_a_circuit_is_read_where_other_nodes_run_as_well() -> None:
    masked = masked_model(model())
    kept_f = some_kept(masked, 0.3)
    whole, few = edges_of(masked, torch.ones_like(kept_f)), draw_edges(flow_through(masked, kept_f, torch.ones_like(kept_f)))
    weights = {(edge.source, edge.target): edge.weight for edge in whole.strongest}
    assert few.strongest and all(weights[edge.source, edge.target] == edge.weight for edge in few.strongest)

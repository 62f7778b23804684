"""Edges removed from a prompt's circuit: held to a literal run with a matrix of its own for every token."""

from __future__ import annotations

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, untrained
from torch import Tensor

from bridge.circuits.error_nodes import error_means, follow_dense
from bridge.circuits.loss import CircuitLoss, Level, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.graph.attribution import draw_edges
from bridge.graph.edge_pruning import EdgeMaskedModel, prune_edges
from bridge.graph.flow import Flow, flow_through
from bridge.models.circuit import COUNTED, Node, corpus_means
from bridge.models.dense import DenseModel
from bridge.models.sparse import Location
from bridge.models.sparse_blocks import norm_scale

LENGTH = 6


@pytest.fixture(scope="module")
def loss(dense: DenseModel) -> CircuitLoss:
    coupling = untrained(dense)
    coupling.sparse.project(0.3)
    coupling.sparse.requires_grad_(False)
    corpus_bt = torch.randint(2, VOCABULARY, (6, CONTEXT), generator=torch.Generator().manual_seed(5))
    tokens_t = corpus_bt[1, :LENGTH].clone()
    followed = follow_dense(coupling, tokens_t[None], torch.tensor([LENGTH - 1]))
    means = {**corpus_means(coupling.sparse, corpus_bt), **error_means(coupling, corpus_bt)}
    masked = MaskedModel(coupling.sparse, Question.of_prompt(tokens_t, 3), means, followed.errors)
    return CircuitLoss(masked, followed.dense_bv, SearchConfig())


def circuit(loss: CircuitLoss, density: float = 0.5) -> Tensor:
    kept_f = torch.rand(loss.masked.space.size, generator=torch.Generator().manual_seed(7)) < density
    return kept_f & loss.nodes_f


def literal_logits(flow: Flow, removed: list[tuple[Node, Node]]) -> Tensor:
    """logits_v of the circuit alone without some edges, token by token and matrix by matrix."""
    sparse, masked = flow.sparse, flow.masked
    means, gate, correct = masked.means, *masked.gates(flow.kept_f[None])
    gone: dict[tuple[Location, int, int], list[Node]] = {}
    for source, target in removed:
        gone.setdefault((target.location, target.position or 0, target.index), []).append(source)

    def top(at: Location, x_1tn: Tensor) -> Tensor:
        kept = max(1, round(sparse.keep * x_1tn.shape[-1]))
        order = x_1tn.abs().argsort(dim=-1, descending=True, stable=True)[..., :kept]
        return gate(at, torch.zeros_like(x_1tn).scatter(-1, order, x_1tn.gather(-1, order)))

    def mapped(layer: int, name: str, kind: str, source: str, x_1tn: Tensor) -> Tensor:
        weight_mn, bias_m = (sparse.get_parameter(f"blocks.{layer}.{name}.{part}") for part in ("weight", "bias"))
        y_1tm = x_1tn @ weight_mn.T + bias_m
        for (at, position, index), sources in gone.items():
            if at == Location(layer, kind):
                for node in sources:
                    change = x_1tn[0, position, node.index] - means[Location(layer, source)][node.index]
                    y_1tm[0, position, index] -= weight_mn[index, node.index] * change
        return y_1tm

    x_1ts = correct(Location(0, "error"), sparse.embed(masked.question.prompt_bt))
    for site, kind in enumerate(sparse.sublayer_kinds):
        layer = site // 2
        r_1ts = x_1ts * norm_scale(x_1ts)
        if kind == "attn":
            r_1ts = top(Location(layer, "attn_in"), r_1ts)
            q, k, v = (top(Location(layer, name), mapped(layer, name, name, "attn_in", r_1ts)) for name in "qkv")
            pattern_htt, channels = sparse.pattern(layer, q, k)[0], sparse.channels
            z_1tn = torch.cat([pattern_htt[h] @ v[0, :, h * channels :][:, :channels] for h in range(len(pattern_htt))], -1)[None]
            weight_sn, bias_s = (sparse.get_parameter(f"blocks.{layer}.o.{part}") for part in ("weight", "bias"))
            y_1ts = z_1tn @ weight_sn.T + bias_s
            for (at, position, index), sources in gone.items():
                for node in sources if at == Location(layer, "attn_out") else ():
                    change = v[0, node.position, node.index] - means[Location(layer, "v")][node.index]
                    share = pattern_htt[node.index // channels, position, node.position]
                    y_1ts[0, position, index] -= share * weight_sn[index, node.index] * change
            x_1ts = x_1ts + top(Location(layer, "attn_out"), y_1ts)
        else:
            r_1ts = top(Location(layer, "mlp_in"), r_1ts)
            before = mapped(layer, "up", "mlp_act", "mlp_in", r_1ts)
            a_1tn = top(Location(layer, "mlp_act"), torch.nn.functional.gelu(before, approximate="tanh"))
            x_1ts = x_1ts + top(Location(layer, "mlp_out"), mapped(layer, "down", "mlp_out", "mlp_act", a_1tn))
        x_1ts = correct(Location(site + 1, "error"), x_1ts)
    tokens = masked.question.prompt_bt
    logits_1tv = sparse.unembedding(x_1ts * norm_scale(x_1ts)) + sparse.bigram_entries(tokens)
    return correct(Location(sparse.n_sites, "error"), logits_1tv[:, -1:])[0, -1]


def test_removed_edges_are_those_of_a_literal_run(loss: CircuitLoss) -> None:
    flow = flow_through(loss.masked, circuit(loss))
    edges = draw_edges(flow)
    strongest = edges.strongest
    kept_re = torch.rand(4, len(strongest), generator=torch.Generator().manual_seed(3)) < torch.tensor(
        [[0.0], [0.3], [0.7], [1.1]]
    )
    made_r = EdgeMaskedModel(loss, flow, edges).miss(kept_re)
    for kept_e, made in zip(kept_re.tolist(), made_r.tolist(), strict=True):
        removed = [(e.source, e.target) for e, kept in zip(strongest, kept_e, strict=True) if e.kind in COUNTED and not kept]
        wanted = float(loss.miss(literal_logits(flow, removed)[None]))
        assert made == pytest.approx(wanted, abs=2e-4)
    assert made_r[0] != made_r[-1]  # there is something to remove
    assert float(made_r[-1]) == pytest.approx(float(loss.miss(loss.masked.logits(flow.kept_f[None]))), abs=1e-4)


def test_pruned_edges_keep_what_the_level_asks(loss: CircuitLoss) -> None:
    kept_f = torch.ones_like(loss.nodes_f)
    flow = flow_through(loss.masked, kept_f)
    edges, level = draw_edges(flow), Level(0.7)
    pruned = prune_edges(loss, flow, edges, level)
    there = {str(edge) for edge in pruned.edges.strongest}
    assert there < {str(edge) for edge in edges.strongest} and pruned.before == edges.count(*COUNTED)
    assert [str(e) for e in pruned.edges.strongest if e.kind not in COUNTED] == [
        str(e) for e in edges.strongest if e.kind not in COUNTED
    ]
    kept = [edge for edge in pruned.edges.strongest if edge.kind in COUNTED]
    assert pruned.edges.count(*COUNTED) == len(kept) < pruned.before
    weights = {(e.source.name, e.target.name) for e in kept}
    assert pruned.edges.distinct(*COUNTED) == len(weights)
    removed = [(e.source, e.target) for e in edges.strongest if e.kind in COUNTED and str(e) not in there]
    faithfulness = 1 - abs(float(loss.miss(literal_logits(flow, removed)[None])))
    assert pruned.faithfulness == pytest.approx(faithfulness, abs=2e-4) and faithfulness >= 0.7


def test_edges_that_are_not_all_listed_are_not_pruned(loss: CircuitLoss) -> None:
    flow = flow_through(loss.masked, circuit(loss))
    edges = draw_edges(flow, 20)
    assert prune_edges(loss, flow, edges, Level(0.9)).edges is edges
    assert prune_edges(loss, flow, edges, Level(0.9)).faithfulness is None

"""Blocks that mirror the dense model's: every family starts as it is, and edges and heads are true of every kind of block."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.circuit_cases import CONTEXT, PARALLEL, SEQUENTIAL
from support.circuit_cases import VOCABULARY as FEW
from support.circuits_attribution_cases import Frozen, edges_of, masked_model, some_edges, some_kept
from support.tiny_families import FAMILIES, VOCABULARY, perturbed, some_tokens, tiny
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bridge.graph.attention import explain_attention
from bridge.graph.flow import flow_through
from bridge.models import schema
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import load_dense
from bridge.models.sparse import Location, SparseTransformer
from bridge.recipe import AttentionShape, BlockShape, SparseShape, resolve
from bridge.training.anatomy import dissect
from bridge.training.initialize import Initialization, start_from_dense
from bridge.training.prepare import complete_recipe

# what adds to a stream that is itself normed (post-norm), and experts, have no counterpart; their other sublayers are not held to
UNKNOWN = ("openai-gpt", "opt-post-norm", "bloom-post-norm", "mixtral")


def started(model: Any, **shape: Any) -> tuple[CoupledModels, Initialization]:
    dense = load_dense(model)
    values = {"dense": "tiny", "sparse": {"keep": 1.0, **shape}, "sparsity": {"l0": 1.0}}
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    return coupling, start_from_dense(coupling, some_tokens(8, 16, seed=3))


@torch.no_grad()
def divergence(coupling: CoupledModels, model: Any, tokens_bt: Tensor) -> float:
    """KL of the sparse model's answers from those of the Hugging Face model, run by itself."""
    wanted, given = (logits_btv.double().log_softmax(-1) for logits_btv in (model(tokens_bt).logits, coupling.sparse(tokens_bt)))
    return float((wanted.exp() * (wanted - given)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_starts_as_it_is(family: str) -> None:
    model = tiny(family)
    coupling, what = started(model)
    if family in UNKNOWN:
        assert None in what.sublayers and "the rest is random" in str(what)
        return
    assert what.embedding and what.unembedding and None not in what.sublayers
    assert divergence(coupling, model, some_tokens(8, 16, seed=9)) < 1e-4


def test_the_sparse_model_has_the_dense_ones_shape_as_many_times_as_it_is_wider() -> None:
    coupling, _ = started(tiny("qwen3"), width=64)
    form, sparse = coupling.recipe.sparse.block, coupling.sparse
    assert form is not None and (sparse.channels, form.heads, form.kv_heads, form.neurons) == (8, 8, 4, 96)
    assert (form.gated, form.activation, form.qk_norm, coupling.recipe.sparse.positions) == (True, "silu", "head", "rotary")
    sizes = {at.kind: n for at, n in sparse.locations().items()}
    assert sizes == {
        "attn_in": 64, "q": 64, "k": 32, "v": 32, "attn_out": 64, "mlp_in": 64, "mlp_gate": 96, "mlp_act": 96, "mlp_out": 64,
    }  # fmt: skip


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ],
    ids=lambda scaling: scaling["rope_type"],
)  # fmt: skip
def test_scaled_rotary_positions_are_measured(scaling: dict[str, Any]) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, rope_parameters={"rope_theta": 500.0, **scaling},
    )  # fmt: skip
    model = perturbed(LlamaForCausalLM(config))
    coupling, what = started(model)
    assert None not in what.sublayers
    assert divergence(coupling, model, some_tokens(4, 64, seed=9)) < 1e-4


def test_windows_and_caps_are_measured() -> None:
    model = tiny("gemma2", attn_logit_softcapping=0.5, final_logit_softcapping=3.0)
    anatomy = dissect(load_dense(model), 16)
    assert {attention.cap for attention in anatomy.attention.values()} == {0.5} and anatomy.logit_cap == 3.0
    assert divergence(started(model)[0], model, some_tokens(8, 16, seed=9)) < 1e-4
    windows = [attention.shape.window for attention in dissect(load_dense(tiny("mistral")), 16).attention.values()]
    assert windows == [4, 4, 4]
    assert [each.shape.window for each in dissect(load_dense(tiny("gpt-neo")), 16).attention.values()] == [None, 4, None]


def test_slopes_of_alibi_are_those_of_the_paper() -> None:
    """Press et al. 2022: with n heads the slopes are 2 ** (-8 i / n)."""
    (first, *_) = dissect(load_dense(tiny("bloom")), 16).attention.values()
    assert first.shape.slopes == pytest.approx([2 ** (-8 * i / 4) for i in (1, 2, 3, 4)], rel=1e-4)


# --- edges and heads of every kind of block

FORMS: dict[str, dict[str, Any]] = {
    "gated": {"gated": True, "activation": "silu"},
    "grouped": {"heads": 4, "kv_heads": 2},
    "partial rotary": {"heads": 4, "kv_heads": 1, "attention": (AttentionShape(frequencies=(0.7,)),)},
    "windows": {"attention": (AttentionShape(window=2), AttentionShape())},
    "alibi": {"attention": (AttentionShape(slopes=(0.5, 0.2, 0.1, 0.05)),)},
    "caps": {"score_cap": 0.8, "logit_cap": 2.0},
    "raw": {"reads_normed": False},
}
NORMS: dict[str, dict[str, Any]] = {
    "heads' norm": {"qk_norm": "head", "heads": 4, "kv_heads": 2},
    "norm over heads": {"qk_norm": "all"},
    "writes' norm": {"writes_normed": True},
}


def block_model(form: dict[str, Any], kinds: tuple[str, ...] = SEQUENTIAL, **shape: Any) -> SparseTransformer:
    """A small random sparse model in float64 whose blocks have a form."""
    values = {"width": 16, "head_channels": 4, "mlp_ratio": 2, "positions": "learned", "bigram_rank": 3, **shape}
    if any(each.frequencies for each in form.get("attention", ())):
        values["positions"] = "rotary"
    sparse = SparseTransformer(SparseShape(**values, block=BlockShape(**form)), kinds, FEW, CONTEXT).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    sparse.project(0.5)
    return sparse.requires_grad_(False)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL], ids=["sequential", "parallel"])
def test_edges_are_what_an_intervention_finds(kinds: tuple[str, ...], form: dict[str, Any]) -> None:
    sparse = block_model(form, kinds, keep=1.0)
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    frozen, edges = Frozen(masked, kept_f), edges_of(masked, kept_f).strongest
    into = schema.activated_kind(sparse.form.gated)  # before its nonlinearity: to first order behind it
    for kind in ("weight", "value", "score", *(("gate",) if sparse.form.gated else ())):
        for edge in some_edges(edges, kind, 40):
            assert edge.target.position is not None
            slope = (frozen.target(edge, -1e-5) - frozen.target(edge, 1e-5)) / 2e-5
            if edge.target.location.kind == into:
                name = "gate" if sparse.form.gated else "up"
                weight, bias = (
                    sparse.get_parameter(f"blocks.{edge.target.location.layer}.{name}.{x}") for x in ("weight", "bias")
                )
                read_n = frozen.values[Location(edge.target.location.layer, "mlp_in")][0, edge.target.position]
                before = (weight[edge.target.index] @ read_n + bias[edge.target.index]).requires_grad_()
                after = F.silu(before) if sparse.form.gated else F.gelu(before, approximate="tanh")
                slope /= float(torch.autograd.grad(after, before)[0])
            assert slope == pytest.approx(edge.weight, abs=1e-6), (kind, edge)
            if kind in ("value", "gate"):
                assert frozen.target(edge, 0) - frozen.target(edge, 1) == pytest.approx(edge.weight, abs=1e-9)


@pytest.mark.parametrize("form", [*FORMS.values(), *NORMS.values()], ids=[*FORMS, *NORMS])
def test_effects_of_edges_are_slopes_of_the_answer(form: dict[str, Any]) -> None:
    """Into a node that all is kept of, an edge's effect is its weight times what the answer owes to the node."""
    sparse = block_model(form, keep=1.0)
    masked = masked_model(sparse)
    kept_f = some_kept(masked)
    edges = edges_of(masked, kept_f).strongest
    gate, correct = masked.gates(kept_f[None])

    def answer(edge: Any, step: float) -> float:
        def stepped(location: Location, x_btn: Tensor) -> Tensor:
            x_btn = gate(location, x_btn)
            if location == edge.target.location:
                x_btn = x_btn.clone()
                x_btn[0, edge.target.position, edge.target.index] += step
            return x_btn

        trace = sparse.run(masked.question.prompt_bt, gate=stepped, correct=correct)
        return float(masked.question.difference(trace.logits_btv[:, -1]))

    for kind in ("weight", "value", "residual"):
        for edge in some_edges(edges, kind, 10):
            if edge.target.location.kind in ("answer", schema.activated_kind(sparse.form.gated)):
                continue
            slope = (answer(edge, 1e-6) - answer(edge, -1e-6)) / 2e-6
            assert slope * edge.weight == pytest.approx(edge.effect, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("form", NORMS.values(), ids=NORMS)
def test_what_goes_through_a_norm_is_scaled_as_it_is(form: dict[str, Any]) -> None:
    """With the norm's scale held, all edges into a node are its change from where its sources are at their means."""
    sparse = block_model(form, keep=1.0)
    masked = masked_model(sparse, errors=False)
    kept_f = torch.ones(masked.space.size, dtype=torch.bool)
    flow, edges = flow_through(masked, kept_f), edges_of(masked, kept_f).strongest
    for name, kind in (("q", "q"), ("down", "mlp_out")):
        for layer in range(2):
            at, source = Location(layer, kind), Location(layer, sparse.matrices[name][0])
            weight_ji, bias_j = (sparse.get_parameter(f"blocks.{layer}.{name}.{part}") for part in ("weight", "bias"))
            scale_tj = flow.value[at] / (flow.value[source] @ weight_ji.T + bias_j)
            wanted_tj = scale_tj * ((flow.value[source] - masked.means[source]) @ weight_ji.T)
            summed_tj = torch.zeros_like(wanted_tj)
            for edge in edges:
                if edge.target.location == at and edge.kind == "weight":
                    assert edge.target.position is not None
                    summed_tj[edge.target.position, edge.target.index] += edge.weight
            torch.testing.assert_close(summed_tj, wanted_tj, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("form", [*FORMS.values(), *NORMS.values()], ids=[*FORMS, *NORMS])
def test_heads_move_what_a_loop_by_hand_moves(form: dict[str, Any]) -> None:
    """Weights and effects of heads, of a head's keys and values at their means for that head alone."""
    sparse = block_model(form, keep=1.0)
    masked = masked_model(sparse)
    kept_f = some_kept(masked, 0.8)
    flow, (gate, correct) = flow_through(masked, kept_f), masked.gates(kept_f[None])
    heads, _ = explain_attention(flow, most=6)
    assert heads
    group = sparse.heads_of_queries // sparse.heads_of_keys

    def moved(layer: int, head: int, query: int, *, pattern_ablated: bool, values_ablated: bool) -> Tensor:
        """z_c of a head at a query."""
        parts = {"q": head, "k": head // group, "v": head // group}
        held = {}
        for kind, part in parts.items():
            at, here = Location(layer, kind), slice(4 * part, 4 * part + 4)
            ablated = values_ablated if kind == "v" else pattern_ablated
            held[kind] = (masked.means[at].expand_as(flow.value[at]) if ablated else flow.value[at])[:, here]
        shape = sparse.form.attention[layer % len(sparse.form.attention)] if sparse.form.attention else AttentionShape()
        scores, z_c = [], torch.zeros(4, dtype=torch.float64)
        for key in range(query + 1):
            q, k = held["q"][query].clone(), held["k"][key].clone()
            for pair, frequency in enumerate(shape.frequencies):
                for x, place in ((q, query), (k, key)):
                    turned = torch.complex(x[pair], x[pair + 1]) * complex(
                        math.cos(place * frequency), math.sin(place * frequency)
                    )
                    x[pair], x[pair + len(shape.frequencies)] = turned.real, turned.imag
            score = float(q @ k) / 2 + (shape.slopes[head] * (key - query) if shape.slopes else 0.0)
            score = sparse.form.score_cap * math.tanh(score / sparse.form.score_cap) if sparse.form.score_cap else score
            scores.append(math.exp(score) if query - key < (shape.window or 99) else 0.0)
        total = sum(scores) + math.exp(float(sparse.get_parameter(f"blocks.{layer}.sinks")[head]))
        for key, score in enumerate(scores):
            z_c += score / total * held["v"][key]
        return z_c

    for head in heads:
        lost = []
        for pattern_ablated, values_ablated in ((True, True), (True, False), (False, True)):
            change_c = moved(head.layer, head.head, head.query, pattern_ablated=pattern_ablated, values_ablated=values_ablated)

            def swap(_module: Any, args: tuple[Tensor], change_c: Tensor = change_c, head: Any = head) -> tuple[Tensor]:
                z_btn = args[0].clone()
                z_btn[0, head.query, 4 * head.head : 4 * head.head + 4] = change_c
                return (z_btn,)

            with sparse.get_submodule(f"blocks.{head.layer}.o").register_forward_pre_hook(swap):
                trace = sparse.run(masked.question.prompt_bt, gate=gate, correct=correct)
            lost.append(flow.difference - float(masked.question.difference(trace.logits_btv[:, -1])))
        assert [head.effect, head.pattern_effect, head.value_effect] == pytest.approx(lost, abs=1e-6)

"""Circuits: means, gates and edges are those of a forward written out by hand, and masks are what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from support.circuit_cases import CONTEXT, PARALLEL, SEQUENTIAL, model, prompt
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.kernels.products import SparseMatrix
from bridge.models.circuit import (
    EMBEDDING,
    Circuit,
    Node,
    NodeSpace,
    ablation_gate,
    corpus_means,
    kl,
    recording_gate,
)
from bridge.models.sparse import Gate, Location, SparseTransformer


def literal(sparse: SparseTransformer, tokens_bt: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Every node and the logits of a sequential model, from its weights, with no gate, no fused attention and torch's topk."""
    weights = dict(sparse.named_parameters())
    keep, channels = sparse.keep, sparse.channels

    def top(x: Tensor) -> Tensor:
        kept = torch.zeros_like(x)
        index = x.abs().topk(round(keep * x.shape[-1]), -1).indices
        return kept.scatter(-1, index, x.gather(-1, index))

    def norm(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    nodes: dict[str, Tensor] = {}
    length = tokens_bt.shape[1]
    x = weights["embedding"][tokens_bt] + weights["positions"][:length]
    for layer in range(len(sparse.blocks)):
        at = f"blocks.{layer}"
        r = nodes[f"{layer}.attn_in"] = top(norm(x))
        q, k, v = (top(linear(f"{at}.{name}", r)) for name in "qkv")
        nodes |= {f"{layer}.q": q, f"{layer}.k": k, f"{layer}.v": v}
        attended = torch.zeros_like(v)
        for head in range(sparse.width // channels):
            c = slice(head * channels, (head + 1) * channels)
            sink = weights[f"{at}.sinks"][head].exp()
            for p in range(length):
                score = torch.einsum("bc,btc->bt", q[:, p, c], k[:, : p + 1, c]) / math.sqrt(channels)
                weight = score.exp() / (score.exp().sum(1, keepdim=True) + sink)
                attended[:, p, c] = torch.einsum("bt,btc->bc", weight, v[:, : p + 1, c])
        out = nodes[f"{layer}.attn_out"] = top(linear(f"{at}.o", attended))
        x = x + out
        r = nodes[f"{layer}.mlp_in"] = top(norm(x))
        a = nodes[f"{layer}.mlp_act"] = top(F.gelu(linear(f"{at}.up", r), approximate="tanh"))
        nodes[f"{layer}.mlp_out"] = top(linear(f"{at}.down", a))
        x = x + nodes[f"{layer}.mlp_out"]
    bigram = weights["bigram.1"][tokens_bt] @ weights["bigram.0"].T
    return nodes, linear("unembedding", norm(x)) + bigram


@dataclass(frozen=True)
class Masked:
    """A circuit of a prompt, as masks by location."""

    tokens_t: Tensor
    kept: dict[Location, Tensor]
    means: dict[Location, Tensor]

    @property
    def gate(self) -> Gate:
        return ablation_gate(self.kept, self.means)


def question(length: int = 6) -> Question:
    return Question.of_prompt(prompt(length), 4, 7)


def random_circuit(sparse: SparseTransformer, density: float = 0.6, length: int = 6) -> Masked:
    means = corpus_means(sparse, torch.stack([prompt(CONTEXT, seed) for seed in range(8)]))
    generator = torch.Generator().manual_seed(1)
    kept = {at: torch.rand(length, n, generator=generator) < density for at, n in sparse.locations().items()}
    return Masked(prompt(length), kept, means)


def test_means_are_those_of_a_forward_written_by_hand():
    sparse = model()
    tokens_bt = torch.stack([prompt(CONTEXT, seed) for seed in range(5)])
    means = corpus_means(sparse, tokens_bt)
    nodes, _ = literal(sparse, tokens_bt)
    assert {str(at) for at in means} == {*nodes, "-1.embedding"}
    for location, mean_n in means.items():
        if location == EMBEDDING:
            expected = (sparse.embedding[tokens_bt] + sparse.get_parameter("positions")).mean((0, 1))
        else:
            expected = nodes[str(location)].mean((0, 1))
        torch.testing.assert_close(mean_n, expected, atol=1e-9, rtol=0)


def test_means_do_not_depend_on_how_the_corpus_is_cut(monkeypatch: pytest.MonkeyPatch):
    sparse = model()
    tokens_bt = torch.stack([prompt(CONTEXT, seed) for seed in range(5)])
    whole = corpus_means(sparse, tokens_bt)
    monkeypatch.setattr("bridge.models.circuit._ROW_TOKENS", CONTEXT)
    for location, mean_n in corpus_means(sparse, tokens_bt).items():
        torch.testing.assert_close(mean_n, whole[location])
    with pytest.raises(ValueError, match="there are none"):
        corpus_means(sparse, tokens_bt[:0])


def test_keeping_every_node_is_the_model_itself_and_keeping_none_uses_the_means():
    sparse = model()
    circuit = random_circuit(sparse)
    tokens_1t = circuit.tokens_t[None]
    everything = {at: torch.ones_like(kept) for at, kept in circuit.kept.items()}
    assert torch.equal(sparse.run(tokens_1t, gate=ablation_gate(everything, circuit.means)).logits_btv, sparse(tokens_1t))
    torch.testing.assert_close(sparse(tokens_1t), literal(sparse, tokens_1t)[1])
    values: dict[Location, Tensor] = {}
    sparse.run(tokens_1t, gate=recording_gate(values, ablation_gate(circuit.kept, circuit.means)))
    for location, value_1tn in values.items():
        outside = ~circuit.kept[location]
        assert torch.equal(value_1tn[0][outside], circuit.means[location].expand_as(outside)[outside])


def test_a_missing_mean_or_a_wrong_mask_is_an_error():
    sparse = model()
    circuit = random_circuit(sparse)
    fewer = {at: mean for at, mean in circuit.means.items() if at != Location(1, "v")}
    for build in (
        lambda: Circuit("quotes", {at: kept_tn[:1] for at, kept_tn in circuit.kept.items()}, fewer),
        lambda: ablation_gate(circuit.kept, fewer),
        lambda: MaskedModel(sparse, question(), fewer),
    ):
        with pytest.raises(ValueError, match=r"no corpus mean for 1\.v; compute it with corpus_means"):
            build()
    one = {at: kept_tn[:1] for at, kept_tn in circuit.kept.items()}
    with pytest.raises(ValueError, match=r"the mask at 0\.attn_in is torch\.bool of shape \(5, 16\)"):
        Circuit("quotes", {**one, Location(0, "attn_in"): torch.ones(5, 16, dtype=torch.bool)}, circuit.means)
    with pytest.raises(ValueError, match="two different tokens"):
        Question.of_prompt(prompt(), 3, 3)
    with pytest.raises(ValueError, match="at least one token"):
        Question.of_prompt(prompt(0), 3, 4)


def test_flat_masks_and_nodes_go_there_and_back():
    sparse = model(PARALLEL)
    circuit = random_circuit(sparse)
    space = NodeSpace(sparse.locations(), 6)
    kept_f = space.join(circuit.kept)
    assert len(kept_f) == space.size
    for location, kept_tn in space.split(kept_f).items():
        assert torch.equal(kept_tn, circuit.kept[location])
    nodes = [space.node(flat) for flat in kept_f.nonzero().flatten().tolist()]
    assert len(nodes) == int(kept_f.sum())
    assert all(circuit.kept[node.location][node.position, node.index] for node in nodes)
    assert str(Node(Location(0, "mlp_act"), 37, 4)) == "L0.mlp_act[37]@4"
    with pytest.raises(IndexError):
        space.node(space.size)


def test_masked_copies_are_the_gated_model():
    sparse = model()
    circuit = random_circuit(sparse)
    masked = MaskedModel(sparse, question(), circuit.means)
    tokens_1t = circuit.tokens_t[None]
    kept_f = masked.space.join(circuit.kept)
    expected_v = sparse.run(tokens_1t, gate=ablation_gate(circuit.kept, circuit.means)).logits_btv[0, -1]
    torch.testing.assert_close(masked.logits(kept_f[None])[0], expected_v)
    torch.testing.assert_close(masked.run(kept_f[None].double()).logits_btv[0, -1], expected_v)
    torch.testing.assert_close(masked.logits(torch.ones_like(kept_f)[None])[0], sparse(tokens_1t)[0, -1])
    whole_v, other_v = sparse(tokens_1t)[0, -1].softmax(-1), expected_v.softmax(-1)
    expected_kl = (whole_v * (whole_v / other_v).log()).sum()
    torch.testing.assert_close(kl(sparse(tokens_1t)[0, -1], expected_v[None])[0], expected_kl)


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
def test_rows_that_start_late_are_the_rows_run_whole(kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch):
    sparse = model(kinds)
    circuit = random_circuit(sparse)
    masked = MaskedModel(sparse, question(), circuit.means)
    kept_f = masked.space.join(circuit.kept)
    node_r = kept_f.nonzero().flatten()[::7].flip(0)
    kept_rf = kept_f.repeat(len(node_r), 1)
    kept_rf[torch.arange(len(node_r)), node_r] = False
    monkeypatch.setattr("bridge.circuits.masked_model._ROW_TOKENS", 6 * 10)
    torch.testing.assert_close(masked.logits_without(kept_f, node_r), masked.logits(kept_rf))


def test_gradients_are_finite_differences():
    sparse = model()
    circuit = random_circuit(sparse)
    masked = MaskedModel(sparse, question(), circuit.means)
    mask_rf = 0.2 + 0.6 * torch.rand(3, masked.space.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope_rf, loss_r = masked.gradient(mask_rf, loss_of(masked))
    torch.testing.assert_close(loss_r, loss_of(masked)(masked.run(mask_rf).logits_btv[:, -1]))
    for flat in torch.where(slope_rf[1].abs() > 1e-4)[0][::60].tolist():
        step = torch.zeros_like(mask_rf)
        step[1, flat] = 1e-6
        up, down = (loss_of(masked)(masked.run(mask_rf + sign * step).logits_btv[:, -1])[1] for sign in (1, -1))
        assert float((up - down) / 2e-6) == pytest.approx(float(slope_rf[1, flat]), rel=1e-3, abs=1e-7)


def loss_of(masked: MaskedModel) -> Callable[[Tensor], Tensor]:
    """KL from the whole model's next token."""
    whole_v = masked.sparse(masked.question.prompt_bt)[0, -1]
    return lambda logits_rv: kl(whole_v, logits_rv)


def single(kinds: tuple[str, ...], **shape) -> SparseTransformer:
    """The model in float32, all of its matrices by their nonzeros, as one that was loaded."""
    sparse = model(kinds, **shape).float()
    sparse.compact = {name: SparseMatrix.of(weight) for name, weight in sparse.packable().items()}
    return sparse


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL, ("attn", "mlp", "mlp"), ("mlp", "attn")])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_what_cannot_reach_the_answer_need_not_be_computed(kinds: tuple[str, ...], positions: str, rows: int):
    sparse = single(kinds, positions=positions)
    means = corpus_means(sparse, torch.stack([prompt(CONTEXT, seed) for seed in range(8)]))
    masked = MaskedModel(sparse, question(), means)
    generator = torch.Generator().manual_seed(1)
    kept_rf = torch.rand(rows, masked.space.size, generator=generator) < 0.7
    whole = [sparse.run(masked.question.prompt_bt, gate=ablation_gate(masked.space.split(kept_f), means)) for kept_f in kept_rf]
    expected_rv = torch.cat([trace.logits_btv[:, -1] for trace in whole])
    torch.testing.assert_close(masked.logits(kept_rf), expected_rv, rtol=1e-4, atol=1e-4)
    narrow = masked.run(kept_rf, narrow=True)
    for site, x_rts in enumerate(narrow.residuals):
        expected_rts = torch.cat([trace.residuals[site] for trace in whole])
        expected_rts = expected_rts[:, -1:] if site >= sparse.narrow_from else expected_rts
        torch.testing.assert_close(x_rts, expected_rts, rtol=1e-4, atol=1e-4)
    node_k = kept_rf[0].nonzero().flatten()[::5]
    less_kf = kept_rf[0].repeat(len(node_k), 1)
    less_kf[torch.arange(len(node_k)), node_k] = False
    expected_kv = torch.cat([masked.run(less_f[None]).logits_btv[:, -1] for less_f in less_kf])
    torch.testing.assert_close(masked.logits_without(kept_rf[0], node_k), expected_kv, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kinds", [SEQUENTIAL, PARALLEL])
@pytest.mark.parametrize("rows", [1, 12])
def test_gradients_of_bool_masks_are_those_of_masks_that_mix(kinds: tuple[str, ...], rows: int):
    for sparse in (model(kinds), single(kinds)):
        means = corpus_means(sparse, torch.stack([prompt(CONTEXT, seed) for seed in range(8)]))
        masked = MaskedModel(sparse, question(), means)
        kept_rf = torch.rand(rows, masked.space.size, generator=torch.Generator().manual_seed(1)) < 0.7
        (slope_rf, loss_r), (expected_rf, expected_r) = (
            masked.gradient(each, loss_of(masked)) for each in (kept_rf, kept_rf.to(type_of(sparse)))
        )
        torch.testing.assert_close(loss_r, expected_r, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope_rf, expected_rf, rtol=1e-3, atol=1e-4)
        assert bool((slope_rf != 0).any(1).all())


def type_of(sparse: SparseTransformer) -> torch.dtype:
    """The type that the model computes in."""
    return sparse.unembedding.bias.dtype


def test_the_circuit_of_a_task_is_at_every_position():
    sparse = model()
    means = corpus_means(sparse, prompt(CONTEXT)[None])
    kept = {at: (torch.arange(n) % 5 == 0)[None] for at, n in sparse.locations().items()}
    circuit = Circuit("quotes", kept, means)
    assert circuit.nodes[0] == Node(Location(0, "attn_in"), 0) and {node.position for node in circuit.nodes} == {None}
    at_every_position = {at: kept_1n.expand(6, -1) for at, kept_1n in kept.items()}
    gate, same, tokens_1t = ablation_gate(kept, circuit.means), ablation_gate(at_every_position, means), prompt(6)[None]
    assert torch.equal(sparse.run(tokens_1t, gate=gate).logits_btv, sparse.run(tokens_1t, gate=same).logits_btv)
    with pytest.raises(ValueError, match="not bool of shape"):
        Circuit("quotes", at_every_position, means)

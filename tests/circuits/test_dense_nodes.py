"""The nodes of dense models are found in every family, with their values matched; what is not found is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.models import planted_pairs
from support.tiny_families import FAMILIES, tiny

from bridge.circuits.dense_nodes import DenseSubject, MaskedDense
from bridge.circuits.question import Question
from bridge.circuits.subject import edge_count
from bridge.data.task_tokens import TokenPairs
from bridge.huggingface.site_discovery import DenseModelError
from bridge.models.dense import DenseModel, load_dense
from bridge.models.span import dense_of
from bridge.models.sparse import Gate, Location

CORPUS = torch.randint(2, 30, (4, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "mixtral"])
def test_nodes_are_found_and_their_gates_change_nothing(family: str) -> None:
    dense = load_dense(tiny(family))
    subject = DenseSubject(dense, CORPUS)
    kinds = [at.kind for at in subject.space.sizes if at.layer == 0]
    assert {"attn_in", "attn_out", "mlp_in", "mlp_act", "mlp_out"} <= set(kinds) and len(kinds) in (6, 8)
    seen: list[Location] = []

    def gate(location: Location, x: torch.Tensor) -> torch.Tensor:
        seen.append(location)
        assert x.shape == (*CORPUS.shape, subject.space.sizes[location])
        return x

    assert torch.equal(subject.run(CORPUS, gate), dense.run(CORPUS).logits_btv)
    assert sorted(seen) == sorted(subject.space.sizes)  # every location once


def test_of_a_span_they_are_those_of_its_blocks() -> None:
    """Gated again and again, past what the span remembers of the text: as the whole model whose other nodes stay."""
    whole = load_dense(tiny("llama"))
    everywhere, span = DenseSubject(whole, CORPUS), DenseSubject(dense_of(whole, "1:2"), CORPUS)
    kinds = {at.kind: size for at, size in everywhere.space.sizes.items() if at.layer == 1}
    assert span.space.sizes == {Location(0, kind): size for kind, size in kinds.items()}
    assert edge_count(span, torch.ones(span.space.size, dtype=torch.bool)) < edge_count(
        everywhere, torch.ones(everywhere.space.size, dtype=torch.bool)
    )

    def halved(layer: int) -> Gate:
        return lambda at, x: x / 2 if at == Location(layer, "mlp_act") else x

    wanted_btv = everywhere.run(CORPUS, halved(1))
    assert float((wanted_btv - whole.run(CORPUS).logits_btv).abs().max()) > 1e-3
    for _ in range(2):
        torch.testing.assert_close(span.run(CORPUS, halved(0)), wanted_btv)


def test_another_threads_plain_run_does_not_see_gates() -> None:
    dense = load_dense(tiny("gpt2"))
    subject, plain_btv = DenseSubject(dense, CORPUS), dense.run(CORPUS).logits_btv
    gating, done = threading.Event(), threading.Event()

    def gate(location: Location, x: torch.Tensor) -> torch.Tensor:
        gating.set()
        assert not done.wait(0.01)  # the other run has not been let in
        return torch.zeros_like(x)

    def other() -> torch.Tensor:
        assert gating.wait(60)
        logits_btv = dense.run(CORPUS).logits_btv
        done.set()
        return logits_btv

    with ThreadPoolExecutor() as threads:
        found = threads.submit(other)
        assert not torch.equal(subject.run(CORPUS, gate), plain_btv)
        assert torch.equal(found.result(), plain_btv)


def test_the_matrices_of_gpt2_are_its_own() -> None:
    dense = load_dense(tiny("gpt2"))
    model: Any = dense.model
    block = model.transformer.h[0]
    found = DenseSubject(dense, CORPUS).matrices()
    matrices = {(matrix.source.kind, matrix.target.kind): matrix for matrix in found if matrix.source.layer == 0}
    width = dense.width
    assert {(m.source.kind, m.target.kind) for m in DenseSubject(dense, CORPUS).matrices()} == {
        ("attn_in", "c_attn"), ("c_attn", "attn_out"), ("mlp_in", "mlp_act"), ("mlp_act", "mlp_out"),
    }  # fmt: skip
    assert torch.equal(matrices["attn_in", "c_attn"].weight_ji, block.attn.c_attn.weight.T)
    output = next(m for m in DenseSubject(dense, CORPUS).matrices() if m.target == Location(0, "attn_out"))
    assert output.source_i.tolist() == [*range(2 * width, 3 * width)]  # the values come last of the three
    assert torch.equal(output.weight_ji, block.attn.c_proj.weight.T)


def test_heads_that_share_values_share_their_nodes() -> None:
    dense = load_dense(tiny("llama"))
    output = next(m for m in DenseSubject(dense, CORPUS).matrices() if m.target == Location(0, "attn_out"))
    config = dense.model.config
    share = config.num_attention_heads // config.num_key_value_heads
    channels = dense.width // config.num_attention_heads
    expected = [head // share * channels + channel for head in range(config.num_attention_heads) for channel in range(channels)]
    assert output.source == Location(0, "v_proj") and output.source_i.tolist() == expected


def test_a_model_without_such_maps_is_refused_in_one_line(dense: DenseModel) -> None:
    with pytest.raises(DenseModelError, match="the linear maps of model 'MixtralForCausalLM' cannot be found") as caught:
        DenseSubject(load_dense(tiny("mixtral")), CORPUS)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="at least one block"):
        DenseSubject(dense, CORPUS[:0])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masks_over_a_dense_models_nodes_are_literal_interventions(kind: str) -> None:
    dense = load_dense(tiny(kind))
    subject, pairs = DenseSubject(dense, CORPUS), planted_pairs(6, (4, 6))
    masked = MaskedDense(subject, Question.of_pairs(replace_tokens(pairs)))
    every_bf = torch.ones(len(pairs), masked.space.size, dtype=torch.bool)
    torch.testing.assert_close(masked.logits(every_bf), pairs.logits_at_last(dense.run(masked.question.prompt_bt).logits_btv))
    kept_f = torch.rand(masked.space.size, generator=torch.Generator().manual_seed(1)) < 0.5
    parts = masked.space.split(kept_f)
    logits_btv = subject.run(
        masked.question.prompt_bt, lambda at, x_btn: torch.where(parts[at][0], x_btn, subject.means[at].to(x_btn.dtype))
    )
    torch.testing.assert_close(masked.logits(kept_f.expand(len(pairs), -1)), pairs.logits_at_last(logits_btv))

    # gradients against a small step
    mask_f = torch.rand(masked.space.size, generator=torch.Generator().manual_seed(2))
    one = MaskedDense(subject, masked.question.rows(torch.tensor([1])))
    gradient_1f, _ = one.gradient(mask_f[None], one.question.difference)
    node_k = gradient_1f[0].abs().topk(5).indices
    for node in node_k.tolist():
        steps_f = torch.zeros_like(mask_f).index_fill(0, torch.tensor(node), 1e-2)
        high, low = one.difference((mask_f + steps_f)[None]), one.difference((mask_f - steps_f)[None])
        assert float((high - low) / 2e-2) == pytest.approx(float(gradient_1f[0, node]), rel=0.05, abs=1e-4)
    assert edge_count(subject, kept_f) == sum(int(matrix.edges_between(parts).sum()) for matrix in subject.matrices()) > 0


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_masks_at_positions_are_hooks_on_the_models_own_modules(kind: str) -> None:
    dense = load_dense(tiny(kind))
    subject, tokens_t = DenseSubject(dense, CORPUS), torch.tensor([3, 7, 2, 9, 4])
    masked = MaskedDense(subject, Question.of_prompt(tokens_t, 5), by_position=True)
    model: Any = dense.model
    plain_v = model(tokens_t[None]).logits[0, -1]
    torch.testing.assert_close(masked.logits(torch.ones(1, masked.space.size, dtype=torch.bool))[0], plain_v)

    # one neuron at one token, and one channel that attention writes at another, at their means by hooks of our own
    block = model.transformer.h[0] if kind == "gpt2" else model.model.layers[0]
    reads_neurons = block.mlp.c_proj if kind == "gpt2" else block.mlp.down_proj
    writes = block.attn.c_proj if kind == "gpt2" else block.self_attn.o_proj
    neuron, channel = (Location(0, "mlp_act"), 3, 1), (Location(0, "attn_out"), 2, 4)
    kept_f = torch.ones(masked.space.size, dtype=torch.bool)
    parts = masked.space.split(kept_f)
    for at, index, position in (neuron, channel):
        parts[at][position, index] = False

    def before(_module: Any, args: tuple) -> tuple:
        x_1tn = args[0].clone()
        x_1tn[0, neuron[2], neuron[1]] = subject.means[neuron[0]][neuron[1]]
        return (x_1tn,)

    def after(_module: Any, _args: tuple, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[0, channel[2], channel[1]] = subject.means[channel[0]][channel[1]]
        return output

    with reads_neurons.register_forward_pre_hook(before), writes.register_forward_hook(after):
        hooked_v = model(tokens_t[None]).logits[0, -1]
    assert not torch.allclose(hooked_v, plain_v)
    torch.testing.assert_close(masked.logits(kept_f[None])[0], hooked_v)
    with pytest.raises(ValueError, match="nodes at positions need a question with one prompt"):
        MaskedDense(subject, Question.of_pairs(replace_tokens(planted_pairs(6, (4, 6)))), by_position=True)


def replace_tokens(pairs: TokenPairs) -> TokenPairs:
    """The pairs with tokens that the tiny models have."""
    return replace(pairs, prompt_bt=pairs.prompt_bt % 30)

"""The nodes of dense models are found in every family, with their values matched; what is not found is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import planted_pairs
from test_dense import FAMILIES, tiny

from bridge.circuits.dense_nodes import DenseSubject
from bridge.circuits.edges import EdgeGoal, Pruned, find_edges
from bridge.circuits.masks import Aim, Goal
from bridge.circuits.subject import ATTENDED
from bridge.dense import DenseModel, load_dense
from bridge.sparse import Location
from bridge.wiring import DenseModelError

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

    assert torch.equal(subject._run(CORPUS, gate), dense.run(CORPUS).logits_btv)
    assert sorted(seen) == sorted(subject.space.sizes)  # every location once


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
        assert not torch.equal(subject._run(CORPUS, gate), plain_btv)
        assert torch.equal(found.result(), plain_btv)


def test_the_matrices_of_gpt2_are_its_own() -> None:
    dense = load_dense(tiny("gpt2"))
    model: Any = dense.model
    block = model.transformer.h[0]
    matrices = {matrix.name: matrix for matrix in DenseSubject(dense, CORPUS).matrices() if matrix.source.layer == 0}
    width = dense.width
    assert {(m.source.kind, m.target.kind) for m in DenseSubject(dense, CORPUS).matrices()} == {
        ("attn_in", "c_attn"), ("c_attn", "attn_out"), ("mlp_in", "mlp_act"), ("mlp_act", "mlp_out"),
    }  # fmt: skip
    assert torch.equal(matrices["0.attn_in.c_attn"].weight_ji, block.attn.c_attn.weight.T)
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
def test_a_removed_edge_is_no_weight_and_its_mean_in_the_bias(kind: str) -> None:
    dense = load_dense(tiny(kind))
    before_btv = dense.run(CORPUS).logits_btv
    subject = DenseSubject(dense, CORPUS)
    pruned = Pruned(subject)
    assert isinstance(pruned.subject, DenseSubject)
    row, column = 3, 2
    for matrix in subject.matrices():
        pruned.remove({})
        assert torch.equal(pruned.subject._run(CORPUS, lambda _, x: x), before_btv)
        pruned.remove({matrix.name: (torch.tensor([row]), torch.tensor([column]))})
        mean = subject.means[Location(matrix.source.layer, ATTENDED) if matrix.target.kind == "attn_out" else matrix.source]
        place = matrix.input_i[column]

        def without(module: Any, args: tuple, output: Any, matrix=matrix, mean=mean, place=place) -> Any:
            taken = args[0][..., place] - mean[place if matrix.target.kind == "attn_out" else matrix.source_i[column]]
            changed = output.clone()
            changed[..., row] -= matrix.weight_ji[row, column] * taken
            return changed

        handle = subject.linear(matrix.path).register_forward_hook(without)
        literal_btv = dense.run(CORPUS).logits_btv
        handle.remove()
        torch.testing.assert_close(pruned.subject._run(CORPUS, lambda _, x: x), literal_btv, atol=1e-5, rtol=1e-4)
        assert not torch.equal(literal_btv, before_btv), matrix.name
    assert torch.equal(dense.run(CORPUS).logits_btv, before_btv)


def test_the_dense_models_edges_are_pruned_to_a_bound() -> None:
    dense = load_dense(tiny("gpt2"))
    subject = DenseSubject(dense, CORPUS)
    goal = Goal(subject, planted_pairs(8).both(), Aim(target=0.02), work=1e9)
    every_f = torch.ones(subject.space.size, dtype=torch.bool)
    found = find_edges(goal, goal, every_f)
    assert found.loss <= 0.02 and 0 < found.n == len(found.edges) < found.n_before
    with torch.no_grad():
        every = EdgeGoal(goal, every_f)
        assert every.loss(torch.ones(found.n_before, dtype=torch.bool)) == pytest.approx(0, abs=1e-6)

"""A span of a dense model: what is before and behind it is the Hugging Face model's own, and nothing of it is computed twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import tiny_gpt2, tiny_tokenizer
from support.tiny_families import some_tokens, tiny
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense
from bridge.models import span as span_module
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import load_dense
from bridge.models.residual import EMBEDDING, Enter
from bridge.models.span import DenseSpan, SparseSpan, dense_of
from bridge.recipe import RecipeError, resolve
from bridge.training.initialize import start_from_dense
from bridge.training.prepare import complete_recipe

FAMILIES = ("gpt2", "llama", "gpt-neox-parallel")


def spliced(family: str, blocks: str, **sparse: Any) -> CoupledModels:
    """A coupling of some blocks of a tiny model that starts as these are, every weight and every value kept."""
    dense = dense_of(load_dense(tiny(family), tokenizer=tiny_tokenizer()), blocks)
    values = {"dense": "tiny", "sparse": {"blocks": blocks, "keep": 1.0, "sinks": False, **sparse}, "sparsity": {"l0": 1.0}}
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    start_from_dense(coupling, some_tokens(6))
    return coupling


def moved(coupling: CoupledModels) -> CoupledModels:
    """The coupling with every parameter moved, so that the sparse model is another than the dense one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (*coupling.sparse.parameters(), *coupling.bridges.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return coupling


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_dense_span_is_the_model_itself(family: str) -> None:
    model, tokens_bt = tiny(family), some_tokens()
    whole = load_dense(model)
    part = dense_of(whole, "1:3")
    assert isinstance(part, DenseSpan) and part.n_sites == len(part.sublayers) + 1 < whole.n_sites
    wanted, plain = whole.run(tokens_bt), part.run(tokens_bt)
    torch.testing.assert_close(plain.logits_btv, model(tokens_bt).logits, rtol=0, atol=1e-5)
    for site in range(part.n_sites):
        torch.testing.assert_close(plain.residuals[site], wanted.residuals[part.first_site + site], rtol=0, atol=1e-5)
        resumed = part.run(some_tokens(seed=2), Enter.at(site, plain.residuals[site]))
        torch.testing.assert_close(resumed.logits_btv, model(tokens_bt).logits, rtol=0, atol=1e-4)
    mixed = part.run(tokens_bt, Enter(torch.tensor([EMBEDDING, 1, 0, EMBEDDING]), wanted.residuals[part.first_site + 1]))
    torch.testing.assert_close(mixed.logits_btv[[0, 1, 3]], model(tokens_bt).logits[[0, 1, 3]], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", ["1:2", "0:3", "-1:"])
def test_spliced_in_with_everything_kept_it_gives_the_models_own_logits(family: str, blocks: str) -> None:
    coupling, tokens_bt = spliced(family, blocks), some_tokens(4)
    wanted_btv = tiny(family)(tokens_bt).logits
    trace = coupling.sparse.run(tokens_bt)
    torch.testing.assert_close(trace.logits_btv, wanted_btv, rtol=0, atol=1e-4)
    last = coupling.sparse.run(tokens_bt, last_only=True, narrow=True)
    torch.testing.assert_close(last.logits_btv, wanted_btv[:, -1:], rtol=0, atol=1e-4)
    for site in range(coupling.n_sites):
        there_btv = coupling.dense_to_sparse(tokens_bt, coupling.dense.run(tokens_bt).residuals, site)
        back_btv = coupling.sparse_to_dense(tokens_bt, trace.residuals, site)
        torch.testing.assert_close(there_btv, wanted_btv, rtol=0, atol=1e-4)
        torch.testing.assert_close(back_btv, wanted_btv, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_span_of_all_blocks_has_the_blocks_of_a_whole_coupling() -> None:
    tokens_bt = some_tokens(4)
    part = spliced("llama", "0:3")
    dense = load_dense(tiny("llama"))
    recipe = resolve({"dense": "tiny", "sparse": {"keep": 1.0, "bigram": "none", "sinks": False}, "sparsity": {"l0": 1.0}})
    whole = new_coupling(dense, complete_recipe(dense, recipe))
    start_from_dense(whole, some_tokens(6))
    assert part.sparse.locations() == whole.sparse.locations() and part.dense.sublayers == whole.dense.sublayers
    for ours, theirs in ((part.sparse, whole.sparse), (part.dense, whole.dense)):
        torch.testing.assert_close(ours.run(tokens_bt).logits_btv, theirs.run(tokens_bt).logits_btv, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_errors_make_it_follow_the_model_exactly(family: str) -> None:
    coupling, tokens_bt = moved(spliced(family, "1:3")), some_tokens(2)
    last_b = torch.tensor([9, 6])
    wanted_bv = tiny(family)(tokens_bt).logits[torch.arange(2), last_b]
    assert float((coupling.sparse.run(tokens_bt).logits_btv[torch.arange(2), last_b] - wanted_bv).abs().max()) > 0.05
    followed = follow_dense(coupling, tokens_bt, last_b)
    torch.testing.assert_close(followed.dense_bv, wanted_bv, rtol=0, atol=1e-5)
    for row, last in enumerate(last_b.tolist()):  # a prompt at a time, as the error on the logits is that of its last token
        errors = {at: error_bts[row : row + 1, : last + 1] for at, error_bts in followed.errors.items()}
        trace = coupling.sparse.run(
            tokens_bt[row : row + 1, : last + 1], correct=lambda at, x, errors=errors: x + errors[at], last_only=True
        )
        torch.testing.assert_close(trace.logits_btv[:, -1], wanted_bv[row : row + 1], rtol=0, atol=1e-4)


def test_gradients_flow_through_what_is_behind() -> None:
    coupling, tokens_bt = moved(spliced("llama", "1:2")), some_tokens(2)

    def loss(x_bts: Tensor) -> Tensor:
        last = coupling.n_sites - 1
        return coupling.sparse.run(tokens_bt, Enter.at(last, x_bts)).logits_btv.log_softmax(-1)[:, -1, 5].sum()

    x_bts = coupling.sparse.run(tokens_bt).residuals[-1].detach().requires_grad_()
    (gradient_bts,) = torch.autograd.grad(loss(x_bts), x_bts)
    direction_bts = torch.randn(x_bts.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        slope = (loss(x_bts + 1e-2 * direction_bts) - loss(x_bts - 1e-2 * direction_bts)) / 2e-2
    torch.testing.assert_close((gradient_bts * direction_bts).sum(), slope, rtol=0.02, atol=1e-3)
    assert gradient_bts[:, :-1].abs().max() > 1e-4  # behind the span attention reads other positions too


@torch.no_grad()
def test_what_is_frozen_is_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens_bt = tiny("llama"), some_tokens()
    part = dense_of(load_dense(model), "1:2")
    assert isinstance(part, DenseSpan)
    ran: list[tuple[int, int]] = []
    for index, block in enumerate(part.model.model.layers):
        forward = block.mlp.forward
        monkeypatch.setattr(block.mlp, "forward", lambda x, i=index, f=forward: (ran.append((i, len(x))), f(x))[1])

    def blocks_run(run: Any) -> list[tuple[int, int]]:
        ran.clear()
        run()
        return list(ran)

    first = part.run(tokens_bt)
    again = blocks_run(lambda: part.run(tokens_bt))
    assert again == [(1, 4)]  # the span alone: its residuals are asked for, what is before and behind is known
    again_btv = part.run(tokens_bt).logits_btv
    assert torch.equal(again_btv, first.logits_btv)
    known_and_new_bt = torch.cat([tokens_bt[:1], some_tokens(1, seed=3), tokens_bt[:1]])
    assert blocks_run(lambda: part.prefix(known_and_new_bt)) == [(0, 1)]
    assert blocks_run(lambda: part.run(tokens_bt, Enter.at(part.n_sites - 1, first.residuals[-1]))) == [(2, 4)]

    monkeypatch.setattr(span_module, "REMEMBERED", 3 * 2 * 10 * 32 * 4)  # three rows of ten tokens, twice
    part.prefix(some_tokens(2, seed=4))
    assert len(part._row_cache) == 3
    model.model.layers[0].mlp.down_proj.weight.mul_(2)  # it shares its weights with a live model, which may change
    torch.testing.assert_close(part.run(tokens_bt).logits_btv, model(tokens_bt).logits, rtol=0, atol=1e-5)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tiny_gpt2(layers=4).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    dense = dense_of(load_dense(tmp_path / "dense"), "-3:-1")
    assert isinstance(dense, DenseSpan)
    values = {"dense": "tiny", "sparse": {"blocks": "-3:-1"}, "sparsity": {"l0": 0.5}}
    coupling = moved(new_coupling(dense, complete_recipe(dense, resolve(values))))
    assert coupling.blocks == "1:3" and coupling.recipe.sparse.positions == "none"
    coupling.save_pretrained(tmp_path / "coupling")
    loaded = CoupledModels.from_pretrained(tmp_path / "coupling")
    tokens_bt = torch.randint(2, 40, (3, 12), generator=torch.Generator().manual_seed(0))
    assert isinstance(loaded.sparse, SparseSpan) and isinstance(loaded.dense, DenseSpan) and loaded.dense.first_block == 1
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.sparse.run(tokens_bt).logits_btv, coupling.sparse.run(tokens_bt).logits_btv, rtol=0, atol=1e-4
        )
    assert CoupledModels.from_pretrained(tmp_path / "coupling", dense=dense.whole).dense.n_sites == 5


@pytest.mark.parametrize("blocks", ["2:2", "1:9", "-9:2", "3:"])
def test_a_slice_that_is_no_span_of_the_model_is_refused(blocks: str) -> None:
    whole = load_dense(tiny_gpt2(layers=3))
    with pytest.raises(RecipeError) as error:
        dense_of(whole, blocks)
    assert f"sparse.blocks {blocks!r} is not a span of the dense model's 3 blocks; give first:last within 0:3" in str(error.value)


@pytest.mark.parametrize("blocks", ["", "3", "1:2:1", "a:b", "1.5:3"])
def test_what_is_no_slice_is_refused(blocks: str) -> None:
    with pytest.raises(RecipeError, match=r"sparse\.blocks = .* must be a slice of the dense model's blocks, first:last"):
        resolve({"dense": "tiny", "sparse": {"blocks": blocks}})


def test_parts_that_a_span_has_not_are_refused() -> None:
    with pytest.raises(RecipeError, match="a span .*, which has no token embedding; give sparse.positions 'auto'"):
        resolve({"dense": "tiny", "sparse": {"blocks": "1:2", "positions": "learned"}})

"""Starting as the dense model: held to Hugging Face's own logits, and what cannot be copied said to be random."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, tiny_gpt2, tiny_tokenizer
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import load_dense
from bridge.recipe import BRIDGE_LOSSES, recipe_values, resolve
from bridge.training import copy_dense
from bridge.training import initialize as start
from bridge.training.initialize import Initialization, start_from_dense
from bridge.training.loop import finish, train
from bridge.training.prepare import complete_recipe, prepare

WIDTH = 16  # of every dense model here


@pytest.fixture
def nothing_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unused neurons silent and sinks shut, so that a copy is exact."""
    monkeypatch.setattr(copy_dense, "SMALL", 0.0)
    monkeypatch.setattr(copy_dense, "SINKS", ())


def tokens() -> Tensor:
    return torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5))


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The model with every parameter far from its initial zero or one."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def started(model: PreTrainedModel, **shape: Any) -> tuple[CoupledModels, Initialization]:
    dense = load_dense(model)
    values = {
        "dense": "tiny",
        "sparse": {"width": 4 * WIDTH, "head_channels": 8, "positions": "learned", **shape},
        "sparsity": {"l0": 0.25},
        "data": {"context": CONTEXT},
    }
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    return coupling, start_from_dense(coupling, tokens())


def logits(model: PreTrainedModel, tokens_bt: Tensor) -> Tensor:
    """Of the Hugging Face model, run by itself."""
    with torch.no_grad():
        return model(input_ids=tokens_bt).logits


@torch.no_grad()
def errors(coupling: CoupledModels, model: PreTrainedModel) -> list[float]:
    """Largest logit error of the sparse model and of the hybrids at every site, on text that the start has not seen."""
    tokens_bt = tokens().flip(1)
    wanted_btv = logits(model, tokens_bt)
    dense, sparse = coupling.dense.run(tokens_bt).residuals, coupling.sparse.run(tokens_bt)
    found = [sparse.logits_btv]
    for site in range(coupling.n_sites):
        found.append(coupling.dense_to_sparse(tokens_bt, dense, site))
        found.append(coupling.sparse_to_dense(tokens_bt, sparse.residuals, site))
    return [(logits_btv - wanted_btv).abs().max().item() for logits_btv in found]


@pytest.mark.usefixtures("nothing_unused")
@pytest.mark.parametrize("head_channels", [8, 16])
@pytest.mark.parametrize("bigram", ["low-rank", "full", "none"])
def test_a_gpt2_is_written_exactly(head_channels: int, bigram: str) -> None:
    """Heads of 8 channels as they are, and in heads of 16 of which 8 stay empty."""
    model = tiny_gpt2()
    coupling, what = started(model, head_channels=head_channels, bigram=bigram)
    assert what.embedding and what.unembedding and what.bridges
    assert all(share is not None and share > 0.9999 for share in what.sublayers)
    assert max(errors(coupling, model)) < 1e-3
    assert str(what) == (
        "embedding, unembedding, bridges, 4 of 4 sublayers (1.000 of their writes explained) from the dense model"
    )


@pytest.mark.usefixtures("nothing_unused")
def test_an_untied_gpt2_with_other_scores_is_written_exactly() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=2, n_head=2, scale_attn_weights=False,
        tie_word_embeddings=False, layer_norm_epsilon=1e-6, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = shaken(GPT2LMHeadModel(config))
    coupling, _ = started(model)
    assert max(errors(coupling, model)) < 1e-3


@pytest.mark.usefixtures("nothing_unused")
def test_separate_maps_and_unscaled_scores_are_found() -> None:
    config = GPTNeoConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=WIDTH, num_layers=2, num_heads=2,
        attention_types=[[["global"], 2]], bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = shaken(GPTNeoForCausalLM(config))
    coupling, what = started(model)
    assert None not in what.sublayers
    assert max(errors(coupling, model)) < 1e-3


@pytest.mark.usefixtures("nothing_unused")
def test_a_relu_and_positions_with_an_offset_are_found() -> None:
    """OPT, whose positions begin at an offset and whose keys are made before its queries are declared."""
    config = OPTConfig(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=4 * WIDTH,
        num_hidden_layers=2, num_attention_heads=2, pad_token_id=1, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = shaken(OPTForCausalLM(config))
    coupling, what = started(model)
    assert None not in what.sublayers and coupling.sparse.form.activation == "relu"
    assert max(errors(coupling, model)) < 1e-3


@pytest.mark.usefixtures("nothing_unused")
def test_a_head_wider_than_the_sparse_ones_becomes_several() -> None:
    """Its values shared out, its queries and keys cut down to half: close where their scores have a rank that small."""
    model = tiny_gpt2()
    blocks: Any = model.transformer.h
    with torch.no_grad():
        for block in blocks:
            maps = [*block.attn.c_attn.weight.view(WIDTH, 3, 2, 8).unbind(1), *block.attn.c_attn.bias.view(1, 3, 2, 8).unbind(1)]
            for part in (*maps[:2], *maps[3:5]):  # queries and keys, not values
                part[..., 4:] = 0
    coupling, what = started(model, head_channels=4)
    assert all(share is not None and share > 0.9999 for share in what.sublayers)
    assert max(errors(coupling, model)) < 1e-3


def llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=CONTEXT, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return shaken(LlamaForCausalLM(config))


@pytest.mark.usefixtures("nothing_unused")
def test_what_the_recipe_has_otherwise_stays_random() -> None:
    """A plain MLP for a gated one; the attention is copied."""
    model = llama()
    coupling, what = started(model, positions="auto", mlp="plain")
    attention, mlp = what.sublayers[::2], what.sublayers[1::2]
    assert what.embedding and what.unembedding and mlp == (None, None)
    assert all(share is not None and share > 0.999 for share in attention)
    assert "2 of 4 sublayers" in str(what) and str(what).endswith("; the rest is random")
    last = coupling.n_sites - 1
    tokens_bt = tokens().flip(1)
    hybrid_btv = coupling.dense_to_sparse(tokens_bt, coupling.dense.run(tokens_bt).residuals, last)
    assert (hybrid_btv - logits(model, tokens_bt)).abs().max() < 1e-3


def test_a_sublayer_that_is_not_verified_is_left_as_it_was() -> None:
    dense = load_dense(llama())
    shape = {"width": 4 * WIDTH, "head_channels": 8, "mlp": "plain"}
    values = {"dense": "tiny", "sparse": shape, "sparsity": {"l0": 0.25}, "data": {"context": CONTEXT}}
    recipe = complete_recipe(dense, resolve(values))
    coupling, untouched = new_coupling(dense, recipe), new_coupling(dense, recipe)
    what = start_from_dense(coupling, tokens())
    untouched_block = dict(untouched.sparse.blocks[0].named_parameters())
    assert what.sublayers[1] is None
    for name, parameter in coupling.sparse.blocks[0].named_parameters():
        if name.startswith(("up", "down")):
            was = untouched_block[name]
            quieter = parameter.norm() / was.norm().clamp_min(1e-9)  # so that what is random does not drown what was copied
            assert quieter <= 1 and torch.allclose(parameter, quieter * was, atol=1e-7), name


def test_a_narrower_model_starts_close_and_one_too_narrow_says_so() -> None:
    """AbsTopK then loses something; without the d channels there is nowhere to write the dense model."""
    model = tiny_gpt2()
    wanted_btv = logits(model, tokens())
    coupling, what = started(model, width=3 * WIDTH, keep=0.25)
    assert all(share is not None and 0.5 < share < 0.999 for share in what.sublayers)
    random = new_coupling(coupling.dense, coupling.recipe)
    with torch.no_grad():
        error, random_error = ((one.sparse(tokens()) - wanted_btv).square().mean() for one in (coupling, random))
    assert error < 0.3 * random_error
    assert str(started(model, width=WIDTH)[1]).startswith("embedding")
    wide = GPT2Config(vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    assert str(started(GPT2LMHeadModel(wide).eval(), width=16)[1]) == "nothing from the dense model; the rest is random"


def test_unused_neurons_are_alive_and_change_little() -> None:
    model = tiny_gpt2()
    coupling, _ = started(model)
    assert max(errors(coupling, model)) < 0.2
    up = dict(coupling.sparse.blocks[0].named_parameters())["up.weight"]
    assert up.any(1).all()


def test_the_recipe_chooses_and_the_calibration_is_not_taken_twice(text_file: Path) -> None:
    def fresh(**settings: Any) -> Any:
        settings = {"sparse.width": 64, "sparse.head_channels": 8, "sparse.positions": "learned", "data.rows": 4, **settings}
        values = recipe_values(l0=1.0, data=str(text_file), tokens=256, settings=settings)
        return prepare(tiny_gpt2(), values, tokenizer=tiny_tokenizer(), device="cpu")

    run = fresh()
    assert isinstance(run.started, Initialization) and run.started.embedding
    scales = [run.coupling.bridges[site].scale.item() for site in range(run.coupling.n_sites)]
    reports = list(train(run))
    assert scales == [run.coupling.bridges[site].scale.item() for site in range(run.coupling.n_sites)]
    assert reports[0].losses["kl"] < 1
    assert fresh(**{"sparse.start": "random"}).started is None
    assert fresh(**{f"losses.{name}": 0 for name in BRIDGE_LOSSES}).started is None


def test_a_run_that_goes_on_does_not_start_again(text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"sparse.width": 64, "sparse.head_channels": 8, "sparse.positions": "learned", "data.rows": 4}
    values = recipe_values(l0=0.1, data=str(text_file), tokens=640, settings=settings)

    def made(out: Path, *, resume: bool) -> Any:
        return prepare(tiny_gpt2(), values, tokenizer=tiny_tokenizer(), out=out, resume=resume, device="cpu")

    whole = made(tmp_path / "whole", resume=False)
    for _ in train(whole):
        pass
    cut = made(tmp_path / "cut", resume=False)
    from bridge.training import loop as training

    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    steps = train(cut)
    for _ in range(4):
        next(steps)
    steps.close()
    monkeypatch.setattr(start, "dissect", None)  # a second start would fail
    rest = made(tmp_path / "cut", resume=True)
    assert rest.started is None
    for _ in train(rest):
        pass
    for one, other in zip(finish(whole).sparse.parameters(), finish(rest).sparse.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_residual_is_turned_to_where_the_embedding_is_sparse() -> None:
    """An embedding of two entries a token, hidden by a rotation that leaves the mean at 0."""
    generator = torch.Generator().manual_seed(0)
    ones_d1 = torch.ones(WIDTH, 1)
    basis_dd = torch.linalg.qr(torch.cat([ones_d1, torch.randn(WIDTH, WIDTH - 1, generator=generator)], 1)).Q[:, 1:]
    codes_vd = torch.zeros(VOCABULARY, WIDTH - 1)
    for row in codes_vd:
        row[torch.randperm(WIDTH - 1, generator=generator)[:2]] = torch.tensor([1.0, -1.0])
    model = tiny_gpt2()
    model.transformer.wte.weight.data.copy_(codes_vd @ basis_dd.T)
    model.transformer.ln_f.weight.data.fill_(1.0)
    energy_vs = started(model)[0].sparse.embedding.detach().square()
    assert energy_vs.topk(2).values.sum() > 0.85 * energy_vs.sum()
    plain_vd = model.transformer.wte.weight.detach().square()
    assert plain_vd.topk(2).values.sum() < 0.7 * plain_vd.sum()

"""The dense model: every family is found, resumes exactly, and agrees with loops written out by hand; what cannot is refused."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.dense_cases import hooks_on, refusal
from support.tiny_families import FAMILIES, LAYERS, SEQUENTIAL, VOCABULARY, WIDTH, perturbed, some_tokens, tiny
from torch import Tensor, nn

from bridge.models.dense import DenseModel, load_dense
from bridge.models.residual import EMBEDDING, Enter, ResidualModel, run


@pytest.fixture(scope="module")
def gpt2() -> Any:  # a DenseModel, whose model's modules no type knows
    return load_dense(tiny())


# --- every family


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_family_resumes_exactly_at_every_site(family: str) -> None:
    model, tokens_bt = tiny(family), some_tokens()
    wanted_btv = model(tokens_bt).logits
    dense = load_dense(model)
    assert dense.sublayers == FAMILIES[family][2]
    assert dense.n_sites == len(dense.parity.errors) == len(dense.sublayers) + 1
    assert (dense.width, dense.vocabulary) == (WIDTH, VOCABULARY)
    assert dense.parity.largest <= dense.parity.tolerance == 1e-4

    plain = dense.run(tokens_bt)
    torch.testing.assert_close(plain.logits_btv, wanted_btv, rtol=0, atol=1e-5)
    assert all(x_btd.shape == (4, 10, WIDTH) for x_btd in plain.residuals)
    # residuals of one text, resumed while the model is fed another: nothing but the residual may reach the logits
    other_bt = some_tokens(seed=2)
    for site in range(dense.n_sites):
        resumed = dense.run(other_bt, Enter.at(site, plain.residuals[site]))
        torch.testing.assert_close(resumed.logits_btv, wanted_btv, rtol=0, atol=1e-4)
        for later in range(site, dense.n_sites):
            torch.testing.assert_close(resumed.residuals[later], plain.residuals[later], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_family_runs_rows_that_enter_at_different_sites(family: str) -> None:
    dense = load_dense(tiny(family))
    sites = [EMBEDDING, *range(dense.n_sites), EMBEDDING]
    order = torch.randperm(len(sites), generator=torch.Generator().manual_seed(0)).tolist()
    sites = [sites[i] for i in order]
    source, host = dense.run(some_tokens(len(sites), seed=3)), some_tokens(len(sites), seed=4)
    own = dense.run(host)
    x_btd = torch.stack([source.residuals[max(site, 0)][row] for row, site in enumerate(sites)])
    mixed = dense.run(host, Enter(torch.tensor(sites), x_btd))
    assert all(len(x_btd) == len(sites) for x_btd in mixed.residuals)
    for row, site in enumerate(sites):
        wanted = own if site == EMBEDDING else source
        torch.testing.assert_close(mixed.logits_btv[row], wanted.logits_btv[row], rtol=0, atol=1e-4)
        for at in range(dense.n_sites):  # until it enters, a row is the host's
            wanted = source if EMBEDDING < site <= at else own
            torch.testing.assert_close(mixed.residuals[at][row], wanted.residuals[at][row], rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", [family for family, (_, _, sublayers) in FAMILIES.items() if sublayers == SEQUENTIAL])
def test_attention_mixes_tokens_and_the_mlp_does_not(family: str) -> None:
    """A site that is right about the logits can still lie in the wrong place, such as behind the first norm."""
    dense, tokens_bt = load_dense(tiny(family)), some_tokens()
    plain = dense.run(tokens_bt)
    for site, kind in enumerate(dense.sublayers):
        x_btd = plain.residuals[site].clone()
        x_btd[:, 0] = plain.residuals[site][:, 5]
        change_btd = dense.run(tokens_bt, Enter.at(site, x_btd)).residuals[site + 1] - plain.residuals[site + 1]
        moved = change_btd[:, 1:].abs().max()
        assert moved > 1e-3 if kind == "attn" else moved < 1e-5


# --- against loops written by hand


def gpt2_loop(model: Any) -> Any:
    """GPT-2 as embed, sublayers, unembed: the reference that `run` in residual.py takes."""
    body = model.transformer

    def embed(tokens_bt: Tensor) -> Tensor:
        return body.wte(tokens_bt) + body.wpe(torch.arange(tokens_bt.shape[1]))

    def attend(block: Any, x_btd: Tensor) -> Tensor:
        shape = (*x_btd.shape[:2], model.config.n_head, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in block.attn.c_attn(block.ln_1(x_btd)).split(x_btd.shape[-1], -1))
        scores = (q @ k.transpose(-1, -2)) / q.shape[-1] ** 0.5
        scores = scores.masked_fill(torch.ones(x_btd.shape[1], x_btd.shape[1]).triu(1).bool(), -torch.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x_btd.shape)
        return x_btd + block.attn.c_proj(mixed)

    def feed(block: Any, x_btd: Tensor) -> Tensor:
        return x_btd + block.mlp(block.ln_2(x_btd))

    sublayers = [lambda x, b=block, f=f: f(b, x) for block in body.h for f in (attend, feed)]
    return embed, sublayers, lambda x_btd, _tokens_bt: model.lm_head(body.ln_f(x_btd))


@torch.no_grad()
def test_gpt2_is_the_loop() -> None:
    model, tokens_bt = tiny(), some_tokens(8)
    dense, loop = load_dense(model), gpt2_loop(model)
    ours, theirs = dense.run(tokens_bt), run(*loop, tokens_bt=tokens_bt)
    torch.testing.assert_close(ours.logits_btv, theirs.logits_btv, rtol=0, atol=1e-5)
    for site in range(dense.n_sites):
        torch.testing.assert_close(ours.residuals[site], theirs.residuals[site], rtol=0, atol=1e-5)

    enter = Enter(torch.tensor([3, EMBEDDING, 0, 6, 1, 3, 2, 5]), torch.randn(8, 10, WIDTH))
    ours, theirs = dense.run(tokens_bt, enter), run(*loop, tokens_bt=tokens_bt, enter=enter)
    torch.testing.assert_close(ours.logits_btv, theirs.logits_btv, rtol=0, atol=1e-5)
    for row, first in enumerate(enter.site_b.tolist()):
        for site in range(max(first, 0), dense.n_sites):
            place = enter.site_b.argsort(stable=True).tolist().index(row)
            torch.testing.assert_close(ours.residuals[site][row], theirs.residuals[site][place], rtol=0, atol=1e-5)


@torch.no_grad()
def test_gpt_neox_parallel_is_the_loop() -> None:
    model, tokens_bt = tiny("gpt-neox-parallel"), some_tokens()
    dense, body = load_dense(model), model.gpt_neox
    positions = body.rotary_emb(torch.zeros(1), torch.arange(10)[None])
    x_btd = body.embed_in(tokens_bt)
    plain = dense.run(tokens_bt)
    mask = torch.full((1, 1, 10, 10), -torch.inf).triu(1)
    for site, block in enumerate(body.layers):
        torch.testing.assert_close(plain.residuals[site], x_btd, rtol=0, atol=1e-5)
        attended = block.attention(block.input_layernorm(x_btd), attention_mask=mask, position_embeddings=positions)[0]
        x_btd = x_btd + attended + block.mlp(block.post_attention_layernorm(x_btd))
    torch.testing.assert_close(plain.residuals[LAYERS], x_btd, rtol=0, atol=1e-5)


def test_gradients_flow_through_what_enters() -> None:
    model, tokens_bt = tiny().double(), some_tokens(8)
    dense = load_dense(model)
    site_b = torch.tensor([0, 1, EMBEDDING, 2, 3, 6, 5, 4])
    x_btd = torch.randn(8, 10, WIDTH, dtype=torch.float64)
    weight_btv = torch.randn(8, 10, VOCABULARY, dtype=torch.float64)

    def gradient(trace_of: Any) -> Tensor:
        given_btd = x_btd.clone().requires_grad_()
        trace = trace_of(Enter(site_b, given_btd))
        (trace.logits_btv * weight_btv).sum().backward()
        assert given_btd.grad is not None
        return given_btd.grad

    ours = gradient(lambda enter: dense.run(tokens_bt, enter))
    theirs = gradient(lambda enter: run(*gpt2_loop(model), tokens_bt=tokens_bt, enter=enter))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    assert ours[2].abs().max() == 0
    assert (ours.flatten(1).abs().amax(1) > 0).tolist() == (site_b != EMBEDDING).tolist()

    direction_btd, step = torch.randn_like(x_btd), 1e-5
    up, down = (
        (dense.run(tokens_bt, Enter(site_b, x_btd + sign * step * direction_btd)).logits_btv * weight_btv).sum()
        for sign in (1, -1)
    )
    torch.testing.assert_close((ours * direction_btd).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_flow_in_every_family_and_leave_the_model_alone(family: str) -> None:
    model = tiny(family).train()
    dense = load_dense(model)
    x_btd = torch.randn(dense.n_sites, 10, WIDTH, requires_grad=True)
    dense.run(some_tokens(dense.n_sites), Enter(torch.arange(dense.n_sites), x_btd)).logits_btv.square().sum().backward()
    assert x_btd.grad is not None and x_btd.grad.isfinite().all() and (x_btd.grad.flatten(1).abs().amax(1) > 0).all()
    assert all(weight.grad is None for weight in [*model.parameters(), *dense.model.parameters()])


# --- dtypes


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma3", "gpt-neox-parallel", "falcon-40b"])
def test_runs_under_autocast(family: str) -> None:
    dense, tokens_bt = load_dense(tiny(family)), some_tokens(7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = dense.run(tokens_bt)
        sites_b = torch.arange(7) % dense.n_sites
        x_btd = torch.stack([plain.residuals[site][row] for row, site in enumerate(sites_b.tolist())])
        resumed = dense.run(some_tokens(7, seed=9), Enter(sites_b, x_btd.bfloat16().float()))
        loaded_inside = load_dense(tiny(family))
    scale = plain.logits_btv.abs().max().item()
    torch.testing.assert_close(resumed.logits_btv, plain.logits_btv, rtol=0, atol=0.05 * scale)
    assert loaded_inside.parity == dense.parity


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "bloom", "llama", "granite", "gpt-j", "cohere", "olmo2"])
def test_half_precision_is_wired_alike_and_resumes_to_its_tolerance(family: str) -> None:
    dense = load_dense(tiny(family).bfloat16())
    assert dense.sublayers == FAMILIES[family][2]
    assert dense.parity.tolerance > 1e-4 and dense.parity.largest <= dense.parity.tolerance
    tokens_bt = some_tokens()
    plain = dense.run(tokens_bt)
    resumed = dense.run(tokens_bt, Enter.at(1, plain.residuals[1].float()))
    torch.testing.assert_close(resumed.logits_btv, plain.logits_btv, rtol=0, atol=dense.parity.tolerance)


# --- a model is left as it was found


def test_is_a_residual_model_and_not_a_module(gpt2: Any) -> None:
    model: ResidualModel = load_dense(tiny())
    assert not isinstance(model, nn.Module) and isinstance(gpt2, DenseModel)
    assert gpt2.name == "GPT2LMHeadModel" and gpt2.revision is None and gpt2.tokenizer is None and gpt2.context == 16
    assert not gpt2.model.training and not any(weight.requires_grad for weight in gpt2.model.parameters())
    assert gpt2.to("cpu") is gpt2 and gpt2.device == torch.device("cpu")


def test_no_hook_outlives_a_run(gpt2: Any) -> None:
    tokens_bt = some_tokens()
    before = gpt2.run(tokens_bt).logits_btv
    assert hooks_on(gpt2.model) == 0
    with pytest.raises(IndexError):
        gpt2.run(torch.full_like(tokens_bt, VOCABULARY), Enter.at(1, torch.zeros(4, 10, WIDTH)))
    assert hooks_on(gpt2.model) == 0
    assert torch.equal(gpt2.run(tokens_bt).logits_btv, before)


def test_a_run_inside_a_run_is_left_alone(gpt2: Any) -> None:
    tokens_bt, x_btd = some_tokens(), torch.randn(4, 10, WIDTH)
    wanted, plain = gpt2.run(tokens_bt, Enter.at(3, x_btd)), gpt2.run(tokens_bt)
    inner: list[Tensor] = []

    def nested(*_: Any) -> None:
        if not inner:
            inner.append(torch.empty(0))
            inner.append(gpt2.run(tokens_bt).logits_btv)

    with gpt2.model.transformer.h[1].mlp.register_forward_pre_hook(nested):
        outer = gpt2.run(tokens_bt, Enter.at(3, x_btd))
    assert torch.equal(inner[1], plain.logits_btv)
    assert all(torch.equal(a, b) for a, b in zip(outer.residuals, wanted.residuals, strict=True))
    assert torch.equal(outer.logits_btv, wanted.logits_btv)


def test_a_live_model_is_not_touched_and_its_weights_are_shared() -> None:
    model, tokens_bt = tiny(), some_tokens()
    seen: list[int] = []
    model.transformer.h[0].register_forward_hook(lambda *_: seen.append(1))
    before_btv = model(tokens_bt).logits.detach()
    model.train()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    random_state = torch.get_rng_state()
    dense: Any = load_dense(model)
    assert torch.equal(torch.get_rng_state(), random_state)
    dense.run(tokens_bt, Enter.at(1, torch.randn(4, 10, WIDTH, requires_grad=True))).logits_btv.sum().backward()
    assert model.training and all(module.training for module in model.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())
    assert hooks_on(model) == 1
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())
    assert torch.equal(model.eval()(tokens_bt).logits, before_btv)
    assert {w.data_ptr() for w in model.parameters()} == {w.data_ptr() for w in dense.model.parameters()}
    assert dense.model.lm_head.weight is dense.model.transformer.wte.weight  # still tied


def test_threads_take_turns(gpt2: Any) -> None:
    tokens_bt, given = some_tokens(), [torch.randn(4, 10, WIDTH) for _ in range(8)]

    def at(site: int) -> Tensor:
        return gpt2.run(tokens_bt, Enter.at(site % 7, given[site])).logits_btv

    wanted = [at(site) for site in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(pool.map(at, range(8)), wanted, strict=True))


def test_a_model_copied_with_deepcopy_runs_alike(gpt2: Any) -> None:
    twin, tokens_bt = copy.deepcopy(gpt2), some_tokens()
    enter = Enter.at(2, torch.randn(4, 10, WIDTH))
    assert torch.equal(twin.run(tokens_bt, enter).logits_btv, gpt2.run(tokens_bt, enter).logits_btv)


def test_entries_that_do_not_fit_are_refused(gpt2: Any) -> None:
    tokens_bt = some_tokens()
    with pytest.raises(ValueError, match="site 7 does not exist"):
        gpt2.run(tokens_bt, Enter.at(7, torch.zeros(4, 10, WIDTH)))
    with pytest.raises(ValueError, match=r"residuals of shape \(4, 9, 32\) cannot enter"):
        gpt2.run(tokens_bt, Enter.at(1, torch.zeros(4, 9, WIDTH)))
    with pytest.raises(ValueError, match="17 tokens are more than the 16 positions"):
        gpt2.run(some_tokens(1, 17))


# --- folders, adapters, fingerprints


def test_a_folder_loads_and_the_fingerprint_names_its_weights(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "saved")
    live, saved = load_dense(model), load_dense(tmp_path / "saved")
    assert saved.name == str(tmp_path / "saved") and saved.revision is None
    assert saved.tokenizer is None  # transformers would invent an empty one
    assert not saved.model.training and not any(weight.requires_grad for weight in saved.model.parameters())
    assert live.fingerprint() == saved.fingerprint() == load_dense(str(tmp_path / "saved")).fingerprint()
    assert len(live.fingerprint()) == 64 and int(live.fingerprint(), 16)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    assert live.fingerprint() == load_dense(model).fingerprint() != saved.fingerprint()
    half = load_dense(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_tokenizer_is_found_beside_the_model(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    dense = load_dense(tmp_path)
    assert dense.tokenizer is not None and len(dense.tokenizer) == VOCABULARY
    assert load_dense(tmp_path, tokenizer=dense.tokenizer).tokenizer is dense.tokenizer


# --- what is refused


def bert_config(**settings: Any) -> Any:
    shape: dict[str, Any] = dict(
        hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=VOCABULARY
    )
    return hf.BertConfig(**shape, **settings)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    hf.BertForMaskedLM(bert_config()).save_pretrained(tmp_path)
    message = refusal(tmp_path)
    assert str(tmp_path) in message and "is not causal" in message and "encoder" in message
    assert "is not causal" in refusal(perturbed(hf.BertForMaskedLM(bert_config())))
    # the same blocks, told to be causal, are a decoder, and read as one
    decoder = load_dense(perturbed(hf.BertLMHeadModel(bert_config(is_decoder=True))))
    assert decoder.sublayers == ("attn", "mlp") * 2


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    shape: dict[str, Any] = dict(d_model=WIDTH, num_layers=2, num_heads=4, d_kv=8, d_ff=48, vocab_size=VOCABULARY)
    t5 = hf.T5ForConditionalGeneration(hf.T5Config(**shape))
    assert "is an encoder-decoder model" in refusal(t5)
    t5.save_pretrained(tmp_path)
    assert "is not a causal language model" in refusal(tmp_path)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    assert "gives no logits" in refusal(tiny().transformer)
    tiny("llama").model.save_pretrained(tmp_path)
    message = refusal(tmp_path)  # transformers would make up a random head
    assert "lm_head.weight" in message and "not a complete causal LM" in message


def test_what_is_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    message = refusal("gpt2")
    assert message.startswith("model 'gpt2' is neither a folder here nor") and "hub cannot be reached" in message
    message = refusal(tmp_path / "nowhere")
    assert message.startswith(f"model '{tmp_path / 'nowhere'}' is neither a folder here nor a model on the Hugging Face hub")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refusal(tmp_path / "empty")
    assert "is not a model; give" in refusal(nn.Linear(2, 2))


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path / "good")

    def variant(name: str) -> Path:
        return Path(shutil.copytree(tmp_path / "good", tmp_path / name))

    pickled = variant("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")
    assert "has no *.safetensors" in refusal(pickled)
    assert "is a file; give the folder" in refusal(tmp_path / "good" / "config.json")
    cut = variant("cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    assert "cannot be loaded" in refusal(cut)
    deeper = variant("deeper")
    config = (deeper / "config.json").read_text()
    (deeper / "config.json").write_text(config.replace('"n_layer": 3', '"n_layer": 4'))
    assert "transformer.h.3" in refusal(deeper)
    (deeper / "config.json").write_text(
        config.replace('"model_type": "gpt2"', '"model_type": "zork", "auto_map": {"AutoConfig": "a.B"}')
    )
    assert "needs code from its own repository" in refusal(deeper)
    (deeper / "config.json").write_text(config.replace('"model_type": "gpt2"', '"model_type": "zork"'))
    assert "cannot be loaded" in refusal(deeper)
    (deeper / "config.json").write_text("{")
    assert "cannot be loaded" in refusal(deeper)


# --- every weight in the file is used


def edited(folder: Path, weights: Callable[[dict[str, Tensor]], Any] | None = None, **config: Any) -> Path:
    """A saved model with other weights in its file, or other settings."""
    from safetensors.torch import load, save_file

    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if weights is not None:
        path = folder / "model.safetensors"
        tensors = weights(load(path.read_bytes()))
        save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata={"format": "pt"})
    return folder


def biased() -> Any:
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**{**tiny("llama").config.to_dict(), "attention_bias": True}))
    return perturbed(model)


UNUSED: dict[str, tuple[Callable[[], Any], dict[str, Any], str, int]] = {
    "biases": (biased, {"attention_bias": False}, "model.layers.0.self_attn.k_proj.bias", 12),
    "opt-biases": (lambda: tiny("opt"), {"enable_bias": False}, "model.decoder.layers.0.fc1.bias", 18),
    "layers": (lambda: tiny("llama"), {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight", 9),
    "gpt2-layers": (tiny, {"n_layer": 2}, "transformer.h.2.attn.c_attn.weight", 11),
    "expert-layers": (lambda: tiny("mixtral"), {"num_hidden_layers": 2}, "model.layers.2.input_layernorm.weight", 9),
}


@pytest.mark.parametrize("kind", UNUSED)
@pytest.mark.parametrize("shards", ["one", "many"])
def test_weights_that_the_configuration_leaves_out_are_refused(kind: str, shards: str, tmp_path: Path) -> None:
    make, settings, first, count = UNUSED[kind]
    model = make()
    model.save_pretrained(tmp_path, max_shard_size="1GB" if shards == "one" else "10KB")
    assert len([*tmp_path.glob("*.safetensors")]) == 1 or shards == "many"
    torch.testing.assert_close(load_dense(tmp_path).run(some_tokens()).logits_btv, model(some_tokens()).logits.detach())
    assert refusal(edited(tmp_path, **settings)) == (
        f"model '{tmp_path}' has weights that its config.json does not use: {first} ({count} such); fix config.json, "
        "or remove these weights by saving the model again with save_pretrained of transformers"
    )


def test_weights_under_other_names_are_refused(tmp_path: Path) -> None:
    def given(name: str, weights: Callable[[dict[str, Tensor]], Any]) -> Path:
        tiny("llama").save_pretrained(tmp_path / name)
        return edited(tmp_path / name, weights)

    extra = given("value-head", lambda tensors: {**tensors, "v_head.summary.weight": torch.ones(1, WIDTH)})
    assert "does not use: v_head.summary.weight (1 such)" in refusal(extra)
    extra = given("critic", lambda tensors: {**tensors, **{f"critic.{key}": tensor for key, tensor in tensors.items()}})
    assert "does not use: critic.lm_head.weight (30 such)" in refusal(extra)
    for prefix in ("_orig_mod.", "base_model.model."):
        other = given(prefix, lambda tensors, p=prefix: {f"{p}{key}": tensor for key, tensor in tensors.items()})
        message = refusal(other)
        assert "holds no weights for lm_head.weight (30 missing; its file has 30 under other names, such as" in message
        assert f"such as {prefix}lm_head.weight): not a complete causal LM" in message


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    cases: list[tuple[str, str, dict[str, Any], str]] = [
        ("vocabulary", "llama", {"vocab_size": 70}, "lm_head.weight of shape (80, 32), but its config.json asks for (70, 32) (2"),
        ("mlp", "llama", {"intermediate_size": 40}, "model.layers.0.mlp.down_proj.weight of shape (32, 48), but its config.json"),
        ("heads", "llama", {"num_key_value_heads": 4}, "model.layers.0.self_attn.k_proj.weight of shape (16, 32), but its"),
        ("experts", "mixtral", {"num_local_experts": 2}, "model.layers.0.mlp.experts.down_proj of shape (4, 32, 48), but its"),
    ]
    for name, family, settings, problem in cases:
        tiny(family).save_pretrained(tmp_path / name)
        message = refusal(edited(tmp_path / name, **settings))
        assert f"has {problem}" in message and "such); give the config.json that its weights were saved with" in message
    expert = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    tiny("mixtral").save_pretrained(tmp_path / "broken")
    edited(tmp_path / "broken", lambda tensors: {key: tensor for key, tensor in tensors.items() if key != expert})
    assert "has experts whose weights do not fit together" in refusal(tmp_path / "broken")


@torch.no_grad()
def test_buffers_of_earlier_versions_are_no_weights(tmp_path: Path) -> None:
    mask, lowest = torch.ones(1, 1, 16, 16).tril(), torch.tensor(-1e4)
    for family, block, buffers in (
        ("gpt2", "transformer.h.{}.attn", {"bias": mask, "masked_bias": lowest}),
        ("gpt-neo", "transformer.h.{}.attn.attention", {"bias": mask, "masked_bias": lowest}),
        ("gpt-j", "transformer.h.{}.attn", {"bias": mask, "masked_bias": lowest}),
        (
            "gpt-neox-parallel",
            "gpt_neox.layers.{}.attention",
            {"bias": mask, "masked_bias": lowest, "rotary_emb.inv_freq": lowest},
        ),
        ("llama", "model.layers.{}.self_attn", {"rotary_emb.inv_freq": torch.ones(4)}),
    ):
        model, folder = tiny(family), tmp_path / family
        model.save_pretrained(folder)
        old = {f"{block.format(layer)}.{key}": tensor for layer in range(LAYERS) for key, tensor in buffers.items()}
        got_btv = load_dense(edited(folder, lambda tensors, old=old: {**tensors, **old})).run(some_tokens()).logits_btv
        torch.testing.assert_close(got_btv, model(some_tokens()).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_head_in_the_file_is_the_head(tmp_path: Path) -> None:
    model = tiny()
    wanted_btv = model(some_tokens()).logits
    for name, factor in (("tied", 1), ("its own", 2)):  # the configuration says that it is tied
        model.save_pretrained(tmp_path / name)
        edited(tmp_path / name, lambda ts, by=factor: {**ts, "lm_head.weight": ts["transformer.wte.weight"] * by})
        got_btv = load_dense(tmp_path / name).run(some_tokens()).logits_btv
        torch.testing.assert_close(got_btv, factor * wanted_btv, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path / "untied")
    assert "holds no weights for lm_head.weight (1 missing)" in refusal(edited(tmp_path / "untied", tie_word_embeddings=False))


def test_an_encoder_with_heads_of_its_own_is_called_an_encoder(tmp_path: Path) -> None:
    hf.BertForPreTraining(bert_config()).save_pretrained(tmp_path)
    assert "is not causal" in refusal(tmp_path)


# --- what cannot be wired is refused by site


class Bent(nn.Module):
    """A sequential block whose second sublayer reads no residual that any module sees, and returns a bent one."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x_btd: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
        mask = kwargs.get("attention_mask")
        attended = self.block.attn(self.block.ln_1(x_btd), attention_mask=mask)[0]
        return torch.tanh(x_btd + attended + self.block.mlp(torch.tanh(x_btd + attended)))


class Unread(Bent):
    """A sequential block with a norm that is no module: its two outputs add up as a parallel block's do, but it is none."""

    def forward(self, x_btd: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
        x_btd = x_btd + self.block.attn(self.block.ln_1(x_btd), attention_mask=kwargs.get("attention_mask"))[0]
        return x_btd + self.block.mlp(nn.functional.layer_norm(x_btd, (WIDTH,)))


@pytest.mark.parametrize("kind", [Bent, Unread])
def test_a_block_without_a_middle_is_refused_by_its_site(kind: type[Bent]) -> None:
    model = tiny()
    model.transformer.h[1] = kind(model.transformer.h[1])
    message = refusal(model)
    assert message.startswith("model 'GPT2LMHeadModel' cannot be read at site 3: no module of block 1 reads the residual")


def test_a_model_that_bypasses_its_residual_is_refused_by_its_site() -> None:
    model = tiny()

    class Bypassed(nn.Module):
        """The last block also reads the embeddings."""

        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def forward(self, x_btd: Tensor, *args: Any, **kwargs: Any) -> Any:
            return self.block(x_btd + 0.3 * embedded[-1], *args, **kwargs)

    embedded: list[Tensor] = []
    model.transformer.wte.register_forward_hook(lambda _m, _a, output: embedded.append(output))
    model.transformer.h[2] = Bypassed(model.transformer.h[2])
    message = refusal(model)
    assert message.startswith("model 'GPT2LMHeadModel' cannot be read at site 4: block 2 depends on more than its arguments")


def test_a_model_whose_residual_is_not_all_that_is_read_is_refused_by_its_site() -> None:
    """Gemma 4 gives every block an embedding of the token: resumed, it would mix one text's residual with another's tokens."""
    shape: dict[str, Any] = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4, intermediate_size=48
    )
    special: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, num_kv_shared_layers=0)

    def gemma4(per_layer: int) -> Any:
        per_layer_input: dict[str, Any] = dict(hidden_size_per_layer_input=per_layer, vocab_size_per_layer_input=VOCABULARY)
        config = hf.Gemma4TextConfig(**shape, **special, **per_layer_input, head_dim=8, num_key_value_heads=2)
        return perturbed(hf.Gemma4ForCausalLM(config))

    message = refusal(gemma4(8))
    assert message.startswith("model 'Gemma4ForCausalLM' fails the parity check at site 0 (attn): logits off by")
    assert load_dense(gemma4(0)).parity.largest <= 1e-4


def test_mixed_blocks_are_read_each_as_it_is() -> None:
    class Parallel(nn.Module):
        def __init__(self, block: Any) -> None:
            super().__init__()
            self.block = block

        def forward(self, x_btd: Tensor, *_args: Any, **kwargs: Any) -> Tensor:
            attended = self.block.attn(self.block.ln_1(x_btd), attention_mask=kwargs.get("attention_mask"))[0]
            return x_btd + attended + self.block.mlp(self.block.ln_2(x_btd))

    model = tiny()
    model.transformer.h[1] = Parallel(model.transformer.h[1])
    dense = load_dense(model)
    assert dense.sublayers == ("attn", "mlp", "parallel", "attn", "mlp")
    assert dense.parity.largest <= 1e-4


def test_a_model_whose_blocks_are_no_list_is_refused() -> None:
    model = tiny()
    model.transformer.h.append(copy.deepcopy(model.transformer.h[0]))
    assert "cannot be read at site 0" in refusal(model)

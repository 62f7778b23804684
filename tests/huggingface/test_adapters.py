"""Adapters: what is merged is what PEFT's own forward computes, of every kind and in every state; what cannot be is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.dense_cases import refusal
from support.tiny_families import LAYERS, VOCABULARY, perturbed, some_tokens, tiny
from torch import Tensor, nn

from bridge.models.dense import load_dense

pytestmark = pytest.mark.filterwarnings("ignore")  # what PEFT warns of, while the references are made


def lora(*targets: str, **settings: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "target_modules": list(targets), "task_type": "CAUSAL_LM", **settings})


def adapted(model: Any, config: Any, name: str = "default") -> Any:
    """A PeftModel of a copy of the model, all that it would train at random values."""
    torch.manual_seed(1)
    peft_model: Any = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config), adapter_name=name)
    with torch.no_grad():
        for weight in peft_model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.15)
    return peft_model.eval()


@torch.no_grad()
def logits(model: Any, tokens_bt: Tensor | None = None) -> Tensor:
    return model(some_tokens() if tokens_bt is None else tokens_bt).logits


@torch.no_grad()
def loaded_logits(model: Any, **settings: Any) -> Tensor:
    return load_dense(model, **settings).run(some_tokens()).logits_btv


def saved(folder: Path, model: Any, peft_model: Any) -> tuple[Path, Path]:
    """The folders of a base and of its adapter."""
    model.save_pretrained(folder / "base")
    peft_model.save_pretrained(str(folder / "adapter"))
    return folder / "base", folder / "adapter"


def same(got_btv: Tensor, wanted_btv: Tensor) -> None:
    torch.testing.assert_close(got_btv, wanted_btv, rtol=0, atol=1e-4)


# --- what can be merged

GPT2 = {"fan_in_fan_out": True}
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
IA3 = {"feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "v_proj", "down_proj"]}
MERGED: dict[str, tuple[str, Any]] = {
    "lora": ("llama", lora("q_proj", "down_proj")),
    "lora-gpt2": ("gpt2", lora("c_attn", "c_fc", **GPT2)),
    "rslora": ("llama", lora("q_proj", "v_proj", use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 32})),
    "dora": ("llama", lora("q_proj", "down_proj", use_dora=True)),
    "bias": ("gpt2", lora("c_attn", bias="all", **GPT2)),
    "pissa": ("llama", lora("q_proj", init_lora_weights="pissa")),
    "experts": ("mixtral", lora("q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
    "replicated": ("llama", lora("q_proj", "down_proj", layer_replication=[[0, 2], [1, 3]])),
    "tied-wte": ("gpt2", lora("wte")),
    "tied-head": ("gpt2", lora("lm_head")),
    "tied-both": ("gpt2", lora("lm_head", "wte")),
    "tied-ensured": ("gpt2", lora("wte", ensure_weight_tying=True)),
    "tied-embed": ("gemma2", lora("embed_tokens", "q_proj")),
    "tied-saved-head": ("gpt2", lora("c_attn", modules_to_save=["lm_head"], **GPT2)),
    "tied-saved-wte": ("gpt2", lora("c_attn", modules_to_save=["wte"], **GPT2)),
    "saved-embed-head": ("llama", lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])),
    "saved-mlp": ("llama", lora("q_proj", modules_to_save=["mlp"])),
    "tokens": ("llama", lora("q_proj", trainable_token_indices=[5, 6, 70])),
    "tied-tokens": ("gpt2", lora("c_attn", trainable_token_indices=[5, 6, 70], **GPT2)),
    "tokens-alone": ("gpt2", peft.TrainableTokensConfig(token_indices=[5, 70], target_modules=["wte"], **CAUSAL)),
    "ia3": ("llama", peft.IA3Config(**IA3, **CAUSAL)),
    "loha": ("llama", peft.LoHaConfig(target_modules=["q_proj", "down_proj"], **CAUSAL)),
    "lokr": ("llama", peft.LoKrConfig(target_modules=["q_proj", "down_proj"], **CAUSAL)),
    "vera": ("llama", peft.VeraConfig(target_modules=["q_proj"], **CAUSAL)),
    "vblora": ("llama", peft.VBLoRAConfig(target_modules=["q_proj"], num_vectors=8, vector_length=8, **CAUSAL)),
    "norms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"], **CAUSAL)),
    "no-task": ("llama", lora("q_proj", task_type=None)),
}


@pytest.mark.parametrize("kind", MERGED)
def test_an_adapter_is_merged_exactly(kind: str, tmp_path: Path) -> None:
    family, config = MERGED[kind]
    model = tiny(family)
    live = adapted(model, config)
    base, adapter = saved(tmp_path, model, live)
    reloaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter))
    wanted_btv, base_btv = logits(reloaded), logits(model)
    same(wanted_btv, logits(live))
    assert (wanted_btv - base_btv).abs().max() > 0.1

    random_state, fingerprints = torch.get_rng_state(), set()
    ways: list[tuple[Any, dict[str, Any]]] = [(base, {"adapter": adapter}), (model, {"adapter": str(adapter)}), (live, {})]
    for given, settings in ways:
        dense: Any = load_dense(given, **settings)
        with torch.no_grad():
            same(dense.run(some_tokens()).logits_btv, wanted_btv)
        assert not any("lora" in name or "base_layer" in name for name, _ in dense.model.named_modules())
        fingerprints.add(dense.fingerprint())
        # weights are tied where the configuration says so: an adapter elsewhere leaves them tied
        config, embedding = dense.model.config, dense.model.get_input_embeddings().weight
        tied = config.get_text_config().tie_word_embeddings
        assert tied == (dense.model.get_output_embeddings().weight is embedding)
        assert tied == (family in ("gpt2", "gemma2") and kind in ("lora-gpt2", "bias"))
        if given is not base:
            assert dense.name == type(model).__name__
    assert len(fingerprints) == 1
    assert torch.equal(torch.get_rng_state(), random_state)
    # neither the live model nor the live PeftModel was merged into
    assert torch.equal(logits(model), base_btv) and not hasattr(model, "peft_config")
    same(logits(live), wanted_btv)
    assert hasattr(live, "peft_config")


def test_half_precision_is_held_to_its_own_tolerance(tmp_path: Path) -> None:
    model = tiny("llama")
    base, adapter = saved(tmp_path, model, adapted(model, lora("q_proj", "down_proj")))
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(model).bfloat16(), str(adapter))
    wanted_btv = logits(reference)
    for given, settings in ((base, {"adapter": adapter, "dtype": torch.bfloat16}), (reference, {})):
        got_btv = loaded_logits(given, **settings)
        assert torch.equal(got_btv, got_btv.bfloat16().float())  # of that precision, and cast where they leave the model
        assert (got_btv - wanted_btv).abs().max() < 0.05 * wanted_btv.abs().max()


# --- the state of a live model


def test_an_adapter_that_is_switched_off_is_not_merged() -> None:
    model = tiny("llama")
    base_btv = logits(model)
    for config in (
        lora("q_proj"),
        lora("q_proj", modules_to_save=["lm_head"]),
        lora("q_proj", trainable_token_indices=[5, 6]),
        peft.PromptTuningConfig(num_virtual_tokens=2, **CAUSAL),
        peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL),
    ):
        live = adapted(model, config)
        with live.disable_adapter():
            assert torch.equal(logits(live), base_btv)
            dense: Any = load_dense(live)
            assert torch.equal(loaded_logits(live), base_btv)
        assert dense.fingerprint() == load_dense(model).fingerprint()
        if not config.is_prompt_learning:
            assert not torch.equal(loaded_logits(live), base_btv)

    live = adapted(model, lora("q_proj"))
    live.base_model.disable_adapter_layers()
    assert torch.equal(loaded_logits(live), base_btv)
    live.base_model.enable_adapter_layers()
    live.merge_adapter()
    same(loaded_logits(live), logits(live))
    with live.disable_adapter():
        same(loaded_logits(live), base_btv)
    tied = adapted(tiny("gpt2"), lora("wte"))
    tied.merge_adapter()  # into both: this is what it computes now
    same(loaded_logits(tied), logits(tied))
    with tied.disable_adapter():
        same(loaded_logits(tied), logits(tiny("gpt2")))


def test_the_active_adapters_are_merged_and_no_other(tmp_path: Path) -> None:
    model = tiny("llama")
    live = adapted(model, lora("q_proj", "v_proj"), name="a")
    other = adapted(model, lora("q_proj", "down_proj", modules_to_save=["lm_head"]), name="b")
    other.save_pretrained(str(tmp_path))
    live.load_adapter(str(tmp_path / "b"), "b")
    found = []
    for active in ("a", "b", ["a", "b"]):
        live.base_model.set_adapter(active)
        found.append(logits(live))
        same(loaded_logits(live), found[-1])
    assert all((one - two).abs().max() > 0.1 for one, two in zip(found, found[1:], strict=False))
    # some layers off, others on
    live.base_model.model.model.layers[1].self_attn.q_proj.enable_adapters(False)
    assert (logits(live) - found[-1]).abs().max() > 0.01
    same(loaded_logits(live), logits(live))


def test_adapters_without_a_peft_model_are_merged(tmp_path: Path) -> None:
    """Transformers' own add_adapter puts the layers into the model itself; a mixed model puts them into one another."""
    model = tiny("llama")
    live = copy.deepcopy(model)
    live.add_adapter(lora("q_proj", "down_proj"))
    perturbed(live)
    same(loaded_logits(live), logits(live))
    enabled_btv = logits(live)
    live.disable_adapters()
    assert (logits(live) - enabled_btv).abs().max() > 0.1
    same(loaded_logits(live), logits(live))

    mixed: Any = peft.get_peft_model(copy.deepcopy(model), lora("q_proj", task_type=None), adapter_name="a", mixed=True)
    mixed.add_adapter("b", peft.LoHaConfig(target_modules=["q_proj", "down_proj"]))
    mixed.set_adapter(["a", "b"])
    perturbed(mixed)
    same(loaded_logits(mixed), logits(mixed))

    # a second adapter, onto a live model that has one
    twice = adapted(model, lora("q_proj"))
    merged = load_dense(twice).model
    second = adapted(merged, lora("v_proj"))
    second.save_pretrained(str(tmp_path))
    same(loaded_logits(twice, adapter=tmp_path), logits(second))


def test_a_live_model_that_keeps_tensors_with_a_history_is_copied() -> None:
    model = tiny("llama")
    live = adapted(model, lora("q_proj"))
    for one in (model, live):
        one.train()
        one.seen = {"logits": [one(some_tokens()).logits]}
        assert not one.seen["logits"][0].is_leaf
        same(loaded_logits(one), logits(one.eval()))


# --- what cannot be merged

REFUSED: dict[str, tuple[Any, str]] = {
    "prompt": (peft.PromptTuningConfig(num_virtual_tokens=2, **CAUSAL), "PROMPT_TUNING"),
    "prefix": (peft.PrefixTuningConfig(num_virtual_tokens=2, **CAUSAL), "PREFIX_TUNING"),
    "p-tuning": (peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=16, **CAUSAL), "P_TUNING"),
    "activated": (lora("q_proj", alora_invocation_tokens=[7, 8]), "aLoRA does not support merging"),
    "lily": (peft.LilyConfig(target_modules=["q_proj"], **CAUSAL), "LILY"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_change_of_weights_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    model, (config, named) = tiny("llama"), REFUSED[kind]
    live = adapted(model, config)
    base, adapter = saved(tmp_path, model, live)
    message = refusal(base, adapter=adapter)
    assert named in message and str(adapter) in message and "give an adapter that only changes weights" in message
    message = refusal(live)
    assert named in message and message.startswith("its adapter (") and "of model 'LlamaForCausalLM'" in message


def test_what_peft_would_merge_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    live = adapted(tiny("llama"), lora("down_proj"))
    whole = peft.tuners.lora.layer.Linear.get_delta_weight
    monkeypatch.setattr(peft.tuners.lora.layer.Linear, "get_delta_weight", lambda *a: 1.01 * whole(*a))
    message = refusal(live)
    assert message.startswith(
        "its adapter (LORA) cannot be merged into the weights of model 'LlamaForCausalLM': the logits would differ by"
    )
    monkeypatch.undo()
    live.base_model.model.model.layers[0].mlp.down_proj.lora_A["default"].weight.data[0, 0] = torch.nan
    assert "the logits would differ by inf" in refusal(live)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    base, adapter = saved(tmp_path, model, adapted(model, lora("q_proj", "down_proj")))
    shallow = copy.deepcopy(model)
    shallow.model.layers = shallow.model.layers[:2]
    shallow.config.num_hidden_layers = 2
    message = refusal(shallow, adapter=adapter)
    assert message == (
        f"adapter '{adapter}' does not fit model 'LlamaForCausalLM': it has weights that the model has no place for, "
        "such as base_model.model.model.layers.2.mlp.down_proj.lora_A.weight (4 in all); give the model that it was trained on"
    )
    deep = copy.deepcopy(model)
    deep.model.layers.append(copy.deepcopy(deep.model.layers[0]))
    deep.config.num_hidden_layers = LAYERS + 1
    message = refusal(deep, adapter=adapter)
    assert "it lacks weights for modules that it changes, such as base_model.model.model.layers.3." in message
    assert "(4 in all)" in message
    other = adapted(tiny("gpt2"), lora("c_attn", **GPT2))
    _, of_gpt2 = saved(tmp_path / "gpt2", tiny("gpt2"), other)
    message = refusal(base, adapter=of_gpt2)
    assert f"adapter '{of_gpt2}' does not fit model '{base}' (" in message and "c_attn" in message
    of_gemma = adapted(tiny("gemma2"), lora("q_proj", "down_proj", r=3))
    _, of_gemma = saved(tmp_path / "gemma", tiny("gemma2"), of_gemma)
    wider = hf.LlamaForCausalLM(hf.LlamaConfig(**{**model.config.to_dict(), "hidden_size": 64, "head_dim": 8}))
    message = refusal(wider, adapter=of_gemma)
    assert "(size mismatch for base_model.model.model.layers.0." in message and "[3, 32]" in message and "[3, 64]" in message

    classifier = adapted(model, lora("q_proj"))
    classifier.peft_config["default"].task_type = "SEQ_CLS"
    classifier.save_pretrained(str(tmp_path / "classifier"))
    assert "is for the task SEQ_CLS" in refusal(base, adapter=tmp_path / "classifier")
    assert "is an adapter; give the model that it was trained on" in refusal(adapter)


def test_damaged_adapters_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    model = tiny("llama")
    base, adapter = saved(tmp_path, model, adapted(model, lora("q_proj", modules_to_save=["lm_head"])))

    def variant(name: str) -> Path:
        return Path(shutil.copytree(adapter, tmp_path / name))

    def refused(folder: Path) -> str:
        message = refusal(base, adapter=folder)
        assert message.startswith(f"adapter '{folder}' ")
        return message

    cut = variant("cut")
    data = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(data[: len(data) // 2])
    assert "does not fit model" in refused(cut)
    (cut / "adapter_config.json").write_text("{")
    assert "adapter_config.json that cannot be read" in refused(cut)
    (cut / "adapter_config.json").write_text("[]")
    assert "adapter_config.json that cannot be read" in refused(cut)
    (cut / "adapter_config.json").write_text('{"peft_type": "ZORK"}')
    assert "adapter_config.json that cannot be read" in refused(cut)
    (cut / "adapter_config.json").unlink()
    assert "has no adapter_config.json; give the folder that PEFT's save_pretrained wrote" in refused(cut)
    shutil.copytree(adapter, cut / "named")
    assert f"has no adapter_config.json; give '{cut / 'named'}', which has one" in refused(cut)

    pickled = variant("pickled")
    (pickled / "adapter_model.safetensors").unlink()
    torch.save({}, pickled / "adapter_model.bin")
    assert "has no adapter_model.safetensors (other weight files can run code)" in refused(pickled)
    assert "is a file; give the folder" in refused(adapter / "adapter_config.json")

    newer = variant("newer")
    said = json.loads((newer / "adapter_config.json").read_text())
    (newer / "adapter_config.json").write_text(json.dumps({**said, "use_zork": None, "peft_version": "99.0"}))
    same(loaded_logits(base, adapter=newer), loaded_logits(base, adapter=adapter))
    (newer / "adapter_config.json").write_text(json.dumps({**said, "use_zork": True}))
    assert "has a setting that this version of PEFT does not know, 'use_zork'" in refused(newer)

    without_head = variant("headless")
    weights = without_head / "adapter_model.safetensors"
    save(weights, {key: tensor for key, tensor in read(weights).items() if "lm_head" not in key})
    assert "does not fit model" in refused(without_head) and "lm_head" in refused(without_head)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert "is neither a folder here nor an adapter on the Hugging Face hub or in its cache (" in refused(tmp_path / "nowhere")
    assert "is neither a folder here nor" in refusal(base, adapter="someone/adapter")


def read(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load

    return load(path.read_bytes())


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path)


# --- tokens that were added before it was trained


def words(count: int) -> Any:
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


ADDED = 3
MORE = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("how", ["saved", "targeted", "tokens"])
def test_added_tokens_come_with_the_adapter(family: str, how: str, tmp_path: Path) -> None:
    model, layer = tiny(family), "c_attn" if family == "gpt2" else "q_proj"
    table = "wte" if family == "gpt2" else "embed_tokens"
    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCABULARY + ADDED)
    heads = {"trainable_token_indices": MORE} if family == "gpt2" else {"trainable_token_indices": {table: MORE, "lm_head": MORE}}
    config = {
        "saved": lora(layer),  # PEFT saves embeddings that were resized with any adapter
        "targeted": lora(layer, table, modules_to_save=[] if family == "gpt2" else ["lm_head"]),
        "tokens": lora(layer, **heads),
    }[how]
    live = adapted(larger, config)
    model.save_pretrained(tmp_path / "base")
    words(VOCABULARY).save_pretrained(tmp_path / "base")
    live.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=how != "tokens")
    words(VOCABULARY + ADDED).save_pretrained(tmp_path / "adapter")

    tokens_bt = some_tokens()
    tokens_bt[:, 2:8:2] = torch.tensor(MORE)
    wanted_btv = logits(live, tokens_bt)
    given = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    given["base_model_name_or_path"] = str(tmp_path / "base")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(given))
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "adapter"))
    same(logits(auto, tokens_bt), wanted_btv)
    for base in (tmp_path / "base", model):
        dense: Any = load_dense(base, adapter=tmp_path / "adapter")
        with torch.no_grad():
            same(dense.run(tokens_bt).logits_btv, wanted_btv)
        assert dense.vocabulary == len(dense.tokenizer) == VOCABULARY + ADDED
        own = words(VOCABULARY + ADDED)
        assert load_dense(base, adapter=tmp_path / "adapter", tokenizer=own).tokenizer is own
    assert len(model.get_input_embeddings().weight) == VOCABULARY  # the live one is as it was

    (tmp_path / "adapter" / "tokenizer_config.json").unlink()
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    dense = load_dense(tmp_path / "base", adapter=tmp_path / "adapter")
    same(dense.run(tokens_bt).logits_btv, wanted_btv)
    assert dense.vocabulary == VOCABULARY + ADDED and len(dense.tokenizer) == VOCABULARY


def test_added_tokens_without_weights(tmp_path: Path) -> None:
    model = tiny("llama")
    base, adapter = saved(tmp_path, model, adapted(model, lora("q_proj", modules_to_save=["lm_head"])))
    words(VOCABULARY + 1).save_pretrained(adapter)  # one to pad with, say, which the model never had
    dense: Any = load_dense(base, adapter=adapter)
    same(dense.run(some_tokens()).logits_btv, loaded_logits(model, adapter=adapter))
    assert dense.vocabulary == VOCABULARY and len(dense.tokenizer) == VOCABULARY + 1

    larger = copy.deepcopy(model)
    larger.resize_token_embeddings(VOCABULARY + ADDED)

    def refused(name: str, config: Any, save_embedding_layers: bool) -> str:
        adapted(larger, config).save_pretrained(str(tmp_path / name), save_embedding_layers=save_embedding_layers)
        return refusal(base, adapter=tmp_path / name).replace(f"adapter '{tmp_path / name}'", "IT")

    part = lora("q_proj", trainable_token_indices=MORE[1:])
    remedy = "give a model into which the adapter was merged"
    assert refused("part", part, False) == f"IT has no embeddings for 1 of the 3 tokens that it adds; {remedy}"
    headless = lora("q_proj", "embed_tokens")
    assert refused("headless", headless, True) == f"IT has no output weights for 3 of the 3 tokens that it adds; {remedy}"
    message = refused("bare", headless, False)
    assert message.startswith(f"IT does not fit model '{base}' (size mismatch for base_model.model.model.embed_tokens.")
    assert f"[4, {VOCABULARY + ADDED}]" in message and f"[4, {VOCABULARY}]" in message


def test_the_base_s_tokenizer_serves_an_adapter_without_one(tmp_path: Path) -> None:
    model = tiny("llama")
    base, adapter = saved(tmp_path, model, adapted(model, lora("q_proj")))
    words(VOCABULARY - 1).save_pretrained(base)
    dense: Any = load_dense(base, adapter=adapter)
    assert len(dense.tokenizer) == VOCABULARY - 1


def test_a_linear_layer_is_no_model_with_adapters() -> None:
    assert "is not a model; give" in refusal(nn.Linear(2, 2))

"""A model is its weights, its configuration and its answers: another function is another model, and nothing else is."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from support.cli_cases import run
from support.models import tiny_gpt2, untrained
from support.tiny_families import perturbed, tiny

import bridge
from bridge.huggingface.identity import Identity
from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense
from bridge.models.store import CheckpointError

GEMMA2 = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 10.0}


def coupled(tmp_path: Path, model: Any) -> tuple[Path, Path]:
    """A model's folder and that of a coupling to it, as `bridge fit` on the folder leaves them."""
    model.save_pretrained(tmp_path / "dense")
    coupling = untrained(load_dense(tmp_path / "dense"))
    coupling.sparse.project(0.3)
    text_bt = torch.randint(3, coupling.dense.vocabulary, (4, 16), generator=torch.Generator().manual_seed(0))
    replace(coupling, reference_bt=text_bt).save_pretrained(tmp_path / "coupling")
    return tmp_path / "dense", tmp_path / "coupling"


def edit_config(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        inner, _, last = key.rpartition(".")
        (config[inner] if inner else config)[last] = value
    (folder / "config.json").write_text(json.dumps(config))


EDITS = [
    ("llama", {"rope_parameters.rope_theta": 77.0}, "rope_parameters.rope_theta is 77, was its default"),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}, "rope_parameters.factor is 4"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is relu, was its default"),
    ("llama", {"rms_norm_eps": 0.5}, "rms_norm_eps is 0.5"),
    ("llama", {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}, None),  # does not load, or is another
    ("mistral", {"sliding_window": 2}, "sliding_window is 2, was 4"),
    ("gemma2", {"final_logit_softcapping": 1.0}, "final_logit_softcapping is 1, was its default"),
    ("granite", {"residual_multiplier": 1.0}, "residual_multiplier is its default, was 0.22"),
    ("cohere", {"logit_scale": 3.0}, "logit_scale is 3"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
    ("gpt2", {"layer_norm_epsilon": 0.3, "n_head": 2}, "layer_norm_epsilon is 0.3, was its default, n_head is 2, was 4"),
]


@pytest.mark.parametrize(("family", "change", "said"), EDITS, ids=[f"{f}-{'-'.join(c)}" for f, c, _ in EDITS])
def test_a_configuration_edited_after_the_fit_is_refused_by_its_key(
    family: str, change: dict[str, Any], said: str | None, tmp_path: Path
) -> None:
    dense, coupling = coupled(tmp_path, tiny(family))
    before = load_dense(dense)
    edit_config(dense, change)
    result = run("eval", coupling, "--device", "cpu")
    assert result.exit_code == 2 and result.stderr.count("\n") == 1 and result.stdout == ""
    if said is not None:
        assert (
            f"is not the one {str(coupling)!r} was fitted to ({str(dense)!r}): its configuration differs: {said}" in result.stderr
        )
        assert "give that model with --dense" in result.stderr
        assert load_dense(dense).fingerprint() != before.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"}, {"transformers_version": "4.1"}, {"_name_or_path": "elsewhere"}, {"use_cache": False},
        {"bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7}, {"attn_pdrop": 0.5, "resid_pdrop": 0.5},
        {"architectures": ["GPT2Model"]}, {"initializer_range": 1.0}, {"activation_function": "gelu_new"}, {"n_inner": None},
    ],
)  # fmt: skip
def test_what_changes_no_logit_changes_no_model(change: dict[str, Any], tmp_path: Path) -> None:
    dense, coupling = coupled(tmp_path, tiny())
    before = load_dense(dense).fingerprint()
    edit_config(dense, change)
    assert load_dense(dense).fingerprint() == before
    assert run("eval", coupling, "--device", "cpu").exit_code == 0


def test_a_setting_that_a_later_version_adds_changes_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, coupling = coupled(tmp_path, tiny())
    monkeypatch.setattr(hf.GPT2Config, "sparkle", 0.5, raising=False)
    made = hf.GPT2Config.to_dict
    monkeypatch.setattr(hf.GPT2Config, "to_dict", lambda self: {**made(self), "sparkle": 0.5})
    assert CoupledModels.from_pretrained(coupling).dense.name == str(dense)


def test_other_weights_are_refused_as_such(tmp_path: Path) -> None:
    _, coupling = coupled(tmp_path, tiny())
    other = tiny()
    with torch.no_grad():
        other.transformer.h[1].mlp.c_fc.bias[3] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="its weights differ; give that model with dense="):
        bridge.load(coupling, dense=tmp_path / "other")
    with pytest.raises(CheckpointError, match="its weights differ"):
        bridge.load(coupling, dense=other)


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.detach().add_(1.0),
    "through .data, which leaves no trace": lambda weight: weight.data.add_(1.0),
    "rows exchanged": lambda weight: weight.data.copy_(weight.data.flip(0)),
    "through numpy": lambda weight: weight.detach().numpy().__setitem__(0, 7.0),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_fingerprint_is_of_the_weights_there_are_now(write: Callable[[torch.Tensor], Any], tmp_path: Path) -> None:
    _, folder = coupled(tmp_path, tiny("llama"))
    model = tiny("llama")
    dense = load_dense(model)
    before = dense.fingerprint()
    coupling = bridge.load(folder, dense=dense)
    assert coupling.dense.fingerprint() == dense.fingerprint() == before
    write(model.model.layers[1].mlp.up_proj.weight)
    assert dense.fingerprint() == load_dense(model).fingerprint() != before
    assert coupling.provenance["dense_fingerprint"] == dense.fingerprint()
    with pytest.raises(CheckpointError, match="its weights differ"):
        bridge.load(folder, dense=dense)


def test_precision_alone_is_no_other_model(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    dense, folder = coupled(tmp_path, model)
    assert load_dense(model).fingerprint() == load_dense(dense).fingerprint()
    assert bridge.load(folder, dense=model).dense.dtype == torch.bfloat16


def test_a_live_model_that_code_has_changed_is_refused_by_its_answers(tmp_path: Path) -> None:
    """Weights and configuration say nothing of it."""
    _, folder = coupled(tmp_path, tiny("llama"))
    model = tiny("llama")
    for layer in model.model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    dense = load_dense(model)
    assert dense.fingerprint() == load_dense(tiny("llama")).fingerprint()
    with pytest.raises(CheckpointError, match="its weights and configuration are the same, but its log-probabilities differ by"):
        bridge.load(folder, dense=dense)


def test_answers_may_be_rounded_otherwise() -> None:
    identity = load_dense(tiny()).identity()
    nearly = replace(identity, answers=tuple(answer + 0.01 * (-1) ** i for i, answer in enumerate(identity.answers)))
    assert identity.difference(nearly) is None
    half = replace(nearly, dtype="bfloat16", answers=tuple(answer + 0.15 for answer in identity.answers))
    assert identity.difference(half) is None and identity.difference(replace(half, dtype="float32")) is not None
    assert Identity.read(json.loads(json.dumps(identity.to_json()))) == identity


def test_a_coupling_without_its_models_identity_is_refused(tmp_path: Path) -> None:
    _, folder = coupled(tmp_path, tiny())
    facts = json.loads((folder / "coupling.json").read_text())
    for key in ("fingerprint", "weights", "configuration", "answers", "dtype"):
        broken = {**facts, "dense": {name: value for name, value in facts["dense"].items() if name != key}}
        (folder / "coupling.json").write_text(json.dumps(broken))
        with pytest.raises(CheckpointError, match="is no coupling that this version reads"):
            bridge.load(folder)
    facts["dense"]["configuration"]["n_head"] = 2  # an edit that the fingerprint beside it does not know
    (folder / "coupling.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="the fingerprint of its dense model does not match the stored weights"):
        bridge.load(folder)


# --- where the model of a coupling is


def saved(coupling: CoupledModels, folder: Path) -> dict[str, Any]:
    coupling.save_pretrained(folder)
    return json.loads((folder / "coupling.json").read_text())["dense"]


def test_a_coupling_to_a_live_model_names_where_the_same_model_is(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "dense")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    text_bt = torch.randint(2, 40, (4, 16))
    coupling = replace(untrained(load_dense(model)), reference_bt=text_bt)
    known = saved(coupling, tmp_path / "coupling")
    assert (known["name"], known["beside"]) == (str(tmp_path / "dense"), "../dense")
    assert run("eval", tmp_path / "coupling", "--device", "cpu").exit_code == 0
    (tmp_path / "dense").rename(tmp_path / "moved")
    result = run("eval", tmp_path / "coupling", "--device", "cpu")
    assert result.exit_code == 2 and "or give its path with --dense" in result.stderr and result.stderr.count("\n") == 1
    assert run("eval", tmp_path / "coupling", "--dense", tmp_path / "moved", "--device", "cpu").exit_code == 0


@pytest.mark.parametrize("changed", ["weights", "configuration", "code", "made here"])
def test_a_live_model_that_is_nowhere_is_not_said_to_be_somewhere(changed: str, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "dense")
    model: Any = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    if changed == "weights":
        model.lm_head.weight.data[3] += 1
    elif changed == "configuration":
        model = type(model).from_pretrained(tmp_path / "dense", rms_norm_eps=0.5)
    elif changed == "code":
        model.model.layers[0].mlp.act_fn = torch.nn.ReLU()
    else:
        model = perturbed(hf.LlamaForCausalLM(copy.deepcopy(model.config)))
    known = saved(untrained(load_dense(model)), tmp_path / "coupling")
    assert (known["name"], known["beside"]) == ("LlamaForCausalLM", None)
    with pytest.raises(CheckpointError, match="dense model of .* not found: .*; or give its path with dense="):
        bridge.load(tmp_path / "coupling")
    assert bridge.load(tmp_path / "coupling", dense=model).dense.name == "LlamaForCausalLM"
    model.save_pretrained(tmp_path / "kept")
    if changed != "code":
        assert bridge.load(tmp_path / "coupling", dense=tmp_path / "kept").dense.name == str(tmp_path / "kept")
    else:
        with pytest.raises(CheckpointError, match="log-probabilities differ by"):
            bridge.load(tmp_path / "coupling", dense=tmp_path / "kept")


def test_every_command_that_opens_a_coupling_takes_its_model(coupling_folder: Path, tmp_path: Path) -> None:
    folder, moved = tmp_path / "coupling", tmp_path / "moved"
    model: Any = tiny_gpt2()
    model.save_pretrained(moved)
    from support.models import tiny_tokenizer

    tiny_tokenizer().save_pretrained(moved)
    live = bridge.load(coupling_folder, dense=load_dense(model, tokenizer=tiny_tokenizer()))
    live.save_pretrained(folder)
    prompt = ("--prompt", "w5 w9 w12 w5", "--bridge", folder)
    for command in (
        ("eval", folder),
        ("explain", *prompt, "--json", tmp_path / "why.json"),
        ("steer", *prompt, "--node", "0.mlp_act[3]", "--tokens", "0", "--draws", "2"),
        ("nodes", "--bridge", folder, "--rows", "2", "--out", tmp_path / "nodes"),
        ("tasks", "var_if", "--bridge", folder),
        ("view", tmp_path / "why.json", "--html", tmp_path / "why.html", "--bridge", folder),
    ):
        refused = run(*command, "--device", "cpu")
        assert refused.exit_code == 2 and "or give its path with --dense" in refused.stderr, command
        found = run(*command, "--dense", moved, "--device", "cpu")
        assert "dense" not in found.stderr, (command, found.stderr)
        assert found.exit_code == 0 or command[0] == "steer", (command, found.stderr)

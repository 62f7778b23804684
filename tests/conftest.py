"""Tiny models that every test file may use: random, made here, on one core, with no download."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridge.bridges import Coupling, new_coupling
from bridge.dense import DenseModel, load_dense
from bridge.recipe import resolve
from bridge.sparse import SparseTransformer
from bridge.tasks.pairs import Example
from bridge.tasks.tokens import TokenPairs
from bridge.training import resolve_for

VOCABULARY = 40
CONTEXT = 16


@pytest.fixture(autouse=True, scope="session")
def _one_core() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _denormals() -> None:
    """Training flushes them, for the whole process; other libraries count on them."""
    torch.set_flush_denormal(False)


def tiny_gpt2(seed: int = 0, layers: int = 2, width: int = 16) -> GPT2LMHeadModel:
    """A random GPT-2 whose parameters are all far from their initial zeros and ones."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=width, n_layer=layers, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word w1 ... w38, an end-of-text token, and an unknown one."""
    words = {"<end>": 0, "<unk>": 1, **{f"w{index}": index for index in range(2, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="session")
def dense() -> DenseModel:
    """A tiny random GPT-2 as a dense model."""
    return load_dense(tiny_gpt2(), tokenizer=tiny_tokenizer())


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model and tokenizer as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny_gpt2().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of 200 short documents with some order in it."""
    generator = torch.Generator().manual_seed(0)
    file = tmp_path_factory.mktemp("text") / "corpus.jsonl"
    lines = []
    for _ in range(200):
        start, stride = torch.randint(2, VOCABULARY, (2,), generator=generator).tolist()
        words = " ".join(f"w{2 + (start + stride * index) % (VOCABULARY - 2)}" for index in range(40))
        lines.append(f'{{"text": "{words}"}}\n')
    file.write_text("".join(lines))
    return file


def untrained(dense: DenseModel, **parts: dict) -> Coupling:
    """An untrained coupling of width 32 to a dense model, every parameter moved off its initial zero."""
    shape = {"width": 32, "head_channels": 16, "positions": "learned", "keep": 0.25}
    values = {"dense": "tiny", "sparse": shape, "sparsity": {"l0": 0.25}, "data": {"rows": 4}}
    recipe = resolve_for(dense, resolve({**values, **parts}))
    coupling = new_coupling(dense, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (coupling.sparse, coupling.bridges):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return coupling


@pytest.fixture
def coupling(dense: DenseModel) -> Coupling:
    """An untrained coupling to the tiny dense model."""
    return untrained(dense)


@pytest.fixture(scope="session")
def coupling_folder(dense_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained coupling to the tiny dense model's folder, with reference text, saved as `tiny`."""
    folder = tmp_path_factory.mktemp("couplings") / "tiny"
    coupling = untrained(load_dense(str(dense_folder)))
    coupling.sparse.project(0.3)
    reference_bt = torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
    replace(coupling, reference_bt=reference_bt).save_pretrained(folder)
    return folder


def planted_pairs(count: int = 8, lengths: tuple[int, ...] = (6,), seed: int = 0) -> TokenPairs:
    """Pairs whose prompts differ in their last token, 2 or 3, and are answered by 4 or 5."""
    generator = torch.Generator().manual_seed(seed)
    last_b = torch.tensor([lengths[row % len(lengths)] - 1 for row in range(count)])
    prompt_bt = torch.randint(6, VOCABULARY, (count, max(lengths)), generator=generator)
    prompt_bt[torch.arange(max(lengths)) > last_b[:, None]] = 0
    row_b = torch.arange(count)
    counterfactual_bt = prompt_bt.clone()
    prompt_bt[row_b, last_b], counterfactual_bt[row_b, last_b] = 2, 3
    no_b = torch.zeros(count, dtype=torch.bool)
    answer_bk, wrong_bk = torch.full((count, 1), 4), torch.full((count, 1), 5)
    example = Example("a", "b", ("c",), ("d",))
    return TokenPairs(prompt_bt, counterfactual_bt, last_b, answer_bk, wrong_bk, no_b, no_b, (example,) * count, ((),) * count)


def planted_sparse(dense: DenseModel, *, decoys: int = 0) -> SparseTransformer:
    """A sparse model that answers `planted_pairs`, and of which it is known how.

    The last token's embedding is channel 0 (of token 2) or 1 (token 3); the first MLP reads each into a neuron of its own
    (0 and 1), which write channels 2 and 3, and these are unembedded as tokens 4 and 5. Nothing else depends on the prompt but
    noise in other channels, which nothing that is unembedded reads.
    """
    sparse = untrained(dense).sparse.requires_grad_(False)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.zero_()
        sparse.embedding[:, 8:] = torch.randn(VOCABULARY, sparse.width - 8, generator=generator) * 0.3
        sparse.embedding[2, 0] = sparse.embedding[3, 1] = 3
        block = sparse.blocks[0]
        for name, rows, columns, value in (("up", (0, 1), (0, 1), 2.0), ("down", (2, 3), (0, 1), 2.0)):
            weight = block.get_parameter(f"{name}.weight")
            for row, column in zip(rows, columns, strict=True):
                weight[row, column] = value
        # decoys: neurons that are on, and write where nothing reads
        up, down = block.get_parameter("up.weight"), block.get_parameter("down.weight")
        for decoy in range(decoys):
            up[8 + decoy, 8 + decoy] = 2.0
            down[8 + decoy, 8 + decoy] = 0.2
        sparse.unembedding.weight[4, 2] = sparse.unembedding.weight[5, 3] = 3
        sparse.unembedding.weight[4, 3] = sparse.unembedding.weight[5, 2] = -3
    return sparse

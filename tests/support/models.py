"""What tests share: models."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridge.data.task_pairs import Example
from bridge.data.task_tokens import TokenPairs
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.dense import DenseModel, load_dense
from bridge.models.sparse import SparseTransformer
from bridge.recipe import resolve
from bridge.training.prepare import complete_recipe

VOCABULARY = 40


CONTEXT = 16


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


def untrained(dense: DenseModel, **parts: dict) -> CoupledModels:
    """An untrained coupling of width 32 to a dense model, every parameter moved off its initial zero."""
    shape = {"width": 32, "head_channels": 16, "positions": "learned", "keep": 0.25}
    values = {"dense": "tiny", "sparse": shape, "sparsity": {"l0": 0.25}, "data": {"rows": 4}}
    recipe = complete_recipe(dense, resolve({**values, **parts}))
    coupling = new_coupling(dense, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in (coupling.sparse, coupling.bridges):
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return coupling


@pytest.fixture
def coupling(dense: DenseModel) -> CoupledModels:
    """An untrained coupling to the tiny dense model."""
    return untrained(dense)


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
    return TokenPairs(prompt_bt, counterfactual_bt, last_b, answer_bk, wrong_bk, no_b, no_b, (example,) * count)


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

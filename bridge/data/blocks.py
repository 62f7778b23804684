"""Corpora -> token blocks: pieces are tokenized, packed and cut into rows of one context each.

    corpora                    pieces of text, of tokens and of chat, in an order fixed by the seed
      -> tokenize              one document after another, an end-of-text token between two
      -> cut                   blocks of `context` tokens, each starting with what the tokenizer puts before a text
      -> split                 every 50th document is held out, for `bridge eval`

A batch is a pure function of (seed, step): epoch after epoch, a seeded permutation of the blocks is read off. So "the data
position" of a run is its step number, and a resumed run sees what an uninterrupted one would have seen.

Shape legend: n blocks, t token, b batch row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridge.data.corpora import Corpus, open_corpus
from bridge.data.packing import Packing, Part, tokenized
from bridge.data.records import DataError, Piece
from bridge.display.progress import OnProgress, Phase
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_EVERY = 50
MAX_TOKENS = 50_000_000  # what is read when a budget in tokens does not say; 200 MB as int32
MAX_SAMPLED_TOKENS = 2_000_000  # the same for text that has to be sampled first
REPORTS = 200  # of progress, in all, while text is read
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """A tokenized corpus: rows to train on and rows never trained on."""

    train_nt: Tensor
    heldout_nt: Tensor
    description: str

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """The `rows` blocks of a step, tokens_bt int64, as a function of (step, rows, seed) alone."""
        n, places = len(self.train_nt), range(step * rows, (step + 1) * rows)
        return self.train_nt[[int(permutation(n, seed, place // n)[place % n]) for place in places]].long()

    def tensors(self) -> dict[str, Tensor]:
        """None: where a run is follows from its step."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Nothing, as there is nothing to restore."""

    def heldout(self, rows: int) -> Tensor:
        """The first `rows` held-out blocks, tokens_bt int64 (all of them where there are fewer)."""
        return self.heldout_nt[:rows].long()


@lru_cache(maxsize=2)  # a step may take the end of one epoch and the beginning of the next
def permutation(n_blocks: int, seed: int, index: int) -> Tensor:
    """An order of blocks that follows from a seed and an index, an epoch's or a step's."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)
    return torch.randperm(n_blocks, generator=generator)


def load_blocks(
    source: str,
    prompts: Prompts | PreTrainedTokenizerBase | None,
    context: int,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    dense: PreTrainedModel | None = None,
    progress: OnProgress | None = None,
) -> Blocks:
    """Read `source` (see `corpora`) until there are `max_tokens` tokens, and cut them into blocks of `context`.

    `prompts` is the dense model's, or a tokenizer. `dense` is what `self` samples from, and what token ids are checked against;
    progress is told how far this is, which takes long for large corpora and longer for sampled ones. Raises PromptError where
    text cannot be read, and DataError where the source does not exist or has no text, where an id is none of the dense model's,
    and where there is too little for a training and a held-out block.
    """
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    packing = Packing.of(source, prompts, context, vocabulary, padded=source != "self")  # a sample is a block, whatever it has
    limit = max(2 * context, max_tokens or (MAX_SAMPLED_TOKENS if source == "self" else MAX_TOKENS))
    if source == "self":
        if dense is None:
            raise DataError("data 'self'", "samples from the dense model, and none was given", "pass the model or name a corpus")
        corpus = Corpus([partial(_sampled, dense, prompts, context, seed)])
    else:
        corpus = open_corpus(source, seed)
    packing, pieces = packing.suited(corpus.pieces)
    parts = (Part(), Part())
    count = index = reported = 0
    for run in tokenized(pieces, prompts):
        put = packing.put(run, parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1])
        if not put:
            continue
        index += run.ends
        count += put
        if progress is not None and count - reported > limit // REPORTS:
            reported = count
            progress(Phase(f"data: {source}, {count:,} tokens {'sampled' if source == 'self' else 'read'}, {limit:,} at most"))
        if count >= limit:
            break
    blocks = [packing.cut(part) for part in _with_held_out(*parts, packing)]
    if not all(map(len, blocks)):
        rule = f"at least {2 * context} are needed (one block of {context} to train on, one held out)"
        raise DataError(f"data {source!r} holds {count} tokens;", rule, "give more text or a shorter context (data.context)")
    for block_nt in blocks:
        packing.check(block_nt)
    train_nt, heldout_nt = blocks
    description = f"{source}: {train_nt.numel():,} tokens to train on, {heldout_nt.numel():,} held out, blocks of {context}"
    return Blocks(train_nt, heldout_nt, f"{description}; left out: {corpus.left_out}" if corpus.left_out else description)


def _with_held_out(train: Part, heldout: Part, packing: Packing) -> tuple[Part, Part]:
    """Both parts; where one has no block (few documents), the tail of everything is held out instead."""
    context, body = packing.context, packing.body
    if all(len(part.rows) >= context or len(part.stream) >= body for part in (train, heldout)):
        return train, heldout
    rows, stream = train.rows + heldout.rows, train.stream + heldout.stream
    n_rows = len(rows) // context
    if n_rows > 1 or (n_rows and len(stream) >= body):
        cut = (n_rows - max(1, n_rows // HELD_OUT_EVERY)) * context
        return Part(rows[:cut], stream), Part(rows[cut:])
    cut = max(0, len(stream) - max(body, len(stream) // HELD_OUT_EVERY))
    return Part(rows, stream[:cut]), Part(stream=stream[cut:])


@torch.no_grad()
def _sampled(dense: PreTrainedModel, prompts: Prompts, context: int, seed: int) -> Iterator[Piece]:
    """Sequences of `context` tokens sampled from the dense model at temperature 1, what stands before a text first; endless.

    Sampled here and not by `generate`, which would follow the penalties, bans and end token of the model's generation settings.
    """
    configuration = dense.config.get_text_config()
    candidates = [getattr(prompts.tokenizer, "bos_token_id", None)]
    candidates += [getattr(configuration, name, None) for name in ("bos_token_id", "eos_token_id")]
    start = prompts.prefix or (next((c for c in candidates if isinstance(c, int) and 0 <= c < configuration.vocab_size), 0),)
    generator = torch.Generator(dense.device).manual_seed(seed)
    while True:
        column_bt = torch.tensor(start, device=dense.device).expand(SAMPLED_ROWS, -1)
        columns, past = [column_bt], None
        for _ in range(context - len(start)):
            output = dense(column_bt, past_key_values=past, use_cache=True)
            past = output.past_key_values
            column_bt = torch.multinomial(output.logits[:, -1].float().softmax(-1), 1, generator=generator)
            columns.append(column_bt)
        yield from (("tokens", row) for row in torch.cat(columns, dim=1).tolist())

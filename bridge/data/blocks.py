"""Corpora -> token blocks: pieces are tokenized, packed and cut into rows of one context each.

    corpora                    pieces of text, token ids and chats, in an order fixed by the seed
      -> tokenize              documents one after another, with an end-of-text token between them
      -> cut                   blocks of `context` tokens, each starting with the tokens that the tokenizer puts before a text
      -> split                 every 50th document is held out, for `bridge eval`

A batch is a function of (seed, step) alone: each epoch reads all blocks in a new seeded permutation. The data position of a run
is therefore its step number, and a resumed run sees the batches that an uninterrupted run would have seen.

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
from bridge.data.packing import Packing, RowBuffer, tokenize_pieces
from bridge.data.records import DataError, Piece
from bridge.display.progress import OnProgress, Phase
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_EVERY = 50
MAX_TOKENS = 50_000_000  # read if no budget in tokens is given; 200 MB as int32
MAX_SAMPLED_TOKENS = 2_000_000  # the same for text that has to be sampled from the dense model
REPORTS = 200  # maximum number of progress reports while text is read
SAMPLED_ROWS = 64


@dataclass(frozen=True)
class Blocks:
    """A tokenized corpus: training rows, and held-out rows that are never trained on."""

    train_nt: Tensor
    heldout_nt: Tensor
    description: str

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """Return the `rows` blocks of a step as tokens_bt, int64; they depend on (step, rows, seed) alone."""
        n, places = len(self.train_nt), range(step * rows, (step + 1) * rows)
        return self.train_nt[[int(permutation(n, seed, place // n)[place % n]) for place in places]].long()

    def tensors(self) -> dict[str, Tensor]:
        """Return no tensors, because the data position of a run follows from its step."""
        return {}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Do nothing, because there is nothing to restore."""

    def heldout(self, rows: int) -> Tensor:
        """Return the first `rows` held-out blocks as tokens_bt, int64; all of them if there are fewer."""
        return self.heldout_nt[:rows].long()


@lru_cache(maxsize=2)  # a step may read the end of one epoch and the beginning of the next
def permutation(n_blocks: int, seed: int, index: int) -> Tensor:
    """Return an order of the blocks that depends only on the seed and on an index (of an epoch or of a step)."""
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

    `prompts` is the dense model's Prompts, or a tokenizer. The source `self` is sampled from `dense`, whose vocabulary bounds all
    token ids. `progress` gets reports, because large corpora take long and sampled ones longer. Raises PromptError if the
    tokenizer cannot be used, and DataError if the source does not exist or has no text, if an id is outside the vocabulary, or if
    there is too little text for one training block and one held-out block.
    """
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    packing = Packing.of(source, prompts, context, vocabulary, padded=source != "self")  # a sample has no padding
    limit = max(2 * context, max_tokens or (MAX_SAMPLED_TOKENS if source == "self" else MAX_TOKENS))
    if source == "self":
        if dense is None:
            raise DataError("data 'self'", "samples from the dense model, and none was given", "pass the model or name a corpus")
        corpus = Corpus([partial(_sample_rows, dense, prompts, context, seed)])
    else:
        corpus = open_corpus(source, seed)
    packing, pieces = packing.detect_packed(corpus.pieces)
    parts = (RowBuffer(), RowBuffer())
    count = index = reported = 0
    for run in tokenize_pieces(pieces, prompts):
        put = packing.add_run(run, parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1])
        if not put:
            continue
        index += run.ends
        count += put
        if progress is not None and count - reported > limit // REPORTS:
            reported = count
            progress(Phase(f"data: {source}, {count:,} tokens {'sampled' if source == 'self' else 'read'}, {limit:,} at most"))
        if count >= limit:
            break
    blocks = [packing.take_blocks(part) for part in _ensure_held_out(*parts, packing)]
    if not all(map(len, blocks)):
        rule = f"at least {2 * context} are needed (one block of {context} to train on, one held out)"
        raise DataError(f"data {source!r} holds {count} tokens;", rule, "give more text or a shorter context (data.context)")
    for block_nt in blocks:
        packing.check(block_nt)
    train_nt, heldout_nt = blocks
    description = f"{source}: {train_nt.numel():,} tokens to train on, {heldout_nt.numel():,} held out, blocks of {context}"
    return Blocks(train_nt, heldout_nt, f"{description}; left out: {corpus.left_out}" if corpus.left_out else description)


def _ensure_held_out(train: RowBuffer, heldout: RowBuffer, packing: Packing) -> tuple[RowBuffer, RowBuffer]:
    """Return (train, heldout); if one of them has no full block (few documents), hold out the tail of all tokens instead."""
    context, body = packing.context, packing.body_length
    if all(len(part.rows) >= context or len(part.stream) >= body for part in (train, heldout)):
        return train, heldout
    rows, stream = train.rows + heldout.rows, train.stream + heldout.stream
    n_rows = len(rows) // context
    if n_rows > 1 or (n_rows and len(stream) >= body):
        cut = (n_rows - max(1, n_rows // HELD_OUT_EVERY)) * context
        return RowBuffer(rows[:cut], stream), RowBuffer(rows[cut:])
    cut = max(0, len(stream) - max(body, len(stream) // HELD_OUT_EVERY))
    return RowBuffer(rows, stream[:cut]), RowBuffer(stream=stream[cut:])


@torch.no_grad()
def _sample_rows(dense: PreTrainedModel, prompts: Prompts, context: int, seed: int) -> Iterator[Piece]:
    """Yield, without end, rows of `context` tokens: a text's prefix (BOS or EOS if there is none), then samples at temperature 1.

    `generate` is not used, because it would apply the penalties, bans and end token of the dense model's generation settings.
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

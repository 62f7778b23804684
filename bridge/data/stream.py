"""A corpus that is read during a fit, for text that is too large to be tokenized beforehand or kept in memory.

    held out       one document in 50, chosen by a digest of its content: it is never trained on, in whatever order text is read
    read           part after part (a part is mostly a file), in a new order every epoch; some documents at a time
    pool           the rows cut from documents, about POOL_TOKENS tokens; a batch is drawn from the pool, which is then refilled

A batch is a function of (step, rows, seed) alone, as in `Blocks`: reading from the beginning always gives the same batches. The
place (epoch, part, piece, the tokens not yet cut, the pool) only saves time: successive batches read on from it, and a run
resumed from a saved place rereads at most the beginning of one part. Every process reads all the text, and takes its own rows of
each batch.

Shape legend: n blocks, t token, b batch row.
"""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridge.data.blocks import HELD_OUT_EVERY, permutation
from bridge.data.corpora import Corpus, open_corpus
from bridge.data.packing import PART_CHARACTERS, TEXTS, Packing, RowBuffer, tokenize_pieces
from bridge.data.records import DataError, Piece
from bridge.display.progress import OnProgress, Phase
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POOL_TOKENS = 1 << 20  # in the pool of rows, which a saved run stores
HELD_OUT_TOKENS = 1 << 18  # of held-out documents to collect when a stream is opened


def open_stream(
    source: str,
    prompts: Prompts | PreTrainedTokenizerBase | None,
    context: int,
    *,
    seed: int = 0,
    dense: PreTrainedModel | None = None,
    progress: OnProgress | None = None,
) -> Stream:
    """Open `source` (see `corpora`) to be read while it is used, and read ahead to collect its held-out blocks.

    The arguments are those of `load_blocks`. Raises PromptError if the tokenizer cannot be used, and DataError if the source does
    not exist, cannot be streamed, or has no full block of held-out text.
    """
    if source == "self":
        raise DataError("data 'self'", "is sampled before a fit begins", "leave data.stream off, or name a corpus")
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    corpus = open_corpus(source, seed)
    packing, _ = Packing.of(source, prompts, context, vocabulary).detect_packed(corpus.pieces)
    if progress is not None:
        progress(Phase(f"data: {source}, looking for documents to hold out"))
    part, pieces, looked_at = RowBuffer(), corpus.pieces, 0
    while len(part.rows) + len(part.stream) < HELD_OUT_TOKENS and (some := list(islice(pieces, TEXTS))):
        looked_at += len(some)
        for run in tokenize_pieces([piece for piece in some if is_held_out(piece)], prompts):
            packing.add_run(run, part)
    heldout_nt = packing.take_blocks(part)
    if not len(heldout_nt):
        rule = f"has no block of {context} tokens in its held-out documents (one in {HELD_OUT_EVERY} is held out)"
        raise DataError(f"data {source!r} of {looked_at} documents", rule, "give more documents, or leave data.stream off")
    packing.check(heldout_nt)
    return Stream(corpus, prompts, packing, heldout_nt)


def is_held_out(piece: Piece) -> bool:
    """Return whether a document is held out; this depends on its content alone, not on its place in a corpus."""
    kind, value = piece
    text = value if kind == "text" else json.dumps(value if kind == "tokens" else value[0], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % HELD_OUT_EVERY == 0


@dataclass
class _ReadPosition:
    """The point up to which a corpus was read for the batches before a step."""

    rows: int
    seed: int
    step: int
    pool_nt: Tensor
    epoch: int = 0
    part: int = 0  # index into the order of parts in this epoch
    piece: int = 0
    uncut: RowBuffer = field(default_factory=RowBuffer)
    reading: Iterator[Piece] | None = None
    last_bt: Tensor | None = None  # of step - 1: initialisation asks for the first batch repeatedly


class Stream:
    """A corpus as training rows, read when they are taken, and held-out rows that are never trained on."""

    def __init__(self, corpus: Corpus, prompts: Prompts, packing: Packing, heldout_nt: Tensor) -> None:
        self.corpus, self.prompts, self.packing, self.heldout_nt = corpus, prompts, packing, heldout_nt
        count = len(corpus.parts)
        left = f"; left out: {corpus.left_out}" if corpus.left_out else ""
        self.description = (
            f"{packing.source}: streamed from {count:,} part{'s' if count > 1 else ''}, {heldout_nt.numel():,} tokens held out, "
            f"blocks of {packing.context}{left}"
        )
        self._place: _ReadPosition | None = None

    def heldout(self, rows: int) -> Tensor:
        """Return the first `rows` held-out blocks as tokens_bt, int64; all of them if there are fewer."""
        return self.heldout_nt[:rows].long()

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """Return the `rows` blocks of a step as tokens_bt, int64; they depend on (step, rows, seed) alone."""
        at = self._place
        if at is not None and at.last_bt is not None and (at.rows, at.seed, at.step) == (rows, seed, step + 1):
            return at.last_bt.long()
        if at is None or (at.rows, at.seed) != (rows, seed) or at.step > step:
            self._place = at = _ReadPosition(rows, seed, 0, self.heldout_nt[:0])
        while at.step < step:
            self._draw_batch(at)
        return self._draw_batch(at)

    def tensors(self) -> dict[str, Tensor]:
        """Return the place after the last batch, as named tensors; {} if no batch was taken."""
        if (at := self._place) is None:
            return {}
        numbers = [len(self.corpus.parts), at.rows, at.seed, at.step, at.epoch, at.part, at.piece]
        uncut_t = torch.tensor(at.uncut.stream, dtype=torch.int32)
        return {"data.place": torch.tensor(numbers), "data.uncut": uncut_t, "data.pool": at.pool_nt}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the place that `tensors` returned. Raises DataError if the corpus has another number of parts now."""
        if "data.place" not in tensors:
            return
        count, rows, seed, step, epoch, part, piece = tensors["data.place"].tolist()
        if count != len(self.corpus.parts):
            rule = f"has {len(self.corpus.parts)} parts, but had {count} when the run was saved"
            raise DataError(f"data {self.packing.source!r}", rule, "restore the data, or fit again")
        uncut = RowBuffer(stream=array("i", tensors["data.uncut"].tolist()))
        self._place = _ReadPosition(rows, seed, step, tensors["data.pool"], epoch, part, piece, uncut)

    def _draw_batch(self, at: _ReadPosition) -> Tensor:
        """Take the next batch out of the pool, and return it."""
        self._fill_pool(at)
        order_n = permutation(len(at.pool_nt), at.seed, at.step)
        at.last_bt, at.pool_nt = at.pool_nt[order_n[: at.rows]], at.pool_nt[order_n[at.rows :].sort().values]
        at.step += 1
        return at.last_bt.long()

    def _fill_pool(self, at: _ReadPosition) -> None:
        """Read on until the pool is full; a new epoch begins only when less than one batch is left in the pool."""
        blocks, barren = [at.pool_nt], False
        n_blocks, enough = len(at.pool_nt), max(at.rows, POOL_TOKENS // self.packing.context)
        while n_blocks < enough:
            if pieces := self._read(at):
                for run in tokenize_pieces([piece for piece in pieces if not is_held_out(piece)], self.prompts):
                    self.packing.add_run(run, at.uncut)
                if len(block_nt := self.packing.take_blocks(at.uncut)):
                    self.packing.check(block_nt)
                    blocks.append(block_nt)
                    n_blocks, barren = n_blocks + len(block_nt), False
            elif n_blocks >= at.rows:
                break
            elif barren:
                rule = f"has no block of {self.packing.context} tokens to train on"
                raise DataError(f"data {self.packing.source!r}", rule, "give more text or a shorter context (data.context)")
            else:
                at.epoch, at.part, at.piece, barren = at.epoch + 1, 0, 0, True
        at.pool_nt = torch.cat(blocks)

    def _read(self, at: _ReadPosition) -> list[Piece]:
        """Return the next documents, as many as are tokenized at a time; [] at the end of an epoch."""
        order = _order(len(self.corpus.parts), at.seed, at.epoch)
        pieces: list[Piece] = []
        size = 0
        while at.part < len(order) and len(pieces) < TEXTS and size < PART_CHARACTERS:
            if at.reading is None:
                at.reading = islice(self.corpus.parts[order[at.part]](), at.piece, None)
            if (piece := next(at.reading, None)) is None:
                at.part, at.piece, at.reading = at.part + 1, 0, None
            else:
                at.piece += 1
                pieces.append(piece)
                size += len(piece[1])
        return pieces


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> list[int]:
    order = list(range(count))
    random.Random(seed * 1_000_003 + epoch).shuffle(order)
    return order

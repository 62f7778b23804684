"""A corpus that is read while a fit goes on, for text that is too much to be tokenized beforehand, or held in memory.

    held out       documents by a digest of theirs, one in 50: whatever is read, in whatever order, none of them is trained on
    read           part after part (files, mostly), in an order of its own every epoch; some documents at a time
    pool           the rows cut from them, about POOL_TOKENS tokens; every batch is drawn from it, and it is filled up again

A batch is a pure function of (step, rows, seed), as it is of `Blocks`: read from the beginning it is always the same one. The
place (epoch, part, piece, the tokens not yet cut, the pool) only spares that: batches that follow one another read on, and a run
that is resumed from a saved place reads again no more than the beginning of one part. Every process reads all the text, and takes
its rows of each batch.

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
from bridge.data.packing import PART_CHARACTERS, TEXTS, Packing, Part, tokenized
from bridge.data.records import DataError, Piece
from bridge.display.progress import OnProgress, Phase
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POOL_TOKENS = 1 << 20  # of rows among which a batch is drawn; also what a saved run keeps of its text
HELD_OUT_TOKENS = 1 << 18  # of documents held out that are looked for


def open_stream(
    source: str,
    prompts: Prompts | PreTrainedTokenizerBase | None,
    context: int,
    *,
    seed: int = 0,
    dense: PreTrainedModel | None = None,
    progress: OnProgress | None = None,
) -> Stream:
    """Open `source` (see `corpora`) to be read while it is used, and read ahead for what is held out of it.

    Arguments as of `load_blocks`. Raises PromptError where text cannot be read, and DataError where the source does not exist or
    is none that can be streamed, and where none of its documents is held out.
    """
    if source == "self":
        raise DataError("data 'self'", "is sampled before a fit begins", "leave data.stream off, or name a corpus")
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    corpus = open_corpus(source, seed)
    packing, _ = Packing.of(source, prompts, context, vocabulary).suited(corpus.pieces)
    if progress is not None:
        progress(Phase(f"data: {source}, looking for documents to hold out"))
    part, pieces, looked_at = Part(), corpus.pieces, 0
    while len(part.rows) + len(part.stream) < HELD_OUT_TOKENS and (some := list(islice(pieces, TEXTS))):
        looked_at += len(some)
        for run in tokenized([piece for piece in some if is_held_out(piece)], prompts):
            packing.put(run, part)
    heldout_nt = packing.cut(part)
    if not len(heldout_nt):
        rule = f"has no block of {context} tokens in those of them that are held out, one in {HELD_OUT_EVERY}"
        raise DataError(f"data {source!r} of {looked_at} documents", rule, "give more documents, or leave data.stream off")
    packing.check(heldout_nt)
    return Stream(corpus, prompts, packing, heldout_nt)


def is_held_out(piece: Piece) -> bool:
    """Whether a document is held out: of the document alone, not of its place in a corpus."""
    kind, value = piece
    text = value if kind == "text" else json.dumps(value if kind == "tokens" else value[0], sort_keys=True, default=str)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % HELD_OUT_EVERY == 0


@dataclass
class _Place:
    """How far a corpus was read for the batches before a step."""

    rows: int
    seed: int
    step: int
    pool_nt: Tensor
    epoch: int = 0
    part: int = 0  # in the order of the epoch
    piece: int = 0
    uncut: Part = field(default_factory=Part)
    reading: Iterator[Piece] | None = None
    last_bt: Tensor | None = None  # the batch before the step: a start asks for the first one again and again


class Stream:
    """A corpus as rows to train on, read as they are taken, and rows never trained on."""

    def __init__(self, corpus: Corpus, prompts: Prompts, packing: Packing, heldout_nt: Tensor) -> None:
        self.corpus, self.prompts, self.packing, self.heldout_nt = corpus, prompts, packing, heldout_nt
        count = len(corpus.parts)
        left = f"; left out: {corpus.left_out}" if corpus.left_out else ""
        self.description = (
            f"{packing.source}: streamed from {count:,} part{'s' if count > 1 else ''}, {heldout_nt.numel():,} tokens held out, "
            f"blocks of {packing.context}{left}"
        )
        self._place: _Place | None = None

    def heldout(self, rows: int) -> Tensor:
        """The first `rows` held-out blocks, tokens_bt int64 (all of them where there are fewer)."""
        return self.heldout_nt[:rows].long()

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """The `rows` blocks of a step, tokens_bt int64, as a function of (step, rows, seed) alone."""
        at = self._place
        if at is not None and at.last_bt is not None and (at.rows, at.seed, at.step) == (rows, seed, step + 1):
            return at.last_bt.long()
        if at is None or (at.rows, at.seed) != (rows, seed) or at.step > step:
            self._place = at = _Place(rows, seed, 0, self.heldout_nt[:0])
        while at.step < step:
            self._draw(at)
        return self._draw(at)

    def tensors(self) -> dict[str, Tensor]:
        """The place after the last batch, by name; empty where none was taken."""
        if (at := self._place) is None:
            return {}
        numbers = [len(self.corpus.parts), at.rows, at.seed, at.step, at.epoch, at.part, at.piece]
        uncut_t = torch.tensor(at.uncut.stream, dtype=torch.int32)
        return {"data.place": torch.tensor(numbers), "data.uncut": uncut_t, "data.pool": at.pool_nt}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the place that `tensors` returned. Raises DataError where the corpus has other parts by now."""
        if "data.place" not in tensors:
            return
        count, rows, seed, step, epoch, part, piece = tensors["data.place"].tolist()
        if count != len(self.corpus.parts):
            what = f"data {self.packing.source!r} has {len(self.corpus.parts)} parts,"
            raise DataError(what, f"and had {count} when the run was saved", "give it back as it was, or fit again")
        uncut = Part(stream=array("i", tensors["data.uncut"].tolist()))
        self._place = _Place(rows, seed, step, tensors["data.pool"], epoch, part, piece, uncut)

    def _draw(self, at: _Place) -> Tensor:
        """The next batch, taken out of the pool."""
        self._fill(at)
        order_n = permutation(len(at.pool_nt), at.seed, at.step)
        at.last_bt, at.pool_nt = at.pool_nt[order_n[: at.rows]], at.pool_nt[order_n[at.rows :].sort().values]
        at.step += 1
        return at.last_bt.long()

    def _fill(self, at: _Place) -> None:
        """Read on until the pool is full; at the end of an epoch, until there is no batch in it any more."""
        blocks, barren = [at.pool_nt], False
        n_blocks, enough = len(at.pool_nt), max(at.rows, POOL_TOKENS // self.packing.context)
        while n_blocks < enough:
            if pieces := self._read(at):
                for run in tokenized([piece for piece in pieces if not is_held_out(piece)], self.prompts):
                    self.packing.put(run, at.uncut)
                if len(block_nt := self.packing.cut(at.uncut)):
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

    def _read(self, at: _Place) -> list[Piece]:
        """The next documents, as many as are tokenized at a time; none at the end of an epoch."""
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

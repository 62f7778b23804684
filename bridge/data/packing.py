"""Pieces of a corpus -> tokens -> rows of one context each.

Chats are written out by the tokenizer's template. A prefix that a document begins with is removed, because `take_blocks` adds
one to each row, and an end-of-text token at its end is not doubled. Padding is removed from given token ids: ids that the mask
excludes (in `records`), and the padding token at both ends. If the end-of-text token serves as padding (also if the tokenizer
has no padding token), a single one before the text is kept, several are removed, and one after the text is kept. Token ids are

    as long as the context    blocks, unchanged
    longer, all equally long  packed: a document need not end with its row. If the length is a multiple of the context and there
                              is no prefix, a row is cut into blocks unchanged; otherwise rows follow one another like documents
    of any other length       documents

Shape legend: n blocks, t token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bridge.data.records import DataError, Piece
from bridge.errors import reraise_as
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART_CHARACTERS = 1 << 20  # tokenized at a time, so that reading can stop early and a huge file needs little memory
TEXTS = 256  # tokenized at a time, because the fast tokenizers use every core on a batch
PIECES_TO_INSPECT = 16  # rows read to see whether all have the same length


@dataclass
class RowBuffer:
    """The finished rows of one split, and a stream still to be cut into rows; 4 bytes per token, while a list takes 36."""

    rows: array[int] = field(default_factory=lambda: array("i"))
    stream: array[int] = field(default_factory=lambda: array("i"))


class TokenRun(NamedTuple):
    """Token ids; whether a document begins and ends with them; whether they were given as ids instead of as text."""

    ids: list[Any]
    begins: bool
    ends: bool
    given: bool = False


@dataclass(frozen=True)
class Packing:
    """Rules that turn the tokens of a source into rows of `context`: the prefix of a row, the end-of-text id, the padding id."""

    source: str
    context: int
    prefix: list[int]
    end: int | None
    pad: int | None
    vocabulary: int | None
    packed: int | None = None  # the length of all rows of token ids, if they share one above the context

    @staticmethod
    def of(source: str, prompts: Prompts, context: int, vocabulary: int | None, *, padded: bool = True) -> Packing:
        """Return the packing for a tokenizer. Raises DataError if the prefix leaves no room for text in the context."""
        prefix, end, pad = [*prompts.prefix], prompts.end, getattr(prompts.tokenizer, "pad_token_id", None)
        if context <= len(prefix):
            rule = f"has no room for text, because the tokenizer puts {len(prefix)} tokens before it"
            raise DataError(f"a context of {context}", rule, "give a longer context")
        return Packing(source, context, prefix, end if padded else None, pad if padded else None, vocabulary)

    def detect_packed(self, pieces: Iterator[Piece]) -> tuple[Packing, Iterator[Piece]]:
        """Return the packing with `packed` set by the lengths of the first pieces, and an iterator over all pieces."""
        first = list(islice(pieces, PIECES_TO_INSPECT))
        lengths = {len(value) if kind == "tokens" else 0 for kind, value in first}
        one = lengths.pop() if len(lengths) == 1 and len(first) > 1 else 0
        return replace(self, packed=one if one > self.context else None), chain(first, pieces)

    @property
    def body_length(self) -> int:
        """Number of text tokens in a row."""
        return self.context - len(self.prefix)

    def add_run(self, run: TokenRun, part: RowBuffer) -> int:
        """Add a run to a part, and return its number of tokens. Raises DataError if its ids are not whole numbers."""
        ids = _strip_padding(run.ids, self.pad, self.end, self.prefix) if run.given else run.ids
        if not ids:
            return 0
        try:
            tokens = array("i", ids)
        except (TypeError, OverflowError) as error:
            rule = f"has input_ids that are not whole numbers ({error})"
            raise DataError(f"data {self.source!r}", rule, "tokenize it again") from None
        whole = run.given and len(tokens) == self.packed  # a packed row: no document ends with it
        as_it_is = len(tokens) == self.context or (whole and not self.prefix and len(tokens) % self.context == 0)
        if run.given and as_it_is:
            part.rows.extend(tokens)
            return len(tokens)
        brought = run.begins and tokens[: len(self.prefix)].tolist() == self.prefix
        part.stream.extend(tokens[len(self.prefix) :] if brought else tokens)
        if run.ends and not whole and self.end is not None and part.stream[-1:] != array("i", [self.end]):
            part.stream.append(self.end)
        return len(tokens)

    def take_blocks(self, part: RowBuffer) -> Tensor:
        """Take block_nt, int32, out of a part: its rows, then its stream cut up, each after the prefix; a remainder stays."""
        row_nt, body_nt = _matrix(part.rows, self.context), _matrix(part.stream, self.body_length)
        del part.rows[:], part.stream[: body_nt.numel()]
        prefix_nt = torch.tensor(self.prefix, dtype=torch.int32).expand(len(body_nt), -1)
        return torch.cat([row_nt, torch.cat([prefix_nt, body_nt], 1)])

    def check(self, block_nt: Tensor) -> None:
        """Raise DataError if an id is outside the dense model's vocabulary."""
        low, high = int(block_nt.min()), int(block_nt.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            wrong, rule = (low, "ids start at 0") if low < 0 else (high, f"the dense model has {self.vocabulary} tokens")
            what, remedy = f"data {self.source!r}", "tokenize it with the model's own tokenizer"
            raise DataError(what, f"has the token id {wrong}, but {rule}", remedy)


def _matrix(tokens: array[int], width: int) -> Tensor:
    if not (n := len(tokens) // width):
        return torch.empty(0, width, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32)[: n * width].clone().view(n, width)


def tokenize_pieces(pieces: Iterable[Piece], prompts: Prompts) -> Iterator[TokenRun]:
    """Yield runs of token ids; texts are tokenized TEXTS at a time, long ones in parts, and empty documents are skipped."""
    waiting: list[tuple[str, bool, bool]] = []
    characters = 0

    def flush() -> Iterator[TokenRun]:
        nonlocal characters
        if waiting:
            rows = prompts.bodies([text for text, _, _ in waiting])
            yield from [TokenRun(row, begins, ends) for row, (_, begins, ends) in zip(rows, waiting, strict=True)]
            waiting.clear()
        characters = 0

    for kind, value in pieces:
        if kind == "tokens":
            yield from flush()
            if value:
                yield TokenRun(value, True, True, given=True)
            continue
        if prompts.tokenizer is None:
            remedy = "give the model a tokenizer that can be read, or give data with input_ids"
            raise DataError("the data", f"is text, but {prompts.missing}", remedy)
        text = _apply_chat_template(value, prompts.tokenizer) if kind == "chat" else value
        for index, (part, ends) in enumerate(_parts(text) if text.strip() else ()):
            waiting.append((part, index == 0, ends))
            characters += len(part)
            if len(waiting) == TEXTS or characters >= PART_CHARACTERS:
                yield from flush()
    yield from flush()


def _apply_chat_template(chat: tuple[list[dict[str, Any]], str], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a conversation as text, written by the tokenizer's chat template. Raises DataError if that fails."""
    messages, where = chat
    if not tokenizer.chat_template:
        raise DataError(f"data {where!r}", "is chat, but the model's tokenizer has no chat template", "give it as text")
    with reraise_as(DataError, f"data {where!r}", "has a chat that the tokenizer's template rejects", "remove the chat"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield the parts of a long text, which end with a line if possible, each with whether it is the last."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = text.rfind("\n", start, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _strip_padding(ids: list[Any], pad: int | None, end: int | None, prefix: list[int]) -> list[Any]:
    """Return the ids without the padding at both ends.

    A single padding token before the text is kept if it is the end-of-text token or in the prefix; one after it, if the former.
    """
    token = end if pad is None else pad
    before = next((at for at, one in enumerate(ids) if one != token), len(ids))
    if token is None or before == len(ids):
        return ids if token is None else []
    behind = next(at for at, one in enumerate(reversed(ids)) if one != token)
    before = 0 if before == 1 and token in (end, *prefix) else before
    behind = max(0, behind - 1) if token == end else behind
    return ids[before : len(ids) - behind]

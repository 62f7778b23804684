"""Pieces of a corpus -> tokens -> rows of one context each.

Chats are written out by the tokenizer's template. A document that brings this or its end-of-text token along has it once.

Padding is removed from given token ids: by the attention mask (`records`), else the padding token at both ends. Where that is the
end-of-text token, or there is none, several of these before a row are padding, and all but one behind it.

    as long as the context   a block, as it is
    longer, all of a length  packed: no document ends where the row does. Cut into blocks as they are where the length is a number
                             of contexts and nothing has to be put before each; else one row after another, like documents
    any other length         a document

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
from bridge.errors import foreign_errors_as
from bridge.huggingface.prompts import Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PART_CHARACTERS = 1 << 20  # tokenized at a time: reading can stop early, and a huge file needs no huge memory
TEXTS = 256  # the same in texts: the fast tokenizers use every core on a batch
LOOKED_AT = 16  # rows of tokens that tell whether all are of one length


@dataclass
class Part:
    """The rows of one split, blocks already, and a stream to be cut into blocks; 4 bytes a token, where a list takes 36."""

    rows: array[int] = field(default_factory=lambda: array("i"))
    stream: array[int] = field(default_factory=lambda: array("i"))


class TokenRun(NamedTuple):
    """Token ids; whether a document begins with them, and ends; whether they were given as ids, not read from text."""

    ids: list[Any]
    begins: bool
    ends: bool
    given: bool = False


@dataclass(frozen=True)
class Packing:
    """How the tokens of a source become rows of `context`: what begins a row, ends a document, and is no token of it."""

    source: str
    context: int
    prefix: list[int]
    end: int | None
    pad: int | None
    vocabulary: int | None
    packed: int | None = None  # length beyond the context that all rows of tokens have

    @staticmethod
    def of(source: str, prompts: Prompts, context: int, vocabulary: int | None, *, padded: bool = True) -> Packing:
        """The packing for a tokenizer. Raises DataError where the context has no room for text."""
        prefix, end, pad = [*prompts.prefix], prompts.end, getattr(prompts.tokenizer, "pad_token_id", None)
        if context <= len(prefix):
            rule = f"holds no text: the tokenizer puts {len(prefix)} tokens before it"
            raise DataError(f"a context of {context}", rule, "give a longer one")
        return Packing(source, context, prefix, end if padded else None, pad if padded else None, vocabulary)

    def suited(self, pieces: Iterator[Piece]) -> tuple[Packing, Iterator[Piece]]:
        """The packing for rows of tokens of the lengths that the first pieces have, and all the pieces."""
        first = list(islice(pieces, LOOKED_AT))
        lengths = {len(value) if kind == "tokens" else 0 for kind, value in first}
        one = lengths.pop() if len(lengths) == 1 and len(first) > 1 else 0
        return replace(self, packed=one if one > self.context else None), chain(first, pieces)

    @property
    def body(self) -> int:
        """Tokens of a row that are text."""
        return self.context - len(self.prefix)

    def put(self, run: TokenRun, part: Part) -> int:
        """Add a run to a part, and return its number of tokens. Raises DataError where they are no whole numbers."""
        ids = _without_padding(run.ids, self.pad, self.end, self.prefix) if run.given else run.ids
        if not ids:
            return 0
        try:
            tokens = array("i", ids)
        except (TypeError, OverflowError) as error:
            rule = f"has input_ids that are not whole numbers ({error})"
            raise DataError(f"data {self.source!r}", rule, "tokenize it again") from None
        whole = run.given and len(tokens) == self.packed  # of a packed row: no document ends with it
        as_it_is = len(tokens) == self.context or (whole and not self.prefix and len(tokens) % self.context == 0)
        if run.given and as_it_is:
            part.rows.extend(tokens)
            return len(tokens)
        brought = run.begins and tokens[: len(self.prefix)].tolist() == self.prefix
        part.stream.extend(tokens[len(self.prefix) :] if brought else tokens)
        if run.ends and not whole and self.end is not None and part.stream[-1:] != array("i", [self.end]):
            part.stream.append(self.end)
        return len(tokens)

    def cut(self, part: Part) -> Tensor:
        """Take block_nt, int32, out of a part: its rows, then the stream behind the prefix; the rest of the stream stays."""
        row_nt, body_nt = _matrix(part.rows, self.context), _matrix(part.stream, self.body)
        del part.rows[:], part.stream[: body_nt.numel()]
        prefix_nt = torch.tensor(self.prefix, dtype=torch.int32).expand(len(body_nt), -1)
        return torch.cat([row_nt, torch.cat([prefix_nt, body_nt], 1)])

    def check(self, block_nt: Tensor) -> None:
        """Raise DataError where an id is none of the dense model's."""
        low, high = int(block_nt.min()), int(block_nt.max())
        if low < 0 or (self.vocabulary is not None and high >= self.vocabulary):
            wrong, rule = (low, "ids start at 0") if low < 0 else (high, f"the dense model's vocabulary is {self.vocabulary}")
            what, remedy = f"data {self.source!r}", "tokenize it with the model's own tokenizer"
            raise DataError(what, f"has the token id {wrong}, but {rule}", remedy)


def _matrix(tokens: array[int], width: int) -> Tensor:
    if not (n := len(tokens) // width):
        return torch.empty(0, width, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32)[: n * width].clone().view(n, width)


def tokenized(pieces: Iterable[Piece], prompts: Prompts) -> Iterator[TokenRun]:
    """Runs of token ids, of texts TEXTS at a time and of long ones in parts; empty documents are left out."""
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
            raise DataError("the data", f"is text, and {prompts.missing}", "give it one that can be read, or data with input_ids")
        text = _written_out(value, prompts.tokenizer) if kind == "chat" else value
        for index, (part, ends) in enumerate(_parts(text) if text.strip() else ()):
            waiting.append((part, index == 0, ends))
            characters += len(part)
            if len(waiting) == TEXTS or characters >= PART_CHARACTERS:
                yield from flush()
    yield from flush()


def _written_out(chat: tuple[list[dict[str, Any]], str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the text that the tokenizer's chat template makes of it."""
    messages, where = chat
    if not tokenizer.chat_template:
        raise DataError(f"data {where!r}", "is chat, and the model's tokenizer has no chat template", "give it as text")
    with foreign_errors_as(DataError, f"data {where!r}", "holds a chat that the tokenizer's template refuses", "leave it out"):
        return str(tokenizer.apply_chat_template(messages, tokenize=False))


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """A long text in parts that end with a line where they can, each with whether it is the last."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = text.rfind("\n", start, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


def _without_padding(ids: list[Any], pad: int | None, end: int | None, prefix: list[int]) -> list[Any]:
    """The ids without the padding at both ends.

    Where what pads also begins or ends a text, one of it before a text is no padding, nor the one behind that ends it.
    """
    token = end if pad is None else pad
    before = next((at for at, one in enumerate(ids) if one != token), len(ids))
    if token is None or before == len(ids):
        return ids if token is None else []
    behind = next(at for at, one in enumerate(reversed(ids)) if one != token)
    before = 0 if before == 1 and token in (end, *prefix) else before
    behind = max(0, behind - 1) if token == end else behind
    return ids[before : len(ids) - behind]

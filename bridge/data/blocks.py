"""Corpora -> token blocks: pieces are tokenized, packed and cut into rows of one context each.

    corpora                    pieces of text, of tokens and of chat, in an order fixed by the seed
      -> tokenize              one document after another, an end-of-text token between two
      -> cut                   blocks of `context` tokens, each starting with what the tokenizer puts before a text
      -> split                 every 50th document is held out, for `bridge eval`

Chats are written out by the tokenizer's template. A document that brings this or its end-of-text token along has it once.

Padding is removed from given token ids: by the attention mask (`records`), else the padding token at both ends. Where that is the
end-of-text token, or there is none, several of these before a row are padding, and all but one behind it.

    as long as the context   a block, as it is
    longer, all of a length  packed: no document ends where the row does. Cut into blocks as they are where the length is a number
                             of contexts and nothing has to be put before each; else one row after another, like documents
    any other length         a document

A batch is a pure function of (seed, step): epoch after epoch, a seeded permutation of the blocks is read off. So "the data
position" of a run is its step number, and a resumed run sees what an uninterrupted one would have seen.

Shape legend: n blocks, t token, b batch row.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bridge.data.corpora import Corpus, open_corpus
from bridge.data.records import DataError, Piece
from bridge.display.progress import OnProgress, Phase
from bridge.huggingface.prompts import Prompts
from bridge.huggingface.site_discovery import first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD_OUT_EVERY = 50
MAX_TOKENS = 50_000_000  # what is read when a budget in tokens does not say; 200 MB as int32
MAX_SAMPLED_TOKENS = 2_000_000  # the same for text that has to be sampled first
REPORTS = 200  # of progress, in all, while text is read
PART_CHARACTERS = 1 << 20  # tokenized at a time: reading can stop early, and a huge file needs no huge memory
SAMPLED_ROWS = 64
LOOKED_AT = 16  # rows of tokens that tell whether all are of one length


@dataclass(frozen=True)
class Blocks:
    """A tokenized corpus: rows to train on and rows never trained on."""

    train_nt: Tensor
    heldout_nt: Tensor
    description: str

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """The `rows` blocks of a step, tokens_bt int64, as a function of (step, rows, seed) alone."""
        n_blocks = self.train_nt.shape[0]
        wanted_b = torch.arange(step * rows, (step + 1) * rows)
        picked_b = torch.empty_like(wanted_b)
        for epoch in torch.unique(wanted_b // n_blocks).tolist():
            here_b = wanted_b // n_blocks == epoch
            picked_b[here_b] = _permutation(n_blocks, seed, epoch)[wanted_b[here_b] % n_blocks]
        return self.train_nt[picked_b].long()

    def heldout(self, rows: int) -> Tensor:
        """The first `rows` held-out blocks, tokens_bt int64 (all of them where there are fewer)."""
        return self.heldout_nt[:rows].long()


@lru_cache(maxsize=2)  # a step may take the end of one epoch and the beginning of the next
def _permutation(n_blocks: int, seed: int, epoch: int) -> Tensor:
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
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
    if not source.strip():
        raise DataError(f"data {source!r}", "names no text", "give stdlib, self, a file, a folder or a hub id")
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    prefix, end, pad = [*prompts.prefix], prompts.end, getattr(prompts.tokenizer, "pad_token_id", None)
    body = context - len(prefix)
    if body < 1:
        raise DataError(
            f"a context of {context}", f"holds no text: the tokenizer puts {len(prefix)} tokens before it", "give a longer one"
        )
    limit = max(2 * context, max_tokens or (MAX_SAMPLED_TOKENS if source == "self" else MAX_TOKENS))
    if source == "self":
        if dense is None:
            raise DataError("data 'self'", "samples from the dense model, and none was given", "pass the model or name a corpus")
        corpus = Corpus(("tokens", row) for row in _sampled(dense, prompts, context, seed))
        end = pad = None  # a sample is a block, whatever tokens it has
    else:
        corpus = open_corpus(source, seed)
    packed, pieces = _packed(corpus.pieces, context)
    parts = (_Part(), _Part())
    count = index = reported = 0
    for run in _tokenized(pieces, prompts):
        part = parts[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        ids = _without_padding(run.ids, pad, end, prefix) if run.given else run.ids
        if not ids:
            continue
        try:
            tokens = array("i", ids)
        except (TypeError, OverflowError) as error:
            raise DataError(
                f"data {source!r}", f"has input_ids that are not whole numbers ({error})", "tokenize it again"
            ) from None
        whole = run.given and len(tokens) == packed  # of a packed row: no document ends with it
        if run.given and (len(tokens) == context or (whole and not prefix and len(tokens) % context == 0)):
            part.rows.extend(tokens)
        else:
            brought = run.begins and tokens[: len(prefix)].tolist() == prefix
            part.stream.extend(tokens[len(prefix) :] if brought else tokens)
            if run.ends and not whole and end is not None and part.stream[-1:] != array("i", [end]):
                part.stream.append(end)
        index += run.ends
        count += len(tokens)
        if progress is not None and count - reported > limit // REPORTS:
            reported = count
            progress(Phase(f"data: {source}, {count:,} tokens {'sampled' if source == 'self' else 'read'}, {limit:,} at most"))
        if count >= limit:
            break
    blocks = [part.cut(context, prefix) for part in _with_held_out(*parts, context, body)]
    if not all(map(len, blocks)):
        raise DataError(
            f"data {source!r} holds {count} tokens;",
            f"at least {2 * context} are needed (one block of {context} to train on, one held out)",
            "give more text or a shorter context (data.context)",
        )
    for block_nt in blocks:
        low, high = int(block_nt.min()), int(block_nt.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            rule = "ids start at 0" if low < 0 else f"the dense model's vocabulary is {vocabulary}"
            wrong = low if low < 0 else high
            raise DataError(
                f"data {source!r}", f"has the token id {wrong}, but {rule}", "tokenize it with the model's own tokenizer"
            )
    train_nt, heldout_nt = blocks
    description = f"{source}: {train_nt.numel():,} tokens to train on, {heldout_nt.numel():,} held out, blocks of {context}"
    return Blocks(train_nt, heldout_nt, f"{description}; left out: {corpus.left_out}" if corpus.left_out else description)


@dataclass
class _Part:
    """The rows of one split, blocks already, and a stream to be cut into blocks; 4 bytes a token, where a list takes 36."""

    rows: array[int] = field(default_factory=lambda: array("i"))
    stream: array[int] = field(default_factory=lambda: array("i"))

    def cut(self, context: int, prefix: list[int]) -> Tensor:
        """block_nt, int32: the rows, then the stream behind the prefix; what is left of the stream is dropped."""
        row_nt, body_nt = _matrix(self.rows, context), _matrix(self.stream, context - len(prefix))
        prefix_nt = torch.tensor(prefix, dtype=torch.int32).expand(len(body_nt), -1)
        return torch.cat([row_nt, torch.cat([prefix_nt, body_nt], 1)])


def _matrix(tokens: array[int], width: int) -> Tensor:
    if not (n := len(tokens) // width):
        return torch.empty(0, width, dtype=torch.int32)
    return torch.frombuffer(tokens, dtype=torch.int32)[: n * width].clone().view(n, width)


def _with_held_out(train: _Part, heldout: _Part, context: int, body: int) -> tuple[_Part, _Part]:
    """Both parts; where one has no block (few documents), the tail of everything is held out instead."""
    if all(len(part.rows) >= context or len(part.stream) >= body for part in (train, heldout)):
        return train, heldout
    rows, stream = train.rows + heldout.rows, train.stream + heldout.stream
    n_rows = len(rows) // context
    if n_rows > 1 or (n_rows and len(stream) >= body):
        cut = (n_rows - max(1, n_rows // HELD_OUT_EVERY)) * context
        return _Part(rows[:cut], stream), _Part(rows[cut:])
    cut = max(0, len(stream) - max(body, len(stream) // HELD_OUT_EVERY))
    return _Part(rows, stream[:cut]), _Part(stream=stream[cut:])


def _packed(pieces: Iterator[Piece], context: int) -> tuple[int | None, Iterator[Piece]]:
    """The length beyond the context that the first rows of tokens all have (None where they differ), and all the pieces."""
    first = list(islice(pieces, LOOKED_AT))
    lengths = {len(value) if kind == "tokens" else 0 for kind, value in first}
    one = lengths.pop() if len(lengths) == 1 and len(first) > 1 else 0
    return one if one > context else None, chain(first, pieces)


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


class _Run(NamedTuple):
    """Token ids; whether a document begins with them, and ends; whether they were given as ids, not read from text."""

    ids: list[Any]
    begins: bool
    ends: bool
    given: bool = False


def _tokenized(pieces: Iterable[Piece], prompts: Prompts) -> Iterator[_Run]:
    """Runs of token ids; empty documents are left out.

    Texts are tokenized 256 at a time (the fast tokenizers use every core on a batch), long ones in parts.
    """
    waiting: list[tuple[str, bool, bool]] = []
    characters = 0

    def flush() -> Iterator[_Run]:
        if waiting:
            rows = prompts.bodies([text for text, _, _ in waiting])
            yield from [_Run(row, begins, ends) for row, (_, begins, ends) in zip(rows, waiting, strict=True)]
            waiting.clear()

    for kind, value in pieces:
        if kind == "tokens":
            yield from flush()
            characters = 0
            if value:
                yield _Run(value, True, True, given=True)
            continue
        if prompts.tokenizer is None:
            raise DataError("the data", f"is text, and {prompts.missing}", "give it one that can be read, or data with input_ids")
        text = _written_out(value, prompts.tokenizer) if kind == "chat" else value
        if not text.strip():
            continue
        begins = True
        for part, ends in _parts(text):
            waiting.append((part, begins, ends))
            begins = False
            characters += len(part)
            if len(waiting) == 256 or characters >= PART_CHARACTERS:
                yield from flush()
                characters = 0
    yield from flush()


def _written_out(chat: tuple[list[dict[str, Any]], str], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation as the text that the tokenizer's chat template makes of it."""
    messages, where = chat
    if not tokenizer.chat_template:
        raise DataError(f"data {where!r}", "is chat, and the model's tokenizer has no chat template", "give it as text")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # whatever a template raises
        why = first_line(error)
        raise DataError(
            f"data {where!r}", f"holds a chat that the tokenizer's template refuses ({why})", "leave it out"
        ) from None


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """A long text in parts that end with a line where they can, each with whether it is the last."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        stop = text.rfind("\n", start, start + PART_CHARACTERS) + 1 or start + PART_CHARACTERS
        yield text[start:stop], False
        start = stop
    yield text[start:], True


@torch.no_grad()
def _sampled(dense: PreTrainedModel, prompts: Prompts, context: int, seed: int) -> Iterator[list[int]]:
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
        yield from torch.cat(columns, dim=1).tolist()

"""Corpora -> token blocks: text is tokenized, packed and cut into rows of one context each.

    documents(source)          text, in an order fixed by the seed
      -> tokenize              one document after another, an end-of-text token between two
      -> cut                   blocks of `context` tokens, each starting with what the tokenizer puts before a text
      -> split                 every 50th document is held out, for `bridge eval`

A batch is a pure function of (seed, step): epoch after epoch, a seeded permutation of the blocks is read off. So "the data
position" of a run is its step number, and a resumed run sees what an uninterrupted one would have seen.

Shape legend: n blocks, t token, b batch row.
"""

from __future__ import annotations

import hashlib
import json
import random
import sysconfig
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bridge.prompts import Prompts
from bridge.recipe import UserError, not_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content", "code", "document")
HELD_OUT_EVERY = 50
MAX_TOKENS = 50_000_000  # what is read when a budget in tokens does not say; 200 MB as int32
MAX_SAMPLED_TOKENS = 2_000_000  # the same for text that has to be sampled first
STEPS_TOLD = 200  # how often, in all, reading says how far it is
MAX_DOCUMENT_BYTES = 200_000  # longer source files are tables of data, not code
PART_CHARACTERS = 1 << 20  # tokenized at a time: reading can stop early, and a huge file needs no huge memory
SAMPLED_ROWS = 64


class DataError(UserError):
    """A corpus that cannot be read, in one line that names what to do."""


@dataclass(frozen=True)
class Blocks:
    """A tokenized corpus: rows to train on and rows never trained on."""

    train_nt: Tensor
    heldout_nt: Tensor
    description: str

    def batch(self, step: int, rows: int, seed: int) -> Tensor:
        """The `rows` blocks of a step, tokens_bt int64: the same for the same (step, rows, seed), whatever ran before."""
        n_blocks = self.train_nt.shape[0]
        wanted_b = torch.arange(step * rows, (step + 1) * rows)
        picked_b = torch.empty_like(wanted_b)
        for epoch in torch.unique(wanted_b // n_blocks).tolist():
            generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
            permutation_n = torch.randperm(n_blocks, generator=generator)
            here_b = wanted_b // n_blocks == epoch
            picked_b[here_b] = permutation_n[wanted_b[here_b] % n_blocks]
        return self.train_nt[picked_b].long()

    def heldout(self, rows: int) -> Tensor:
        """The first `rows` held-out blocks, tokens_bt int64 (all of them where there are fewer)."""
        return self.heldout_nt[:rows].long()


def load_blocks(
    source: str,
    prompts: Prompts | PreTrainedTokenizerBase | None,
    context: int,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    dense: PreTrainedModel | None = None,
    progress: Callable[[str], None] | None = None,
) -> Blocks:
    """Read `source` (see `documents`) until `max_tokens` tokens are held, and cut them into blocks of `context`.

    `prompts` is the dense model's, or a tokenizer. `dense` is what `self` samples from, and what token ids are checked against;
    progress is told how far this is, which takes long for large corpora and longer for sampled ones. Raises PromptError where
    text cannot be read, and DataError where the source does not exist or has no text, where an id is none of the dense model's,
    and where there is too little for a training and a held-out block.
    """
    if not source.strip():
        raise DataError(f"data {source!r} names no text; give stdlib, self, a file, a folder or a hub id")
    vocabulary = None if dense is None else dense.config.get_text_config().vocab_size
    prompts = Prompts.of(prompts, vocabulary)
    prefix, end = prompts.prefix, prompts.end
    body = context - len(prefix)
    if body < 1:
        raise DataError(
            f"a context of {context} holds no text: the tokenizer puts {len(prefix)} tokens before it; give a longer one"
        )
    limit = max(2 * context, max_tokens or (MAX_SAMPLED_TOKENS if source == "self" else MAX_TOKENS))
    if source == "self":
        if dense is None:
            raise DataError("data 'self' samples from the dense model, and none was given; pass the model or name a corpus")
        pieces = (("tokens", row[len(prefix) :]) for row in _sampled(dense, prompts, context, seed))
        end = None  # a sample is one block, and does not end where a text would
    else:
        pieces = _pieces(source, seed)
    streams = (array("i"), array("i"))  # 4 bytes a token, where a list takes 36
    count = index = told = 0
    for tokens, ends in _tokenized(pieces, prompts):
        stream = streams[index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1]
        try:
            stream.extend(tokens)
        except (TypeError, OverflowError) as error:
            raise DataError(f"data {source!r} has input_ids that are not whole numbers ({error}); tokenize it again") from None
        if ends:
            index += 1
            if end is not None and stream[-1:] != array("i", [end]):
                stream.append(end)
        count += len(tokens)
        if progress is not None and count - told > limit // STEPS_TOLD:
            told = count
            progress(f"data: {source}, {count:,} tokens {'sampled' if source == 'self' else 'read'}, {limit:,} at most")
        if count >= limit:
            break
    train, heldout = streams
    if min(len(train), len(heldout)) < body:  # few documents: hold out the tail instead
        both = train + heldout
        cut = len(both) - max(body, len(both) // HELD_OUT_EVERY)
        train, heldout = both[: max(0, cut)], both[max(0, cut) :]
    if min(len(train), len(heldout)) < body:
        raise DataError(
            f"data {source!r} holds {count} tokens; at least {2 * context} are needed (one block of {context} to train on, one "
            "held out); give more text or a shorter context (--set context=N)"
        )
    train_nt, heldout_nt = (_cut(stream, body, prefix) for stream in (train, heldout))
    for block_nt in (train_nt, heldout_nt):
        low, high = int(block_nt.min()), int(block_nt.max())
        if low < 0 or (vocabulary is not None and high >= vocabulary):
            rule = "ids start at 0" if low < 0 else f"the dense model's vocabulary is {vocabulary}"
            wrong = low if low < 0 else high
            raise DataError(f"data {source!r} has the token id {wrong}, but {rule}; tokenize it with the model's own tokenizer")
    description = f"{source}: {train_nt.numel():,} tokens to train on, {heldout_nt.numel():,} held out, blocks of {context}"
    return Blocks(train_nt, heldout_nt, description)


def documents(source: str, seed: int = 0) -> Iterator[str]:
    """The documents of a text corpus, in an order fixed by the seed.

    `stdlib` is the source of the Python library on this machine, `stdlib+packages` adds the packages installed beside it; a
    file or folder is read as text or records (txt, md, rst, py, jsonl, json, parquet); anything else is a hub data set, streamed.
    """
    for kind, value in _pieces(source, seed):
        if kind == "text":
            yield value


def _pieces(source: str, seed: int) -> Iterator[tuple[str, Any]]:
    """('text', str) or ('tokens', list of int), document by document."""
    if source in ("stdlib", "stdlib+packages"):
        yield from (("text", text) for text in _python_source(packages=source != "stdlib", seed=seed))
    elif Path(source).expanduser().exists():
        yield from _local(Path(source).expanduser(), seed)
    elif source.startswith((".", "/", "~")) or Path(source).suffix in TEXT_SUFFIXES + RECORD_SUFFIXES:
        raise DataError(f"data {source!r} does not exist; name a file, a folder, 'stdlib', 'self' or a hub data set")
    else:
        yield from _streamed(source)


def _python_source(*, packages: bool, seed: int) -> Iterator[str]:
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    if packages:
        roots += [Path(sysconfig.get_paths()["purelib"])]
    files = {}
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root).parts
            if "__pycache__" in inside or ("site-packages" in inside and root == roots[0]):
                continue
            files["/".join(inside)] = path
    names = sorted(files)
    random.Random(seed).shuffle(names)
    seen: set[bytes] = set()
    for name in names:
        try:
            if files[name].stat().st_size > MAX_DOCUMENT_BYTES:
                continue
            text = files[name].read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text.strip() and digest not in seen:  # vendored copies are common
            seen.add(digest)
            yield text


def _local(path: Path, seed: int) -> Iterator[tuple[str, Any]]:
    files = [path]
    if path.is_dir():
        suffixes = TEXT_SUFFIXES + RECORD_SUFFIXES
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        files = sorted(p for p in inside if p.is_file() and p.suffix.lower() in suffixes)
        random.Random(seed).shuffle(files)
        if not files:
            raise DataError(f"data {str(path)!r} holds no file ending in {', '.join(suffixes)}")
    for file in files:
        suffix = file.suffix.lower()
        try:
            if suffix == ".parquet":
                yield from _parquet_rows(file)
            elif suffix in (".jsonl", ".json"):
                yield from (_record(row, str(file)) for row in _json_rows(file))
            else:
                yield "text", file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise DataError(f"data {str(file)!r} is not UTF-8 text; convert it, or give jsonl or parquet") from None
        except OSError as error:
            raise DataError(f"data {str(file)!r} cannot be read ({error.strerror})") from None


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table = parquet.ParquetFile(file)
        columns = table.schema_arrow.names
        wanted = [column for column in ("input_ids", *TEXT_COLUMNS) if column in columns]  # the others may be large
        for batch in table.iter_batches(1024, columns=wanted or columns):
            yield from (_record(row, str(file)) for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise DataError(f"data {str(file)!r} is not a readable parquet file ({_first_line(error)})") from None


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8-sig") as lines:
        if file.suffix.lower() == ".json":
            text = lines.read()
            try:
                rows = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise DataError(f"data {str(file)!r} is not JSON ({error})") from None
            yield from rows if isinstance(rows, list) else [rows]
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.strip())
                except json.JSONDecodeError as error:
                    where = f"line {number}, column {error.colno}"
                    raise DataError(f"data {str(file)!r} is not JSON lines ({error.msg}: {where})") from None
                except (ValueError, RecursionError) as error:
                    why = str(error).partition(";")[0]
                    raise DataError(f"data {str(file)!r} is not JSON lines ({why}: line {number})") from None


def _streamed(source: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        for row in load_dataset(name, configuration or None, split="train", streaming=True):
            yield _record(row, source)
    except DataError:
        raise
    except Exception as error:
        reason = _first_line(error)
        raise DataError(f"data {source!r} is no file here, nor could the hub stream it ({reason}); name another") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _record(row: Any, where: str) -> tuple[str, Any]:
    if isinstance(row, str):
        return "text", _checked(row, where)
    if isinstance(row, dict):
        if isinstance(row.get("input_ids"), list):
            return "tokens", row["input_ids"]
        for column in TEXT_COLUMNS:
            if column in row and isinstance(row[column], str | None):
                return "text", _checked(row[column] or "", where)
        found = ", ".join(map(str, row)) or "none"
    else:
        found = type(row).__name__
    raise DataError(f"data {where!r} has no text column (found: {found}); name one of {', '.join(TEXT_COLUMNS)} or input_ids")


def _checked(text: str, where: str) -> str:
    if wrong := not_text(text):
        raise DataError(f"data {where!r} holds {wrong}, which is no character of UTF-8 text; write it again without")
    return text


def _tokenized(pieces: Iterable[tuple[str, Any]], prompts: Prompts) -> Iterator[tuple[list[int], bool]]:
    """Token ids, and whether a document ends after them; empty documents are left out.

    Texts are tokenized 256 at a time (the fast tokenizers use every core on a batch), long ones in parts.
    """
    waiting: list[tuple[str, bool]] = []
    characters = 0

    def flush() -> Iterator[tuple[list[int], bool]]:
        if waiting:
            yield from zip(prompts.bodies([text for text, _ in waiting]), [ends for _, ends in waiting], strict=True)
            waiting.clear()

    for kind, value in pieces:
        if kind == "tokens":
            yield from flush()
            characters = 0
            if value:
                yield value, True
            continue
        if prompts.missing:
            raise DataError(f"the data is text, and {prompts.missing}; give it one that can be read, or data with input_ids")
        if not value.strip():
            continue
        for text, ends in _parts(value):
            waiting.append((text, ends))
            characters += len(text)
            if len(waiting) == 256 or characters >= PART_CHARACTERS:
                yield from flush()
                characters = 0
    yield from flush()


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


def _cut(stream: array[int], body: int, prefix: tuple[int, ...]) -> Tensor:
    n_blocks = len(stream) // body
    block_nt = torch.frombuffer(stream, dtype=torch.int32)[: n_blocks * body].clone().view(n_blocks, body)
    return torch.cat([torch.tensor(prefix, dtype=torch.int32).expand(n_blocks, -1), block_nt], dim=1)

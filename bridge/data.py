"""Corpora -> token blocks: text is tokenized, packed and cut into rows of one context each.

    documents(source)          text, in an order fixed by the seed
      -> tokenize              one document after another, an end-of-text token between two
      -> cut                   blocks of `context` tokens, each starting with BOS where the tokenizer adds one
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
RECORD_SUFFIXES = (".jsonl", ".json", ".parquet")
TEXT_COLUMNS = ("text", "content", "code", "document")
HELD_OUT_EVERY = 50
MAX_TOKENS = 50_000_000  # what is read when a budget in tokens does not say; 200 MB as int32
MAX_DOCUMENT_BYTES = 200_000  # longer source files are tables of data, not code


class DataError(ValueError):
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
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            permutation_n = torch.randperm(n_blocks, generator=generator)
            here_b = wanted_b // n_blocks == epoch
            picked_b[here_b] = permutation_n[wanted_b[here_b] % n_blocks]
        return self.train_nt[picked_b].long()

    def heldout(self, rows: int) -> Tensor:
        """The first `rows` held-out blocks, tokens_bt int64 (all of them where there are fewer)."""
        return self.heldout_nt[:rows].long()


def load_blocks(
    source: str,
    tokenizer: PreTrainedTokenizerBase | None,
    context: int,
    *,
    max_tokens: int | None = None,
    seed: int = 0,
    dense: PreTrainedModel | None = None,
) -> Blocks:
    """Read `source` (see `documents`) until `max_tokens` tokens are held, and cut them into blocks of `context`.

    Raises DataError where the source does not exist, has no text, or holds too little for one training and one held-out block.
    """
    limit = max_tokens or MAX_TOKENS
    if source == "self":
        if dense is None:
            raise DataError("data 'self' samples from the dense model, and none was given; pass the model or name a corpus")
        pieces = iter([("tokens", row) for row in _sampled(dense, tokenizer, context, limit, seed)])
    else:
        pieces = _pieces(source, seed)
    bos = _added_bos(tokenizer)
    end = getattr(tokenizer, "eos_token_id", None)
    body = context - len(bos)
    streams = (array("i"), array("i"))  # 4 bytes a token, where a list takes 36
    count = 0
    for index, tokens in enumerate(_tokenized(pieces, tokenizer)):
        stream = streams[1 if index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1 else 0]
        stream.extend(tokens)
        if end is not None:
            stream.append(end)
        count += len(tokens)
        if count >= limit:
            break
    train, heldout = streams
    if len(heldout) < body and len(train) >= 2 * body:  # few documents: hold out the tail instead
        cut = len(train) - max(body, len(train) // HELD_OUT_EVERY)
        train, heldout = train[:cut], train[cut:]
    if len(train) < body or len(heldout) < body:
        raise DataError(
            f"data {source!r} holds {count} tokens; at least {2 * context} are needed (one block of {context} to train on, one "
            "held out); give more text or a shorter context (--set context=N)"
        )
    train_nt, heldout_nt = (_cut(stream, body, bos) for stream in (train, heldout))
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
    elif Path(source).exists():
        yield from _local(Path(source), seed)
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
        if files[name].stat().st_size > MAX_DOCUMENT_BYTES:
            continue
        try:
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
        files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix in TEXT_SUFFIXES + RECORD_SUFFIXES)
        random.Random(seed).shuffle(files)
    if not files:
        raise DataError(f"data {str(path)!r} holds no file ending in {', '.join(TEXT_SUFFIXES + RECORD_SUFFIXES)}")
    for file in files:
        if file.suffix == ".parquet":
            import pyarrow.parquet as parquet

            try:
                table = parquet.ParquetFile(file)
            except Exception as error:
                raise DataError(f"data {str(file)!r} is not a readable parquet file ({error})") from None
            rows = (row for batch in table.iter_batches(1024) for row in batch.to_pylist())
            yield from (_record(row, str(file)) for row in rows)
        elif file.suffix in (".jsonl", ".json"):
            yield from (_record(row, str(file)) for row in _json_rows(file))
        else:
            try:
                yield "text", file.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise DataError(f"data {str(file)!r} is not UTF-8 text; convert it, or give jsonl or parquet") from None


def _json_rows(file: Path) -> Iterator[Any]:
    with file.open(encoding="utf-8") as lines:
        if file.suffix == ".json":
            try:
                rows = json.load(lines)
            except json.JSONDecodeError as error:
                raise DataError(f"data {str(file)!r} is not JSON ({error})") from None
            yield from rows if isinstance(rows, list) else [rows]
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise DataError(f"data {str(file)!r}, line {number} is not JSON ({error})") from None


def _streamed(source: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    try:
        rows = iter(load_dataset(name, configuration or None, split="train", streaming=True))
        first = next(rows)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"data {source!r} is no file here and could not be streamed from the hub ({reason})") from None
    yield _record(first, source)
    yield from (_record(row, source) for row in rows)


def _record(row: Any, where: str) -> tuple[str, Any]:
    if isinstance(row, str):
        return "text", row
    if isinstance(row, dict):
        if isinstance(row.get("input_ids"), list):
            return "tokens", row["input_ids"]
        for column in TEXT_COLUMNS:
            if isinstance(row.get(column), str):
                return "text", row[column]
        found = ", ".join(map(str, row)) or "none"
    else:
        found = type(row).__name__
    raise DataError(f"data {where!r} has no text column (found: {found}); name one of {', '.join(TEXT_COLUMNS)} or input_ids")


def _tokenized(pieces: Iterator[tuple[str, Any]], tokenizer: PreTrainedTokenizerBase | None) -> Iterator[list[int]]:
    """Token ids per document, texts tokenized 256 at a time (the fast tokenizers use every core on a batch)."""
    waiting: list[str] = []

    def flush() -> Iterator[list[int]]:
        if waiting:
            assert tokenizer is not None
            yield from tokenizer(waiting, add_special_tokens=False, verbose=False)["input_ids"]
            waiting.clear()

    for kind, value in pieces:
        if kind == "tokens":
            yield from flush()
            yield value
            continue
        if tokenizer is None:
            raise DataError("the data is text and the model came without a tokenizer; pass one, or data with input_ids")
        waiting.append(value)
        if len(waiting) == 256:
            yield from flush()
    yield from flush()


def _sampled(
    dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, context: int, tokens: int, seed: int
) -> Iterator[list[int]]:
    """Sequences sampled from the dense model at temperature 1, from its beginning-of-text token on."""
    configuration = dense.config.get_text_config()
    candidates = (getattr(tokenizer, "bos_token_id", None), configuration.bos_token_id, configuration.eos_token_id)
    start = next((c for c in candidates if isinstance(c, int) and c < configuration.vocab_size), 0)
    rows = 64
    with torch.random.fork_rng(devices=[dense.device] if dense.device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(-(-tokens // (rows * context))):
            begin_bt = torch.full((rows, 1), start, device=dense.device)
            sampled_bt = dense.generate(  # type: ignore[operator]
                begin_bt,
                attention_mask=torch.ones_like(begin_bt),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=context - 1,
                min_new_tokens=context - 1,
                pad_token_id=start,
            )
            yield from sampled_bt[:, 1:].tolist()


def _added_bos(tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """[bos] where the tokenizer itself puts one before a text, else []: BOS belongs to the tokenizer, not to the model."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if tokenizer is None or bos is None:
        return []
    return [bos] if tokenizer("a")["input_ids"][:1] == [bos] else []


def _cut(stream: array[int], body: int, bos: list[int]) -> Tensor:
    n_blocks = len(stream) // body
    block_nt = torch.frombuffer(stream, dtype=torch.int32)[: n_blocks * body].clone().view(n_blocks, body)
    if bos:
        block_nt = torch.cat([torch.full((n_blocks, 1), bos[0], dtype=torch.int32), block_nt], dim=1)
    return block_nt

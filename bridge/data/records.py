"""Files and rows -> pieces of a corpus: ("text", str), ("tokens", ids), ("chat", (messages, where they are)).

    txt, md, rst, py        one text
    jsonl, ndjson, json     a row per line; a .json file may instead be one value, and a list has a row per element
    csv, tsv                a row per line, with the column names in the first line
    parquet, arrow          a row per row of the table

All but the last two may be compressed by gz, bz2, xz or zst. A row gives its first filled column, in this order: `input_ids`
without the padding that its `attention_mask` marks, the text columns, the chat columns.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from bridge.errors import UserError, first_line
from bridge.recipe import encoding_fault

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
COLUMN_SUFFIXES = (".parquet", ".arrow")
RECORD_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *COLUMN_SUFFIXES)
DECOMPRESSORS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED_SUFFIXES = (*DECOMPRESSORS, ".zst")
ARCHIVES = (".zip", ".tar", ".tgz", ".7z", ".rar")
TEXT_COLUMNS = ("text", "content", "code", "document")
CHAT_COLUMNS = ("messages", "conversations")
COLUMNS = ("input_ids", "attention_mask", *TEXT_COLUMNS, *CHAT_COLUMNS)
LONGEST_FIELD = 2**31 - 1  # characters in a field of a csv or tsv file
POINTER = b"version https://git-lfs.github.com/spec/"  # start of the pointer that replaces a file not fetched by a clone
BATCH = 1024  # rows in memory at a time
_ROLES = {"human": "user", "gpt": "assistant"}  # from ShareGPT's names of the roles

Piece = tuple[str, Any]


class DataError(UserError):
    """Error for a corpus that cannot be read: one line that includes the remedy."""


def suffix_of(file: Path) -> str:
    """Return the suffix of a file's name in lower case, ignoring the suffix of its compression."""
    name = file.with_suffix("") if file.suffix.lower() in COMPRESSED_SUFFIXES else file
    return name.suffix.lower()


def file_pieces(file: Path) -> Iterator[Piece]:
    """Yield the pieces in a file. Raises DataError if the file cannot be read, or if one of its rows is not usable."""
    where, kind = str(file), suffix_of(file)
    packed = file.suffix.lower() in COMPRESSED_SUFFIXES
    if kind in ARCHIVES or (packed and kind in COLUMN_SUFFIXES):
        raise DataError(f"data {where!r}", "is an archive", "unpack it, and name the unpacked file")
    try:
        with file.open("rb") as begun:
            if begun.read(len(POINTER)) == POINTER:
                rule = "is a pointer to a file that was not fetched"
                raise DataError(f"data {where!r}", rule, "run `git lfs pull` in its folder")
        if kind in RECORD_SUFFIXES:
            yield from (piece(row, where) for row in _rows(file, kind))
        else:
            with _open_text(file) as stream:
                yield "text", stream.read()
    except UnicodeDecodeError:
        raise DataError(f"data {where!r}", "is not UTF-8 text", "convert it, or give jsonl or parquet") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise DataError(f"data {where!r}", f"cannot be {'unpacked' if packed else 'read'} ({reason})") from None


def piece(row: Any, where: str) -> Piece:
    """Return a row as a piece of a corpus. Raises DataError if it has none of COLUMNS, or another type of value in one."""
    if isinstance(row, str):
        return "text", _check_text(row, where)
    if not isinstance(row, dict):
        raise _no_column_error([type(row).__name__], where)
    if (ids := row.get("input_ids")) not in (None, []):
        return "tokens", _unmasked_ids(ids, row.get("attention_mask"), where)
    texts = {column: value for column in TEXT_COLUMNS if (value := row.get(column)) not in (None, "", [])}
    for value in texts.values():
        if isinstance(value, str) and value.strip():
            return "text", _check_text(value, where)
    for column in CHAT_COLUMNS:
        if row.get(column):
            return "chat", (_chat_messages(row[column], where), where)
    for column, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"data {where!r}", f"has {_describe_value(value)} in its column {column!r}", "store one text per row")
    if not any(column in row for column in COLUMNS):
        raise _no_column_error(row, where)
    return "text", ""


# -- files to rows ----------------------------------------------------------------------------------------------------------


def _open_text(file: Path, newline: str | None = None) -> TextIO:
    if file.suffix.lower() == ".zst":
        import pyarrow

        return io.TextIOWrapper(pyarrow.input_stream(str(file), compression="zstd"), encoding="utf-8-sig", newline=newline)
    stream: Any = DECOMPRESSORS.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline=newline)
    return stream


def _rows(file: Path, kind: str) -> Iterator[Any]:
    if kind in COLUMN_SUFFIXES:
        return _column_rows(file, kind)
    if kind in (".csv", ".tsv"):
        return _table_rows(file, kind)
    return _json_rows(file) if kind == ".json" and not _has_lines(file) else _line_rows(file)


def _column_rows(file: Path, kind: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        table: Any = parquet.ParquetFile(file) if kind == ".parquet" else _arrow_reader(file)
        names = (table.schema_arrow if kind == ".parquet" else table.schema).names
        wanted = [column for column in COLUMNS if column in names]  # other columns may be large
        if not wanted:
            raise _no_column_error(names, str(file))
        batches = table.iter_batches(BATCH, columns=wanted) if kind == ".parquet" else (batch.select(wanted) for batch in table)
        for batch in batches:
            for start in range(0, len(batch), BATCH):
                yield from batch.slice(start, BATCH).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"data {str(file)!r}", f"is not a readable {kind[1:]} file ({first_line(error)})") from None


def _arrow_reader(file: Path) -> Any:
    """Return the record batches of an Arrow file, in the stream format (as `datasets` writes it) or the file format (ARROW1)."""
    import pyarrow

    with file.open("rb") as stream:
        named = stream.read(6) == b"ARROW1"
    mapped = pyarrow.memory_map(str(file))
    if not named:
        return pyarrow.ipc.open_stream(mapped)
    table = pyarrow.ipc.open_file(mapped)
    return pyarrow.RecordBatchReader.from_batches(table.schema, map(table.get_batch, range(table.num_record_batches)))


def _table_rows(file: Path, kind: str) -> Iterator[Any]:
    csv.field_size_limit(LONGEST_FIELD)
    with _open_text(file, newline="") as lines:
        reader = csv.DictReader(lines, delimiter="," if kind == ".csv" else "\t", strict=True)
        try:
            for row in reader:
                if None in row:
                    raise csv.Error("more fields than the first line has names")
                yield row
        except csv.Error as error:
            raise DataError(f"data {str(file)!r}", f"is not {kind[1:].upper()} ({error}: line {reader.line_num})") from None


def _has_lines(file: Path) -> bool:
    """Return whether a .json file holds one value per line instead of one value in all."""
    with _open_text(file) as lines:
        filled = (line for line in lines if line.strip())
        first = next(filled, "").lstrip()
        if first[:1] not in ("{", '"') or next(filled, None) is None:
            return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _json_rows(file: Path) -> Iterator[Any]:
    with _open_text(file) as stream:
        text = stream.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"data {str(file)!r}", f"is not JSON ({error})") from None
    yield from value if isinstance(value, list) else [value]


def _line_rows(file: Path) -> Iterator[Any]:
    with _open_text(file) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield json.loads(line.strip())
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", str(error).partition(";")[0])
                    where = f"line {number}" + (f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else "")
                    raise DataError(f"data {str(file)!r}", f"is not JSON lines ({why}: {where})") from None


# -- rows to pieces ---------------------------------------------------------------------------------------------------------


def _no_column_error(found: Iterable[Any], where: str) -> DataError:
    columns = ", ".join(map(str, found)) or "none"
    return DataError(
        f"data {where!r}", f"has no text column (found: {columns})", f"rename a column to {', '.join(TEXT_COLUMNS)} or input_ids"
    )


def _check_text(text: str, where: str) -> str:
    if fault := encoding_fault(text):
        raise DataError(f"data {where!r}", fault, "remove it")
    return text


def _unmasked_ids(ids: Any, mask: Any, where: str) -> list[Any]:
    """Return the ids that an attention mask marks as text; all of them if there is no mask."""
    if not isinstance(ids, list):
        raise DataError(
            f"data {where!r}", f"has input_ids that are not whole numbers ({_describe_value(ids)})", "tokenize it again"
        )
    if mask is None:
        return ids
    if not isinstance(mask, list) or len(mask) != len(ids):
        problem = f"of length {len(mask)}" if isinstance(mask, list) else "that is not a list"
        rule = f"has {len(ids)} input_ids and an attention_mask {problem}"
        raise DataError(f"data {where!r}", rule, "tokenize it again")
    return [token for token, there in zip(ids, mask, strict=True) if there]


def _chat_messages(given: Any, where: str) -> list[dict[str, Any]]:
    """Return a conversation as chat templates take it: messages with a role and a content."""
    if isinstance(given, dict) and all(isinstance(value, list) for value in given.values()):  # structs stored by column
        given = [dict(zip(given, values, strict=False)) for values in zip(*given.values(), strict=False)]
    messages = []
    for message in given if isinstance(given, list) else [given]:
        if isinstance(message, dict) and "role" not in message and {"from", "value"} <= message.keys():
            message = {"role": _ROLES.get(message["from"], message["from"]), "content": message["value"]}
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise DataError(f"data {where!r}", "has a message without role or content", "give each message both")
        messages.append(message)
    return messages


def _describe_value(value: Any) -> str:
    if isinstance(value, list):
        return "a list of strings" if all(isinstance(part, str) for part in value) else "a list"
    return {dict: "a nested value", str: "a text", int: "a number", float: "a number"}.get(type(value), type(value).__name__)

"""Sources -> the pieces of a corpus, in an order fixed by the seed, and the parts of the source that are left out.

    stdlib, stdlib+packages   the source of the Python library on this machine, and of the packages installed beside it
    a file                    read as `records` describes
    a folder                  saved by `datasets` (save_to_disk): its training split
                              a data set with a card (at the head of README.md): the files that `datasets` resolves for train
                              any other: its files except hidden ones and, if some hold records, those that describe the records
    anything else             a hub data set, streamed

The test and validation splits of a data set are never read, so that they stay unseen. A split is recognised by the name of a file
or of its folder. If the source is a single file, the file is read whatever its name is.
"""

from __future__ import annotations

import hashlib
import random
import re
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import yaml

from bridge.data.records import (
    COLUMNS,
    COMPRESSED_SUFFIXES,
    RECORD_SUFFIXES,
    TEXT_SUFFIXES,
    DataError,
    Piece,
    file_pieces,
    piece,
    suffix_of,
)
from bridge.errors import reraise_as

MAX_DOCUMENT_BYTES = 200_000  # longer source files are tables of data, not code
SUFFIXES = (*TEXT_SUFFIXES, *RECORD_SUFFIXES)
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
DOCUMENTATION_NAMES = (
    "readme", "license", "licence", "copying", "notice", "citation", "changelog", "contributing", "code_of_conduct"
)  # fmt: skip
METADATA_FILES = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json", "croissant.json")
SAVED_ROWS = 10_000  # rows per part of a data set written by `save_to_disk`
SAVED_DATASET_FILES = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # files that save_to_disk writes
CARD_KEYS = {"configs", "dataset_info", "task_categories", "task_ids", "size_categories", "source_datasets"}


@dataclass(frozen=True)
class Corpus:
    """The parts of a source, each a function that reads its pieces anew, and a text naming what was left out ("" if nothing).

    If a source has files, each part is a file: a reader that resumes in the middle of the corpus need not reread earlier parts.
    """

    parts: Sequence[Callable[[], Iterator[Piece]]]
    left_out: str = ""

    @property
    def pieces(self) -> Iterator[Piece]:
        """Iterator over all pieces; each is read only when it is reached."""
        return chain.from_iterable(part() for part in self.parts)


def open_corpus(source: str, seed: int = 0) -> Corpus:
    """Open the corpus of a source. Raises DataError, possibly only while pieces are read, if the source cannot be read."""
    if not source.strip():  # as a path it would be the current folder
        raise DataError(f"data {source!r}", "is empty", "give stdlib, self, a file, a folder or a hub id")
    if source in ("stdlib", "stdlib+packages"):
        return Corpus([partial(_python_source, packages=source != "stdlib", seed=seed)])
    path, configuration = Path(source).expanduser(), None
    if not path.exists() and ":" in source:  # a configuration of a local data set
        name, _, named = source.rpartition(":")
        if Path(name).expanduser().is_dir():
            path, configuration = Path(name).expanduser(), named
    if path.is_dir():
        return _folder(path, configuration, seed)
    if path.exists():
        return Corpus([partial(file_pieces, path)])
    if source.startswith((".", "/", "~")) or suffix_of(Path(source)) in SUFFIXES:
        raise DataError(f"data {source!r}", "does not exist", "name a file, a folder, 'stdlib', 'self' or a hub data set")
    return Corpus(_stream_hub_data_set(source))


def documents(source: str, seed: int = 0) -> Iterator[str]:
    """Yield the texts of a corpus, in an order fixed by the seed; skip token ids and chats. Raises DataError as `open_corpus`."""
    for kind, value in open_corpus(source, seed).pieces:
        if kind == "text":
            yield value


# -- files on this machine --------------------------------------------------------------------------------------------------


def _python_source(*, packages: bool, seed: int) -> Iterator[Piece]:
    roots = [Path(sysconfig.get_paths()[name]) for name in (("stdlib", "purelib") if packages else ("stdlib",))]
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
            yield "text", text


def _folder(path: Path, configuration: str | None, seed: int) -> Corpus:
    where = str(path) if configuration is None else f"{path}:{configuration}"
    if any(all((path / name).is_file() for name in names) for names in SAVED_DATASET_FILES):
        return _saved_data_set(path)
    inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
    files = sorted(p for p in inside if p.is_file() and suffix_of(p) in SUFFIXES)
    card = _card(path)
    about_data = _records(files) or not CARD_KEYS.isdisjoint(card or ())
    asked = configuration is not None or (card is not None and about_data)
    if asked and (splits := _resolve_data_files(path, configuration, where, card or {})):
        chosen = _training_split(splits, where, "one of its files")
        return Corpus(_shuffle_files(splits[chosen], seed), _splits(name for name in splits if name != chosen))
    files, left = _training_files(path, files)
    if left and not files:
        rule = f"has only its {_splits(left)}, and nothing to train on"
        raise DataError(f"data {where!r}", rule, "name one of its files to use it")
    if not files:
        packed = ", ".join(COMPRESSED_SUFFIXES)
        raise DataError(f"data {where!r}", f"contains no file ending in {', '.join(SUFFIXES)} (each may be followed by {packed})")
    return Corpus(_shuffle_files(files, seed), _splits(left))


def _shuffle_files(files: Iterable[Path], seed: int) -> list[Callable[[], Iterator[Piece]]]:
    files = list(files)
    random.Random(seed).shuffle(files)
    return [partial(file_pieces, file) for file in files]


def _training_files(path: Path, files: list[Path]) -> tuple[list[Path], list[str]]:
    """Return the files of a folder to train on, and the names of the splits whose files are left out.

    If a record or .txt file is named train, keep only such files. If not, skip records of other splits and READMEs of records.
    """
    records = _records(files)
    data = [*records, *(file for file in files if suffix_of(file) == ".txt")]
    split = {file: _split_of(file.relative_to(path)) for file in data}
    if "train" in split.values():
        kept = [file for file in data if split[file] == "train"]
    elif records:
        about = re.compile(rf"({'|'.join(DOCUMENTATION_NAMES)})\b", re.IGNORECASE)
        texts = [file for file in files if suffix_of(file) in TEXT_SUFFIXES and not about.match(file.name)]
        kept = [*(file for file in records if split[file] is None), *texts]
    else:
        return [file for file in files if file.name not in METADATA_FILES], []
    left = {name for file in data if (name := split[file]) not in (None, "train") and file not in kept}
    return sorted(kept), sorted(left)


def _split_of(inside: Path) -> str | None:
    """Return the split that a file's name gives, or else the name of a folder around it; None if neither names one."""
    for part in reversed(inside.parts):
        for split, words in SPLITS.items():
            if re.search(rf"(?<![a-z])({'|'.join(words)})(?![a-z])", part.lower()):
                return split
    return None


# -- data sets in the sense of `datasets` ----------------------------------------------------------------------------------


def _saved_data_set(path: Path) -> Corpus:
    """Return the corpus of a data set written by `save_to_disk`."""
    from datasets import DatasetDict, load_from_disk

    where, remedy = str(path), "save it again"
    with reraise_as(DataError, f"data {where!r}", "is a saved data set that cannot be loaded", remedy):
        found = load_from_disk(where)
    splits = {str(name): table for name, table in found.items()} if isinstance(found, DatasetDict) else {"train": found}
    chosen = _training_split(splits, where, "the folder of one split")
    table = splits[chosen].with_format(None)  # plain values, even if it was saved to give tensors
    wanted = [column for column in COLUMNS if column in table.column_names]
    if not wanted:
        piece(dict.fromkeys(table.column_names), where)  # raises DataError
    starts = range(0, max(1, len(table)), SAVED_ROWS)
    tables = [table.select_columns(wanted).select(range(start, min(start + SAVED_ROWS, len(table)))) for start in starts]
    left = _splits(name for name in splits if name != chosen)
    return Corpus([partial(_row_pieces, rows, where, "cannot be read", remedy) for rows in tables], left)


def _row_pieces(rows: Iterable[Any], where: str, problem: str, remedy: str) -> Iterator[Piece]:
    with reraise_as(DataError, f"data {where!r}", problem, remedy):
        for row in rows:
            yield piece(row, where)


def _records(files: Iterable[Path]) -> list[Path]:
    return [file for file in files if suffix_of(file) in RECORD_SUFFIXES and file.name not in METADATA_FILES]


def _card(path: Path) -> dict[str, Any] | None:
    """Return the metadata at the head of a folder's README.md; None if there is none."""
    try:
        text = (path / "README.md").read_text(encoding="utf-8-sig")
        facts = yaml.safe_load(text.removeprefix("---").partition("\n---")[0]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return facts if isinstance(facts, dict) else None


def _resolve_data_files(path: Path, configuration: str | None, where: str, card: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the files of a data set by split, as `datasets` resolves them from card and file names; {} if it finds none."""
    from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset_builder

    here, what = str(path.resolve()), f"data {where!r}"
    unresolved = reraise_as(DataError, what, "is a data set that cannot be resolved", "name one of its data files")
    with unresolved, tempfile.TemporaryDirectory() as nowhere:  # leaves the user's cache alone
        try:
            names = get_dataset_config_names(here)
            if configuration is None and len(names) > 1:
                configuration = get_dataset_default_config_name(here)
            if configuration not in (None, *names) or (configuration is None and len(names) > 1):
                raise DataError(what, f"has the configurations {', '.join(names)}", f"name one, as in {path}:{names[0]}")
            found = load_dataset_builder(here, configuration, cache_dir=nowhere).config.data_files or {}
        except FileNotFoundError:
            if configuration is None and "configs" not in card:
                return {}
            raise
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def _training_split(splits: Iterable[str], where: str, remedy: str) -> str:
    """Return the split "train", or else the only one named after training, or else the only one of no known kind."""
    names = list(splits)
    kinds = {name: _split_of(Path(name)) for name in names}
    some = [name for name in names if kinds[name] == "train"] or [name for name in names if kinds[name] is None]
    if "train" not in names and len(some) != 1:
        rule = f"has the splits {', '.join(names)}, but not exactly one to train on"
        raise DataError(f"data {where!r}", rule, f"name {remedy}")
    return "train" if "train" in names else some[0]


def _splits(left: Iterable[str]) -> str:
    names = list(left)
    return f"{'splits' if len(names) > 1 else 'split'} {', '.join(names)}" if names else ""


def _stream_hub_data_set(source: str) -> list[Callable[[], Iterator[Piece]]]:
    """Return one part for each shard (a file, mostly) of a hub data set."""
    from datasets import load_dataset

    name, _, configuration = source.partition(":")
    problem, remedy = "is not a file here, and cannot be streamed from the hub", "name another source"
    with reraise_as(DataError, f"data {source!r}", problem, remedy):
        table = load_dataset(name, configuration or None, split="train", streaming=True)
        shards = [table.shard(table.num_shards, index) for index in range(table.num_shards)]
    return [partial(_row_pieces, shard, source, problem, remedy) for shard in shards]

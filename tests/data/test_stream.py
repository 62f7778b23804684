"""Text that is read while it is used: each document once an epoch, the same batches after a cut, some documents never."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from support.data_cases import END, letters, write_jsonl

from bridge.data import stream as streams
from bridge.data.records import DataError
from bridge.data.stream import Stream, is_held_out, open_stream

CONTEXT, ROWS, FILES, DOCUMENTS = 4, 3, 5, 240


@pytest.fixture(autouse=True)
def _a_small_pool_and_little_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "POOL_TOKENS", 10 * CONTEXT)
    monkeypatch.setattr(streams, "TEXTS", 7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of documents of a number each, over and over, that fill two or three rows with their end."""
    (tmp_path / "texts").mkdir()
    for file in range(FILES):
        first = 2 + file * DOCUMENTS // FILES
        rows = ({"input_ids": document(number)} for number in range(first, first + DOCUMENTS // FILES))
        write_jsonl(tmp_path / "texts" / f"part{file}.jsonl", rows)
    return tmp_path / "texts"


def document(number: int) -> list[int]:
    return [number] * ((2 + number % 2) * CONTEXT - 1)


def opened(source: Path | str) -> Stream:
    return open_stream(str(source), letters(), CONTEXT)


def held_out_numbers() -> set[int]:
    return {number for number in range(2, 2 + DOCUMENTS) if is_held_out(("tokens", document(number)))}


def test_an_epoch_has_each_row_once_and_none_that_is_held_out(folder: Path) -> None:
    stream, held_out = opened(folder), held_out_numbers()
    assert 0 < len(held_out) < DOCUMENTS // 10
    assert set(stream.heldout_nt.flatten().tolist()) - {END} == held_out
    train = set(range(2, 2 + DOCUMENTS)) - held_out
    cut = [[*document(number), END] for number in train]
    rows = sorted(row[start : start + CONTEXT] for row in cut for start in range(0, len(row), CONTEXT))
    steps = len(rows) // 2  # of two rows, so that an epoch ends where a step does, or with one row left
    read = torch.cat([stream.batch(step, 2, 0) for step in range(2 * steps + 1)])
    assert read.dtype == torch.int64
    counts = Counter(map(tuple, read[: 2 * steps].tolist()))
    left = Counter(map(tuple, rows)) - counts
    assert not counts - Counter(map(tuple, rows)) and left.total() == len(rows) % 2
    first, second = read[:40], read[len(rows) :][:40]
    assert first.tolist() != sorted(first.tolist()) and not torch.equal(first, second)  # mixed, and otherwise again


def test_a_batch_depends_on_its_step_alone(folder: Path) -> None:
    stream = opened(folder)
    in_order = [stream.batch(step, ROWS, 0) for step in range(40)]
    for step in (7, 0, 39, 3):
        assert torch.equal(stream.batch(step, ROWS, 0), in_order[step])
    assert not torch.equal(stream.batch(0, ROWS, 1), in_order[0])
    assert torch.equal(stream.batch(0, 2 * ROWS, 0)[:1], opened(folder).batch(0, 2 * ROWS, 0)[:1])


@pytest.mark.parametrize("cut", [1, 8, 190, 205])
def test_from_a_saved_place_it_goes_on_with_the_same_rows(folder: Path, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where an epoch ends, at about the 200th step; the parts that were read through are not opened again."""
    stream = opened(folder)
    for step in range(cut):
        stream.batch(step, ROWS, 0)
    saved = {name: tensor.clone() for name, tensor in stream.tensors().items()}
    expected = [stream.batch(step, ROWS, 0) for step in range(cut, cut + 30)]
    other = opened(folder)
    other.restore(saved)
    taken = []
    monkeypatch.setattr(streams, "_order", lambda count, seed, epoch: taken.append(epoch) or ORDER(count, seed, epoch))
    assert all(torch.equal(other.batch(cut + index, ROWS, 0), batch) for index, batch in enumerate(expected))
    assert min(taken) == int(saved["data.place"][4])  # no earlier epoch was read


ORDER = streams._order


def test_a_data_set_of_datasets_is_streamed_file_by_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As from the hub, from local files by `load_dataset(streaming=True)`; the place in it is good for another process."""
    files = [str(file) for file in sorted(folder.iterdir())]
    load = datasets.load_dataset

    def load_dataset(_name: str, _configuration: str | None, **options: Any) -> Any:
        return load("json", data_files={"train": files}, **options)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    stream = opened("some/set")
    assert len(stream.corpus.parts) == FILES and "streamed from 5 parts" in stream.description
    assert set(stream.heldout_nt.flatten().tolist()) - {END} == held_out_numbers()
    before = torch.cat([stream.batch(step, ROWS, 0) for step in range(50)])
    other = opened("some/set")
    other.restore(stream.tensors())
    after = torch.cat([other.batch(step, ROWS, 0) for step in range(50, 150)])
    whole = torch.cat([opened("some/set").batch(step, ROWS, 0) for step in (0, 49, 149)])
    assert torch.equal(whole, torch.cat([before[:ROWS], before[-ROWS:], after[-ROWS:]]))
    numbers = {number for row in (*before.tolist(), *after.tolist()) for number in row} - {END}
    assert not numbers & held_out_numbers()
    counts = Counter(map(tuple, (*before.tolist(), *after.tolist())))
    assert all(count <= (2 if END not in row else 1) for row, count in counts.items())  # each row once


def test_what_cannot_be_streamed_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data 'self' is sampled before a fit begins; leave data\.stream off"):
        opened("self")
    with pytest.raises(DataError, match=r"data ' ' is empty; give stdlib, self, a file, a folder or a hub id"):
        opened(" ")
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": "a few words"}])
    with pytest.raises(
        DataError, match=r"of 1 documents has no block of 4 tokens in its held-out documents \(one in 50 is held out\)"
    ):
        opened(few)
    stream = opened(folder)
    stream.batch(0, ROWS, 0)
    (folder / "part0.jsonl").unlink()
    with pytest.raises(DataError, match=r"has 4 parts, but had 5 when the run was saved; restore the data"):
        opened(folder).restore(stream.tensors())

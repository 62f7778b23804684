"""Folders are written whole or not at all, and read only if they are what was written."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.models import store as checkpoint
from bridge.models.store import (
    CheckpointError,
    check_new_folder,
    check_writable_file,
    check_writable_folder,
    pack_nonzeros,
    read_folder,
    unpack_nonzeros,
    write_folder,
    write_json,
    write_text,
)

FIRST = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}
SECOND = {"a": -torch.arange(6.0).view(2, 3), "b": torch.tensor([3, 4], dtype=torch.int32)}


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def assert_holds(folder: Path, tensors: dict[str, Tensor], facts: dict) -> None:
    found, found_facts = read_folder(folder, "pair")
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert {key: found_facts[key] for key in facts} == facts
    assert len(list(folder.iterdir())) == 2  # one JSON, one tensor file, nothing temporary


def tensor_file(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def test_a_folder_is_read_back(tmp_path: Path) -> None:
    write_folder(tmp_path / "new" / "deep", "pair", FIRST, {"step": 1})
    assert_holds(tmp_path / "new" / "deep", FIRST, {"step": 1})


def test_a_later_pair_replaces_the_earlier(tmp_path: Path) -> None:
    for tensors, step in ((FIRST, 1), (SECOND, 2), (SECOND, 3)):  # the last: the same tensors with other facts
        write_folder(tmp_path, "pair", tensors, {"step": step})
        assert_holds(tmp_path, tensors, {"step": step})


@pytest.mark.parametrize("fails", ["save_file", "_flush", "_digest", "write_json"])
def test_a_failing_write_leaves_the_earlier_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    write_folder(tmp_path, "pair", FIRST, {"step": 1})
    with monkeypatch.context() as broken:
        broken.setattr(checkpoint, fails, full_disk)
        with pytest.raises(CheckpointError, match=r"could not write .*No space left on device.*; free space or name another"):
            write_folder(tmp_path, "pair", SECOND, {"step": 2})
    assert_holds(tmp_path, FIRST, {"step": 1})


@pytest.mark.parametrize("survives", [0, 1])
def test_a_failing_rename_leaves_the_earlier_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, survives: int) -> None:
    """The first rename is that of the tensors, the second that of the JSON."""
    write_folder(tmp_path, "pair", FIRST, {"step": 1})
    rename, done = os.replace, []

    def replace(*paths: Path) -> None:
        if len(done) == survives:
            full_disk()
        done.append(paths)
        rename(*paths)

    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", replace)
        with pytest.raises(CheckpointError, match="could not write"):
            write_folder(tmp_path, "pair", SECOND, {"step": 2})
    assert_holds(tmp_path, FIRST, {"step": 1})


def test_a_failing_first_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_json", full_disk)
    with pytest.raises(CheckpointError):
        write_folder(tmp_path, "pair", FIRST, {})
    assert not list(tmp_path.iterdir())


def test_what_a_kill_left_behind_is_cleared_by_the_next_write(tmp_path: Path) -> None:
    write_folder(tmp_path, "pair", FIRST, {"step": 1})
    (tmp_path / ".pair.writing").mkdir()
    (tmp_path / ".pair.writing" / ".tmpPnAWQd").write_bytes(b"half a file, under the name that safetensors gives it")
    (tmp_path / "pair-0123456789ab.safetensors").write_bytes(b"renamed, and killed before the JSON was")
    write_folder(tmp_path, "pair", SECOND, {"step": 2})
    assert_holds(tmp_path, SECOND, {"step": 2})


def test_texts_are_there_before_the_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_json", lambda path, _: path.write_text(str((tmp_path / "README.md").read_text())))
    write_folder(tmp_path, "pair", FIRST, {}, {"README.md": "a card"})
    assert (tmp_path / "pair.json").read_text() == "a card"


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_allows(tmp_path: Path, umask: int, expected: int) -> None:
    before = os.umask(umask)
    try:
        write_folder(tmp_path, "pair", FIRST, {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {expected}


def truncate(folder: Path) -> None:
    file = tensor_file(folder)
    file.write_bytes(file.read_bytes()[:-5])


def flip(folder: Path) -> None:
    file = tensor_file(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose(folder: Path) -> None:
    tensor_file(folder).unlink()


def garble(folder: Path) -> None:
    (folder / "pair.json").write_bytes(b"\xff\x00{")


def cut_json(folder: Path) -> None:
    (folder / "pair.json").write_text((folder / "pair.json").read_text()[:-20])


def edit(folder: Path, **tensors: object) -> None:
    facts = json.loads((folder / "pair.json").read_text())
    (folder / "pair.json").write_text(json.dumps({**facts, "tensors": {**facts["tensors"], **tensors}}))


def point_outside(folder: Path) -> None:
    """A file that exists, with the right digest, but not in the folder."""
    tensor_file(folder).rename(folder.parent / "outside.safetensors")
    edit(folder, file="../outside.safetensors")


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (truncate, "its content is not what was written"),
        (flip, "its content is not what was written"),
        (lose, "it is missing"),
        (garble, "invalid start byte"),
        (cut_json, "line 4"),
        (lambda folder: (folder / "pair.json").write_text("[1, 2]"), "not a JSON object"),
        (lambda folder: (folder / "pair.json").write_text("{}"), "names no tensor file"),
        (lambda folder: (folder / "pair.json").write_text('{"tensors": "x"}'), "names no tensor file"),
        (lambda folder: edit(folder, file=3), "names no tensor file"),
        (lambda folder: edit(folder, file=""), "it is missing"),
        (point_outside, "it is missing"),
    ],
)
def test_damage_is_refused_in_one_line(tmp_path: Path, damage, why: str) -> None:
    folder = tmp_path / "folder"
    write_folder(folder, "pair", FIRST, {})
    damage(folder)
    with pytest.raises(CheckpointError, match=f"damaged: .*{why}.*; fetch or fit it again$") as caught:
        read_folder(folder, "pair")
    assert "\n" not in str(caught.value)


def test_a_wrong_file_with_the_right_digest_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, "pair", FIRST, {})
    tensor_file(tmp_path).write_bytes(b"not tensors")
    edit(tmp_path, sha256=checkpoint._digest(tensor_file(tmp_path)))
    with pytest.raises(CheckpointError, match="damaged"):
        read_folder(tmp_path, "pair")


def test_a_folder_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no coupling\.json; name a folder that `bridge fit` wrote"):
        read_folder(tmp_path, "coupling")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_folder(tmp_path / "nowhere", "pair")
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"is a file, not a folder with a circuit\.json; .*`bridge circuit` wrote"):
        read_folder(tmp_path / "file", "circuit")


def test_json_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "facts.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(file, {"a": float("nan")})
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_json(file, {"a": 2})
    assert checkpoint.read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("path", [".", "", "/", "..", "folder"])
def test_a_folder_is_no_file_to_write(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="is a folder; name a file$"):
        write_text(Path(path), "x")
    with pytest.raises(CheckpointError, match=r"^json='.+' cannot be written; name a file in a folder that exists and is writab"):
        check_writable_file(path, "json")
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_an_error_of_writing_names_the_path_that_was_given(tmp_path: Path) -> None:
    for path, error in ((tmp_path / "nowhere" / "x.json", FileNotFoundError), (Path("/proc/version/x.json"), NotADirectoryError)):
        with pytest.raises(error) as caught:
            write_text(path, "x")
        assert caught.value.filename == str(path) and ".writing'" not in str(caught.value)
        with pytest.raises(CheckpointError, match="cannot be written; name a file in a folder that exists"):
            check_writable_file(path, "json")
    assert not list(tmp_path.iterdir())


def test_text_that_is_none_leaves_the_earlier_file(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "earlier")
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x", "\ud800")
    assert (tmp_path / "x").read_text() == "earlier" and len(list(tmp_path.iterdir())) == 1


def test_a_link_gives_way_and_what_it_leads_to_stays(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("shared")
    (tmp_path / "link").symlink_to("there/file")
    assert check_writable_file(tmp_path / "link", "--json") == tmp_path / "link"
    write_text(tmp_path / "link", "own")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == "own"
    assert (tmp_path / "there" / "file").read_text() == "shared"


def test_a_pipe_and_a_device_are_written_to_and_stay(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    check_writable_file(tmp_path / "pipe", "--json")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_text(tmp_path / "pipe", "through it")
        assert os.read(reader, 100) == b"through it"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    (tmp_path / "null").symlink_to("/dev/null")
    check_writable_file(tmp_path / "null", "--json")
    write_text(tmp_path / "null", "nowhere")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode) and (tmp_path / "null").is_symlink()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["null", "pipe"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}"], ids=["lists", "objects", "digits"]
)
def test_json_beyond_what_python_reads_is_damaged(tmp_path: Path, text: str) -> None:
    (tmp_path / "facts.json").write_text(text)
    with pytest.raises(CheckpointError, match="facts.json' is damaged: .*; fetch or fit it again") as caught:
        checkpoint.read_json(tmp_path / "facts.json")
    assert "\n" not in str(caught.value)


def test_check_folder_wants_a_folder_that_can_be_made_or_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "lost").symlink_to("nowhere")
    for good in (tmp_path, tmp_path / "new" / "deeper"):
        assert check_writable_folder(good) == good
    for bad in (tmp_path / "file", tmp_path / "file" / "inside", tmp_path / "lost", tmp_path / "lost" / "inside"):
        with pytest.raises(CheckpointError, match=r"^out='.*' cannot be created: '.*' is not a writable folder; name another"):
            check_writable_folder(bad)
    with pytest.raises(CheckpointError, match="^against='"):
        check_writable_folder(tmp_path / "file", "against")
    assert not (tmp_path / "new").exists()


def test_check_new_wants_a_place_for_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = tmp_path / "file"
    file.write_text("")
    assert check_new_folder(tmp_path / "new" / "deeper") == tmp_path / "new" / "deeper"
    assert check_new_folder(tmp_path / "empty") == tmp_path / "empty"
    for taken in (tmp_path, file):
        with pytest.raises(CheckpointError, match=r"exists and is not empty; name a new folder, or give resume="):
            check_new_folder(taken)
    with pytest.raises(CheckpointError, match="cannot be created"):
        check_new_folder(file / "inside")
    assert not (tmp_path / "new").exists()


def with_nonzeros(rows: int, columns: int, *places: tuple[int, int], dtype: torch.dtype = torch.float32) -> Tensor:
    matrix = torch.zeros(rows, columns, dtype=dtype)
    for number, place in enumerate(places, 1):
        matrix[place] = number / 8
    return matrix


@pytest.mark.parametrize(
    ("matrix", "column_bytes"),
    [
        (with_nonzeros(4, 5, (0, 4), (2, 0), (2, 3)), 2),  # rows 1 and 3 are empty
        (with_nonzeros(3, 7), 2),
        (with_nonzeros(1, 1, (0, 0)), 2),
        (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 2),
        (with_nonzeros(2, 1 << 16, (0, 65535), (1, 32768)), 2),
        (with_nonzeros(2, (1 << 16) + 1, (0, 65536), (1, 1)), 4),
        (with_nonzeros(3, 4, (1, 2), dtype=torch.bfloat16), 2),
    ],
)
def test_a_matrix_comes_back_from_its_nonzeros(tmp_path: Path, matrix: Tensor, column_bytes: int) -> None:
    packed = pack_nonzeros("w", matrix)
    count = int((matrix != 0).sum())
    assert sum(part.numel() * part.element_size() for part in packed.values()) == (
        count * (matrix.element_size() + column_bytes) + 4 * matrix.shape[0]
    )
    write_folder(tmp_path, "pair", packed, {})  # through the file too: not every format knows 16 unsigned bits
    found = unpack_nonzeros("w", read_folder(tmp_path, "pair")[0], matrix.shape[1])
    assert found.dtype == matrix.dtype and torch.equal(found, matrix)


def test_nonzeros_that_do_not_fit_are_refused() -> None:
    packed = pack_nonzeros("w", with_nonzeros(4, 5, (0, 4), (2, 0), (2, 3)))
    for tensors, columns in (
        ({key: value for key, value in packed.items() if "counts" not in key}, 5),
        (packed, 4),
        ({**packed, "w.values": packed["w.values"][:2]}, 5),
        ({**packed, "w.counts": packed["w.counts"] + 1}, 5),
    ):
        with pytest.raises(CheckpointError, match="nonzeros of w are missing or do not fit together"):
            unpack_nonzeros("w", tensors, columns)

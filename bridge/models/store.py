"""Tensors and facts in a folder: safetensors and JSON, written atomically, checked when read.

A folder holds one JSON file and one safetensors file. The JSON is written last and names the tensor file with its SHA-256, and a
tensor file is named by its content. So at any moment, even after a kill or on a full disk, the JSON on disk describes a complete
file beside it. Reading checks the digest; a file that does not match is refused, never repaired.

Sparse matrices are stored by their nonzeros: the values, the column of each, and the number in each row.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from bridge.errors import UserError, first_line


class CheckpointError(UserError):
    """An error, in one line: a folder cannot be read or written as a checkpoint."""


def check_new_folder(path: str | Path) -> Path:
    """Return the path if a new checkpoint may be written to it. Raises CheckpointError if something is there already."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise CheckpointError(
            f"‹out› {str(path)!r}", "exists and is not empty", "name a new folder, or give ‹resume› to continue it"
        )
    return check_writable_folder(path)


def check_writable_folder(path: str | Path, option: str = "out") -> Path:
    """Return the path if it is a folder that can be made or written to. Raises CheckpointError, before any computation."""
    path = Path(path)
    above = next(folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise CheckpointError(
            f"‹{option}› {str(path)!r}", f"cannot be created: {str(above)!r} is not a writable folder", "name another folder"
        )
    return path


def check_writable_file(path: str | Path, option: str) -> Path:
    """Return the path if it is a file that can be written to. Raises CheckpointError, before any computation."""
    path = Path(path)
    folder = path.absolute().parent
    special = path.exists() and not path.is_file()
    there = os.access(path, os.W_OK) if special else folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    if path.is_dir() or not there:
        raise CheckpointError(
            f"‹{option}› {str(path)!r}", "cannot be written", "name a file in a folder that exists and is writable"
        )
    return path


def write_folder(
    path: str | Path, name: str, tensors: dict[str, Tensor], facts: dict[str, Any], texts: dict[str, str] | None = None
) -> None:
    """Write `name.json` with the facts and `name-DIGEST.safetensors` with the tensors, replacing an earlier pair atomically.

    `texts` are further files by name, written before the JSON. Raises CheckpointError if the disk is full or not writable; the
    earlier pair is then still there, whole.
    """
    path = Path(path)
    desk = path / f".{name}.writing"  # a folder, because safetensors leaves a file of its own beside its target when killed
    temporary = desk / "tensors"
    earlier: set[Path] = set()
    file = temporary
    try:
        shutil.rmtree(desk, ignore_errors=True)
        desk.mkdir(parents=True)
        earlier = set(path.glob(f"{name}-*.safetensors"))
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask allows; the mode of safetensors lets no other user read
        save_file({key: tensor.detach().contiguous().cpu() for key, tensor in tensors.items()}, temporary)
        temporary.chmod(mode)
        _flush(temporary)
        digest = _digest(temporary)
        file = path / f"{name}-{digest[:12]}.safetensors"
        os.replace(temporary, file)
        for text_name, text in (texts or {}).items():
            write_text(path / text_name, text)
        write_json(path / f"{name}.json", {**facts, "tensors": {"file": file.name, "sha256": digest}})
    except (OSError, SafetensorError) as error:
        shutil.rmtree(desk, ignore_errors=True)
        if file not in earlier:
            with contextlib.suppress(OSError):
                file.unlink()
        raise CheckpointError(f"could not write {str(path)!r} ({error})", remedy="free space or name another folder") from None
    shutil.rmtree(desk, ignore_errors=True)
    for old in earlier - {file}:
        with contextlib.suppress(OSError):
            old.unlink()


def read_folder(path: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and facts of a folder written by `write_folder`.

    Raises CheckpointError if they are missing or damaged.
    """
    path = Path(path)
    if not (path / f"{name}.json").is_file():
        missing = "is a file, not a folder with a" if path.exists() else "does not exist, so there is no"
        there = "holds no" if path.is_dir() else missing
        writer = {"coupling": "bridge fit", "circuit": "bridge circuit"}.get(name, "bridge")
        raise CheckpointError(f"{str(path)!r}", f"{there} {name}.json", f"name a folder that `{writer}` wrote")
    facts = read_json(path / f"{name}.json")
    try:
        file, digest = path / facts["tensors"]["file"], facts["tensors"]["sha256"]
    except (KeyError, TypeError):
        raise _damaged(path / f"{name}.json", "it names no tensor file") from None
    if file.parent != path or not file.is_file():
        raise _damaged(file, "it is missing")
    try:
        if _digest(file) != digest:
            raise _damaged(file, "its content is not what was written")
        return load_file(file), facts
    except (OSError, SafetensorError) as error:
        raise _damaged(file, str(error)) from None


@contextlib.contextmanager
def refuse_unreadable(what: object, kind: str, remedy: str, refusal: type[UserError] = CheckpointError) -> Iterator[None]:
    """A context in which stored values are read; an error there is raised in one line as a `refusal`: they are no `kind`."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
        raise refusal(what, f"is no {kind} that this version reads ({why})", remedy) from None
    except (KeyError, TypeError, ValueError, RuntimeError, RecursionError) as error:
        raise refusal(what, f"is no {kind} that this version reads ({first_line(error)})", remedy) from None


def as_json(value: Any) -> dict[str, Any]:
    """Return a dataclass as plain JSON values. Raises ValueError for NaN."""
    return json.loads(json.dumps(asdict(value), allow_nan=False))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the earlier one or the new one, whole."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, remedy: str = "fetch or fit it again") -> dict[str, Any]:
    """Read a JSON object. Raises CheckpointError, with the remedy, if the file holds anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, str(error), remedy) from None
    if not isinstance(value, dict):
        raise _damaged(path, "it is not a JSON object", remedy)
    return value


def pack_nonzeros(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """Pack a matrix as three named vectors: nonzero values, their columns (in 16 bits if those suffice), and counts per row."""
    matrix = matrix.detach().cpu()
    row, column = matrix.nonzero(as_tuple=True)
    small = matrix.shape[1] <= 1 << 16
    return {
        f"{name}.values": matrix[row, column],
        f"{name}.columns": column.to(torch.uint16 if small else torch.int32),
        f"{name}.counts": torch.bincount(row, minlength=matrix.shape[0]).to(torch.int32),
    }


def unpack_nonzeros(name: str, tensors: dict[str, Tensor], columns: int) -> Tensor:
    """Return the matrix, of `columns` columns, that `pack_nonzeros` packed. Raises CheckpointError if the parts do not fit."""
    try:
        values, column, counts = (tensors[f"{name}.{part}"] for part in ("values", "columns", "counts"))
        row = torch.repeat_interleave(torch.arange(len(counts)), counts.long())
        matrix = torch.zeros(len(counts), columns, dtype=values.dtype)
        matrix[row, column.long()] = values
    except (KeyError, IndexError, RuntimeError):
        raise CheckpointError(
            f"the checkpoint's nonzeros of {name}", "are missing or do not fit together", "fetch it again"
        ) from None
    return matrix


def write_text(path: Path, text: str) -> None:
    """Write a text so that the file is either the earlier one or the new one, whole; pipes and devices are written to directly.

    A link to a file is replaced by the new file, because in a hub's cache other snapshots share the link's target. Raises
    CheckpointError for a folder, and OSError with this path if it cannot be written.
    """
    if path.is_dir():
        raise CheckpointError(f"{str(path)!r}", "is a folder", "name a file")
    content = text.encode()
    temporary = path.with_name(f".{path.name}.writing")
    try:
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None


def _damaged(path: Path, why: str, remedy: str = "fetch or fit it again") -> CheckpointError:
    return CheckpointError(f"checkpoint file {str(path)!r} is damaged:", why, remedy)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())

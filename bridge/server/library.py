"""The couplings and circuits on disk under their root folders, and the labels that people give to nodes.

A request names a coupling or circuit by its listed name, which is looked up in the list: no path is ever built from a request.
A file that a symbolic link leads to outside its root is not listed. Every name begins with the name of its root.

If too many couplings are in memory, the least recently used one is dropped. Labels are kept in `labels.json` in the coupling's
folder, one text for each labelled node; the file is replaced atomically.
"""

from __future__ import annotations

import json
import os
import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bridge.errors import UserError
from bridge.explanations.explanation import Fingerprints
from bridge.models.bridges import CoupledModels
from bridge.models.sparse import Location, SparseTransformer
from bridge.models.store import CheckpointError, read_json, write_json
from bridge.nodes.statistics import parse_node
from bridge.recipe import resolve

DEPTH = 3  # levels of folders below a root that are searched
MOST_LISTED = 500
LOADED = 2  # couplings in memory, at most
MOST_LABELS, LONGEST_LABEL = 5000, 300
LABELS = "labels.json"
_QUOTED_FOLDERS = re.compile(r"""(?<!\w)(['"])[^'"\n]*[/\\](?=[^'"/\\\n]+\1(?!\w))""")
_NODE = re.compile(r"(L\d{1,6}\.)?\w{1,32}\[\d{1,9}\]")


class LibraryError(UserError):
    """A folder that cannot be served, or a label that cannot be kept."""


class NotListedError(LibraryError):
    """A name that is not in the list."""


class Library:
    """The couplings under some folders, the circuits under another, and those loaded into memory.

    `dense` is where the couplings' dense model is, if it has moved. Raises LibraryError if a root is not a folder, if two roots
    of couplings have the same name, or if they hold no coupling.
    """

    def __init__(
        self, couplings: Sequence[Path], circuits: Path | None = None, *, dense: str | None = None, device: str = "cpu"
    ) -> None:
        self._roots = [_root(path, "‹bridge›") for path in couplings]
        self._circuits = None if circuits is None else _root(circuits, "‹circuits›")
        names = [root.name for root in self._roots]
        if twice := [name for name in names if names.count(name) > 1]:
            raise LibraryError("two folders of couplings", f"are called {twice[0]!r}", "rename one, or serve them one at a time")
        self.dense, self.device = dense, device
        self._loaded: OrderedDict[tuple[Path, int], tuple[CoupledModels, Fingerprints]] = OrderedDict()
        self._lock = threading.Lock()  # guards `_loaded`
        self._loading, self._writing = threading.Lock(), threading.Lock()  # one load, one write of labels at a time
        if not self.couplings():
            raise LibraryError(
                f"there is no coupling in {', '.join(map(str, couplings))}", remedy="name a folder that `bridge fit` wrote"
            )

    # -- couplings ----------------------------------------------------------------------------------------------------------

    def couplings(self) -> dict[str, Path]:
        """The folders of couplings by name; the first is the default."""
        return {name: folder for root in self._roots for name, folder in _find_folders(root, "coupling.json")}

    def coupling(self, name: str | None) -> tuple[str, Path]:
        """The name and folder of a coupling; None means the first one. Raises NotListedError."""
        listed = self.couplings()
        return _pick(name if name is not None else next(iter(listed), ""), listed, "coupling", "/api/couplings")

    def load(self, name: str) -> tuple[CoupledModels, Fingerprints]:
        """A coupling and its fingerprints, from memory or from its folder. Raises NotListedError or CheckpointError."""
        with self._loading:
            _, folder = self.coupling(name)
            if (there := self.in_memory(folder)) is not None:
                return there
            key = _version(folder)
            try:
                coupling = CoupledModels.from_pretrained(folder, dense=self.dense, device=self.device)
            except UserError as error:
                problem = _strip_folders(error.problem)
                raise CheckpointError(f"{name!r}", f"cannot be loaded: {problem}", _strip_folders(error.remedy)) from None
            known = coupling, Fingerprints.of(coupling)
            with self._lock:
                self._loaded[key] = known
                while len(self._loaded) > LOADED:
                    self._loaded.popitem(last=False)
            return known

    def find_loaded(self, name: str) -> tuple[CoupledModels, Fingerprints] | None:
        """The result of `load` if the coupling's current version on disk is in memory, otherwise None. Raises NotListedError."""
        return self.in_memory(self.coupling(name)[1])

    def in_memory(self, folder: Path) -> tuple[CoupledModels, Fingerprints] | None:
        """The result of `load` if the current version of a listed folder is in memory, otherwise None."""
        key = _version(folder)
        with self._lock:
            if key in self._loaded:
                self._loaded.move_to_end(key)
            return self._loaded.get(key)

    @staticmethod
    def facts(folder: Path) -> dict[str, Any]:
        """The facts of a `CouplingEntry`, read from a coupling's coupling.json. Raises CheckpointError."""
        facts = _read(folder / "coupling.json")
        try:
            recipe, dense = resolve(facts["recipe"]), facts["dense"]
            return {
                "dense": Path(dense["name"]).name if dense.get("beside") else str(dense["name"]),
                "blocks": recipe.sparse.blocks, "l0": recipe.sparsity.l0, "width": recipe.sparse.width,
                "sublayers": len(dense["sublayers"]), "context": recipe.data.context, "vocabulary": int(dense["vocabulary"]),
            }  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            why = _strip_folders(str(error))
            raise CheckpointError(f"{folder.name!r}", f"is no coupling that this version reads ({why})", "fit it again") from None

    # -- labels -------------------------------------------------------------------------------------------------------------

    def labels(self, name: str | None) -> dict[str, str]:
        """The labels of a coupling's nodes. Raises NotListedError, or CheckpointError if the file does not hold labels."""
        return _labels(self.coupling(name)[1])

    def relabel(self, name: str | None, given: Mapping[str, str], *, others: bool) -> dict[str, str]:
        """Set the given labels, drop those with an empty text, keep all other labels if `others`, and return the result.

        Raises NotListedError, LibraryError, NodeError, or CheckpointError if the file cannot be read or written.
        """
        _, folder = self.coupling(name)
        _check_few(given)
        sizes = _sizes(folder)
        checked = {_node_name(node, sizes): _label(node, text) for node, text in given.items()}
        with self._writing:
            labels = {node: text for node, text in {**(_labels(folder) if others else {}), **checked}.items() if text}
            _check_few(labels)
            try:
                write_json(folder / LABELS, dict(sorted(labels.items())))
            except OSError as error:
                raise CheckpointError(
                    LABELS, f"cannot be written ({error.strerror})", "make the coupling's folder writable"
                ) from None
        return labels

    # -- circuits -----------------------------------------------------------------------------------------------------------

    def circuits(self) -> dict[str, Path]:
        """The folders of circuits by name; empty if no folder of circuits is served."""
        return {} if self._circuits is None else dict(_find_folders(self._circuits, "circuit.json"))

    def circuit(self, name: str) -> tuple[str, Path]:
        """The name and folder of a circuit. Raises NotListedError."""
        return _pick(name, self.circuits(), "circuit", "/api/circuits")


def finite_json(path: Path) -> dict[str, Any]:
    """A JSON object that can be sent. Raises CheckpointError if it holds NaN, infinities or invalid characters."""
    values = _read(path)
    try:
        json.dumps(values, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        what = f"{'/'.join(path.parts[-2:])!r} is damaged: it holds numbers or text that JSON does not allow"
        raise CheckpointError(what, remedy="make it again") from None
    return values


def _root(path: Path, option: str) -> Path:
    if not path.is_dir():
        raise LibraryError(f"{option} {str(path)!r}", "is not a folder", "name one that exists")
    return path.resolve()


def _find_folders(root: Path, file: str) -> Iterator[tuple[str, Path]]:
    """Names and folders that hold such a file, the root itself included; folders below a match are not searched."""
    count = 0
    for at, below, files in os.walk(root):
        folder = Path(at)
        parts = folder.relative_to(root).parts
        below[:] = sorted(name for name in below if not name.startswith(".") and name.isprintable() and len(parts) < DEPTH)
        if file in files and (folder / file).resolve().is_relative_to(root):
            below.clear()
            yield "/".join((root.name, *parts)), folder
            count += 1
            if count == MOST_LISTED:
                return


def _pick(name: str, listed: Mapping[str, Path], what: str, where: str) -> tuple[str, Path]:
    if name not in listed:
        raise NotListedError(f"there is no {what} {name[:80]!r} here", remedy=f"choose one that GET {where} lists")
    return name, listed[name]


def _version(folder: Path) -> tuple[Path, int]:
    try:
        return folder, (folder / "coupling.json").stat().st_mtime_ns
    except OSError:
        raise NotListedError(f"the coupling {folder.name!r}", "no longer exists", "see GET /api/couplings for others") from None


def _read(path: Path) -> dict[str, Any]:
    remedy = {"remedy": "repair it, or move it away"} if path.name == LABELS else {}  # labels by people cannot be fitted again
    try:
        return read_json(path, **remedy)
    except CheckpointError as error:
        raise CheckpointError(*map(_strip_folders, (error.what, error.rule, error.remedy))) from None


def _strip_folders(text: str) -> str:
    """A message with every quoted path cut to its last part, so clients do not learn folders."""
    return _QUOTED_FOLDERS.sub(r"\1", text)


def _labels(folder: Path) -> dict[str, str]:
    file = folder / LABELS
    if not file.exists():
        return {}
    if file.resolve().parent != folder:
        raise CheckpointError(LABELS, "is a link to a file outside the coupling's folder", "replace it by the file")
    values = finite_json(file)
    if not all(isinstance(text, str) for text in values.values()):
        raise CheckpointError(LABELS, "is damaged: not every label is a text", "repair or delete it")
    return values


def _check_few(labels: Mapping[str, str]) -> None:
    if len(labels) > MOST_LABELS:
        raise LibraryError(f"{len(labels):,} labels", f"are too many: a coupling keeps at most {MOST_LABELS:,}", "drop some")


def _sizes(folder: Path) -> Mapping[Location, int]:
    """The node locations of a coupling and their sizes, from the shape in its JSON."""
    facts = _read(folder / "coupling.json")
    with torch.device("meta"):
        shape = resolve(facts["recipe"]).sparse
        return SparseTransformer(shape, tuple(facts["dense"]["sublayers"]), 1, 1).locations()


def _node_name(name: str, sizes: Mapping[Location, int]) -> str:
    if not _NODE.fullmatch(name):
        raise LibraryError(f"{name[:80]!r}", "names no node", "write layer, kind and channel as in L1.mlp_act[37]")
    return parse_node(name, sizes).name if name.startswith("L") else name  # channels of the embedding have no layer


def _label(node: str, text: str) -> str:
    line = " ".join(text.split())
    if len(line) > LONGEST_LABEL:
        raise LibraryError(
            f"the label of {node}", f"is {len(line):,} characters long, and at most {LONGEST_LABEL} are kept", "shorten it"
        )
    if odd := next((character for character in line if unicodedata.category(character) in ("Cc", "Cs")), None):
        raise LibraryError(f"the label of {node}", f"holds {odd!r}, which cannot be shown", "leave it out")
    return line

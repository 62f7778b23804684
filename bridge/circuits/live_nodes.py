"""The part of a frozen sparse model that can matter to its logits: what a masked pass computes, and no more.

A model started as its dense model in a larger width leaves most of its channels, neurons and heads without weights: three
quarters of what ships. Left out, with the same results, is what is 0 under every mask or read by nothing:

    channel of the stream, with its nodes    where nothing writes it, and the means and the errors are 0 there too
    head, with its q, k and v                where o reads none of its channels
    neuron                                   where down does not read it

One thing such a node can still do: be among those that AbsTopK keeps, in the place of another. So those that are not always 0
are computed up to AbsTopK (`rival_m`); of the constant ones, no more of the largest than AbsTopK keeps.

Shape legend: n live nodes of a location, m its rivals, s channels of the stream, h heads, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.kernels.masked import StoredMatrix
from bridge.kernels.products import Compact, source_of
from bridge.models.schema import ERROR, HEAD_KINDS, READ_KINDS, WRITE_KINDS
from bridge.models.sparse import Location, SparseTransformer


@dataclass(frozen=True, eq=False)
class LiveNodes:
    """The live nodes of a location by their channels, ascending, and its rivals; how many of all its nodes AbsTopK keeps.

    place_c is the place of each channel among the live ones, -1 of one that is not.
    """

    channel_n: Tensor
    rival_m: Tensor
    kept: int
    place_c: Tensor

    @staticmethod
    def of(live_c: Tensor, rival_m: Tensor, keep: float) -> LiveNodes:
        """The nodes of a location of which live_c are live."""
        place_c = torch.where(live_c, live_c.cumsum(0) - 1, -1)
        return LiveNodes(live_c.nonzero().flatten(), rival_m, max(1, round(keep * len(live_c))), place_c)


class LiveModel:
    """The live parts of a sparse model whose stream is written, besides by its weights, at the channels also_s."""

    def __init__(self, sparse: SparseTransformer, also_s: Tensor) -> None:
        weight, layers = sparse.get_parameter, {at.layer for at in sparse.locations()}
        stream_s = also_s | weight("embedding").ne(0).any(0)
        if sparse.positions is not None:
            stream_s = stream_s | sparse.positions.ne(0).any(0)
        for layer in layers:
            for name in ("o", "down"):
                path = f"blocks.{layer}.{name}"
                stream_s = stream_s | weight(f"{path}.weight").ne(0).any(1) | weight(f"{path}.bias").ne(0)
        self.stream_s = _not_empty(stream_s).nonzero().flatten()
        self.nodes, self.heads = dict[Location, LiveNodes](), dict[int, Tensor]()
        for layer in layers:
            head_h = _not_empty(weight(f"blocks.{layer}.o.weight").ne(0).any(0).unflatten(0, (-1, sparse.channels)).any(1))
            self.heads[layer] = head_h.nonzero().flatten()
            head_c = head_h.repeat_interleave(sparse.channels)
            neuron_c = _not_empty(weight(f"blocks.{layer}.down.weight").ne(0).any(0))
            for kind in READ_KINDS + WRITE_KINDS:
                self.nodes[Location(layer, kind)] = LiveNodes.of(stream_s, torch.zeros(0, dtype=torch.long), sparse.keep)
            for kind, name, live_c in (*((kind, kind, head_c) for kind in HEAD_KINDS), ("mlp_act", "up", neuron_c)):
                self.nodes[Location(layer, kind)] = LiveNodes.of(live_c, self._rivals(sparse, layer, name, live_c), sparse.keep)
        blocks = {f"blocks.{layer}.{name}": (layer, *ends) for layer in layers for name, ends in sparse.matrices.items()}
        self.matrices = {
            name: self._matrix(sparse, name, Location(at, a), Location(at, b)) for name, (at, a, b) in blocks.items()
        }
        self.matrices["unembedding"] = self._matrix(sparse, "unembedding")

    @staticmethod
    def _rivals(sparse: SparseTransformer, layer: int, name: str, live_c: Tensor) -> Tensor:
        """The nodes that a matrix writes that are not live and can have a place in AbsTopK."""
        weight_mn, bias_m = (sparse.get_parameter(f"blocks.{layer}.{name}.{part}") for part in ("weight", "bias"))
        size_c = (F.gelu(bias_m, approximate="tanh") if name == "up" else bias_m).abs()
        varies_c, kept = weight_mn.ne(0).any(1), max(1, round(sparse.keep * len(live_c)))
        if kept == len(live_c):
            return torch.zeros(0, dtype=torch.long)
        constant_c = ~live_c & ~varies_c & (size_c > 0)
        largest = torch.where(constant_c, size_c, 0).topk(min(kept, int(constant_c.sum()))).indices
        return (~live_c & varies_c).index_fill(0, largest, True).nonzero().flatten()

    def _matrix(
        self, sparse: SparseTransformer, name: str, read: Location | None = None, written: Location | None = None
    ) -> StoredMatrix:
        """A matrix from the live nodes that it reads to those that it writes, and their rivals; without locations, of the logits."""
        weight_mn, bias_m = (sparse.get_parameter(f"{name}.{part}").detach() for part in ("weight", "bias"))
        read_n, row_m, live = self.stream_s, torch.arange(len(bias_m)), len(bias_m)
        if read is not None and written is not None:
            nodes = self.nodes[written]
            read_n, live = self.nodes[read].channel_n, len(nodes.channel_n)
            row_m = torch.cat([nodes.channel_n, nodes.rival_m])
        part_mn = weight_mn[row_m][:, read_n]
        return StoredMatrix.of(Compact.of(part_mn), bias_m[row_m], Compact.of(part_mn[:live]))


_known: WeakKeyDictionary[SparseTransformer, tuple[tuple[object, ...], LiveModel]] = WeakKeyDictionary()


def live_model(
    sparse: SparseTransformer, means: Mapping[Location, Tensor], errors: Mapping[Location, Tensor] | None
) -> LiveModel:
    """The live parts of a model whose nodes, or errors, are at their means or their values; kept for the next question."""
    also_s = torch.zeros(sparse.width, dtype=torch.bool)
    for at, mean_n in means.items():
        if at.kind in READ_KINDS + WRITE_KINDS or (at.kind == ERROR and at.layer < sparse.n_sites):
            also_s |= mean_n.reshape(-1, sparse.width).ne(0).any(0)
    for at, error_bts in (errors or {}).items():
        if at.layer < sparse.n_sites:
            also_s |= error_bts.flatten(0, -2).ne(0).any(0)
    state = (*map(source_of, sparse.parameters()), also_s.numpy().tobytes())
    if _known.get(sparse, (None, None))[0] != state:
        _known[sparse] = state, LiveModel(sparse, also_s)
    return _known[sparse][1]


def _not_empty(live_c: Tensor) -> Tensor:
    """live_c, with one at least, since kernels expect some."""
    return live_c if bool(live_c.any()) else live_c.index_fill(0, torch.zeros(1, dtype=torch.long), True)

"""The part of a frozen sparse model that can affect its logits: a masked pass computes this part and no more.

A model started from its dense model in a larger width leaves most of its channels, neurons and heads without weights: three
quarters of the model that ships. A node that is 0 under every mask, or that nothing reads, is left out; results are the same:

    channel of the stream, with its nodes    if nothing writes it, and the means and the errors are 0 there too
    head, with its q, k and v                if o reads none of its channels
    neuron                                   if down does not read it

Such a node can still have one effect: AbsTopK may keep it in place of another. Rivals (`rival_m`) are therefore computed up to
AbsTopK: all that are not constant, and the largest of the constant ones, at most as many as AbsTopK keeps.

Shape legend: n live nodes of a location, m its rivals, s channels of the stream, h heads, c channels of a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.kernels.lanes import LANES
from bridge.kernels.masked import StoredMatrix
from bridge.kernels.products import SparseMatrix, weight_version
from bridge.models.circuit import NodeSpace
from bridge.models.schema import ERROR, HEAD_KINDS, READ_KINDS, WRITE_KINDS
from bridge.models.sparse import Location, SparseTransformer


@dataclass(frozen=True, eq=False)
class LiveNodes:
    """The live nodes of a location and its rivals, by channel in ascending order; how many of all its nodes AbsTopK keeps.

    place_c is the index of each channel among the live ones, -1 for a channel that is not live.
    """

    channel_n: Tensor
    rival_m: Tensor
    kept: int
    place_c: Tensor

    @staticmethod
    def of(live_c: Tensor, keep: float, varies_c: Tensor, size_c: Tensor) -> LiveNodes:
        """Return the nodes of a location: live_c are live, varies_c are not constant, size_c is a constant's magnitude."""
        kept, place_c = max(1, round(keep * len(live_c))), torch.where(live_c, live_c.cumsum(0) - 1, -1)
        constant_c = torch.where(live_c | varies_c, 0, size_c)
        largest = constant_c.topk(min(kept, int(constant_c.count_nonzero()))).indices
        rival_c = (~live_c & varies_c).index_fill(0, largest, True) & (kept < len(live_c))
        return LiveNodes(live_c.nonzero().flatten(), rival_c.nonzero().flatten(), kept, place_c)


class LiveModel:
    """The live parts of a sparse model; also_s marks the channels of the stream that are written by more than its weights."""

    def __init__(self, sparse: SparseTransformer, also_s: Tensor) -> None:
        self.n_sites = sparse.n_sites
        weight, layers = sparse.get_parameter, sorted({at.layer for at in sparse.locations()})
        stream_s = also_s | weight("embedding").ne(0).any(0)
        if sparse.positions is not None:
            stream_s = stream_s | sparse.positions.ne(0).any(0)
        for layer in layers:
            for name in ("o", "down"):
                path = f"blocks.{layer}.{name}"
                stream_s = stream_s | weight(f"{path}.weight").ne(0).any(1) | weight(f"{path}.bias").ne(0)
        stream_s = _not_empty(stream_s)
        self.stream_s = stream_s.nonzero().flatten()
        self.nodes, self.heads = dict[Location, LiveNodes](), dict[int, Tensor]()
        self.matrices = dict[int, dict[str, StoredMatrix]]()
        never_s = torch.zeros_like(stream_s)
        for layer in layers:
            head_h = _not_empty(weight(f"blocks.{layer}.o.weight").ne(0).any(0).unflatten(0, (-1, sparse.channels)).any(1))
            self.heads[layer] = head_h.nonzero().flatten()
            head_c = head_h.repeat_interleave(sparse.channels)
            neuron_c = _not_empty(weight(f"blocks.{layer}.down.weight").ne(0).any(0))
            for kind in READ_KINDS + WRITE_KINDS:
                self.nodes[Location(layer, kind)] = LiveNodes.of(stream_s, sparse.keep, never_s, never_s)
            for kind, name, live_c in (*((kind, kind, head_c) for kind in HEAD_KINDS), ("mlp_act", "up", neuron_c)):
                weight_mn, bias_m = weight(f"blocks.{layer}.{name}.weight"), weight(f"blocks.{layer}.{name}.bias")
                size_c = (F.gelu(bias_m, approximate="tanh") if name == "up" else bias_m).abs()
                self.nodes[Location(layer, kind)] = LiveNodes.of(live_c, sparse.keep, weight_mn.ne(0).any(1), size_c)
            self.matrices[layer] = {}
            for name, (read, written) in sparse.matrices.items():
                nodes, read_n = self.nodes[Location(layer, written)], self.nodes[Location(layer, read)].channel_n
                row_m = torch.cat([nodes.channel_n, nodes.rival_m])
                self.matrices[layer][name] = _stored(sparse, f"blocks.{layer}.{name}", read_n, row_m, len(nodes.channel_n))
        every_v = torch.arange(sparse.vocabulary)
        self.unembedding = _stored(sparse, "unembedding", self.stream_s, every_v, len(every_v))


def _stored(sparse: SparseTransformer, name: str, read_n: Tensor, row_m: Tensor, live: int) -> StoredMatrix:
    """Return the matrix from the nodes read_n to the nodes row_m; only the first `live` of these have a backward pass."""
    weight_mn, bias_m = (sparse.get_parameter(f"{name}.{part}").detach() for part in ("weight", "bias"))
    part_mn = weight_mn[row_m][:, read_n]
    return StoredMatrix.of(SparseMatrix.of(part_mn), bias_m[row_m], SparseMatrix.of(part_mn[:live]))


@dataclass(frozen=True, eq=False)
class KernelLocation:
    """A location for the kernels: offset and number per token of its masks, its live nodes, and the errors of a site.

    kept is how many nodes AbsTopK keeps; near says about where its thresholds were at the last call.
    """

    first: int
    size: int
    mean_n: np.ndarray
    channel_n: np.ndarray
    kept: int
    near: np.ndarray
    excess_bts: np.ndarray


@dataclass(frozen=True, eq=False)
class Sublayer:
    """A sublayer for the kernels: its locations by kind, its matrices by name, the sinks of its live heads."""

    at: dict[str, KernelLocation]
    matrix: dict[str, StoredMatrix]
    sink_h: np.ndarray


def kernel_locations(
    live: LiveModel, space: NodeSpace, means: Mapping[Location, Tensor], errors: Mapping[Location, Tensor] | None
) -> dict[Location, KernelLocation]:
    """Return the locations of a row of masks, in its order."""
    at_location = dict[Location, KernelLocation]()
    for at, size in space.sizes.items():
        nodes = live.nodes.get(at)
        if nodes is not None:
            channel_n = nodes.channel_n
        else:  # errors, of the stream or of the logits
            channel_n = live.stream_s if at.layer < live.n_sites else torch.arange(means[at].shape[-1])
        mean_n = means[at].float()[..., channel_n].contiguous()
        excess_bts = (errors[at] - means[at])[..., channel_n] if errors and at in errors else mean_n.new_zeros(0, 0, 0)
        kept, near = nodes.kept if nodes else 0, np.zeros(LANES, np.int16)
        arrays = mean_n.numpy(), channel_n.numpy()
        at_location[at] = KernelLocation(space.first[at], size, *arrays, kept, near, excess_bts.contiguous().numpy())
    return at_location


def sublayers(sparse: SparseTransformer, live: LiveModel, places: Mapping[Location, KernelLocation]) -> list[Sublayer]:
    """Return a model's sublayers, by site; the attention and the MLP of a layer share one `Sublayer`."""
    made = list[Sublayer]()
    for layer, head_h in live.heads.items():
        at_kind = {at.kind: place for at, place in places.items() if at.layer == layer and at.kind != ERROR}
        made += [Sublayer(at_kind, live.matrices[layer], sparse.sinks(layer)[head_h].numpy())] * 2
    return made


_live_models: WeakKeyDictionary[SparseTransformer, tuple[tuple[object, ...], LiveModel]] = WeakKeyDictionary()


def live_model(
    sparse: SparseTransformer, means: Mapping[Location, Tensor], errors: Mapping[Location, Tensor] | None
) -> LiveModel:
    """Return the live parts of a model, for the means and errors that its nodes can take; cached for the next question."""
    also_s = torch.zeros(sparse.width, dtype=torch.bool)
    for at, x in (*means.items(), *(errors or {}).items()):
        if at.kind in READ_KINDS + WRITE_KINDS or (at.kind == ERROR and at.layer < sparse.n_sites):
            also_s |= x.reshape(-1, sparse.width).ne(0).any(0)
    state = (*map(weight_version, sparse.parameters()), also_s.numpy().tobytes())
    if _live_models.get(sparse, (None, None))[0] != state:
        _live_models[sparse] = state, LiveModel(sparse, also_s)
    return _live_models[sparse][1]


def _not_empty(live_c: Tensor) -> Tensor:
    """Return live_c with at least one channel marked, because the kernels expect one."""
    return live_c if bool(live_c.any()) else live_c.index_fill(0, torch.zeros(1, dtype=torch.long), True)

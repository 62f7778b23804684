"""Masked copies of one prompt through the sparse model, forward and backward, by compiled kernels alone: the inside of a search.

What `SparseTransformer.run` and autograd do with a gate of masks, done without them, since on short prompts they take longer than
the arithmetic: a few hundred calls of a tensor library for a few milliseconds of work. Rows are independent, so halves of them
run in threads of their own. For every node, with a what AbsTopK has left of it, m its mean, k its mask (bool, or a number that
mixes) and y what the mask makes of it,

    y = m + k (a - m)            slope = dL/dy (a - m)            dL/da = k dL/dy where not silenced

Whatever comes after the last keys and values is computed at the last position alone (`SparseTransformer.run`, narrow). What the
kernels do not serve, `Copies.of` says, and the model's own run does instead: it is also the reference that tests compare with.

Activations are stored channel by channel, the tokens of all rows end to end within one.

Shape legend: r masked copy, t token, n nodes of a location, s residual width, f all nodes of a prompt in one row, x any channels,
c columns (the tokens of all rows), v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bridge.kernels import masked
from bridge.kernels.attention import NEVER
from bridge.kernels.cpu import WIDEST, in_parallel
from bridge.kernels.products import Compact
from bridge.residual import Enter
from bridge.sparse import Location, SparseTransformer

Array = np.ndarray[Any, Any]
SERVED = {("", "attn"), ("attn", "attn"), ("attn", "mlp"), ("mlp", "attn")}  # sublayers that may follow each other
MAPS = {"attn": ("q", "k", "v", "o"), "mlp": ("up", "down")}
DENSE = 0.2  # share of nonzeros from which on a matrix is not served
SEVERAL = 32  # columns, from which on rows are divided; by their number alone, so that results do not depend on the threads


@dataclass(frozen=True)
class _Map:
    """A linear map by its nonzeros, to a kernel: y = W x + b by rows, and x += W' y by columns."""

    rows: tuple[Array, Array, Array, Array]
    columns: tuple[Array, Array, Array, Array]

    @staticmethod
    def of(matrix: Compact, bias_m: Tensor) -> _Map:
        (start, column, _), (start_n, row, none_n) = matrix.pattern.by_row, matrix.pattern.by_column
        values = (matrix.value_p.detach().numpy(), matrix.by_column_p.detach().numpy())
        return _Map((start, column, values[0], bias_m.detach().float().numpy()), (start_n, row, values[1], none_n.numpy()))

    def forward(self, x_xc: Array) -> Array:
        return masked.product(*self.rows, x_xc)

    def backward(self, dy_xc: Array) -> Array:
        return masked.product(*self.columns, dy_xc)


@dataclass(frozen=True)
class _Gated:
    """What a gate has seen: its location, values after AbsTopK, and which of them it let through."""

    location: Location
    first: int  # the position of the first token in a row
    left_nc: Array
    through_nc: Array


class Copies:
    """The sparse model on masked copies of a prompt; made by `of`."""

    def __init__(
        self,
        sparse: SparseTransformer,
        packed: Mapping[tuple[int, str], Compact],
        tokens_1t: Tensor,
        means: Mapping[Location, Tensor],
    ) -> None:
        self.sparse, self.tokens_1t = sparse, tokens_1t
        self.length = tokens_1t.shape[1]
        self.means = {at: means[at].detach().float().contiguous().numpy() for at in sparse.locations()}
        self.offsets: dict[Location, int] = {}
        self.unreached: list[tuple[int, int]] = []  # nodes that only later positions could answer for: they have no slopes
        start = 0
        for at, n in sparse.locations().items():
            self.offsets[at] = start
            late = sparse.site(at) - sparse.narrow_from
            if late >= 0 or (late == -1 and at.kind in ("q", "attn_out")):
                self.unreached.append((start, start + (self.length - 1) * n))
            start += self.length * n
        layers = range(len(sparse.blocks))
        self.maps = {at: _Map.of(matrix, sparse.get_parameter(f"blocks.{at[0]}.{at[1]}.bias")) for at, matrix in packed.items()}
        channels = sparse.shape.head_channels
        never_h = torch.full((sparse.width // channels,), NEVER)
        sinks = {layer: sparse.get_parameter(f"blocks.{layer}.sinks") if sparse.shape.sinks else never_h for layer in layers}
        self.sinks = {layer: sink_h.detach().float().contiguous().numpy() for layer, sink_h in sinks.items()}
        with torch.no_grad():
            x_1ts = sparse.run(tokens_1t, last_only=True).residuals[0]
        self.embedded_st = x_1ts[0].t().float().contiguous().numpy()

    @staticmethod
    def of(sparse: SparseTransformer, tokens_1t: Tensor, means: Mapping[Location, Tensor]) -> Copies | None:
        """The copies of a prompt; None where the kernels do not serve the model, its matrices or its device."""
        kinds = sparse.sublayer_kinds
        if (
            sparse.device.type != "cpu"
            or sparse.embedding.dtype != torch.float32
            or not all((before, kind) in SERVED for before, kind in zip(("", *kinds), kinds, strict=False))
            or sparse.shape.positions == "rotary"
            or max(sparse.locations().values()) > WIDEST
            or sparse.values
        ):
            return None
        packed = {
            (layer, name): _packed(sparse, layer, name) for layer in range(len(sparse.blocks)) for name in _names(sparse, layer)
        }
        held = {at: matrix for at, matrix in packed.items() if matrix is not None}
        return Copies(sparse, held, tokens_1t, means) if len(held) == len(packed) else None

    @torch.no_grad()
    def logits(self, kept_rf: Tensor) -> Tensor:
        """logits_rv at the last position, of some masks."""
        return self._unembedded(self._last(kept_rf, None))

    @torch.no_grad()
    def logits_without(self, kept_f: Tensor, node_r: Tensor, site_r: Tensor, rows: int) -> Tensor:
        """logits_rv of a mask less one node, for each of node_r, from the site on that its sublayer reads: `rows` at a time."""
        streams = self._forward(kept_f[None].numpy(), None)
        x_rs = torch.empty(len(node_r), self.sparse.width)
        for site in site_r.unique().tolist():
            for some_r in (site_r == site).nonzero().flatten().split(rows):
                kept_rf = kept_f.repeat(len(some_r), 1)
                kept_rf[torch.arange(len(some_r)), node_r[some_r]] = False
                x_rs[some_r] = self._last(kept_rf, None, site, streams[site])
        return self._unembedded(x_rs)

    def slopes(self, kept_rf: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """slope_rf and loss_r of loss(logits_rv), as `Ablations.slopes` has them."""
        tapes: dict[int, list[Any]] = {}
        x_rs = self._last(kept_rf, tapes).requires_grad_()
        with torch.enable_grad():
            loss_r = loss(self._unembedded(x_rs))
            slope_rs = torch.autograd.grad(loss_r.sum(), x_rs)[0].contiguous().numpy()
        slope_rf = torch.empty(kept_rf.shape)
        slopes = slope_rf.numpy()
        for start, stop in self.unreached:
            slopes[:, start:stop] = 0

        def back(part: slice) -> None:
            self._backward(slope_rs[part].T.copy(), tapes[part.start], slopes[part])

        self._divided(len(kept_rf), back)
        return slope_rf, loss_r.detach()

    def _last(
        self, kept_rf: Tensor, tapes: dict[int, list[Any]] | None, site: int = 0, x_sc: Array | None = None
    ) -> Tensor:  # fmt: skip
        """The stream x_rs at the last position; tapes, where given, of every part of the rows by its first.

        Rows start from the embedding, or all from the same stream at a site.
        """
        masks_rf = kept_rf if kept_rf.dtype == torch.bool else kept_rf.detach().float()
        kept, x_rs = masks_rf.contiguous().numpy(), np.empty((len(kept_rf), self.sparse.width), np.float32)

        def run(part: slice) -> None:
            tape = None if tapes is None else tapes.setdefault(part.start, [])
            x_rs[part] = self._forward(kept[part], tape, site, x_sc)[-1].T

        self._divided(len(kept), run)
        return torch.from_numpy(x_rs)

    def _divided(self, rows: int, task: Callable[[slice], None]) -> None:
        """The task on all rows, or on two halves of them at once."""
        edges = [0, rows // 2, rows] if rows > 1 and rows * self.length >= SEVERAL else [0, rows]
        parts = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]

        def some(start: int, stop: int) -> None:
            for part in parts[start:stop]:
                task(part)

        in_parallel(some, len(parts), 1 << 30)

    def _unembedded(self, x_rs: Tensor) -> Tensor:
        token_r1 = self.tokens_1t[:, -1:].expand(len(x_rs), -1)
        return self.sparse.run(token_r1, Enter.at(self.sparse.n_sites - 1, x_rs[:, None])).logits_btv[:, 0]

    # -- a pass over some rows ------------------------------------------------------------------------------------------

    def _forward(self, kept_rf: Array, tape: list[Any] | None, start: int = 0, x_sc: Array | None = None) -> list[Array]:
        """What every site reads from one on at which all rows start alike; last the stream x_sr that is unembedded.

        The tape is given what the way back needs.
        """
        narrow, layer = self.sparse.narrow_from, -1
        streams = [np.ascontiguousarray(np.tile(self.embedded_st if x_sc is None else x_sc, len(kept_rf)))]
        first = self.length - 1 if start >= narrow else 0
        for site, kind in enumerate(self.sparse.sublayer_kinds):
            layer += kind != "mlp"
            if site < start:
                continue
            half = _Half(self, layer, kept_rf, tape)
            if kind == "mlp":
                streams.append(half.mlp(streams[-1], first))
            else:
                streams.append(half.attention(streams[-1], first := self.length - 1 if site == narrow - 1 else 0))
        return streams

    def _backward(self, dx_sc: Array, tape: list[Any], slope_rf: Array) -> None:
        """The slopes of every node that the tape has seen, from those of the stream at the last position."""
        for back in reversed(tape):
            dx_sc = back(dx_sc, slope_rf)


class _Half:
    """One sublayer on some rows; every step puts its way back on the tape."""

    def __init__(self, copies: Copies, layer: int, kept_rf: Array, tape: list[Any] | None) -> None:
        self.copies, self.layer, self.kept_rf, self.tape = copies, layer, kept_rf, tape

    def mlp(self, x_sc: Array, first: int) -> Array:
        """The stream with what the MLP writes added."""
        up, down = (self.copies.maps[self.layer, name] for name in MAPS["mlp"])
        read_sc, scale_c = masked.normed(x_sc)
        read, y_sc = self._node("mlp_in", read_sc, first)
        active_nc, bend_nc = masked.gelu(up.forward(y_sc))
        active, a_nc = self._node("mlp_act", active_nc, first)
        write, w_sc = self._node("mlp_out", down.forward(a_nc), first)

        def back(dx_sc: Array, slope_rf: Array) -> Array:
            da_nc = down.backward(self._slopes(write, dx_sc, slope_rf))
            dy_sc = up.backward(self._slopes(active, da_nc, slope_rf) * bend_nc)
            return masked.normed_slopes(self._slopes(read, dy_sc, slope_rf), read_sc, scale_c, dx_sc)

        if self.tape is not None:
            self.tape.append(back)
        return x_sc + w_sc

    def attention(self, x_sc: Array, first: int) -> Array:
        """The same of an attention whose queries begin at position `first`: of the stream, what is from there on."""
        copies, layer, rows = self.copies, self.layer, len(self.kept_rf)
        to_q, to_k, to_v, to_o = (copies.maps[layer, name] for name in MAPS["attn"])
        read_sc, scale_c = masked.normed(x_sc)
        read, y_sc = self._node("attn_in", read_sc, 0)
        asking_sc = masked.from_position(y_sc, rows, first)
        query, q_sc = self._node("q", to_q.forward(asking_sc), first)
        key, k_sc = self._node("k", to_k.forward(y_sc), 0)
        value, v_sc = self._node("v", to_v.forward(y_sc), 0)
        heads = masked.Heads(q_sc, k_sc, v_sc, copies.sinks[layer], rows, copies.sparse.shape.head_channels)
        write, w_sc = self._node("attn_out", to_o.forward(heads.z_xc), first)

        def back(dx_sc: Array, slope_rf: Array) -> Array:
            dz_sc = to_o.backward(self._slopes(write, dx_sc, slope_rf))
            dq_sc, dk_sc, dv_sc = heads.slopes(dz_sc)
            dy_sc = to_k.backward(self._slopes(key, dk_sc, slope_rf)) + to_v.backward(self._slopes(value, dv_sc, slope_rf))
            dy_sc = masked.add_from_position(dy_sc, to_q.backward(self._slopes(query, dq_sc, slope_rf)), rows, first)
            dy_sc = self._slopes(read, dy_sc, slope_rf)
            return masked.normed_slopes(
                dy_sc, read_sc, scale_c, masked.add_from_position(np.zeros_like(x_sc), dx_sc, rows, first)
            )

        if self.tape is not None:
            self.tape.append(back)
        return masked.from_position(x_sc, rows, first) + w_sc

    def _node(self, kind: str, x_nc: Array, first: int) -> tuple[_Gated, Array]:
        """What AbsTopK leaves and the masks let through of a location's nodes."""
        copies, at = self.copies, Location(self.layer, kind)
        kept = max(1, round(copies.sparse.shape.keep * len(x_nc)))
        offset = copies.offsets[at] + first * len(x_nc)
        left_nc, through_nc, y_nc = masked.node(x_nc, kept, self.kept_rf, offset, copies.means[at])
        return _Gated(at, first, left_nc, through_nc), y_nc

    def _slopes(self, seen: _Gated, dy_nc: Array, slope_rf: Array) -> Array:
        """Slopes of a location's nodes into slope_rf; those of what AbsTopK was given are returned."""
        copies, n = self.copies, len(seen.left_nc)
        offset = copies.offsets[seen.location] + seen.first * n
        return masked.node_slopes(dy_nc, seen.left_nc, seen.through_nc, copies.means[seen.location], slope_rf, offset)


def _names(sparse: SparseTransformer, layer: int) -> tuple[str, ...]:
    kinds = {at.kind for at in sparse.locations() if at.layer == layer}
    return (MAPS["attn"] if "q" in kinds else ()) + (MAPS["mlp"] if "mlp_act" in kinds else ())


def _packed(sparse: SparseTransformer, layer: int, name: str) -> Compact | None:
    """A map's matrix by its nonzeros; None where there are too many of them for that."""
    at = f"blocks.{layer}.{name}.weight"
    held, weight = sparse.held(at), sparse.get_parameter(at)
    if held is None and int(weight.count_nonzero()) < DENSE * weight.numel():
        return Compact.of(weight)
    return held

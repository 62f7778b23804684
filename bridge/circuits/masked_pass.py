"""The masked model without autograd: forward and backward written by hand, for a frozen sparse model on a CPU.

A search runs thousands of passes of a few masked copies, and needs only gradients with respect to the masks; the weights are few
and never change. With autograd, most of the time of such a pass is not arithmetic. Here copies of all rows are lanes of the same
few compiled kernels (`kernels/masked`), which run sublayer by sublayer, in tiles that fit the caches; nothing outlives a tile.
After the last attention only the position of the answer is computed.

With x_i the stream at site i, g the nodes under their masks (`kernels/masked`), N the norm, A the attention, e_i the error

    attention   r = g(N x);  q, k, v = g(W r + b);  x_(i+1) = x + g(W_o A(q, k, v) + b) + e_(i+1)
    MLP         r = g(N x);  a = g(gelu(W r + b));  x_(i+1) = x + g(W a + b) + e_(i+1)

The backward pass takes the same steps in reverse order.

Shape legend: r masked copy of a prompt, b prompt, t token, l lane (token of a copy), n nodes of a location, s sparse width, v
vocabulary, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.live_nodes import KernelLocation, Sublayer, kernel_locations, live_model, sublayers
from bridge.circuits.question import Question
from bridge.kernels import attention, masked
from bridge.kernels.masked import ArrayPool, Lanes
from bridge.models.circuit import NodeSpace
from bridge.models.residual import EMBEDDING, Enter, Trace
from bridge.models.sparse import ERROR, Location, SparseTransformer
from bridge.recipe import AttentionShape

_TILE = 128  # lanes computed at a time: what is kept of them for the backward pass stays within some megabytes
_TILES = 8  # kept for the backward pass; if there are more, each is computed again
_MAX_CACHED_LANES = 64  # tiles whose lanes are cached
_MAX_DENSITY = 0.6  # share of nonzero weights; with more, dense products are faster (for 128 x 128 at .5, half as fast)

Array = np.ndarray
Back = Callable[[Array, "_AllGradients | _SelectedGradients"], Array]  # (dy, dmask) -> dx; gradients of masks are given to dmask


def supports_model(sparse: SparseTransformer) -> bool:
    """Return whether the pass supports a model: whole, frozen, sparse, float32 on a CPU, with plain sequential sublayers."""
    form = sparse.form
    other = form.gated or form.score_cap or form.logit_cap or form.qk_norm or form.writes_normed or not form.reads_normed
    plain = not other and form.activation == "gelu_new" and all(each == AttentionShape() for each in form.attention)
    plain = plain and sparse.heads_of_keys == sparse.heads_of_queries and sparse.shape.positions != "rotary"
    alternating = tuple(sparse.sublayer_kinds) == ("attn", "mlp") * (len(sparse.sublayer_kinds) // 2)
    frozen = all(not p.requires_grad and p.dtype == torch.float32 for p in sparse.parameters())
    packed = frozen and sparse.device.type == "cpu" and bool(sparse.compact) and sparse.shape.blocks is None
    return plain and alternating and packed and sparse.achieved_l0() <= _MAX_DENSITY


class _AllGradients:
    """Receives the gradients of all entries of a tile's masks."""

    def __init__(self, gradient_rf: Array) -> None:
        self.flat = gradient_rf.reshape(-1)

    def nodes(self, at: KernelLocation, lanes: Lanes, dy: Array, change: Array, through: Array) -> None:
        """Collect the mask gradients of a location's nodes, and turn dy into dpre."""
        masked.apply_masks_backward(dy, change, through, lanes.mask_indices(at.size), at.first, at.channel_n, self.flat)

    def error(self, at: KernelLocation, lanes: Lanes, dx: Array, *what: Array) -> None:
        """Collect the mask gradients of a site's errors."""
        masked.add_error_back(dx, lanes.mask_indices(1), at.first, *what, self.flat)


class _SelectedGradients:
    """Receives the gradients of some entries, per location as index k, token and channel; if few, most work is spared."""

    def __init__(self, of: MaskedPass, node_k: Tensor, gradient_rk: Array) -> None:
        self.gradient_rk = gradient_rk
        if of.asked is not node_k:
            of.asked, of.asked_parts = node_k, dict(of.live_parts(node_k))
        self.parts = of.asked_parts

    def nodes(self, at: KernelLocation, lanes: Lanes, dy: Array, change: Array, through: Array) -> None:
        """Collect the mask gradients of a location's nodes, and turn dy into dpre."""
        if at.first in self.parts:
            here_k, token_k, channel_k = self.parts[at.first]
            gradient_kr = np.empty((len(here_k), len(self.gradient_rk)), np.float32)
            masked.mask_gradients_of_nodes(dy, change, channel_k, token_k, not lanes.by_position, lanes.lane_rt, gradient_kr)
            self.gradient_rk[:, here_k] = gradient_kr.T
        dy *= through

    def error(self, at: KernelLocation, lanes: Lanes, dx: Array, *what: Array) -> None:
        """Collect the mask gradients of a site's errors."""
        if at.first in self.parts:
            here_k, token_k, _ = self.parts[at.first]
            rows, tokens = lanes.lane_rt.shape if lanes.by_position else (len(lanes.lane_rt), 1)
            gradient_rt = np.zeros((rows, tokens), np.float32)
            place_l = lanes.row_l * tokens + (lanes.token_l if lanes.by_position else 0)
            masked.add_error_back(dx, place_l, 0, *what, gradient_rt.reshape(-1))
            self.gradient_rk[:, here_k] = gradient_rt[:, token_k]


class MaskedPass:
    """Logits of masked copies of a question's prompts, and gradients of a loss on them with respect to the masks."""

    def __init__(
        self,
        sparse: SparseTransformer,
        question: Question,
        space: NodeSpace,
        means: Mapping[Location, Tensor],
        errors: Mapping[Location, Tensor] | None,
    ) -> None:
        self.sparse, self.space, self.n_tokens = sparse, space, question.prompt_bt.shape[1]
        self.last_b = question.last_b.numpy()
        self.live = live = live_model(sparse, {at: means[at] for at in space.sizes}, errors)
        self.embedded_bts = sparse.embed(question.prompt_bt)[..., live.stream_s].numpy()
        self.at = kernel_locations(live, space, means, errors)
        self.sublayers = sublayers(sparse, live, self.at)
        self.rooms, self.brief = [ArrayPool() for _ in range(_TILES)], ArrayPool()
        self.known_lanes: dict[bytes, tuple[Lanes, Lanes]] = {}
        self.asked: Tensor | None = None  # the last node_k and its parts, since a descent asks for the same often
        self.asked_parts: dict[int, tuple[Array, Array, Array]] = {}
        self.most = max(len(nodes.channel_n) + len(nodes.rival_m) for nodes in live.nodes.values())
        self.active = np.zeros(0, np.bool_)
        answer_token_bv = sparse.bigram_entries(question.prompt_bt.gather(1, question.last_b[:, None]))
        self.bigram_bv = None if answer_token_bv is None else answer_token_bv[:, 0].numpy()

    @torch.no_grad()
    def logits(self, kept_rf: Tensor, row_r: Tensor) -> Tensor:
        """Return logits_rv after the prompts of row_r under their masks."""
        return torch.cat([_Tile(self, *tile, self.rooms[0], False).logits_rv for tile in self._tiles(kept_rf, row_r)])

    @torch.no_grad()
    def run(self, kept_rf: Tensor, row_r: Tensor, enter: Enter | None = None) -> Trace:
        """Run the copies, narrow (see `SparseTransformer.run`); rows that enter, if any, are in the order of their sites."""
        kept_rf, tiles, logits = kept_rf.contiguous(), list[_Tile](), list[Tensor]()
        sites = [EMBEDDING] * len(row_r) if enter is None else enter.site_b.tolist()
        first = 0
        while first < len(sites):
            rows = max(1, _TILE // self.n_tokens) if sites[first] < self.sparse.narrow_from else _TILE
            after = first + sites[first : first + rows].count(sites[first])
            some = slice(first, after)
            (mask, prompt_r), x_rts = self._flat(kept_rf[some], row_r[some]), None if enter is None else enter.x_btd[some]
            tiles.append(_Tile(self, mask, prompt_r, self.rooms[0], False, sites[first], x_rts, trace=True))
            logits.append(tiles[-1].logits_rv)
            first = after
        residuals = [
            torch.cat([tile.residuals[site] for tile in tiles if site in tile.residuals] or [torch.zeros(0)])
            for site in range(self.sparse.n_sites)
        ]
        return Trace(torch.cat(logits)[:, None], tuple(residuals))

    @torch.no_grad()
    def gradient(
        self, kept_rf: Tensor, loss: Callable[[Tensor], Tensor], row_r: Tensor, node_k: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return gradient_rf of the sum of loss(logits_rv) with respect to the mask entries, all or node_k, and loss_r."""
        parts, tiles = list(self._tiles(kept_rf, row_r)), list[_Tile]()
        if len(parts) <= _TILES:
            tiles = [_Tile(self, *part, room, True) for part, room in zip(parts, self.rooms, strict=False)]
            logits_rv = torch.cat([tile.logits_rv for tile in tiles])
        else:
            logits_rv = self.logits(kept_rf, row_r)
        with torch.enable_grad():
            loss_r = loss(logits_rv.requires_grad_())
            (gradient_rv,) = torch.autograd.grad(loss_r.sum(), logits_rv)
        gradient_rf = torch.zeros(len(kept_rf), kept_rf.shape[1] if node_k is None else len(node_k))
        first = 0
        for place, part in enumerate(parts):
            tile = tiles[place] if tiles else _Tile(self, *part, self.rooms[0], True)
            some = slice(first, first := first + len(part[1]))
            into = gradient_rf[some].numpy()
            dmask = _AllGradients(into) if node_k is None else _SelectedGradients(self, node_k, into)
            tile.backward(gradient_rv[some].numpy(), dmask)
        return gradient_rf, loss_r.detach()

    def lanes(self, prompt_r: Array) -> tuple[Lanes, Lanes]:
        """Return the lanes of all tokens of some copies, and those of their answers."""
        key = prompt_r.tobytes()
        if key not in self.known_lanes:
            self.known_lanes = self.known_lanes if len(self.known_lanes) < _MAX_CACHED_LANES else {}
            token_rt, last_r1 = np.tile(np.arange(self.n_tokens), (len(prompt_r), 1)), self.last_b[prompt_r][:, None]
            shape = self.n_tokens, self.space.size, self.space.n_tokens > 1
            self.known_lanes[key] = Lanes(prompt_r, token_rt, *shape), Lanes(prompt_r, last_r1, *shape)
        return self.known_lanes[key]

    def live_parts(self, node_k: Tensor) -> Iterator[tuple[int, tuple[Array, Array, Array]]]:
        """Yield, by a location's first entry: the indices k of live entries, their tokens, and their indices among live nodes."""
        for at, here_k, place_k in self.space.indices_by_location(node_k):
            token_k, channel_k = divmod(place_k.numpy(), self.space.sizes[at])
            if at in self.live.nodes:
                channel_k = self.live.nodes[at].place_c.numpy()[channel_k]
            live_k = channel_k >= 0
            yield self.at[at].first, (here_k.numpy()[live_k], token_k[live_k], channel_k[live_k])

    def covers_stream(self, x_rts: Tensor) -> bool:
        """Return whether a stream is 0 in every channel that is not computed."""
        return bool(x_rts.count_nonzero() == x_rts[..., self.live.stream_s].count_nonzero())

    def _tiles(self, kept_rf: Tensor, row_r: Tensor) -> Iterator[tuple[Array, Array]]:
        """Yield the flat masks and the prompts of as many copies as are computed at a time."""
        rows = max(1, _TILE // self.n_tokens)
        kept_rf = kept_rf.contiguous()
        for some_rf, some_r in zip(kept_rf.split(rows), row_r.split(rows), strict=True):
            yield self._flat(some_rf, some_r)

    @staticmethod
    def _flat(kept_rf: Tensor, row_r: Tensor) -> tuple[Array, Array]:
        mask = kept_rf.view(torch.uint8) if kept_rf.dtype == torch.bool else kept_rf.float()
        return mask.view(-1).numpy(), row_r.numpy()


class _Tile:
    """Some masked copies: their logits, with keep their backward steps, and with trace their residuals by site.

    They start at the site `begin` with x_rts, or at the embedding.
    """

    def __init__(
        self,
        of: MaskedPass,
        mask: Array,
        prompt_r: Array,
        room: ArrayPool,
        keep: bool,
        begin: int = EMBEDDING,
        x_rts: Tensor | None = None,
        *,
        trace: bool = False,
    ) -> None:
        self.of, self.mask, self.room, self.brief, self.keep, self.ways = of, mask, room, of.brief, keep, list[Back]()
        room.used = 0
        self.wide, self.answers = of.lanes(prompt_r)
        rows = len(prompt_r)
        self.last_r = np.arange(rows) * of.n_tokens + self.answers.token_l  # indices of the answers' lanes among the wide ones
        if of.active.size < of.most * self.wide.padded:
            of.active = np.zeros(of.most * self.wide.padded, np.bool_)
        sparse, self.residuals = of.sparse, dict[int, Tensor]()
        lanes = self.wide if begin < sparse.narrow_from else self.answers
        x = np.zeros((len(of.live.stream_s), lanes.padded), np.float32)
        if begin == EMBEDDING:
            x[:, : len(lanes.row_l)] = of.embedded_bts[lanes.prompt_l, lanes.token_l].T
            self._error(0, x, lanes)
        else:
            assert x_rts is not None
            x[:, : len(lanes.row_l)] = x_rts.flatten(0, 1)[:, of.live.stream_s].T.numpy()
        for site in range(max(begin, 0), len(sparse.sublayer_kinds)):
            if trace:
                self.residuals[site] = self._stream(x, lanes)
            room.used, self.brief.used = room.used if keep else 0, 0
            if sparse.sublayer_kinds[site] == "attn":
                to = self.answers if site + 1 == sparse.narrow_from else lanes
                x, lanes = self._attention(of.sublayers[site], x, lanes, to), to
            else:
                x = self._mlp(of.sublayers[site], x, lanes)
            self._error(site + 1, x, lanes)
        if trace:
            self.residuals[sparse.n_sites - 1] = self._stream(x, lanes)
        y, normed_back = self._norm(x)
        self._append_backward(lambda dy, _: normed_back(dy, np.zeros_like(dy)))
        unembedding = of.live.unembedding
        logits = unembedding.times(y, room)
        self._append_backward(lambda dy, _: unembedding.back(dy, self.brief))
        if of.bigram_bv is not None:
            logits[:, :rows] += of.bigram_bv[prompt_r].T
        self._error(sparse.n_sites, logits, self.answers)
        self.logits_rv = torch.from_numpy(logits[:, :rows].T.copy())

    def backward(self, gradient_rv: Array, dmask: _AllGradients | _SelectedGradients) -> None:
        """Give the gradients of the masks to dmask, from the gradients of the logits."""
        d = np.zeros((gradient_rv.shape[1], self.answers.padded), np.float32)
        d[:, : len(gradient_rv)] = gradient_rv.T
        for back in reversed(self.ways):
            self.brief.used = 0
            d = back(d, dmask)
        self.ways.clear()  # they hold the tile and its masks

    def _append_backward(self, back: Back) -> None:
        """Append the backward step of an operation, if the tile keeps them."""
        if self.keep:
            self.ways.append(back)

    # -- sublayers: the stream x -> the stream after it, without errors ---------------------------------------------------

    def _attention(self, sublayer: Sublayer, x: Array, lanes: Lanes, to: Lanes) -> Array:
        """Return the stream at the lanes `to`, which are those of the queries."""
        places, matrices, room, narrow = sublayer.at, sublayer.matrix, self.room, to is not lanes
        y, normed_back = self._norm(x)
        r, r_back = self._nodes(places["attn_in"], y, lanes)
        r_q = self._answers(r) if narrow else r
        parts = {
            kind: self._nodes(places[kind], matrices[kind].times(read, room), at, lasting=True)
            for kind, read, at in (("q", r_q, to), ("k", r, lanes), ("v", r, lanes))
        }
        q, k, v = (parts[kind][0] for kind in parts)
        z, attend_back = self._attend(sublayer.sink_h, q, k, v, lanes, to)
        write, write_back = self._nodes(places["attn_out"], matrices["o"].times(z, room), to)
        into = self._answers(x) if narrow else x

        def back(dx: Array, dmask: _AllGradients | _SelectedGradients) -> Array:
            dz = matrices["o"].back(write_back(_copied(dx, self.brief), dmask), self.brief)
            dy = dict(zip("qkv", attend_back(dz), strict=True))
            dr_q, dr, dr_v = (matrices[kind].back(parts[kind][1](dy[kind], dmask), self.brief) for kind in "qkv")
            dr += dr_v
            if narrow:
                dr[:, self.last_r] += dr_q[:, : len(self.last_r)]
                wide = np.zeros_like(dr)
                wide[:, self.last_r] = dx[:, : len(self.last_r)]
                dx = wide
            else:
                dr += dr_q
            return normed_back(r_back(dr, dmask), dx)

        self._append_backward(back)
        return self._sum(into, write)

    def _mlp(self, sublayer: Sublayer, x: Array, lanes: Lanes) -> Array:
        places, up, down, room = sublayer.at, sublayer.matrix["up"], sublayer.matrix["down"], self.room
        y, normed_back = self._norm(x)
        r, r_back = self._nodes(places["mlp_in"], y, lanes)
        before = up.times(r, room)
        gradient = room.take(*before.shape)
        masked.gelu(before, before, gradient)
        a, a_back = self._nodes(places["mlp_act"], before, lanes)
        write, write_back = self._nodes(places["mlp_out"], down.times(a, room), lanes)

        def back(dx: Array, dmask: _AllGradients | _SelectedGradients) -> Array:
            da = a_back(down.back(write_back(_copied(dx, self.brief), dmask), self.brief), dmask)
            da *= gradient[: len(da)]
            return normed_back(r_back(up.back(da, self.brief), dmask), dx)

        self._append_backward(back)
        return self._sum(x, write)

    def _error(self, site: int, x: Array, lanes: Lanes) -> None:
        """Add the errors of a site, under their masks, to the stream or to the logits, in place."""
        at = self.of.at.get(Location(site, ERROR))
        if at is None:
            return
        token_l = lanes.token_l if site < self.of.sparse.n_sites else np.zeros_like(lanes.token_l)  # logits: one row per prompt
        what = at.excess_bts, lanes.prompt_l, token_l
        masked.add_error(x, self.mask, lanes.mask_indices(1), at.first, at.mean_n, *what)

        def back(dx: Array, dmask: _AllGradients | _SelectedGradients) -> Array:
            dmask.error(at, lanes, dx, *what)
            return dx

        self._append_backward(back)

    # -- parts ----------------------------------------------------------------------------------------------------------

    def _nodes(self, at: KernelLocation, change: Array, lanes: Lanes, *, lasting: bool = False) -> tuple[Array, Back]:
        """Return masked nodes (lost after the sublayer unless lasting) and dy -> dpre; `change` holds values before AbsTopK."""
        shape = len(at.channel_n), change.shape[1]
        through, y = self.room.take(*shape), (self.room if lasting else self.brief).take(*shape)
        where, kept = (self.mask, lanes.mask_indices(at.size), at.first, at.channel_n), at.kept
        masked.apply_masks(change, kept, *where, at.mean_n, self.of.active, through, y, at.near)

        def back(dy: Array, dmask: _AllGradients | _SelectedGradients) -> Array:
            dmask.nodes(at, lanes, dy, change, through)
            return dy

        return y, back

    def _norm(self, x: Array) -> tuple[Array, Callable[[Array, Array], Array]]:
        """Return the RMSNorm of x, and the function (dy, dx) -> dx that adds its gradient to dx."""
        y, scale = self.room.take(*x.shape), np.empty(x.shape[1], np.float32)
        width, eps = self.of.sparse.width, self.of.sparse.form.eps
        masked.norm(x, scale, y, width, eps)

        def back(dy: Array, dx: Array) -> Array:
            masked.norm_back(dy, x, scale, width, dx)
            return dx

        return y, back

    def _attend(
        self, sink_h: Array, q: Array, k: Array, v: Array, lanes: Lanes, to: Lanes
    ) -> tuple[Array, Callable[[Array], tuple[Array, Array, Array]]]:
        """Return the outputs of the heads for every lane of `to`, and their backward function."""
        of, room, rows = self.of, self.room, len(self.last_r)
        channels, narrow = of.sparse.channels, to is not lanes
        z, heads = room.take(*q.shape), rows * len(sink_h)
        z[:, len(to.row_l) :] = 0
        log_sum = np.empty((heads, 1 if narrow else of.n_tokens), np.float32)
        first, after = (to.token_l, to.token_l + 1) if narrow else (np.zeros(rows, np.int64), np.full(rows, of.n_tokens))
        strides = 1 if narrow else of.n_tokens, q.shape[1], of.n_tokens, k.shape[1]
        arrays = q.reshape(-1), k.reshape(-1), v.reshape(-1), sink_h, z.reshape(-1), log_sum
        attention.forward(*arrays, channels, first, after, *strides, 0, heads)

        def back(dz: Array) -> tuple[Array, Array, Array]:
            dq, dk, dv = gradients = [self.brief.take(*x.shape) for x in (q, k, v)]
            for gradient in gradients:
                gradient[:] = 0
            flat = (x.reshape(-1) for x in (dz, dq, dk, dv))
            attention.backward(*arrays, *flat, np.zeros(heads, np.float32), channels, first, after, *strides, 0, heads)
            return dq, dk, dv

        return z, back

    def _stream(self, x: Array, lanes: Lanes) -> Tensor:
        """Return x_rts of the lanes."""
        x_ls = torch.zeros(len(lanes.row_l), self.of.sparse.width)
        x_ls[:, self.of.live.stream_s] = torch.from_numpy(x[:, : len(lanes.row_l)]).T
        return x_ls.unflatten(0, (len(self.last_r), -1))

    def _sum(self, x: Array, write: Array) -> Array:
        """Return the stream with a write added; in place if nothing needs x again."""
        return np.add(x, write, out=self.room.take(*x.shape) if self.keep else x)

    def _answers(self, x: Array) -> Array:
        """Return the lanes of the answers, out of the wide ones."""
        narrow = np.zeros((len(x), self.answers.padded), np.float32)
        narrow[:, : len(self.last_r)] = x[:, self.last_r]
        return narrow


def _copied(x: Array, room: ArrayPool) -> Array:
    y = room.take(*x.shape)
    y[:] = x
    return y

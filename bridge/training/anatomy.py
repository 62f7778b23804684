"""Parts of a dense model's sublayers, measured: linear maps, heads, positions, norms and nonlinearities, by no name.

A few rows of tokens are run and watched: modules that multiply by a weight of two axes, products of queries and keys, what goes
into the softmax. With z = h centred and divided by its deviation (LayerNorm; RMSNorm does not centre),

    reads       a map whose input is g z + b at a site (or h itself) reads there; g and b go into its weights
    values      at the first token attention can only hand on its value: the columns of the maps equal there to what a map takes
                in are v, head by head, in whatever order; heads that have the same share it
    q, k        the columns that at the first token, where rotary positions turn nothing, lie along what was multiplied; through
                a norm with a gain, by head or over all, where only so
    positions   the angle between q before and after, for halves of a head's first channels or for neighbours; the scores, less
                scale * q . k, by distance (ALiBi); how far back the last query sees; a cap C tanh(score / C)
    MLP         a map takes in act(up), or act(gate) up, for one of the nonlinearities
    writes      what a sublayer adds is its last map's output times a constant, or that through a norm with a gain

What does not fit is None; what does is verified where it is used (`training/initialize`), by what the whole sublayer writes.

Shape legend: b batch row, t token (x: of all rows), d dense width, o outputs, i inputs, h query heads, g heads of keys and
values, c channels of a head, m neurons, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bridge.huggingface.site_discovery import first_tensor, forward, output_tensor
from bridge.models.dense import DenseModel
from bridge.models.dense_run import exclusive
from bridge.models.span import DenseSpan
from bridge.models.sparse import ACTIVATIONS
from bridge.recipe import AttentionShape

ROWS, TOKENS = 6, 29  # of the probe; a number of tokens that no width is likely to have
SAME = 1e-3  # largest unexplained share of the variance at which two tensors are the same, up to constants
EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
CAPS = (0.1, 500.0)  # between which a soft cap is looked for
UNSEEN = -1e4  # a score below it is masked


@dataclass(frozen=True, eq=False)
class Affine:
    """x @ weight_oi.T + bias_o."""

    weight_oi: Tensor
    bias_o: Tensor

    def rows(self, index_o: Tensor, factor_o: Tensor | float = 1.0) -> Affine:
        """Some outputs, each times a factor."""
        factor_o = torch.as_tensor(factor_o, device=self.bias_o.device).expand(len(index_o))
        return Affine(self.weight_oi[index_o] * factor_o[:, None], self.bias_o[index_o] * factor_o)

    def __call__(self, x_xi: Tensor) -> Tensor:
        """y_xo."""
        return x_xi @ self.weight_oi.T + self.bias_o


@dataclass(frozen=True, eq=False)
class Written:
    """The last map of a sublayer, and the gain of the norm that its output goes through, if it does."""

    map: Affine
    gain_d: Tensor | None
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention as maps of what is read (z, or h where raw): scores are q . k / root of the channels, pairs rotated as halves.

    gains are those of the norms of q (h c) and k (g c), `by_head` or over all of them.
    """

    q: Affine
    k: Affine
    v: Affine
    out: Written
    channels: int
    shape: AttentionShape
    cap: float | None
    gains: tuple[Tensor, Tensor] | None
    by_head: bool
    norm_eps: float
    raw: bool

    @property
    def heads(self) -> int:
        """Query heads."""
        return len(self.q.bias_o) // self.channels

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return len(self.v.bias_o) // self.channels


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP as maps of what is read; gate None where it is plain."""

    gate: Affine | None
    up: Affine
    out: Written
    activation: str
    raw: bool

    @property
    def neurons(self) -> int:
        """Inputs of its last map."""
        return len(self.up.bias_o)


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Measurements of a dense model; attention and MLP by site, None where they are not of the kinds that are known here.

    embedding_vd and what positions add to it (position_td; None: nothing) make the residual at site 0; unembedding is a map of
    the last residual's norm.
    """

    centred: bool
    eps: float
    attention: dict[int, Attention]
    mlp: dict[int, Mlp]
    embedding_vd: Tensor | None
    position_td: Tensor | None
    unembedding: Affine | None
    logit_cap: float | None


@torch.no_grad()
def dissect(dense: DenseModel, context: int) -> Anatomy:
    """The parts of a dense model, as far as they are understood; windows of `context` tokens and more are none.

    Of a span they are the whole model's that lie in it, and for an embedding the residual that comes into it stands.
    """
    if isinstance(dense, DenseSpan):
        whole, first = dissect(dense.whole, context), dense.offset
        attention, mlp = (
            {site - first: part for site, part in parts.items() if first <= site < first + len(dense.sublayers)}
            for parts in (whole.attention, whole.mlp)
        )
        h_xd = dense.prefix(_probe(dense))[:, 1:].flatten(0, 1).float()
        return Anatomy(whole.centred, whole.eps, attention, mlp, h_xd, None, None, None)
    tokens_bt = _probe(dense)
    seen = _watch(dense, tokens_bt)
    sites = _sites(dense)
    first = replace(seen, maps=[one for one in seen.maps if one.block <= 0])
    kinds = {(centred, eps): _reads(first, sites, centred, eps) for centred in (False, True) for eps in EPSILONS}
    # the norm that explains most inputs, and those best
    centred, eps = max(kinds, key=lambda kind: (len(kinds[kind]), -sum(read.unexplained for read in kinds[kind])))
    found = _reads(seen, sites, centred, eps)
    anatomy = Anatomy(centred, eps, {}, {}, *_embedding(dense, tokens_bt, seen.residuals[0]), *_unembedding(seen, found))
    for block, (each, window) in enumerate(zip(seen.blocks, _windows(dense, context), strict=True)):
        attn, mlp = sites[block][0], sites[block][-1]
        here = [read for read in found if read.map.block == block]
        writers = [one for one in seen.maps if one.block == block and one.output_xo.shape == seen.residuals[0].shape]
        write_a, write_m = (seen.residuals[at + 1] - seen.residuals[at] for at in (attn, mlp))
        attention = _attention([read for read in here if read.site == attn], writers, each, window)
        neurons = _mlp([read for read in here if read.site == mlp], writers)
        outs = [None if part is None else _written(part[1], write) for part, write in ((attention, write_a), (neurons, write_m))]
        if attn == mlp and attention and neurons:
            factor, left = _multiple(attention[1].output_xo + neurons[1].output_xo, write_a)
            outs = [_times(part[1], factor) if left < SAME else None for part in (attention, neurons)]
        if attention and outs[0]:
            anatomy.attention[attn] = replace(attention[0], out=outs[0])
        if neurons and outs[1]:
            anatomy.mlp[mlp] = replace(neurons[0], out=outs[1])
    _name_frequencies(dense, anatomy)
    return anatomy


def _name_frequencies(dense: DenseModel, anatomy: Anatomy) -> None:
    """Make frequencies that are measured the same so: those of a module's buffer, or else of the first block that has them."""
    known = [x.flatten().tolist() for name, x in dense.model.named_buffers() if name.endswith("inv_freq")]
    for site, attention in anatomy.attention.items():
        mine = attention.shape.frequencies
        same = (
            each
            for each in known
            if len(each) == len(mine) and all(abs(a - b) <= 1e-5 + 1e-4 * a for a, b in zip(each, mine, strict=True))
        )
        if (named := next(same, None)) is None:
            known.append(list(mine))
        else:
            shape = attention.shape.model_copy(update={"frequencies": tuple(named)})
            anatomy.attention[site] = replace(attention, shape=shape)


# --- what is seen


@dataclass(frozen=True, eq=False)
class _Map:
    """A linear map as it was called, in which block (-1: in none)."""

    weight_oi: Tensor
    bias_o: Tensor
    input_xi: Tensor
    output_xo: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class _Read:
    """A map that reads the residual at a site, of z (or of h, where raw)."""

    map: _Map
    affine: Affine
    site: int
    raw: bool
    unexplained: float


@dataclass(eq=False)
class _Attended:
    """Products in a block, and the scores that went into the softmax."""

    q_bhtc: Tensor | None = None
    k_bhtc: Tensor | None = None
    score_bhtt: Tensor | None = None


@dataclass(eq=False)
class _Seen:
    maps: list[_Map] = field(default_factory=list)
    blocks: list[_Attended] = field(default_factory=list)
    residuals: list[Tensor] = field(default_factory=list)  # h_xd of every site
    logits_xv: Tensor | None = None


class _Scores(TorchFunctionMode):
    """Hands every product of queries and keys, and the scores in the end, to `multiplied` and `softened`."""

    def __init__(self, tokens: int, multiplied: Callable[[Tensor, Tensor], None], softened: Callable[[Tensor], None]) -> None:
        super().__init__()
        self.tokens, self.multiplied, self.softened = tokens, multiplied, softened

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name, square = func(*args, **kwargs), getattr(func, "__name__", ""), (self.tokens, self.tokens)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if name == "scaled_dot_product_attention" and given[0].shape[-2] == self.tokens == given[1].shape[-2]:
            with torch._C.DisableTorchFunction():
                q, k = given[0], given[1]
                self.multiplied(q, k)
                self.softened(_scored(q, k, given[3] if len(given) > 3 else None, kwargs.get("scale"), *args[5:6]))
        elif name == "softmax" and tuple(given[0].shape[-2:]) == square:
            self.softened(given[0])
        elif isinstance(out, Tensor) and tuple(out.shape[-2:]) == square:
            pairs = [(q, k) for q in given for k in given if q is not k and q.dim() > 2 and q.shape[-1:] == k.shape[-2:-1]]
            for q, k in pairs:
                if q.shape[-2] == k.shape[-1] == self.tokens != q.shape[-1]:
                    self.multiplied(q, k.transpose(-1, -2))
        return out


def _scored(q_bhtc: Tensor, k_bgtc: Tensor, mask: Tensor | None, scale: float | None, *_causal: Any) -> Tensor:
    """Scores as scaled_dot_product_attention makes them; without a mask every later key is masked."""
    k_bhtc = k_bgtc.repeat_interleave(q_bhtc.shape[1] // k_bgtc.shape[1], 1)
    score_bhtt = q_bhtc.float() @ k_bhtc.float().transpose(-1, -2) * (scale or 1 / math.sqrt(q_bhtc.shape[-1]))
    if mask is None:
        mask = torch.ones(score_bhtt.shape[-2:], dtype=torch.bool, device=score_bhtt.device).tril()
    return score_bhtt.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score_bhtt + mask


def _probe(dense: DenseModel, rows: int = ROWS, tokens: int = TOKENS) -> Tensor:
    length = min(tokens, dense.context or tokens)
    generator = torch.Generator().manual_seed(0)
    rows_of_embedding: Any = dense.model.get_input_embeddings()
    return torch.randint(min(len(rows_of_embedding.weight), dense.vocabulary), (rows, length), generator=generator).to(
        dense.device
    )


def _watch(dense: DenseModel, tokens_bt: Tensor) -> _Seen:
    """The maps, products and scores of a run on the tokens."""
    seen, maps = _Seen(blocks=[_Attended() for _ in dense.blocks]), dict[nn.Module, _Map]()
    block_of = {module: index for index, block in enumerate(dense.blocks) for module in block.module.modules()}
    now = [-1]

    def enter(index: int, *_: Any) -> None:
        now[0] = index

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, y, weight, bias = first_tensor(args, kwargs), output_tensor(output), module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and weight.is_floating_point()
        if module in maps or not tensors or x.numel() // x.shape[-1] != tokens_bt.numel():
            return
        x_xi, y_xo = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        bias_o = torch.zeros_like(y_xo[0]) if bias is None else bias.float()
        for weight_oi in (weight.float(), weight.float().T):  # transformers' Conv1D has inputs first
            fits = weight_oi.shape == (y_xo.shape[1], x_xi.shape[1])
            if fits and _unexplained(torch.addmm(bias_o, x_xi, weight_oi.T), y_xo) < 10 * SAME:
                maps[module] = _Map(weight_oi, bias_o, x_xi.clone(), y_xo.clone(), block_of.get(module, -1))
                return

    def multiplied(q: Tensor, k: Tensor) -> None:
        if now[0] < 0 or any(x.shape[:-2].numel() % len(tokens_bt) for x in (q, k)):
            return  # not attention: a mask in the making
        here = seen.blocks[now[0]]
        here.q_bhtc, here.k_bhtc = (x.float().reshape(len(tokens_bt), -1, *x.shape[-2:]).clone() for x in (q, k))

    def softened(score: Tensor) -> None:
        if now[0] >= 0:
            seen.blocks[now[0]].score_bhtt = score.float().reshape(len(tokens_bt), -1, *score.shape[-2:]).clone()

    with exclusive(), ExitStack() as hooks:
        for index, block in enumerate(dense.blocks):
            hooks.enter_context(block.module.register_forward_pre_hook(partial(enter, index)))
        for module in dense.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                hooks.enter_context(module.register_forward_hook(see, with_kwargs=True))
        with _Scores(tokens_bt.shape[1], multiplied, softened):
            trace = dense.run(tokens_bt)
    seen.maps, seen.logits_xv = list(maps.values()), trace.logits_btv.flatten(0, 1).float()
    seen.residuals = [h_btd.flatten(0, 1).float() for h_btd in trace.residuals]
    return seen


# --- maps that read and write


def _sites(dense: DenseModel) -> dict[int, list[int]]:
    """The sites that each block reads, and (of -1) what lies behind all blocks."""
    sites: dict[int, list[int]] = {-1: [len(dense.sublayers)]}
    for site, kind in enumerate(dense.sublayers):
        if kind == "mlp":
            sites[max(sites)].append(site)
        else:
            sites[len(sites) - 1] = [site]
    return sites


def _reads(seen: _Seen, sites: Mapping[int, Sequence[int]], centred: bool, eps: float) -> list[_Read]:
    """The maps that read the residual, each at the site of its block that explains its input best."""
    found: list[_Read] = []
    known: list[tuple[Tensor, tuple[float, int, bool, Tensor, Tensor]]] = []  # several maps take in the same
    for one in seen.maps:
        if one.input_xi.shape != seen.residuals[0].shape:
            continue
        best = next((fit for input_xd, fit in known if torch.equal(input_xd, one.input_xi)), None)
        if best is None:
            fits = [_fit_read(one.input_xi, seen.residuals[site], site, centred, eps) for site in sites[one.block]]
            best = min(fits, key=lambda fit: fit[0])
            known.append((one.input_xi, best))
        unexplained, site, raw, gain_d, bias_d = best
        if unexplained < SAME:
            affine = Affine(one.weight_oi * gain_d, one.weight_oi @ bias_d + one.bias_o)
            found.append(_Read(one, affine, site, raw, unexplained))
    return found


def _fit_read(
    input_xd: Tensor, h_xd: Tensor, site: int, centred: bool, eps: float
) -> tuple[float, int, bool, Tensor, Tensor]:  # fmt: skip
    """(unexplained, site, raw, gain_d, bias_d) of an input as g z + b, or as h."""
    gain_d, bias_d, unexplained = _gain(_normal(h_xd, centred, eps), input_xd, biased=centred)
    raw = _unexplained(h_xd, input_xd)
    if raw < unexplained:
        return raw, site, True, torch.ones_like(gain_d), torch.zeros_like(gain_d)
    return unexplained, site, False, gain_d, bias_d


def _normal(h_xd: Tensor, centred: bool, eps: float) -> Tensor:
    h_xd = h_xd - h_xd.mean(-1, keepdim=True) if centred else h_xd
    return h_xd * torch.rsqrt(h_xd.square().mean(-1, keepdim=True) + max(eps, 1e-20))


def _gain(z_xd: Tensor, y_xd: Tensor, *, biased: bool) -> tuple[Tensor, Tensor, float]:
    """(gain_d, bias_d, unexplained) of y = gain z + bias, channel by channel."""
    mean_d, offset_d = (z_xd.mean(0), y_xd.mean(0)) if biased else (torch.zeros_like(z_xd[0]), torch.zeros_like(z_xd[0]))
    z0_xd = z_xd - mean_d
    gain_d = (z0_xd * (y_xd - offset_d)).sum(0) / z0_xd.square().sum(0).clamp_min(1e-12)
    bias_d = offset_d - gain_d * mean_d
    return gain_d, bias_d, _unexplained(gain_d * z_xd + bias_d, y_xd)


def _multiple(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(c, unexplained) of y = c x."""
    factor = ((x * y).sum() / x.square().sum().clamp_min(1e-20)).item()
    return factor, _unexplained(factor * x, y)


def _scaled(x_vd: Tensor, y_vd: Tensor) -> tuple[float, Tensor, float]:
    """(c, offset_d, unexplained) of y = c x + offset."""
    x0_vd = x_vd - x_vd.mean(0)
    factor = ((x0_vd * y_vd).sum() / x0_vd.square().sum().clamp_min(1e-20)).item()
    offset_d = (y_vd - factor * x_vd).mean(0)
    return factor, offset_d, _unexplained(factor * x_vd + offset_d, y_vd)


def _times(one: _Map, factor: float) -> Written:
    return Written(Affine(one.weight_oi * factor, one.bias_o * factor), None)


def _written(one: _Map, write_xd: Tensor) -> Written | None:
    """The steps from a map's output to its sublayer's write."""
    factor, unexplained = _multiple(one.output_xo, write_xd)
    if unexplained < SAME:
        return _times(one, factor)
    fits = [(_gain(_normal(one.output_xo, False, eps), write_xd, biased=False), eps) for eps in EPSILONS]
    (gain_d, _, unexplained), eps = min(fits, key=lambda fit: fit[0][2])
    return Written(Affine(one.weight_oi, one.bias_o), gain_d, eps) if unexplained < SAME else None


def _unexplained(guess_xy: Tensor, target_xy: Tensor) -> float:
    """Share of the target's variance over tokens that a guess leaves."""
    total = (target_xy - target_xy.mean(0)).square().sum()
    return ((guess_xy - target_xy).square().sum() / total.clamp_min(1e-20)).nan_to_num(torch.inf).item()


def unexplained(guess_xy: Tensor, target_xy: Tensor) -> float:
    """Share of the target's variance over tokens that a guess leaves."""
    return _unexplained(guess_xy, target_xy)


# --- sublayers


def _attention(
    reads: Sequence[_Read], writers: Sequence[_Map], seen: _Attended, window: int | None
) -> tuple[Attention, _Map] | None:
    """The attention that some maps read for, and the map that writes; None where it is not one that is known here."""
    q_bhtc, k_bhtc, score_bhtt = seen.q_bhtc, seen.k_bhtc, seen.score_bhtt
    if q_bhtc is None or k_bhtc is None or score_bhtt is None or not reads:
        return None
    rows, heads, _, channels = q_bhtc.shape
    affine = Affine(*(torch.cat(parts) for parts in zip(*((r.affine.weight_oi, r.affine.bias_o) for r in reads), strict=True)))
    column_bto = torch.cat([read.map.output_xo for read in reads], -1).unflatten(0, (rows, -1))
    for one in writers:
        first_bi = one.input_xi.unflatten(0, (rows, -1))[:, 0]
        if first_bi.shape[1] != heads * channels or (found := _along(first_bi, column_bto[:, 0])) is None:
            continue
        v_hc = found[0].view(heads, channels)
        distinct = list(dict.fromkeys(map(tuple, v_hc.tolist())))
        group = heads // len(distinct)
        if [list(distinct[head // group]) for head in range(heads)] != v_hc.tolist():
            return None
        k_bgtc = k_bhtc[:, ::group] if k_bhtc.shape[1] == heads else k_bhtc
        before_q, before_k = (_queries(x_bhtc, affine, column_bto, reads) for x_bhtc in (q_bhtc, k_bgtc))
        if before_q is None or before_k is None or (before_q.gain_o is None) != (before_k.gain_o is None):
            return None
        scored = _positions(before_q, before_k, q_bhtc, k_bgtc, score_bhtt)
        if scored is None:
            return None
        shape, cap, (q, k), gains = scored
        shape = shape.model_copy(update={"window": window})
        v = affine.rows(v_hc[::group].flatten(), found[1].view(heads, channels)[::group].flatten())
        nothing = Written(Affine(one.weight_oi, one.bias_o), None)
        by_head, norm_eps = before_q.by_head, before_q.eps
        return Attention(q, k, v, nothing, channels, shape, cap, gains, by_head, norm_eps, reads[0].raw), one
    return None


def _along(want_bi: Tensor, column_bo: Tensor) -> tuple[Tensor, Tensor] | None:
    """(index_i, factor_i): the column that is each of the wanted ones, or lies along it, and how long it is; None without."""
    near_i, index_i = torch.cdist(want_bi.T.double(), column_bo.T.double()).min(1)  # what a row of rows is there can be all alike
    if bool((near_i <= 1e-4 * want_bi.norm(dim=0) + 1e-6 * want_bi.abs().max()).all()):
        return index_i, torch.ones_like(want_bi[0])
    want_norm_i, norm_o = want_bi.norm(dim=0).clamp_min(1e-20), column_bo.norm(dim=0).clamp_min(1e-20)
    cosine_io = (want_bi / want_norm_i).T @ (column_bo / norm_o)
    best_i, index_i = cosine_io.abs().max(1)
    factor_i = want_norm_i / norm_o[index_i] * cosine_io.gather(1, index_i[:, None])[:, 0].sign()
    return (index_i, factor_i) if bool((1 - best_i < 1e-5).all()) else None


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries (or keys) before they are rotated: a map, perhaps a norm with a gain behind it, and what they are on the probe."""

    map: Affine
    gain_o: Tensor | None
    by_head: bool
    eps: float
    value_bhtc: Tensor


def _queries(x_bhtc: Tensor, affine: Affine, column_bto: Tensor, reads: Sequence[_Read]) -> _Queries | None:
    rows, heads, _, channels = x_bhtc.shape
    if (found := _along(x_bhtc[:, :, 0].flatten(1), column_bto[:, 0])) is not None:
        index_o, factor_o = found
        value_bto = column_bto[..., index_o] * factor_o
        return _Queries(
            affine.rows(index_o, factor_o), None, True, 0.0, value_bto.unflatten(-1, (heads, channels)).transpose(1, 2)
        )
    best: tuple[float, _Queries] | None = None
    for read in reads:
        if len(read.affine.bias_o) != heads * channels:
            continue
        for by_head in (True, False):
            for eps in EPSILONS:
                y_bto = read.map.output_xo.unflatten(0, (rows, -1))
                y_bto = (
                    _normal(y_bto.unflatten(-1, (heads, channels)), False, eps).flatten(-2)
                    if by_head
                    else _normal(y_bto, False, eps)
                )
                first_bo = x_bhtc[:, :, 0].flatten(1)
                gain_o, _, left = _gain(y_bto[:, 0], first_bo, biased=False)
                if best is None or left < best[0]:
                    value_bhtc = (y_bto * gain_o).unflatten(-1, (heads, channels)).transpose(1, 2)
                    best = left, _Queries(read.affine, gain_o, by_head, eps, value_bhtc)
    return best[1] if best is not None and best[0] < SAME else None


def _positions(
    q: _Queries, k: _Queries, q_bhtc: Tensor, k_bgtc: Tensor, score_bhtt: Tensor
) -> tuple[AttentionShape, float | None, tuple[Affine, Affine], tuple[Tensor, Tensor] | None] | None:
    """Positions in scores of queries and keys, and both with pairs as halves and such a scale that the score is q . k / root."""
    turn = _turn(torch.cat([q.value_bhtc, k.value_bhtc], 1), torch.cat([q_bhtc, k_bgtc], 1))
    if turn is None:
        return None
    frequencies, order_c = turn
    heads, channels = q_bhtc.shape[1], q_bhtc.shape[3]
    product_bhtt = q_bhtc @ k_bgtc.repeat_interleave(heads // k_bgtc.shape[1], 1).transpose(-1, -2)
    response = _response(product_bhtt, score_bhtt)
    if response is None:
        return None
    scale, cap, alibi_h = response
    factor = scale * math.sqrt(channels)
    made = []
    for each, times in ((q, factor), (k, 1.0)):
        order_o = (torch.arange(len(each.map.bias_o), device=order_c.device).view(-1, channels)[:, order_c]).flatten()
        gain_o = None if each.gain_o is None else each.gain_o[order_o] * times
        made.append((each.map.rows(order_o, times if gain_o is None else 1.0), gain_o))
    gains = None if made[0][1] is None or made[1][1] is None else (made[0][1], made[1][1])
    alibi = () if alibi_h is None else tuple(alibi_h.tolist())
    return AttentionShape(frequencies=frequencies, slopes=alibi), cap, (made[0][0], made[1][0]), gains


def _turn(before_bhtc: Tensor, after_bhtc: Tensor) -> tuple[tuple[float, ...], Tensor] | None:
    """(frequencies, order_c): the radians a token by which pairs of channels turn, and the order in which pairs are halves."""
    channels, length = before_bhtc.shape[-1], before_bhtc.shape[2]
    natural_c = torch.arange(channels, device=before_bhtc.device)
    if (after_bhtc - before_bhtc).abs().max() <= 1e-4 * before_bhtc.abs().max():
        return (), natural_c
    size = before_bhtc.double().square().sum()
    best: tuple[float, Tensor, Tensor] | None = None
    for turning in range(channels - channels % 2, 0, -2):
        halves_c, neighbours_c = natural_c[:turning], natural_c[:turning].view(-1, 2).T.flatten()
        for order_c in (halves_c, neighbours_c):
            pairs = [x[..., order_c].double().unflatten(-1, (2, -1)) for x in (before_bhtc, after_bhtc)]
            was, now = (torch.complex(x[..., 0, :], x[..., 1, :]) for x in pairs)
            rotation_tp = (now * was.conj()).sum((0, 1))
            rotation_tp = rotation_tp / rotation_tp.abs().clamp_min(1e-20)
            rest = (after_bhtc[..., turning:] - before_bhtc[..., turning:]).double().square().sum()
            left = (((now - was * rotation_tp).abs().square().sum() + rest) / size).item()
            if best is None or left < 0.5 * best[0] and best[0] > 1e-9:
                best = left, rotation_tp.angle(), torch.cat([order_c, natural_c[turning:]])
    if best is None or best[0] > 1e-5:
        return None
    angle_tp = best[1]
    frequency_p = angle_tp[1]
    for place in range(2, length):  # a later position tells it more exactly, once it is known how often it has gone round
        off_p = angle_tp[place] - place * frequency_p
        frequency_p = frequency_p + (off_p - 2 * math.pi * (off_p / (2 * math.pi)).round()) / place
    return tuple(frequency_p.tolist()), best[2]


def _response(product_bhtt: Tensor, score_bhtt: Tensor) -> tuple[float, float | None, Tensor | None] | None:
    """(scale, cap, slopes_h) of scores as functions of q . k and of the key's place."""
    seen_bhtt = (score_bhtt > UNSEEN).expand_as(product_bhtt)
    score_bhtt = score_bhtt.expand_as(product_bhtt).double()
    product_bhtt, place_t = product_bhtt.double(), torch.arange(score_bhtt.shape[-1], device=score_bhtt.device).double()
    scale, cap, left = _capped(product_bhtt[seen_bhtt], score_bhtt[seen_bhtt])
    if left < 1e-6:
        return scale, cap, None

    def within(x_bhtt: Tensor) -> Tensor:  # less its mean over the keys that each query sees
        mean = (x_bhtt * seen_bhtt).sum(-1, keepdim=True) / seen_bhtt.sum(-1, keepdim=True)
        return (x_bhtt - mean) * seen_bhtt

    x, p, y = (within(one.expand_as(product_bhtt)).transpose(0, 1).flatten(1) for one in (product_bhtt, place_t, score_bhtt))
    both = torch.linalg.lstsq(torch.stack([x, p], -1), y[..., None]).solution[..., 0]
    left = ((both[:, :1] * x + both[:, 1:] * p - y).square().sum() / y.square().sum()).item()
    alike = (both[:, 0] - both[:, 0].mean()).abs().max() <= 1e-3 * both[:, 0].abs().max()
    return (both[:, 0].mean().item(), None, both[:, 1].float()) if left < 1e-6 and bool(alike) else None


def _capped(x: Tensor, y: Tensor) -> tuple[float, float | None, float]:
    """(scale, cap, unexplained) of y = scale x, or of y = cap tanh(scale x / cap) where that is needed."""
    total = y.square().sum().clamp_min(1e-20)

    def fit(cap: float | None) -> tuple[float, float]:
        inner = y if cap is None else cap * (y / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh()
        weight = 1.0 if cap is None else 1 - (y / cap).square().clamp(max=1)  # an error there counts as it does in y
        scale = ((weight * x * weight * inner).sum() / (weight * x).square().sum().clamp_min(1e-20)).item()
        guess = scale * x if cap is None else cap * (scale * x / cap).tanh()
        return scale, ((guess - y).square().sum() / total).item()

    scale, left = fit(None)
    if left < 1e-9:
        return scale, None, left
    low, high = math.log(max(CAPS[0], y.abs().max().item())), math.log(CAPS[1])
    for _ in range(6):
        places = torch.linspace(low, high, 33).tolist()
        best = min(range(33), key=lambda place: fit(math.exp(places[place]))[1])
        low, high = places[max(0, best - 1)], places[min(32, best + 1)]
    cap = float(f"{math.exp((low + high) / 2):.4g}")
    capped_scale, capped_left = fit(cap)
    return (capped_scale, cap, capped_left) if capped_left < 0.01 * left else (scale, None, left)


def _mlp(reads: Sequence[_Read], writers: Sequence[_Map]) -> tuple[Mlp, _Map] | None:
    """The MLP that some maps read for, and the map that writes."""
    for one in writers:
        neurons = one.weight_oi.shape[1]
        parts = [
            (Affine(*(x.split(neurons)[part] for x in (read.affine.weight_oi, read.affine.bias_o))), y_xm, read.raw)
            for read in reads
            if len(read.affine.bias_o) % neurons == 0
            for part, y_xm in enumerate(read.map.output_xo.split(neurons, -1))
        ]
        nothing = Written(Affine(one.weight_oi, one.bias_o), None)
        fits: list[tuple[float, Mlp]] = []
        for name, activation in ACTIVATIONS.items():
            for up, y_xm, raw in parts:
                fits.append((_unexplained(activation(y_xm), one.input_xi), Mlp(None, up, nothing, name, raw)))
            for (gate, gate_xm, raw), (up, up_xm, _) in permutations(parts, 2):
                fits.append((_unexplained(activation(gate_xm) * up_xm, one.input_xi), Mlp(gate, up, nothing, name, raw)))
        left, best = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
        if best is not None and left < SAME:
            return best, one
    return None


# --- ends


class _Stop(Exception):
    """Ends a run of which no more is wanted."""


def _residual_at_entry(dense: DenseModel, tokens_bt: Tensor) -> Tensor:
    """h_btd of tokens at site 0; what comes behind is not computed."""

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        raise _Stop(first_tensor(args, kwargs))

    with exclusive(), dense.blocks[0].module.register_forward_pre_hook(stop, with_kwargs=True):
        try:
            forward(dense.model, tokens_bt)
        except _Stop as stopped:
            return stopped.args[0].float()
    raise AssertionError("a model ran without its first block")


def _embedding(dense: DenseModel, tokens_bt: Tensor, h_xd: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(embedding_vd, position_td), None where the residual at site 0 is not their sum."""
    table: Any = dense.model.get_input_embeddings()
    weight_ud = table.weight[: dense.vocabulary]
    known = len(weight_ud)
    every_v1 = torch.arange(known, device=dense.device)[:, None]
    embedding_vd = torch.cat([_residual_at_entry(dense, some_v1)[:, 0] for some_v1 in every_v1.split(4096)])
    embedding_vd = F.pad(embedding_vd, (0, 0, 0, dense.vocabulary - known))
    row_1t = tokens_bt[:1, :1].expand(1, min(dense.context or tokens_bt.shape[1], 4096))
    position_td = _residual_at_entry(dense, row_1t)[0] - embedding_vd[row_1t[0]]
    weight_vd = F.pad(weight_ud.float(), (0, 0, 0, dense.vocabulary - known))
    if weight_vd.shape == embedding_vd.shape:  # what is no token's own is the position's
        factor, offset_d, left = _scaled(weight_vd[:known], embedding_vd[:known])
        if left < SAME and offset_d.abs().max() > 1e-5 * embedding_vd.abs().max():
            embedding_vd, position_td = factor * weight_vd, position_td + offset_d
    guess_btd = embedding_vd[tokens_bt] + position_td[: tokens_bt.shape[1]]
    if not _unexplained(guess_btd.flatten(0, 1), h_xd) < SAME:
        return None, None
    still = position_td.abs().max() <= 1e-5 * embedding_vd.abs().max()
    return embedding_vd, None if bool(still) else position_td


def _unembedding(seen: _Seen, reads: Sequence[_Read]) -> tuple[Affine | None, float | None]:
    """The map of the last residual's norm whose output is the logits, perhaps times a constant and softly capped."""
    assert seen.logits_xv is not None
    for read in reads:
        if read.map.output_xo.shape == seen.logits_xv.shape and read.site == len(seen.residuals) - 1 and not read.raw:
            scale, cap, left = _capped(read.map.output_xo.double().flatten(), seen.logits_xv.double().flatten())
            if left < SAME:
                return read.affine.rows(torch.arange(len(read.affine.bias_o), device=read.affine.bias_o.device), scale), cap
    return None, None


def _windows(dense: DenseModel, context: int) -> list[int | None]:
    """Number of tokens that the last query of a row of `context` sees in every block; None: all."""
    tokens_1t, seen, now = _probe(dense, 1, context), dict[int, int](), [-1]

    def enter(index: int, *_: Any) -> None:
        now[0] = index

    def softened(score: Tensor) -> None:
        seen[now[0]] = int((score[..., -1, :] > UNSEEN).flatten(0, -2)[0].sum())

    with exclusive(), ExitStack() as hooks:
        for index, block in enumerate(dense.blocks):
            hooks.enter_context(block.module.register_forward_pre_hook(partial(enter, index)))
        with _Scores(tokens_1t.shape[1], lambda *_: None, softened):
            forward(dense.model, tokens_1t)
    length = tokens_1t.shape[1]
    return [count if 0 < (count := seen.get(block, 0)) < length else None for block in range(len(dense.blocks))]

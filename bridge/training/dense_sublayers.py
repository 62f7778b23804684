"""Find the attention and MLPs of a dense model among its linear maps by their inputs and outputs (see `anatomy`).

Shape legend: as in `anatomy`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations, product

import torch
from torch import Tensor

from bridge.models.sparse_blocks import ACTIVATIONS
from bridge.recipe import AttentionShape
from bridge.training.dense_maps import (
    EPSILONS,
    MASKED_SCORE,
    MAX_UNEXPLAINED,
    Affine,
    CalledMap,
    OutputMap,
    Reading,
    RecordedAttention,
    fit_gain,
    normalise,
    unexplained,
)

CAP_RANGE = (0.1, 500.0)  # range in which a soft cap is searched


@dataclass(frozen=True, eq=False)
class Attention:
    """Attention as maps of z (h if raw): scores are q . k / sqrt(channels); channels i and i + half rotate as a pair.

    gains are the gains of the norms of q (h c) and k (g c); each norm is per head if by_head, otherwise over all heads.
    """

    q: Affine
    k: Affine
    v: Affine
    out: OutputMap
    channels: int
    shape: AttentionShape
    cap: float | None
    gains: tuple[Tensor, Tensor] | None
    by_head: bool
    norm_eps: float
    raw: bool

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return len(self.q.bias_o) // self.channels

    @property
    def kv_heads(self) -> int:
        """Number of heads of keys and values."""
        return len(self.v.bias_o) // self.channels


@dataclass(frozen=True, eq=False)
class Mlp:
    """An MLP as maps of z (h if raw); gate is None if the MLP is not gated."""

    gate: Affine | None
    up: Affine
    out: OutputMap
    activation: str
    raw: bool

    @property
    def neurons(self) -> int:
        """Number of inputs of the last map."""
        return len(self.up.bias_o)


def find_attention(
    reads: Sequence[Reading], writers: Sequence[CalledMap], seen: RecordedAttention, window: int | None
) -> tuple[Attention, CalledMap] | None:
    """Find the attention whose inputs some maps compute; return it with the map that writes, None if it fits no known form."""
    q_bhtc, k_bhtc, score_bhtt = seen.q_bhtc, seen.k_bhtc, seen.score_bhtt
    if q_bhtc is None or k_bhtc is None or score_bhtt is None or not reads:
        return None
    rows, heads, _, channels = q_bhtc.shape
    affine = Affine(*(torch.cat(parts) for parts in zip(*((r.affine.weight_oi, r.affine.bias_o) for r in reads), strict=True)))
    column_bto = torch.cat([read.map.output_xo for read in reads], -1).unflatten(0, (rows, -1))
    for one in writers:
        first_bi = one.input_xi.unflatten(0, (rows, -1))[:, 0]
        if first_bi.shape[1] != heads * channels or (found := _match_columns(first_bi, column_bto[:, 0])) is None:
            continue
        v_hc = found[0].view(heads, channels)
        distinct = list(dict.fromkeys(map(tuple, v_hc.tolist())))
        group = heads // len(distinct)
        if [list(distinct[head // group]) for head in range(heads)] != v_hc.tolist():
            return None
        k_bgtc = k_bhtc[:, ::group] if k_bhtc.shape[1] == heads else k_bhtc
        before_q, before_k = (_find_queries(x_bhtc, affine, column_bto, reads) for x_bhtc in (q_bhtc, k_bgtc))
        if before_q is None or before_k is None or (before_q.gain_o is None) != (before_k.gain_o is None):
            return None
        turn = _fit_rotation(torch.cat([before_q.value_bhtc, before_k.value_bhtc], 1), torch.cat([q_bhtc, k_bgtc], 1))
        response = _fit_scores(q_bhtc @ k_bgtc.repeat_interleave(heads // k_bgtc.shape[1], 1).transpose(-1, -2), score_bhtt)
        if turn is None or response is None:
            return None
        (frequencies, order_c), (scale, cap, alibi) = turn, response
        shape = AttentionShape(frequencies=frequencies, window=window, slopes=alibi)
        q, gain_q = before_q.reorder(order_c, scale * math.sqrt(channels))
        k, gain_k = before_k.reorder(order_c, 1.0)
        gains = None if gain_q is None or gain_k is None else (gain_q, gain_k)
        v = affine.rows(v_hc[::group].flatten(), found[1].view(heads, channels)[::group].flatten())
        by_head, norm_eps = before_q.by_head, before_q.eps
        return Attention(q, k, v, OutputMap(one.affine), channels, shape, cap, gains, by_head, norm_eps, reads[0].raw), one
    return None


def _match_columns(want_bi: Tensor, column_bo: Tensor) -> tuple[Tensor, Tensor] | None:
    """Match each wanted column to an equal column, or else a parallel one; return (index_i, factor_i), None if there is none."""
    near_i, index_i = torch.cdist(want_bi.T.double(), column_bo.T.double()).min(1)  # equality first: many columns may be parallel
    if bool((near_i <= 1e-4 * want_bi.norm(dim=0) + 1e-6 * want_bi.abs().max()).all()):
        return index_i, torch.ones_like(want_bi[0])
    want_norm_i, norm_o = want_bi.norm(dim=0).clamp_min(1e-20), column_bo.norm(dim=0).clamp_min(1e-20)
    cosine_io = (want_bi / want_norm_i).T @ (column_bo / norm_o)
    best_i, index_i = cosine_io.abs().max(1)
    factor_i = want_norm_i / norm_o[index_i] * cosine_io.gather(1, index_i[:, None])[:, 0].sign()
    return (index_i, factor_i) if bool((1 - best_i < 1e-5).all()) else None


@dataclass(frozen=True, eq=False)
class _Queries:
    """Queries (or keys) before rotation: a map, a norm with a gain after it (gain_o None: no norm), and values on the probe."""

    map: Affine
    gain_o: Tensor | None
    by_head: bool
    eps: float
    value_bhtc: Tensor

    def reorder(self, order_c: Tensor, factor: float) -> tuple[Affine, Tensor | None]:
        """Return map and gain with each head's channels reordered; the gain, or the map if there is none, is times a factor."""
        order_o = torch.arange(len(self.map.bias_o), device=order_c.device).view(-1, len(order_c))[:, order_c].flatten()
        if self.gain_o is None:
            return self.map.rows(order_o, factor), None
        return self.map.rows(order_o), self.gain_o[order_o] * factor


def _find_queries(x_bhtc: Tensor, affine: Affine, column_bto: Tensor, reads: Sequence[Reading]) -> _Queries | None:
    rows, heads, _, channels = x_bhtc.shape
    first_bo = x_bhtc[:, :, 0].flatten(1)

    def heads_of(value_bto: Tensor) -> Tensor:
        return value_bto.unflatten(-1, (heads, channels)).transpose(1, 2)

    if (found := _match_columns(first_bo, column_bto[:, 0])) is not None:
        index_o, factor_o = found
        return _Queries(affine.rows(index_o, factor_o), None, True, 0.0, heads_of(column_bto[..., index_o] * factor_o))
    best: tuple[float, _Queries] | None = None
    for read, by_head, eps in product(reads, (True, False), EPSILONS):
        if len(read.affine.bias_o) != heads * channels:
            continue
        y_bthc = read.map.output_xo.unflatten(0, (rows, -1)).unflatten(-1, (heads if by_head else 1, -1))
        y_bto = normalise(y_bthc, False, eps).flatten(-2)
        gain_o, _, left = fit_gain(y_bto[:, 0], first_bo, biased=False)
        if best is None or left < best[0]:
            best = left, _Queries(read.affine, gain_o, by_head, eps, heads_of(y_bto * gain_o))
    return best[1] if best is not None and best[0] < MAX_UNEXPLAINED else None


def _fit_rotation(before_bhtc: Tensor, after_bhtc: Tensor) -> tuple[tuple[float, ...], Tensor] | None:
    """Return (frequencies, order_c): radians per token of each pair, the order in which pairs are halves; None without a fit."""
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
    for place in range(2, length):  # later positions refine it; the estimate so far gives the number of full turns
        off_p = angle_tp[place] - place * frequency_p
        frequency_p = frequency_p + (off_p - 2 * math.pi * (off_p / (2 * math.pi)).round()) / place
    return tuple(frequency_p.tolist()), best[2]


def _fit_scores(product_bhtt: Tensor, score_bhtt: Tensor) -> tuple[float, float | None, tuple[float, ...]] | None:
    """Fit scores as functions of q . k and the key's position; return (scale, cap, ALiBi of each head), None without a fit."""
    seen_bhtt = (score_bhtt > MASKED_SCORE).expand_as(product_bhtt)
    score_bhtt = score_bhtt.expand_as(product_bhtt).double()
    product_bhtt, place_t = product_bhtt.double(), torch.arange(score_bhtt.shape[-1], device=score_bhtt.device).double()
    scale, cap, left = fit_soft_cap(product_bhtt[seen_bhtt], score_bhtt[seen_bhtt])
    if left < 1e-6:
        return scale, cap, ()

    def within(x_bhtt: Tensor) -> Tensor:  # minus its mean over the keys that each query attends to
        mean = (x_bhtt * seen_bhtt).sum(-1, keepdim=True) / seen_bhtt.sum(-1, keepdim=True)
        return (x_bhtt - mean) * seen_bhtt

    x, p, y = (within(one.expand_as(product_bhtt)).transpose(0, 1).flatten(1) for one in (product_bhtt, place_t, score_bhtt))
    both = torch.linalg.lstsq(torch.stack([x, p], -1), y[..., None]).solution[..., 0]
    left = ((both[:, :1] * x + both[:, 1:] * p - y).square().sum() / y.square().sum()).item()
    alike = (both[:, 0] - both[:, 0].mean()).abs().max() <= 1e-3 * both[:, 0].abs().max()
    return (both[:, 0].mean().item(), None, tuple(both[:, 1].float().tolist())) if left < 1e-6 and bool(alike) else None


def fit_soft_cap(x: Tensor, y: Tensor) -> tuple[float, float | None, float]:
    """Fit y = scale x, or y = cap tanh(scale x / cap) if that is much better; return (scale, cap, unexplained)."""
    total = y.square().sum().clamp_min(1e-20)

    def fit(cap: float | None) -> tuple[float, float]:
        inner = y if cap is None else cap * (y / cap).clamp(-1 + 1e-9, 1 - 1e-9).atanh()
        weight = 1.0 if cap is None else 1 - (y / cap).square().clamp(max=1)  # so that an error counts as much as it would in y
        scale = ((weight * x * weight * inner).sum() / (weight * x).square().sum().clamp_min(1e-20)).item()
        guess = scale * x if cap is None else cap * (scale * x / cap).tanh()
        return scale, ((guess - y).square().sum() / total).item()

    scale, left = fit(None)
    if left < 1e-9:
        return scale, None, left
    low, high = math.log(max(CAP_RANGE[0], y.abs().max().item())), math.log(CAP_RANGE[1])
    for _ in range(6):
        places = torch.linspace(low, high, 33).tolist()
        best = min(range(33), key=lambda place: fit(math.exp(places[place]))[1])
        low, high = places[max(0, best - 1)], places[min(32, best + 1)]
    cap = float(f"{math.exp((low + high) / 2):.4g}")
    capped_scale, capped_left = fit(cap)
    return (capped_scale, cap, capped_left) if capped_left < 0.01 * left else (scale, None, left)


def find_mlp(reads: Sequence[Reading], writers: Sequence[CalledMap]) -> tuple[Mlp, CalledMap] | None:
    """Find the MLP whose inputs some maps compute; return it with the map that writes, None if no form fits."""
    for one in writers:
        neurons = one.affine.weight_oi.shape[1]
        parts = [
            (Affine(*(x.split(neurons)[part] for x in (read.affine.weight_oi, read.affine.bias_o))), y_xm, read.raw)
            for read in reads
            if len(read.affine.bias_o) % neurons == 0
            for part, y_xm in enumerate(read.map.output_xo.split(neurons, -1))
        ]
        out = OutputMap(one.affine)
        fits: list[tuple[float, Mlp]] = []
        for name, activation in ACTIVATIONS.items():
            for up, y_xm, raw in parts:
                fits.append((unexplained(activation(y_xm), one.input_xi), Mlp(None, up, out, name, raw)))
            for (gate, gate_xm, raw), (up, up_xm, _) in permutations(parts, 2):
                fits.append((unexplained(activation(gate_xm) * up_xm, one.input_xi), Mlp(gate, up, out, name, raw)))
        left, best = min(fits, key=lambda fit: fit[0], default=(math.inf, None))
        if best is not None and left < MAX_UNEXPLAINED:
            return best, one
    return None

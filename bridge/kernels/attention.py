"""Causal attention with a sink per head, fused, for the CPU, with tokens innermost: head h, query i, keys j <= i.

    s_j = q_i . k_j / sqrt(c)        l = log(exp(sink) + sum_j exp(s_j))        p_j = exp(s_j - l)        z_i = sum_j p_j v_j

    D = dz_i . z_i        ds_j = p_j (dz_i . v_j - D)        dsink -= exp(sink - l) D
    dq_i = sum_j ds_j k_j / sqrt(c)        dk_j += ds_j q_i / sqrt(c)        dv_j += p_j dz_i

No t x t matrix is stored: the backward pass recomputes a query's scores from l. Each channel of the keys is a row of tokens, so
a query's scores are a weighted sum of rows, as in `products`. The values of a head (its keys in the backward pass) are transposed
once, so z_i (dq_i) is a weighted sum of rows too. For many short rows (masked copies of a prompt) torch's batched products take
less time, and the scores are stored.

The queries may cover the last positions only.

Shape legend: b batch row, t token, n channels of all heads, h heads, c channels of a head.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.kernels.cpu import run_in_parallel
from bridge.kernels.lanes import add_scaled, compiled, exponentials, weighted_sum_16, weighted_sum_32, weighted_sum_64

NO_SINK_LOGIT = -1e30  # the logit of a sink that takes no attention
SHORT, MANY = 64, 8  # a row of fewer tokens is short; at least so many rows are many


def attend(q_bqn: Tensor, k_btn: Tensor, v_btn: Tensor, channels: int, sink_h: Tensor | None = None) -> Tensor:
    """Return z_bqn of the last q positions in float32, stored with tokens innermost; differentiable in q, k, v and the sinks."""
    sink_h = q_bqn.new_full((q_bqn.shape[-1] // channels,), NO_SINK_LOGIT) if sink_h is None else sink_h
    rows, tokens, _ = k_btn.shape
    if tokens < SHORT and rows >= MANY:
        return _of_short_rows(q_bqn, k_btn, v_btn, sink_h, channels)
    earlier = tokens - q_bqn.shape[1]
    q_btn = F.pad(q_bqn, (0, 0, earlier, 0)) if earlier else q_bqn
    return _Attention.apply(q_btn, k_btn, v_btn, sink_h, channels)[:, earlier:]  # type: ignore[no-any-return]


def _of_short_rows(q_bqn: Tensor, k_btn: Tensor, v_btn: Tensor, sink_h: Tensor, channels: int) -> Tensor:
    q_bhqc, k_bhtc, v_bhtc = (x.float().unflatten(-1, (-1, channels)).transpose(1, 2) for x in (q_bqn, k_btn, v_btn))
    score_bhqt = q_bhqc @ k_bhtc.transpose(-1, -2) / math.sqrt(channels)
    queries, tokens = score_bhqt.shape[-2:]
    future_qt = torch.ones(queries, tokens, dtype=torch.bool, device=score_bhqt.device).triu(1 + tokens - queries)
    sink_bhq1 = sink_h.view(1, -1, 1, 1).expand(*score_bhqt.shape[:3], 1)
    with_sink = torch.cat([sink_bhq1, score_bhqt.masked_fill(future_qt, -torch.inf)], -1)
    return (with_sink.softmax(-1)[..., 1:] @ v_bhtc).transpose(1, 2).flatten(2)


def _pad_tokens_innermost(x_btn: Tensor) -> Tensor:
    """Return x_bnt, contiguous and padded at the end to whole vectors of tokens; no query attends to the padding."""
    x_bnt = x_btn.detach().float().transpose(1, 2)
    short = -x_bnt.shape[2] % 16
    return F.pad(x_bnt, (0, short)).contiguous() if short else x_bnt.contiguous()


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_btn: Tensor, k_btn: Tensor, v_btn: Tensor, sink_h: Tensor, channels: int) -> Tensor:
        q_bnt, k_bnt, v_bnt = (_pad_tokens_innermost(x) for x in (q_btn, k_btn, v_btn))
        z_bnt, l_ht = torch.empty_like(q_bnt), torch.empty(q_bnt.shape[0] * q_bnt.shape[1] // channels, q_bnt.shape[2])
        # a copy, because numpy would keep the memory of gathered weights (`training/shards`) from being freed
        sink_h = sink_h.detach().to(torch.float32, copy=True)
        tensors = (q_bnt, k_bnt, v_bnt, sink_h, z_bnt)
        arrays = [*(tensor.view(-1).numpy() for tensor in tensors), l_ht.numpy()]
        rows, n, tokens = q_bnt.shape  # every token is a query, and rows follow one another in memory
        where = channels, np.zeros(rows, np.int64), np.full(rows, tokens), n * tokens, tokens, n * tokens, tokens
        run_in_parallel(lambda start, stop: forward(*arrays, *where, start, stop), len(l_ht), q_bnt.numel() * q_bnt.shape[2])
        ctx.save_for_backward(*tensors, l_ht)
        ctx.where, ctx.length = where, q_btn.shape[1]
        return z_bnt.transpose(1, 2)[:, : q_btn.shape[1]]

    @staticmethod
    def backward(ctx: Any, dz_btn: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q_bnt, k_bnt, v_bnt, sink_h, z_bnt, l_ht = ctx.saved_tensors
        dz_bnt = _pad_tokens_innermost(dz_btn)
        dq_bnt, dk_bnt, dv_bnt = torch.empty_like(q_bnt), torch.zeros_like(q_bnt), torch.zeros_like(q_bnt)
        dsink_bh = torch.zeros(len(q_bnt), len(sink_h))
        before, after = (q_bnt, k_bnt, v_bnt, sink_h, z_bnt), (dz_bnt, dq_bnt, dk_bnt, dv_bnt, dsink_bh)
        arrays = [*(x.view(-1).numpy() for x in before), l_ht.numpy(), *(x.view(-1).numpy() for x in after)]
        work = q_bnt.numel() * q_bnt.shape[2]
        run_in_parallel(lambda start, stop: backward(*arrays, *ctx.where, start, stop), dsink_bh.numel(), work)
        d_btn = [d_bnt.transpose(1, 2)[:, : ctx.length] for d_bnt in (dq_bnt, dk_bnt, dv_bnt)]
        return (*d_btn, dsink_bh.sum(0), None)


@compiled
def _sums(
    x: np.ndarray, x_at: int, stride: int, index: np.ndarray, weight: np.ndarray, rows: int, upto: int, y: np.ndarray
) -> None:
    """Set y[j] = sum over i < rows of weight[i] x[index[i], j] for j < upto, a multiple of 16; no sum runs across a vector."""
    j = 0
    while j < upto:
        if j + 64 <= upto:
            weighted_sum_64(x, x_at + j, stride, index, weight, 0, rows, np.float32(0), y, j)
            j += 64
        elif j + 32 <= upto:
            weighted_sum_32(x, x_at + j, stride, index, weight, 0, rows, np.float32(0), y, j)
            j += 32
        else:
            weighted_sum_16(x, x_at + j, stride, index, weight, 0, rows, np.float32(0), y, j)
            j += 16


@compiled
def _transpose_head(x: np.ndarray, x_at: int, tokens: int, channels: int, upto: int, y: np.ndarray) -> int:
    """Set y[j * width + c] = x[c, j] for j < upto, and return width: the channels rounded up to whole vectors."""
    width = (channels + 15) // 16 * 16
    for c in range(channels):
        for j in range(upto):
            y[j * width + c] = x[x_at + c * tokens + j]
    return width


@numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz", "reassoc"})
def _largest(score: np.ndarray, upto: int) -> np.float32:
    largest = score[0]
    for j in range(upto):
        largest = max(largest, score[j])
    return largest


@compiled
def _through(ds: np.ndarray, p: np.ndarray, through: np.float32, upto: int) -> None:
    for j in range(upto):
        ds[j] = p[j] * (ds[j] - through)


@compiled
def forward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray, z: np.ndarray, log_sum: np.ndarray, channels: int,
    first: np.ndarray, after: np.ndarray, q_row: int, q_stride: int, row: int, stride: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Compute z and log_sum for heads start to stop, counted over all rows, and for queries first[b] to after[b] of row b.

    All arrays are flat. The tokens of a channel are contiguous; the next channel begins `stride` (of queries q_stride) later, and
    row b begins at b * row (b * q_row). Values after a channel's tokens are read up to whole vectors, but not used.
    """
    score, index = np.empty(stride, np.float32), np.arange(max(channels, stride)).astype(np.int32)
    query, out = np.empty(channels, np.float32), np.empty(channels + 16, np.float32)
    by_token = np.zeros(stride * (channels + 16), np.float32)
    scale = np.float32(1 / math.sqrt(channels))
    heads = sink.shape[0]
    for head in range(start, stop):
        b, h = head // heads, head % heads
        at, q_at = b * row + h * channels * stride, b * q_row + h * channels * q_stride
        width = _transpose_head(v, at, stride, channels, after[b], by_token)
        for i in range(first[b], after[b]):
            to = q_at + i - first[b]
            for c in range(channels):
                query[c] = q[to + c * q_stride] * scale
            upto = (i // 16 + 1) * 16
            _sums(k, at, stride, index, query, channels, upto, score)
            largest = max(sink[h], _largest(score, i + 1))
            for j in range(i + 1, upto):
                score[j] = -np.inf
            total = exponentials(score, 0, upto // 16, largest) + math.exp(sink[h] - largest)
            log_sum[head, i - first[b]] = largest + math.log(total)
            _sums(by_token, 0, width, index, score, i + 1, width, out)
            for c in range(channels):
                z[to + c * q_stride] = out[c] / np.float32(total)


@compiled
def backward(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, sink: np.ndarray, z: np.ndarray, log_sum: np.ndarray, dz: np.ndarray,
    dq: np.ndarray, dk: np.ndarray, dv: np.ndarray, dsink: np.ndarray, channels: int, first: np.ndarray, after: np.ndarray,
    q_row: int, q_stride: int, row: int, stride: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Compute the gradients of `forward` from that of z: dq is overwritten; dk, dv and dsink[head] are added to."""
    p, ds, index = np.empty(stride, np.float32), np.empty(stride, np.float32), np.arange(max(channels, stride)).astype(np.int32)
    query, given, out = np.empty(channels, np.float32), np.empty(channels, np.float32), np.empty(channels + 16, np.float32)
    by_token = np.zeros(stride * (channels + 16), np.float32)
    scale = np.float32(1 / math.sqrt(channels))
    heads = sink.shape[0]
    for head in range(start, stop):
        b, h = head // heads, head % heads
        at, q_at = b * row + h * channels * stride, b * q_row + h * channels * q_stride
        width = _transpose_head(k, at, stride, channels, after[b], by_token)
        for i in range(first[b], after[b]):
            to, logs = q_at + i - first[b], log_sum[head, i - first[b]]
            dz_dot_z = np.float32(0)
            for c in range(channels):
                query[c] = q[to + c * q_stride] * scale
                given[c] = dz[to + c * q_stride]
                dz_dot_z += given[c] * z[to + c * q_stride]
            upto = (i // 16 + 1) * 16
            _sums(k, at, stride, index, query, channels, upto, p)
            for j in range(i + 1, upto):
                p[j] = -np.inf
            exponentials(p, 0, upto // 16, logs)
            _sums(v, at, stride, index, given, channels, upto, ds)
            _through(ds, p, dz_dot_z, upto)
            dsink[head] -= math.exp(sink[h] - logs) * dz_dot_z
            _sums(by_token, 0, width, index, ds, i + 1, width, out)
            for c in range(channels):
                dq[to + c * q_stride] = out[c] * scale
                add_scaled(dk, at + c * stride, query[c], ds, upto // 16)
                add_scaled(dv, at + c * stride, given[c], p, upto // 16)

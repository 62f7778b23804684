"""Blocks of the weight-sparse transformer: their linear maps, nonlinearities and attention heads (see `sparse`).

`attend` has a sink per head: a learnt logit in the softmax denominator. On a CPU our own kernel computes it
(`kernels/attention`); elsewhere a dummy first position and one extra query/key channel represent the sink, so that the fused
causal kernels still apply.

Shape legend: b batch row, t token, s residual width, n nodes of a location, h query heads, g heads of keys and values,
c channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.kernels.attention import NO_SINK_LOGIT, attend
from bridge.kernels.cpu import tokens_contiguous
from bridge.kernels.products import SparseMatrix, sparse_linear
from bridge.kernels.top_k import apply_norm, gelu
from bridge.recipe import AttentionShape, BlockShape, SparseShape

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu, "gelu": F.gelu, "silu": F.silu, "relu": F.relu, "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu2": lambda x: F.relu(x).square(),
}  # fmt: skip


def norm_scale(x_bts: Tensor, eps: float = 1e-6) -> Tensor:
    """Return scale_bt1, by which RMSNorm multiplies a residual."""
    return torch.rsqrt(x_bts.square().mean(-1, keepdim=True) + eps)


def norm(x_bts: Tensor, eps: float) -> Tensor:
    """Return RMSNorm without a gain, in float32; under autocast in the dtype of dense products, unless tokens are innermost."""
    r_bts = apply_norm(x_bts, partial(norm_scale, eps=eps))
    device = x_bts.device.type
    wanted = torch.is_autocast_enabled(device) and not tokens_contiguous(x_bts)
    return r_bts.to(torch.get_autocast_dtype(device)) if wanted else r_bts


class Linear(nn.Linear):
    """A linear map, computed by its nonzeros if it is given them; a module in both cases, so that hooks see its input."""

    matrix: SparseMatrix | None = None

    def reset_parameters(self) -> None:
        """Initialise a map that has any outputs, before the model gives it weights."""
        if self.out_features:
            super().reset_parameters()

    def forward(self, x_btn: Tensor) -> Tensor:
        """Return y_btm."""
        return super().forward(x_btn) if self.matrix is None else sparse_linear(x_btn, self.matrix, self.bias)


class Block(nn.Module):
    """Parameters of a block."""

    def __init__(self, form: BlockShape, width: int, queries: int, keys: int, neurons: int, channels: int) -> None:
        super().__init__()
        self.q = Linear(width, queries)
        self.k = Linear(width, keys)
        self.v = Linear(width, keys)
        self.o = Linear(queries, width)
        self.sinks = nn.Parameter(torch.empty(queries // channels))
        self.up = Linear(width, neurons)
        self.down = Linear(neurons, width)
        self.gate = Linear(width, neurons) if form.gated else None
        gains = {"q": queries, "k": keys} if form.qk_norm else {}
        gains |= {"attn_out": width, "mlp_out": width} if form.writes_normed else {}
        self.gains = nn.ParameterDict({kind: nn.Parameter(torch.empty(size)) for kind, size in gains.items()})


class Heads(nn.Module):
    """Attention of a model of `Block`s: its patterns, scores and rotations."""

    shape: SparseShape
    form: BlockShape
    channels: int
    group: int
    blocks: nn.ModuleList

    def pattern(self, layer: int, q_btn: Tensor, k_btn: Tensor) -> Tensor:
        """Return attention pattern_bhtt of a block from its q and k nodes: rows sum to at most 1, and the sink takes the rest."""
        score_bhtt = self.scores(layer, q_btn, k_btn)
        place_t = torch.arange(score_bhtt.shape[-1], device=score_bhtt.device)
        distance_tt = place_t[:, None] - place_t
        score_bhtt = score_bhtt.masked_fill((distance_tt < 0) | (distance_tt >= self._window(layer, len(place_t))), -torch.inf)
        if not self.shape.sinks:
            return score_bhtt.softmax(-1)
        sink_bht1 = self._block(layer).sinks.view(1, -1, 1, 1).expand(*score_bhtt.shape[:3], 1)
        return torch.cat([sink_bht1, score_bhtt], -1).softmax(-1)[..., 1:]

    def scores(self, layer: int, q_btn: Tensor, k_btn: Tensor) -> Tensor:
        """Return score_bhtt of a block's q and k nodes, including keys that the query does not attend to."""
        q_bhtc, k_bgtc = (self.split_heads(layer, x, rotate=True) for x in (q_btn, k_btn))
        score_bhtt = q_bhtc @ self.repeat_shared_heads(k_bgtc).transpose(-1, -2) / math.sqrt(self.channels)
        if alibi_h := self._attention_shape(layer).slopes:
            place_t = torch.arange(score_bhtt.shape[-1], device=score_bhtt.device)
            score_bhtt = score_bhtt + score_bhtt.new_tensor(alibi_h)[:, None, None] * (place_t - place_t[:, None])
        cap = self.form.score_cap
        return score_bhtt if cap is None else cap * (score_bhtt / cap).tanh()

    def score_gradient(self, score: Tensor) -> Tensor:
        """Return d score / d (q . k / sqrt(channels)) at the given scores: 1 without a soft cap."""
        cap = self.form.score_cap
        return torch.ones_like(score) if cap is None else 1 - (score / cap).square()

    def repeat_shared_heads(self, x_bgtc: Tensor) -> Tensor:
        """Return x_bhtc for every query head, from keys or values as `split_heads` returns them."""
        return x_bgtc if self.group == 1 else x_bgtc.repeat_interleave(self.group, 1)

    def _attention_shape(self, layer: int) -> AttentionShape:
        shapes = self.form.attention
        return shapes[layer % len(shapes)] if shapes else AttentionShape()

    def _window(self, layer: int, tokens: int) -> int:
        return self._attention_shape(layer).window or tokens

    def sinks(self, layer: int) -> Tensor:
        """Return sink_h of a block's heads; for a model without sinks, logits that take no attention."""
        sink_h = self._block(layer).sinks
        return sink_h if self.shape.sinks else torch.full_like(sink_h, NO_SINK_LOGIT)

    def split_heads(self, layer: int, x_btn: Tensor, *, rotate: bool) -> Tensor:
        """Return x_bhtc of q nodes, or x_bgtc of k or v nodes; with rotate, rotated by position if positions are rotary."""
        x_bhtc = x_btn.unflatten(-1, (-1, self.channels)).transpose(1, 2)
        return self._rotated(layer, x_bhtc, 1) if rotate else x_bhtc

    def merge_heads(self, layer: int, x_bhtc: Tensor, *, rotated: bool) -> Tensor:
        """Return x_btn from x_bhtc: the inverse of `split_heads`, which also maps gradients of heads to gradients of nodes."""
        return (self._rotated(layer, x_bhtc, -1) if rotated else x_bhtc).transpose(1, 2).flatten(-2)

    def frequencies(self, layer: int) -> tuple[float, ...]:
        """Return radians per token by which channels i and i + n of a head rotate, n values; other channels do not rotate."""
        if self.shape.positions != "rotary":
            return ()
        if self.form.attention:
            return self._attention_shape(layer).frequencies
        half = self.channels // 2
        return tuple((10_000 ** (-torch.arange(half) / half)).tolist())

    def _rotated(self, layer: int, x_bhtc: Tensor, sign: int) -> Tensor:
        frequencies = self.frequencies(layer)
        if not frequencies:
            return x_bhtc
        half = len(frequencies)
        angle_tc = sign * torch.arange(x_bhtc.shape[2], device=x_bhtc.device)[:, None] * x_bhtc.new_tensor(frequencies).float()
        cosine_tc, sine_tc = angle_tc.cos().to(x_bhtc.dtype), angle_tc.sin().to(x_bhtc.dtype)
        first, second, rest = x_bhtc[..., :half], x_bhtc[..., half : 2 * half], x_bhtc[..., 2 * half :]
        return torch.cat([first * cosine_tc - second * sine_tc, first * sine_tc + second * cosine_tc, rest], -1)

    def _attend(self, layer: int, q_btn: Tensor, k_btn: Tensor, v_btn: Tensor) -> Tensor:
        channels, sink_h = self.channels, self._block(layer).sinks if self.shape.sinks else None
        earlier, turns = k_btn.shape[1] - q_btn.shape[1], bool(self.frequencies(layer))
        shape, tokens = self._attention_shape(layer), k_btn.shape[1]
        has_plain_scores = self.form.score_cap is None and not shape.slopes and self._window(layer, tokens) >= tokens
        fused = has_plain_scores and q_btn.device.type == "cpu" and q_btn.dtype in (torch.float32, torch.bfloat16)
        if earlier and (turns or not fused):
            q_btn = F.pad(q_btn, (0, 0, earlier, 0))  # the added queries are not used
            return self._attend(layer, q_btn, k_btn, v_btn)[:, earlier:]
        if not has_plain_scores:  # no fused kernel has these scores
            pattern_bhtt = self.pattern(layer, q_btn, k_btn).to(v_btn.dtype)
            return (
                (pattern_bhtt @ self.repeat_shared_heads(self.split_heads(layer, v_btn, rotate=False))).transpose(1, 2).flatten(2)
            )
        if turns:
            q_btn, k_btn = (self.split_heads(layer, x, rotate=True).transpose(1, 2).flatten(2) for x in (q_btn, k_btn))
        if self.group > 1:
            k_btn, v_btn = (x.unflatten(-1, (-1, channels)).repeat_interleave(self.group, 2).flatten(2) for x in (k_btn, v_btn))
        if fused:
            return attend(q_btn, k_btn, v_btn, channels, sink_h).to(q_btn.dtype)
        q_bhtc, k_bhtc, v_bhtc = (self.split_heads(layer, x, rotate=False) for x in (q_btn, k_btn, v_btn))
        scale = 1 / math.sqrt(channels)
        if sink_h is None:
            z_bhtc = F.scaled_dot_product_attention(q_bhtc, k_bhtc, v_bhtc, is_causal=True, scale=scale)
            return z_bhtc.transpose(1, 2).flatten(2)
        # A dummy first token that every query sees has value 0, and a key whose only nonzero is the sink logit, in an extra
        # channel that is 1 in every query. Eight channels are added, because the fused kernels need multiples of 8.
        q_bhtc, k_bhtc, v_bhtc = (F.pad(x, (0, 8, 1, 0)) for x in (q_bhtc, k_bhtc, v_bhtc))
        extra_c = torch.zeros(channels + 8, dtype=q_bhtc.dtype, device=q_bhtc.device)
        extra_c[channels] = 1
        sink_htc = (sink_h[:, None] / scale).to(k_bhtc.dtype)[:, :, None] * extra_c
        sink_htc = F.pad(sink_htc, (0, 0, 0, k_bhtc.shape[2] - 1))
        z_bhtc = F.scaled_dot_product_attention(q_bhtc + extra_c, k_bhtc + sink_htc, v_bhtc, is_causal=True, scale=scale)
        return z_bhtc[:, :, 1:, :channels].transpose(1, 2).flatten(2)

    def _block(self, layer: int) -> Block:
        block = self.blocks[layer]
        assert isinstance(block, Block)
        return block

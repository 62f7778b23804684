"""Copy the measured parts of a dense model to a sparse model's weights (`initialize` has the equations).

Each function writes one part in place and returns whether it could. The copy of a sublayer is kept if, run on the dense residuals
without AbsTopK, it writes the same as the dense sublayer.

Shape legend: as in `initialize`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.models.bridges import CoupledModels
from bridge.models.sparse import SparseTransformer
from bridge.training.anatomy import Anatomy
from bridge.training.dense_maps import Affine, OutputMap, normalise, unexplained
from bridge.training.dense_sublayers import Attention, Mlp

MAX_SINK_COST = 1e-6  # largest fraction of a write's variance that a sink may cost
ROTATION_STEPS, ROTATION_ROWS = 30, 4096  # optimisation steps for the rotation, and the number of rows of each matrix used for it
MAX_RANDOM_WRITE = 0.1  # largest RMS of the write of a random sublayer, relative to the dense sublayer's
MIN_EXPLAINED = 0.9  # a copy is accepted if, without AbsTopK, it explains more than this fraction of the dense sublayer's write
SMALL = 0.02  # factor on the random weights by which unused channels and neurons read
SINKS = (-4.0, -6.0, -8.0, -12.0)  # sink logits to try: the highest that changes nothing, as it still has a gradient
NO_SINK = -30.0


@dataclass(frozen=True)
class Frame:
    """Position of the dense residual inside the sparse residual; turn_dd is R^T."""

    turn_dd: Tensor
    s: int
    centred: bool
    scale: float
    eps: float

    @property
    def d(self) -> int:
        """Dense width."""
        return len(self.turn_dd)

    @property
    def gain(self) -> float:
        """Factor from the sparse norm's output to z: sqrt(d / s)."""
        return math.sqrt(self.d / self.s)

    def centre(self, h_xd: Tensor) -> Tensor:
        """Return h_xd as the norm sees it: minus its mean if the norm is a LayerNorm, otherwise unchanged."""
        return h_xd - h_xd.mean(-1, keepdim=True) if self.centred else h_xd

    def to_dense_channels(self, h_xd: Tensor) -> Tensor:
        """Map the dense residual, or a write to it, to the first d channels of the sparse residual."""
        return self.centre(h_xd) @ self.turn_dd / self.scale

    def normal(self, h_xd: Tensor) -> Tensor:
        """Return z_xd of a dense residual."""
        return normalise(self.to_sparse(h_xd), False, self.eps)[..., : self.d] * self.gain @ self.turn_dd.T

    def convert_reader(self, part: Affine, raw: bool) -> Affine:
        """Convert a map of z into a map of the sparse norm's output; if raw, a map of h into a map of x."""
        return Affine(part.weight_oi @ self.turn_dd * (self.scale if raw else self.gain), part.bias_o)

    def to_sparse(self, h_xd: Tensor) -> Tensor:
        """Return x_xs of a dense residual."""
        return F.pad(self.to_dense_channels(h_xd), (0, self.s - self.d))


def find_rotation(anatomy: Anatomy, frame: Frame) -> Tensor:
    """Return the rotation that maximises the sum of fourth powers of embedding and unembedding, with rows scaled to length 1.

    The iteration starts at the embedding's principal axes; each step takes the orthogonal matrix nearest to the gradient.
    """
    weights = [anatomy.embedding_vd, None if anatomy.unembedding is None else anatomy.unembedding.weight_oi]
    unit = [F.normalize(frame.centre(w_vd[:: 1 + len(w_vd) // ROTATION_ROWS]), dim=-1) for w_vd in weights if w_vd is not None]
    if not unit:
        return frame.turn_dd
    unit_xd = torch.cat(unit)
    turn_dd = torch.linalg.eigh(unit[0].T @ unit[0]).eigenvectors
    for _ in range(ROTATION_STEPS):
        left_dd, _, right_dd = torch.linalg.svd(unit_xd.T @ (unit_xd @ turn_dd).pow(3))
        turn_dd = left_dd @ right_dd
    return turn_dd


def copy_bridges(coupling: CoupledModels, frame: Frame) -> None:
    """Set every encoder to x = centred(h) / S and every decoder to its inverse, given the bridge's constants mu and sigma."""
    placed_sd = frame.to_sparse(torch.eye(frame.d, device=coupling.dense.device)).T
    for site in range(coupling.n_sites):
        bridge = coupling.bridges[site]
        bridge.encoder.weight.copy_(placed_sd * bridge.scale)
        bridge.encoder.bias.copy_(frame.to_sparse(bridge.mean_d))
        bridge.decoder.weight.copy_(placed_sd.T * frame.scale**2 / bridge.scale)
        bridge.decoder.bias.copy_(-frame.centre(bridge.mean_d) / bridge.scale)


def copy_embedding(sparse: SparseTransformer, frame: Frame, anatomy: Anatomy) -> bool:
    """Copy the embedding and the positions; if the sparse model has no learned positions, their mean joins the embedding."""
    if anatomy.embedding_vd is None:
        return False
    embedding_vd, position_td = anatomy.embedding_vd, anatomy.position_td
    if sparse.positions is not None:
        sparse.positions.zero_()
        if position_td is not None:
            sparse.positions.copy_(frame.to_sparse(position_td[: sparse.context]))
    elif position_td is not None:
        embedding_vd = embedding_vd + position_td[: sparse.context].mean(0)
    sparse.embedding.copy_(frame.to_sparse(embedding_vd))
    return True


def copy_unembedding(sparse: SparseTransformer, frame: Frame, anatomy: Anatomy) -> bool:
    """Copy the unembedding if the logits are a linear map of the normed last residual, with the same soft cap."""
    if anatomy.unembedding is None or sparse.form.logit_cap != anatomy.logit_cap:
        return False
    _set_reader(sparse.unembedding, slice(None), frame.convert_reader(anatomy.unembedding, raw=False))
    return True


def copy_sublayer(
    coupling: CoupledModels, site: int, frame: Frame, anatomy: Anatomy, residuals: Sequence[Tensor]
) -> float | None:  # fmt: skip
    """Copy a sublayer to its sparse block; return the fraction of the write explained with AbsTopK, None if not accepted."""
    dense, sparse = coupling.dense, coupling.sparse
    kind, layer = dense.sublayers[site], sum(other != "mlp" for other in dense.sublayers[: site + 1]) - 1
    block: Any = sparse.blocks[layer]
    x_bts, wanted_btd = frame.to_sparse(residuals[site]), frame.to_dense_channels(residuals[site + 1] - residuals[site])
    attention, mlp = anatomy.attention.get(site), anatomy.mlp.get(site)
    keeping_all = copy(sparse)  # the same weights, without AbsTopK
    keeping_all.shape = sparse.shape.model_copy(update={"keep": 1.0})

    def explained(model: SparseTransformer) -> float:
        written_bts = model.sublayer(site)(x_bts) - x_bts
        return 1 - unexplained(written_bts[..., : frame.d].flatten(0, 1), wanted_btd.flatten(0, 1))

    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    z_xd = frame.normal(residuals[site].flatten(0, 1))
    written = all([
        kind == "mlp" or (attention is not None and _copy_attention(sparse, layer, frame, attention, z_xd)),
        kind == "attn" or (mlp is not None and _copy_mlp(sparse, block, frame, mlp)),
    ])  # fmt: skip
    if not written or not (best := explained(keeping_all)) > MIN_EXPLAINED:
        block.load_state_dict(before)
        size = (keeping_all.sublayer(site)(x_bts) - x_bts).square().mean().sqrt()
        quiet = (MAX_RANDOM_WRITE * wanted_btd.square().mean().sqrt() / size.clamp_min(1e-12)).clamp(max=1)
        for linear in [block.o] * (kind != "mlp") + [block.down] * (kind != "attn"):
            linear.weight *= quiet  # large random writes would hide the copied ones
        return None
    for sink in SINKS if kind != "mlp" and sparse.shape.sinks else ():
        block.sinks.fill_(sink)
        if explained(keeping_all) > best - MAX_SINK_COST:
            break
        block.sinks.fill_(NO_SINK)
    return explained(sparse)


def _copy_mlp(sparse: SparseTransformer, block: Any, frame: Frame, mlp: Mlp) -> bool:
    """Copy an MLP to a block; return False if the block has another form."""
    form, rows = sparse.form, slice(mlp.neurons)
    same = (form.gated, form.activation, form.reads_normed) == (mlp.gate is not None, mlp.activation, not mlp.raw)
    if not same or mlp.neurons > sparse.neurons:
        return False
    if mlp.gate is not None:
        _set_reader(block.gate, rows, frame.convert_reader(mlp.gate, mlp.raw))
    _set_reader(block.up, rows, frame.convert_reader(mlp.up, mlp.raw))
    return _set_writer(block, "mlp_out", block.down, rows, frame, mlp.out)


def _copy_attention(sparse: SparseTransformer, layer: int, frame: Frame, attention: Attention, z_xd: Tensor) -> bool:
    """Copy attention to a block; return False if the block has another form.

    Keys that are not rotated lose their mean: it adds the same to all scores of a query, so only the sink would notice it. A head
    wider than the sparse heads becomes several, which divide its value channels and all have its queries and keys, cut to width.
    """
    form, own, channels = sparse.form, sparse.channels, attention.channels
    block: Any = sparse.blocks[layer]
    turns, plain = sparse.frequencies(layer), attention.gains is None and attention.cap is None
    q, k, v = attention.q, attention.k, attention.v
    if (form.reads_normed, form.score_cap) != (not attention.raw, attention.cap):
        return False
    group = attention.heads // attention.kv_heads
    same = own == channels and sparse.heads_of_keys >= attention.kv_heads and sparse.group == group
    parts = math.ceil(channels / own)
    if not same:  # other sparse heads, of which several may copy one dense head
        if not plain or attention.heads * parts > sparse.heads_of_keys or sparse.group > 1 or (parts > 1 and turns):
            return False
        k, v = (_repeat_heads(part, attention.heads, channels) for part in (k, v))
    if plain and not turns and not attention.raw:
        k = Affine(k.weight_oi, -k.weight_oi @ z_xd.mean(0))
    row_hc = parts * own * torch.arange(attention.heads)[:, None] + torch.arange(channels)
    value_rows, v_rows = row_hc.flatten(), row_hc.flatten()[: len(v.bias_o)]
    q_rows, k_rows = value_rows, v_rows
    if parts > 1:
        q, k = (_repeat_heads(part, attention.heads * parts, own) for part in _reduce_channels(q, k, z_xd, attention.heads, own))
        q_rows = k_rows = torch.arange(attention.heads * parts * own)
    q = q * math.sqrt(own / channels)
    for linear, rows, part in ((block.q, q_rows, q), (block.k, k_rows, k), (block.v, v_rows, v)):
        _set_reader(linear, rows, frame.convert_reader(part, attention.raw))
    if attention.gains is not None:
        for kind, linear, rows, gain_o in zip("qk", (block.q, block.k), (q_rows, k_rows), attention.gains, strict=True):
            if kind not in block.gains:
                return False
            share = 1.0 if attention.by_head else len(rows) / linear.out_features  # fraction of the normed channels in use
            times = math.sqrt(form.eps / (share * attention.norm_eps)) if form.eps and attention.norm_eps else 1.0
            linear.weight[rows] *= times
            linear.bias[rows] *= times
            if not attention.by_head:
                linear.weight[len(rows) :] = 0
            block.gains[kind].fill_(SMALL)  # a norm per head would scale unused channels up to the size of used ones
            block.gains[kind][rows] = gain_o * math.sqrt(share)
    block.sinks.fill_(NO_SINK)
    return _set_writer(block, "attn_out", block.o, value_rows, frame, attention.out)


def _reduce_channels(q: Affine, k: Affine, z_xd: Tensor, heads: int, own: int) -> tuple[Affine, Affine]:
    """Return queries and keys with `own` channels per head whose scores on the text are nearest to the given ones (by SVD)."""
    q_htc, k_htc = (part(z_xd).unflatten(-1, (heads, -1)).transpose(0, 1) for part in (q, k))
    q_hcc, k_hcc = torch.linalg.qr(q_htc).R, torch.linalg.qr(k_htc).R  # scores are (.. Q) R_q R_k^T (.. Q)^T
    left_hcc, values_hc, right_hcc = torch.linalg.svd(q_hcc @ k_hcc.transpose(-1, -2))
    root_h1c = values_hc[:, None, :own].sqrt()
    narrow = []
    for part, r_hcc, side_hcc in ((q, q_hcc, left_hcc), (k, k_hcc, right_hcc.transpose(-1, -2))):
        turn_hoc = (torch.linalg.pinv(r_hcc) @ side_hcc[..., :own] * root_h1c).transpose(-1, -2)
        weight_hcd, bias_hc1 = part.weight_oi.unflatten(0, (heads, -1)), part.bias_o.unflatten(0, (heads, -1))[..., None]
        narrow.append(Affine((turn_hoc @ weight_hcd).flatten(0, 1), (turn_hoc @ bias_hc1).flatten()))
    return narrow[0], narrow[1]


def _repeat_heads(part: Affine, heads: int, channels: int) -> Affine:
    """Repeat keys or values that several heads share, once for each head."""
    row_hc = torch.arange(len(part.bias_o)).view(-1, channels)
    return part.rows(row_hc.repeat_interleave(heads // len(row_hc), 0).flatten())


def _set_reader(linear: nn.Linear, rows: slice | Tensor, part: Affine) -> None:
    """Set some outputs of a map to these weights on the dense channels; the other outputs' weights become small, biases 0."""
    linear.weight.mul_(SMALL)
    linear.weight[rows] = 0
    linear.weight[rows, : part.weight_oi.shape[1]] = part.weight_oi
    linear.bias.zero_()
    linear.bias[rows] = part.bias_o


def _set_writer(block: Any, kind: str, linear: nn.Linear, columns: slice | Tensor, frame: Frame, out: OutputMap) -> bool:
    """Set some inputs of a map to these weights into the dense channels, the rest to 0; False if the block has another form."""
    if (kind in block.gains) != (out.gain_d is not None):
        return False
    weight_do, bias_d = out.map.weight_oi, out.map.bias_o
    if out.gain_d is None:
        weight_do, bias_d = frame.to_dense_channels(weight_do.T).T, frame.to_dense_channels(bias_d)
    else:
        times = math.sqrt(frame.eps * frame.s / (frame.d * out.eps)) if frame.eps and out.eps else 1.0
        weight_do, bias_d = weight_do * times, bias_d * times
        block.gains[kind][: frame.d] = frame.to_dense_channels(out.gain_d) * frame.gain
    linear.weight.zero_()
    linear.weight[: frame.d, columns] = weight_do
    linear.bias.zero_()
    linear.bias[: frame.d] = bias_d
    return True

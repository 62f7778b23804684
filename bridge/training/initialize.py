"""A coupling that starts as the dense model, as far as the sparse architecture can be it; or as a coupling fitted before.

AbsTopK keeps a quarter of a location's values, so a sparse model four times as wide loses nothing of a dense one that is written
on its first channels. With z = h centred and divided by its deviation (LayerNorm; RMSNorm does not centre), up to constants,

    x[:d] = R centred(h) / S,  x[d:] = 0                encoder and decoder of every bridge; S makes the embedding's RMS 1/2
    norm(x)[:d] = sqrt(s / d) R z                       the sparse norm averages over s channels, of which d are not zero
    W (g z + b) + c = (W g R^T sqrt(d / s)) norm(x)[:d] + (W b + c)  every map that reads the residual, the unembedding too
    W a + c -> R centred(W a + c) / S                   every map that writes to it; embedding and positions likewise

What is centred away is read by nobody. The other channels and neurons read by small random weights and write nothing. R is any
rotation, as a norm has no gain of its own left: the one in which embedding and unembedding have the largest fourth powers, which
are nearly sparse there, for these two, thin as they are, lose most when the projection keeps the same fraction of every matrix.

No architecture is known by name. The dense model is run once and every module that multiplies its input by its weight is
watched: a map whose input is g z + b at a site reads there, one whose output is a sublayer's write writes there, one whose output
is the logits unembeds. A sublayer is an attention of that many heads, or an MLP, where its copy, run on the dense residuals
without AbsTopK, writes what the dense one writes; orders of q, k and v are tried until one does. What is not verified so (gated
MLPs, parallel blocks, positions that the recipe has not) stays random.

Shape legend: b batch row, t token (of all rows), d dense width, s sparse width, i inputs, o outputs, h heads, c head channels,
m dense neurons, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.models.bridges import Coupling, folder_of
from bridge.models.dense import DenseModel
from bridge.models.span import DenseSpan
from bridge.models.sparse import Fractions, SparseTransformer, norm_scale
from bridge.models.store import read_json
from bridge.recipe import AttentionShape, BlockShape, RecipeError, SparseShape
from bridge.training.anatomy import Affine, Anatomy, Attention, Mlp, Written, dissect, unexplained

UNMOVED = 1e-6  # share of a write that a sink may change
TURNS, TURN_ROWS = 30, 4096  # steps to the rotation, and the rows of either matrix on which it is found
ROWS, TOKENS = 4, 64  # of the text, on which maps are found and copies verified
GENTLE, FASTEST, TRIED = 0.007, 1e-3, 6  # see `gentle_rate`; the model that ships, for which 1e-3 was found best, has .007
QUIET = 0.1  # RMS of what a random sublayer writes, beside that of the dense one
VERIFIED = 0.9  # explained share of a dense write at which a copy of its sublayer, without AbsTopK, is accepted
EMBEDDING_RMS = 0.5  # of the channels in use, as in a random start
SMALL = 0.02  # of what it was, the random weight by which an unused channel or neuron reads
SINKS = (-4.0, -6.0, -8.0, -12.0)  # logits beside a dense model without sinks: as high as changes nothing, to have a gradient
NO_SINK = -30.0


@dataclass(frozen=True)
class Started:
    """Parts copied from the dense model: embedding, unembedding, bridges, and of each sublayer the share of its write that the
    copy explains, AbsTopK included (None: random); or from another coupling, all of it, whose L0 the anneal then falls from.
    """

    embedding: bool
    unembedding: bool
    bridges: bool
    sublayers: tuple[float | None, ...]
    coupling: str | None = None
    l0: Fractions = Fractions(1.0, 1.0)

    def __str__(self) -> str:
        if self.coupling is not None:
            return f"the coupling in {self.coupling}, at L0 {self.l0.blocks:.4g}"
        parts = [name for name in ("embedding", "unembedding", "bridges") if getattr(self, name)]
        shares = [share for share in self.sublayers if share is not None]
        if shares:
            mean = sum(shares) / len(shares)
            parts.append(f"{len(shares)} of {len(self.sublayers)} sublayers ({mean:.3f} of their writes explained)")
        random = "" if len(shares) == len(self.sublayers) else "; the rest is random"
        return (", ".join(parts) + " from the dense model" if parts else "nothing from the dense model") + random


def shape_for(dense: DenseModel, shape: SparseShape, context: int) -> SparseShape:
    """A recipe's shape with what it leaves to the dense model filled in, as that is measured."""
    anatomy = dissect(dense, context)
    attention = next(iter(anatomy.attention.values()), None)
    mlp = next(iter(anatomy.mlp.values()), None)
    channels = shape.head_channels or (attention.channels if attention else 16)
    width = shape.width or max(1, round(2 * dense.width / channels)) * channels
    if not (attention and channels == attention.channels) and width % channels:
        raise RecipeError(f"sparse.width {width} is not a multiple of sparse.head_channels {channels}; change one of them")
    times = max(1.0, width / dense.width)
    form: dict[str, Any] = {"eps": _sparse_eps(anatomy, dense.width, width), "logit_cap": anatomy.logit_cap}
    positions = shape.positions
    if positions == "auto":
        turning = any(each.shape.frequencies for each in anatomy.attention.values())
        positions = "learned" if anatomy.position_td is not None else "rotary" if turning else "none"
    if attention is not None and channels == attention.channels:
        form |= _heads(anatomy, attention, times, positions)
    keep = shape.keep or (0.25 if shape.start == "random" or not anatomy.mlp else max(0.25, min(1.0, dense.width / width)))
    if mlp is not None:
        form |= {"activation": mlp.activation, "gated": mlp.gate is not None}
        if shape.mlp_ratio is None:
            form["neurons"] = round(mlp.neurons * times)
    if shape.mlp != "auto":
        form["gated"] = shape.mlp == "gated"
    outs = [part.out.gain_d is not None for part in (*anatomy.attention.values(), *anatomy.mlp.values())]
    raw = [part.raw for part in (*anatomy.attention.values(), *anatomy.mlp.values())]
    form |= {"writes_normed": any(outs), "reads_normed": not (raw and all(raw))}
    update = {
        "width": width, "head_channels": channels, "positions": positions, "mlp_ratio": shape.mlp_ratio or 4, "keep": keep,
        "block": BlockShape(**form),
    }  # fmt: skip
    return shape.model_copy(update=update)


def _heads(anatomy: Anatomy, one: Attention, times: float, positions: str) -> dict[str, Any]:
    """Heads, what they know of positions, and their scores, as in the dense model's blocks; as many times more as it is wider."""
    every = [anatomy.attention.get(site, one) for site in sorted({*anatomy.attention, *anatomy.mlp}) if site in anatomy.attention]
    keys = max(one.kv_heads, int(one.kv_heads * times + 1e-9))
    heads, shapes = keys * one.heads // one.kv_heads, []
    for each in every:
        slopes = each.shape.slopes + (0.0,) * (heads - one.heads) if each.shape.slopes else ()
        frequencies = each.shape.frequencies if positions == "rotary" else ()
        shapes.append(each.shape.model_copy(update={"slopes": slopes, "frequencies": frequencies}))
    if positions == "rotary" and not any(each.frequencies for each in shapes):  # the recipe's own
        shapes = []
    shapes = shapes[:1] if all(each == shapes[0] for each in shapes) else shapes
    return {
        "heads": heads, "kv_heads": keys, "score_cap": one.cap,
        "attention": tuple(shapes) if shapes != [AttentionShape()] else (),
        "qk_norm": None if one.gains is None else "head" if one.by_head else "all",
    }  # fmt: skip


def _sparse_eps(anatomy: Anatomy, d: int, s: int) -> float:
    """The eps of the sparse norms at which they are the dense ones, the residual being divided by `_scale`."""
    return anatomy.eps * d / (s * _scale(anatomy) ** 2)


def _scale(anatomy: Anatomy) -> float:
    """S, by which the dense residual is divided, such that the embedding's RMS is the same as in a random start."""
    if anatomy.embedding_vd is None:
        return 1.0
    e_vd = anatomy.embedding_vd - (anatomy.embedding_vd.mean(-1, keepdim=True) if anatomy.centred else 0)
    return max(1e-6, e_vd.square().mean().sqrt().item() / EMBEDDING_RMS)


@torch.no_grad()
def start_from_dense(coupling: Coupling, tokens_bt: Tensor) -> Started:
    """Overwrite a new coupling by its dense model, in place, as far as that is verified on tokens_bt; calibrates the bridges."""
    dense, sparse = coupling.dense, coupling.sparse
    trace = dense.run(tokens_bt)
    residuals = [h_btd.float() for h_btd in trace.residuals]
    coupling.bridges.calibrate(residuals)
    nothing = Started(False, False, False, (None,) * len(dense.sublayers))
    if sparse.width < dense.width:
        return nothing
    anatomy = dissect(dense, coupling.context)
    frame = _Frame(torch.eye(dense.width, device=dense.device), sparse.width, anatomy.centred, _scale(anatomy), sparse.form.eps)
    span = isinstance(dense, DenseSpan)
    if not sparse.form.writes_normed and not span:  # a gain there is one for each channel
        frame = replace(frame, turn_dd=_turn(anatomy, frame))
    _copy_bridges(coupling, frame)
    sample = [h_btd[:ROWS, :TOKENS] for h_btd in residuals]
    sublayers = tuple(_copy_sublayer(coupling, site, frame, anatomy, sample) for site in range(len(dense.sublayers)))
    ends = (False, False) if span else (_copy_embedding(sparse, frame, anatomy), _copy_unembedding(sparse, frame, anatomy))
    return Started(*ends, True, sublayers)


def shape_of_coupling(path: str, shape: SparseShape) -> SparseShape:
    """A recipe's shape with what it leaves open taken from a coupling that it starts from. Raises CheckpointError."""
    facts = read_json(folder_of(path) / "coupling.json")
    theirs = SparseShape.model_validate((facts.get("recipe") or {}).get("sparse") or {})
    unsaid = {name: value for name, value in theirs.model_dump().items() if getattr(shape, name) in (None, "auto")}
    return shape.model_copy(update={**unsaid, "block": theirs.block or BlockShape()})


@torch.no_grad()
def start_from_coupling(coupling: Coupling, path: str) -> Started:
    """Give a new coupling the weights of one that was fitted to the same dense model, in place.

    Raises CheckpointError where there is none, RecipeError where it has another shape.
    """
    other = Coupling.from_pretrained(path, dense=coupling.dense)
    mine, theirs = (
        one.recipe.sparse.model_copy(update={"start": "auto", "keep": one.sparse.keep, "block": one.sparse.form})
        for one in (coupling, other)
    )
    if (mine, coupling.context) != (theirs, other.context):
        differ = [name for name, value in theirs.model_dump().items() if getattr(mine, name) != value] or ["data.context"]
        raise RecipeError(
            f"sparse.start {path!r} is a coupling of another shape ({', '.join(differ)}); take its numbers, or start as 'auto'"
        )
    coupling.sparse.load_state_dict(other.sparse.state_dict())
    coupling.bridges.load_state_dict(other.bridges.state_dict())
    return Started(True, True, True, (1.0,) * (coupling.n_sites - 1), path, other.sparse.achieved_fractions())


@dataclass(frozen=True)
class _Frame:
    """Place of the dense residual in the sparse one; turn_dd is R^T."""

    turn_dd: Tensor
    s: int
    centred: bool
    scale: float
    eps: float

    @property
    def d(self) -> int:
        return len(self.turn_dd)

    @property
    def gain(self) -> float:
        """Ratio of z to the sparse norm's output."""
        return math.sqrt(self.d / self.s)

    def centre(self, h_xd: Tensor) -> Tensor:
        return h_xd - h_xd.mean(-1, keepdim=True) if self.centred else h_xd

    def into(self, h_xd: Tensor) -> Tensor:
        """The dense residual, or a write to it, on the first d channels of the sparse one."""
        return self.centre(h_xd) @ self.turn_dd / self.scale

    def normal(self, h_xd: Tensor, eps: float) -> Tensor:
        """z_xd of a dense residual."""
        x_xs = self.place(h_xd)
        return (x_xs * norm_scale(x_xs, eps))[..., : self.d] * self.gain @ self.turn_dd.T

    def read(self, part: Affine, raw: bool) -> Affine:
        """A map of z (or, raw, of h) as one of what the sparse norm gives (or of x)."""
        return Affine(part.weight_oi @ self.turn_dd * (self.scale if raw else self.gain), part.bias_o)

    def place(self, h_xd: Tensor) -> Tensor:
        """x_xs of a dense residual."""
        return F.pad(self.into(h_xd), (0, self.s - self.d))


# --- what of it is written to the sparse model


def _turn(anatomy: Anatomy, frame: _Frame) -> Tensor:
    """The rotation in which embedding and unembedding, their rows of length 1, have the largest sum of fourth powers.

    From the embedding's principal axes, each step goes to the rotation nearest to the gradient.
    """
    weights = [anatomy.embedding_vd, None if anatomy.unembedding is None else anatomy.unembedding.weight_oi]
    unit = [F.normalize(frame.centre(w_vd[:: 1 + len(w_vd) // TURN_ROWS]), dim=-1) for w_vd in weights if w_vd is not None]
    if not unit:
        return frame.turn_dd
    unit_xd = torch.cat(unit)
    turn_dd = torch.linalg.eigh(unit[0].T @ unit[0]).eigenvectors
    for _ in range(TURNS):
        left_dd, _, right_dd = torch.linalg.svd(unit_xd.T @ (unit_xd @ turn_dd).pow(3))
        turn_dd = left_dd @ right_dd
    return turn_dd


def _copy_bridges(coupling: Coupling, frame: _Frame) -> None:
    """Give every bridge x = centred(h) / S through its constants mu and sigma, and back."""
    placed_sd = frame.place(torch.eye(frame.d, device=coupling.dense.device)).T
    for site in range(coupling.n_sites):
        bridge = coupling.bridges[site]
        bridge.encoder.weight.copy_(placed_sd * bridge.scale)
        bridge.encoder.bias.copy_(frame.place(bridge.mean_d))
        bridge.decoder.weight.copy_(placed_sd.T * frame.scale**2 / bridge.scale)
        bridge.decoder.bias.copy_(-frame.centre(bridge.mean_d) / bridge.scale)


def _copy_embedding(sparse: SparseTransformer, frame: _Frame, anatomy: Anatomy) -> bool:
    """The embedding, and what positions add to it, or their mean where the sparse model has none."""
    if anatomy.embedding_vd is None:
        return False
    embedding_vd, position_td = anatomy.embedding_vd, anatomy.position_td
    if sparse.positions is not None:
        sparse.positions.zero_()
        if position_td is not None:
            sparse.positions.copy_(frame.place(position_td[: sparse.context]))
    elif position_td is not None:
        embedding_vd = embedding_vd + position_td[: sparse.context].mean(0)
    sparse.embedding.copy_(frame.place(embedding_vd))
    return True


def _copy_unembedding(sparse: SparseTransformer, frame: _Frame, anatomy: Anatomy) -> bool:
    """The unembedding where the logits are a linear map of the last residual's norm."""
    if anatomy.unembedding is None or sparse.form.logit_cap != anatomy.logit_cap:
        return False
    _read_by(sparse.unembedding, slice(None), frame.read(anatomy.unembedding, raw=False))
    return True


def _copy_sublayer(
    coupling: Coupling, site: int, frame: _Frame, anatomy: Anatomy, residuals: Sequence[Tensor]
) -> float | None:  # fmt: skip
    """Write a sublayer to the sparse block; the share of its write that the copy explains, None where it is not accepted."""
    dense, sparse = coupling.dense, coupling.sparse
    kind, layer = dense.sublayers[site], sum(other != "mlp" for other in dense.sublayers[: site + 1]) - 1
    block: Any = sparse.blocks[layer]
    x_bts, wanted_btd = frame.place(residuals[site]), frame.into(residuals[site + 1] - residuals[site])
    attention, mlp = anatomy.attention.get(site), anatomy.mlp.get(site)

    def explained() -> float:
        written_bts = sparse.sublayer(site)(x_bts) - x_bts
        return 1 - unexplained(written_bts[..., : frame.d].flatten(0, 1), wanted_btd.flatten(0, 1))

    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    z_xd = frame.normal(residuals[site].flatten(0, 1), sparse.form.eps)
    written = all([
        kind == "mlp" or (attention is not None and _copy_attention(sparse, layer, frame, attention, z_xd)),
        kind == "attn" or (mlp is not None and _copy_mlp(sparse, block, frame, mlp)),
    ])  # fmt: skip
    with _keeping_all(sparse):
        if not written or not (best := explained()) > VERIFIED:
            block.load_state_dict(before)
            size = (sparse.sublayer(site)(x_bts) - x_bts).square().mean().sqrt()
            quiet = (QUIET * wanted_btd.square().mean().sqrt() / size.clamp_min(1e-12)).clamp(max=1)
            for linear in [block.o] * (kind != "mlp") + [block.down] * (kind != "attn"):
                linear.weight *= quiet  # what is random would drown what was copied
            return None
        for sink in SINKS if kind != "mlp" and sparse.shape.sinks else ():
            block.sinks.fill_(sink)
            if explained() > best - UNMOVED:
                break
            block.sinks.fill_(NO_SINK)
    return explained()


@contextmanager
def _keeping_all(sparse: SparseTransformer) -> Iterator[None]:
    """The model without AbsTopK, for as long as it lasts."""
    shape = sparse.shape
    sparse.shape = shape.model_copy(update={"keep": 1.0})
    try:
        yield
    finally:
        sparse.shape = shape


def _copy_mlp(sparse: SparseTransformer, block: Any, frame: _Frame, mlp: Mlp) -> bool:
    """Write an MLP to a block; False where that has another form."""
    form, rows = sparse.form, slice(mlp.neurons)
    same = (form.gated, form.activation, form.reads_normed) == (mlp.gate is not None, mlp.activation, not mlp.raw)
    if not same or mlp.neurons > sparse.neurons:
        return False
    if mlp.gate is not None:
        _read_by(block.gate, rows, frame.read(mlp.gate, mlp.raw))
    _read_by(block.up, rows, frame.read(mlp.up, mlp.raw))
    return _write_by(block, "mlp_out", block.down, rows, frame, mlp.out)


def _copy_attention(sparse: SparseTransformer, layer: int, frame: _Frame, attention: Attention, z_xd: Tensor) -> bool:
    """Write attention to a block; False where that has another form.

    Keys lose their mean where nothing turns them: it adds as much to all scores of a query, which only the sink would notice. A
    head wider than the sparse ones becomes several, which share out its values and have each the same queries and keys, cut down
    to their width.
    """
    form, own, channels = sparse.form, sparse.channels, attention.channels
    block: Any = sparse.blocks[layer]
    turns, plain = sparse.frequencies(layer), attention.gains is None and attention.cap is None
    q, k, v, out = attention.q, attention.k, attention.v, attention.out
    if (form.reads_normed, form.score_cap) != (not attention.raw, attention.cap):
        return False
    same = own == channels and (sparse.heads_of_keys >= attention.kv_heads, sparse.group) == (
        True,
        attention.heads // attention.kv_heads,
    )
    if not same:  # heads of its own, of which several may stand for one
        parts = math.ceil(channels / own)
        if not plain or attention.heads * parts > sparse.heads_of_keys or sparse.group > 1 or (parts > 1 and turns):
            return False
        k, v = (_repeated(part, attention.heads, channels) for part in (k, v))
    if plain and not turns and not attention.raw:
        k = Affine(k.weight_oi, -k.weight_oi @ z_xd.mean(0))
    if same:
        q_rows = value_rows = torch.arange(attention.heads * own, device=z_xd.device)
        k_rows = v_rows = torch.arange(attention.kv_heads * own, device=z_xd.device)
    else:
        value_rows = v_rows = torch.cat([torch.arange(channels) + parts * own * head for head in range(attention.heads)])
        if parts > 1:
            q, k = (_repeated(part, attention.heads * parts, own) for part in _narrowed(q, k, z_xd, attention.heads, own))
        q_rows = k_rows = torch.arange(attention.heads * parts * own) if parts > 1 else value_rows
        q = Affine(*(x * math.sqrt(own / channels) for x in (q.weight_oi, q.bias_o)))
    for linear, rows, part in ((block.q, q_rows, q), (block.k, k_rows, k), (block.v, v_rows, v)):
        _read_by(linear, rows, frame.read(part, attention.raw))
    if attention.gains is not None:
        for kind, linear, rows, gain_o in (
            ("q", block.q, q_rows, attention.gains[0]),
            ("k", block.k, k_rows, attention.gains[1]),
        ):
            if kind not in block.gains:
                return False
            share = 1.0 if attention.by_head else len(rows) / linear.out_features  # of the channels that the norm is over
            times = math.sqrt(form.eps / (share * attention.norm_eps)) if form.eps and attention.norm_eps else 1.0
            linear.weight[rows] *= times
            linear.bias[rows] *= times
            if not attention.by_head:
                linear.weight[len(rows) :] = 0
            block.gains[kind].fill_(SMALL)  # a norm by head makes what is unused as large as what is used
            block.gains[kind][rows] = gain_o * math.sqrt(share)
    block.sinks.fill_(NO_SINK)
    return _write_by(block, "attn_out", block.o, value_rows, frame, out)


def _narrowed(q: Affine, k: Affine, z_xd: Tensor, heads: int, own: int) -> tuple[Affine, Affine]:
    """Queries and keys of `own` channels a head whose scores, on the text, are the nearest to the given ones (by SVD)."""
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


def _repeated(part: Affine, heads: int, channels: int) -> Affine:
    """Keys or values that several heads share, once for each."""
    weight_hcd, bias_hc = (x.unflatten(0, (-1, channels)) for x in (part.weight_oi, part.bias_o))
    times = heads // len(bias_hc)
    return Affine(weight_hcd.repeat_interleave(times, 0).flatten(0, 1), bias_hc.repeat_interleave(times, 0).flatten())


def _read_by(linear: nn.Linear, rows: slice | Tensor, part: Affine) -> None:
    """Give some outputs of a map these weights from the dense channels; everything else reads by little."""
    linear.weight.mul_(SMALL)
    linear.weight[rows] = 0
    linear.weight[rows, : part.weight_oi.shape[1]] = part.weight_oi
    linear.bias.zero_()
    linear.bias[rows] = part.bias_o


def _write_by(block: Any, kind: str, linear: nn.Linear, columns: slice | Tensor, frame: _Frame, out: Written) -> bool:
    """Give some inputs of a map these weights to the dense channels; everything else writes nothing. False: another form."""
    if (kind in block.gains) != (out.gain_d is not None):
        return False
    weight_do, bias_d = out.map.weight_oi, out.map.bias_o
    if out.gain_d is None:
        weight_do, bias_d = frame.into(weight_do.T).T, frame.into(bias_d)
    else:
        times = math.sqrt(frame.eps * frame.s / (frame.d * out.eps)) if frame.eps and out.eps else 1.0
        weight_do, bias_d = weight_do * times, bias_d * times
        block.gains[kind][: frame.d] = frame.into(out.gain_d) * frame.gain
    linear.weight.zero_()
    linear.weight[: frame.d, columns] = weight_do
    linear.bias.zero_()
    linear.bias[: frame.d] = bias_d
    return True


@torch.no_grad()
def gentle_rate(coupling: Coupling, tokens_bt: Tensor) -> float:
    """The learning rate for a model whose answers change by so much where a step moves every weight by it.

    A step moves every weight by about the rate; with random signs the answers' KL goes by the rate's square, and blocks' changes
    about add up, so some blocks are moved by `FASTEST`, one at a time. Where all of it is at most `GENTLE` nats that is the rate;
    beyond, half of the way (in the logarithm) to the rate at which it would be: a lower one takes longer to mend what L0 breaks.
    """
    sparse, tokens_bt = coupling.sparse, tokens_bt[:2, :TOKENS]
    before_btv = sparse.run(tokens_bt).logits_btv.log_softmax(-1)
    generator, n_blocks = torch.Generator().manual_seed(0), len(sparse.blocks)
    some = sorted({index * n_blocks // TRIED for index in range(TRIED)})
    total = 0.0
    for index in some:
        weights = [weight for weight in sparse.blocks[index].parameters() if weight.dim() == 2]
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            sign = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            weight.add_(sign.to(weight), alpha=FASTEST)
        after_btv = sparse.run(tokens_bt).logits_btv.log_softmax(-1)
        total += float((before_btv.exp() * (before_btv - after_btv)).sum(-1).mean()) * n_blocks / len(some)
        for weight, was in zip(weights, kept, strict=True):
            weight.copy_(was)
    return FASTEST * min(1.0, (GENTLE / max(total, 1e-12)) ** 0.25)

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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.bridges import Coupling
from bridge.dense import DenseModel
from bridge.recipe import RecipeError
from bridge.sparse import Fractions, SparseTransformer, norm_scale
from bridge.wiring import first_tensor, output_tensor

TURNS, TURN_ROWS = 30, 4096  # steps to the rotation, and the rows of either matrix on which it is found
ROWS, TOKENS = 4, 64  # of the text, on which maps are found and copies verified
SAME = 0.01  # largest unexplained share of the variance at which two tensors are called the same, up to constants
VERIFIED = 0.9  # explained share of a dense write at which a copy of its sublayer, without AbsTopK, is accepted
EXACT = 0.999  # at which no other copy is tried
EMBEDDING_RMS = 0.5  # of the channels in use, as in a random start
SMALL = 0.02  # of what it was, the random weight by which an unused channel or neuron reads
SINKS = (-4.0, -6.0, -8.0, -12.0)  # logits beside a dense model without sinks: as high as changes nothing, to have a gradient
NO_SINK = -30.0


@dataclass(frozen=True)
class Started:
    """What was copied from the dense model: embedding, unembedding, bridges, and of each sublayer the share of its write that the
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


@torch.no_grad()
def start_from_dense(coupling: Coupling, tokens_bt: Tensor) -> Started:
    """Overwrite a new coupling by its dense model, in place, as far as that is verified on tokens_bt; calibrates the bridges."""
    dense, sparse = coupling.dense, coupling.sparse
    residuals = [h_btd.float() for h_btd in dense.run(tokens_bt).residuals]
    coupling.bridges.calibrate(residuals)
    nothing = Started(False, False, False, (None,) * len(dense.sublayers))
    if sparse.width < dense.width:
        return nothing
    maps, sample = _watch(dense, tokens_bt[:ROWS, :TOKENS])
    reads = {centred: _reads(maps, sample.residuals, centred) for centred in (True, False)}
    centred = sum(map(len, reads[True])) > sum(map(len, reads[False]))
    frame = _Frame(torch.eye(dense.width, device=dense.device), sparse.width, centred, 1.0)
    rms = frame.into(residuals[0]).square().mean().sqrt().clamp_min(1e-12).item()
    frame = replace(frame, turn_dd=_turn(coupling, frame, reads[centred][-1]), scale=rms / EMBEDDING_RMS)
    turned = [[replace(read, weight_od=read.weight_od @ frame.turn_dd) for read in here] for here in reads[centred]]
    _copy_bridges(coupling, frame)
    sublayers = tuple(
        _copy_sublayer(coupling, site, frame, turned[site], maps, sample.residuals) for site in range(len(dense.sublayers))
    )
    return Started(
        _copy_embedding(coupling, frame, tokens_bt, residuals[0]),
        _copy_unembedding(sparse, frame, turned[-1], sample),
        True,
        sublayers,
    )


@torch.no_grad()
def start_from_coupling(coupling: Coupling, path: str) -> Started:
    """Give a new coupling the weights of one that was fitted to the same dense model, in place.

    Raises CheckpointError where there is none, RecipeError where it has another shape.
    """
    other = Coupling.from_pretrained(path, dense=coupling.dense)
    mine, theirs = (one.recipe.sparse.model_copy(update={"start": "auto"}) for one in (coupling, other))
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
    """Where the dense residual is in the sparse one; turn_dd is R^T."""

    turn_dd: Tensor
    s: int
    centred: bool
    scale: float

    @property
    def d(self) -> int:
        return len(self.turn_dd)

    @property
    def gain(self) -> float:
        """What z is to the sparse norm's output."""
        return math.sqrt(self.d / self.s)

    def centre(self, h_xd: Tensor) -> Tensor:
        return h_xd - h_xd.mean(-1, keepdim=True) if self.centred else h_xd

    def into(self, h_xd: Tensor) -> Tensor:
        """The dense residual, or a write to it, on the first d channels of the sparse one."""
        return self.centre(h_xd) @ self.turn_dd / self.scale

    def place(self, h_xd: Tensor) -> Tensor:
        """x_xs of a dense residual."""
        return F.pad(self.into(h_xd), (0, self.s - self.d))


# --- what the dense model is made of


@dataclass(frozen=True)
class _Map:
    """A linear map of the dense model as it was called: output_to = input_ti @ weight_oi.T + bias_o."""

    weight_oi: Tensor
    bias_o: Tensor
    input_ti: Tensor
    output_to: Tensor


@dataclass(frozen=True)
class _Read:
    """A map that reads the residual at a site, as a map of z: weight_od z + bias_o."""

    weight_od: Tensor
    bias_o: Tensor
    map: _Map


@dataclass(frozen=True)
class _Sample:
    """Some text through the dense model, rows and tokens flattened: the residual of every site, and the logits."""

    residuals: list[Tensor]
    logits_tv: Tensor
    rows: int


def _watch(dense: DenseModel, tokens_bt: Tensor) -> tuple[list[_Map], _Sample]:
    """The linear maps of the dense model in the order of their first calls, and what it made of the tokens."""
    maps: dict[nn.Module, _Map] = {}

    def seen(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, y, weight = first_tensor(args, kwargs), output_tensor(output), module.weight
        assert isinstance(weight, Tensor)
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and weight.is_floating_point()
        if module in maps or not tensors or x.numel() // x.shape[-1] != tokens_bt.numel():
            return
        x_ti, y_to = x.reshape(-1, x.shape[-1]).float(), y.reshape(-1, y.shape[-1]).float()
        bias = getattr(module, "bias", None)
        bias_o = torch.zeros_like(y_to[0]) if bias is None else bias.float()
        for weight_oi in (weight.float(), weight.float().T):  # transformers' Conv1D has inputs first
            fits = weight_oi.shape == (y_to.shape[1], x_ti.shape[1])
            if fits and _unexplained(torch.addmm(bias_o, x_ti, weight_oi.T), y_to) < SAME:
                maps[module] = _Map(weight_oi, bias_o, x_ti.clone(), y_to.clone())
                return

    with ExitStack() as hooks:
        for module in dense.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                hooks.enter_context(module.register_forward_hook(seen, with_kwargs=True))
        trace = dense.run(tokens_bt)
    residuals = [h_btd.flatten(0, 1).float() for h_btd in trace.residuals]
    return list(maps.values()), _Sample(residuals, trace.logits_btv.flatten(0, 1).float(), len(tokens_bt))


def _reads(maps: Sequence[_Map], residuals: Sequence[Tensor], centred: bool) -> list[list[_Read]]:
    """The maps that read each site through a norm with gain and bias, each at the site that explains its input best."""
    normalised = []
    for h_td in residuals:
        h_td = h_td - h_td.mean(-1, keepdim=True) if centred else h_td
        normalised.append(h_td * torch.rsqrt(h_td.square().mean(-1, keepdim=True) + 1e-6))
    found: list[list[_Read]] = [[] for _ in residuals]
    for one in maps:
        if one.input_ti.shape != residuals[0].shape:
            continue
        fits = []
        for z_td in normalised:
            mean_d = z_td.mean(0) if centred else torch.zeros_like(z_td[0])
            z0_td, n0_td = z_td - mean_d, one.input_ti - (one.input_ti.mean(0) if centred else 0)
            gain_d = (z0_td * n0_td).sum(0) / z0_td.square().sum(0).clamp_min(1e-12)
            bias_d = one.input_ti.mean(0) - gain_d * mean_d if centred else torch.zeros_like(mean_d)
            fits.append((_unexplained(gain_d * z_td + bias_d, one.input_ti), gain_d, bias_d))
        site = min(range(len(fits)), key=lambda site: fits[site][0])
        unexplained, gain_d, bias_d = fits[site]
        if unexplained < SAME:
            found[site].append(_Read(one.weight_oi * gain_d, one.weight_oi @ bias_d + one.bias_o, one))
    return found


def _unexplained(guess_tx: Tensor, target_tx: Tensor) -> float:
    """Share of the target's variance over tokens that a guess leaves."""
    total = (target_tx - target_tx.mean(0)).square().sum()
    return ((guess_tx - target_tx).square().sum() / total.clamp_min(1e-20)).item()


# --- what of it is written to the sparse model


def _turn(coupling: Coupling, frame: _Frame, reads: Sequence[_Read]) -> Tensor:
    """The rotation in which embedding and unembedding, their rows of length 1, have the largest sum of fourth powers.

    From the embedding's principal axes, each step goes to the rotation nearest to the gradient.
    """
    weights = [_embedding_weight(coupling), *(read.weight_od for read in reads if len(read.bias_o) == coupling.sparse.vocabulary)]
    unit = [F.normalize(frame.centre(w_vd[:: 1 + len(w_vd) // TURN_ROWS]), dim=-1) for w_vd in weights if w_vd is not None]
    if not unit:
        return frame.turn_dd
    unit_xd = torch.cat(unit)
    turn_dd = torch.linalg.eigh(unit[0].T @ unit[0]).eigenvectors
    for _ in range(TURNS):
        left_dd, _, right_dd = torch.linalg.svd(unit_xd.T @ (unit_xd @ turn_dd).pow(3))
        turn_dd = left_dd @ right_dd
    return turn_dd


def _embedding_weight(coupling: Coupling) -> Tensor | None:
    """weight_vd of the dense model's input embeddings, None where they are not a table of the residual's width."""
    weight = getattr(coupling.dense.model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (coupling.dense.vocabulary, coupling.dense.width):
        return None
    return weight.float()


def _copy_bridges(coupling: Coupling, frame: _Frame) -> None:
    """Give every bridge x = centred(h) / S through its constants mu and sigma, and back."""
    placed_sd = frame.place(torch.eye(frame.d, device=coupling.dense.device)).T
    for site in range(coupling.n_sites):
        bridge = coupling.bridges[site]
        bridge.encoder.weight.copy_(placed_sd * bridge.scale)
        bridge.encoder.bias.copy_(frame.place(bridge.mean_d))
        bridge.decoder.weight.copy_(placed_sd.T * frame.scale**2 / bridge.scale)
        bridge.decoder.bias.copy_(-frame.centre(bridge.mean_d) / bridge.scale)


def _copy_embedding(coupling: Coupling, frame: _Frame, tokens_bt: Tensor, h_btd: Tensor) -> bool:
    """The embedding where the residual at site 0 is a multiple of it plus a vector per position."""
    sparse, weight_vd = coupling.sparse, _embedding_weight(coupling)
    if weight_vd is None:
        return False
    e_btd = weight_vd[tokens_bt]
    deviation_btd = e_btd - e_btd.mean(0)
    multiple = (deviation_btd * (h_btd - h_btd.mean(0))).sum() / deviation_btd.square().sum().clamp_min(1e-12)
    position_td = (h_btd - multiple * e_btd).mean(0)
    if not _unexplained((multiple * e_btd + position_td).flatten(0, 1), h_btd.flatten(0, 1)) < SAME:
        return False
    mean_d = torch.zeros_like(position_td[0])
    if sparse.positions is None:
        mean_d = position_td.mean(0)
    else:
        sparse.positions.copy_(frame.place(position_td))
    sparse.embedding.copy_(frame.place(multiple * weight_vd + mean_d))
    return True


def _copy_unembedding(sparse: SparseTransformer, frame: _Frame, reads: Sequence[_Read], sample: _Sample) -> bool:
    """The unembedding where the logits are a linear map of the last residual's norm."""
    for read in reads:
        one = read.map
        if one.output_to.shape == sample.logits_tv.shape and _unexplained(one.output_to, sample.logits_tv) < SAME:
            _read_by(sparse.unembedding, slice(None), read.weight_od * frame.gain, read.bias_o)
            return True
    return False


def _copy_sublayer(
    coupling: Coupling, site: int, frame: _Frame, reads: Sequence[_Read], maps: Sequence[_Map], residuals: Sequence[Tensor]
) -> float | None:
    """Try what the maps at a site may be; the share of the write that the copy explains, None where none was accepted."""
    dense, sparse = coupling.dense, coupling.sparse
    kind = dense.sublayers[site]
    write_td = residuals[site + 1] - residuals[site]
    writers = [one for one in maps if one.output_to.shape == write_td.shape and _unexplained(one.output_to, write_td) < SAME]
    if kind == "parallel" or len(writers) != 1:
        return None
    layer = sum(other != "mlp" for other in dense.sublayers[: site + 1]) - 1
    block: Any = sparse.blocks[layer]
    rows = ROWS if len(write_td) % ROWS == 0 else 1
    x_bts = frame.place(residuals[site]).unflatten(0, (rows, -1))
    wanted_td = frame.into(write_td)

    def explained() -> float:
        written_bts = sparse.sublayer(site)(x_bts) - x_bts
        return 1 - _unexplained(written_bts[..., : frame.d].flatten(0, 1), wanted_td)

    before = {name: parameter.clone() for name, parameter in block.named_parameters()}
    best, chosen = VERIFIED, before
    z_td = (x_bts * norm_scale(x_bts))[..., : frame.d].flatten(0, 1) * frame.gain
    attention = _attention_copies(coupling, block, frame, reads, writers[0], z_td)
    for _ in attention if kind == "attn" else _mlp_copies(block, frame, reads, writers[0]):
        with _keeping_all(sparse):
            share = explained()
        if share > best:
            best, chosen = share, {name: parameter.clone() for name, parameter in block.named_parameters()}
        if share > EXACT:
            break
        block.load_state_dict(before)
    block.load_state_dict(chosen)
    if chosen is before:
        return None
    with _keeping_all(sparse):
        for sink in SINKS if kind == "attn" and sparse.shape.sinks else ():
            block.sinks.fill_(sink)
            if explained() > best - (1 - EXACT):
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


def _mlp_copies(block: Any, frame: _Frame, reads: Sequence[_Read], writer: _Map) -> Iterator[None]:
    """The MLP, written to the block: as it is, and with a steeper GELU, which is a ReLU."""
    neurons = writer.weight_oi.shape[1]
    if len(reads) != 1 or len(reads[0].bias_o) != neurons or neurons > block.up.out_features:
        return
    for steepness in (1.0, 4.0):
        _read_by(block.up, slice(neurons), steepness * frame.gain * reads[0].weight_od, steepness * reads[0].bias_o)
        _write_by(block.down, slice(neurons), frame.into(writer.weight_oi.T).T / steepness, frame.into(writer.bias_o))
        yield


def _attention_copies(
    coupling: Coupling, block: Any, frame: _Frame, reads: Sequence[_Read], writer: _Map, z_td: Tensor
) -> Iterator[None]:
    """The attention, written to the block with every order that q, k and v may have, scores scaled or not.

    Keys lose their mean: it adds as much to all scores of a query, which only the sink would notice. A head wider than the sparse
    ones becomes several, which share out its values and have each the same queries and keys, cut down to their width.
    """
    shape = coupling.sparse.shape
    heads = getattr(coupling.dense.model.config.get_text_config(), "num_attention_heads", None)
    width = writer.weight_oi.shape[1]
    if not isinstance(heads, int) or width % heads:
        return
    channels, own = width // heads, shape.head_channels
    parts = math.ceil(channels / own)
    if heads * parts * own > frame.s or (parts > 1 and shape.positions == "rotary"):
        return
    value_rows = torch.cat([torch.arange(channels) + parts * own * head for head in range(heads)])
    rows = torch.arange(heads * parts * own) if parts > 1 else value_rows
    for q, k, v in _orders(reads, heads, channels):
        if shape.positions != "rotary":
            k = k[0], -k[0] @ z_td.mean(0)
        if parts > 1:
            q, k = (_repeated(part, heads * parts, own) for part in _narrowed(q, k, z_td, heads, own))
        for scaled in (1.0, math.sqrt(channels)):  # a few models do not divide scores by the root of the width (GPT-Neo)
            factor = scaled * math.sqrt(own / channels)
            _read_by(block.q, rows, factor * frame.gain * q[0], factor * q[1])
            _read_by(block.k, rows, frame.gain * k[0], k[1])
            _read_by(block.v, value_rows, frame.gain * v[0], v[1])
            _write_by(block.o, value_rows, frame.into(writer.weight_oi.T).T, frame.into(writer.bias_o))
            block.sinks.fill_(NO_SINK)
            yield


def _narrowed(
    q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor], z_td: Tensor, heads: int, own: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries and keys of `own` channels a head whose scores, on the text, are the nearest to the given ones (by SVD)."""
    q_htc, k_htc = ((z_td @ weight_od.T + bias_o).unflatten(-1, (heads, -1)).transpose(0, 1) for weight_od, bias_o in (q, k))
    q_hcc, k_hcc = torch.linalg.qr(q_htc).R, torch.linalg.qr(k_htc).R  # scores are (.. Q) R_q R_k^T (.. Q)^T
    left_hcc, values_hc, right_hcc = torch.linalg.svd(q_hcc @ k_hcc.transpose(-1, -2))
    root_h1c = values_hc[:, None, :own].sqrt()
    narrow = []
    for (weight_od, bias_o), r_hcc, side_hcc in ((q, q_hcc, left_hcc), (k, k_hcc, right_hcc.transpose(-1, -2))):
        turn_hoc = (torch.linalg.pinv(r_hcc) @ side_hcc[..., :own] * root_h1c).transpose(-1, -2)
        weight_hcd, bias_hc1 = weight_od.unflatten(0, (heads, -1)), bias_o.unflatten(0, (heads, -1))[..., None]
        narrow.append(((turn_hoc @ weight_hcd).flatten(0, 1), (turn_hoc @ bias_hc1).flatten()))
    return narrow[0], narrow[1]


def _orders(reads: Sequence[_Read], heads: int, channels: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """(weight_od, bias_o) of q, k and v, in every way in which the maps that read may hold them."""
    parts = [(read.weight_od, read.bias_o) for read in reads]
    if len(parts) == 1:
        weight_od, bias_o = parts[0]
        shared = len(bias_o) - heads * channels  # k and v together; fewer heads than q has where they are shared
        if shared <= 0 or shared % (2 * channels):
            return
        sizes = [heads * channels, shared // 2, shared // 2]
        split = list(zip(weight_od.split(sizes), bias_o.split(sizes), strict=True))
        yield [_repeated(part, heads, channels) for part in split]
        if sizes[0] == sizes[1]:  # q, k and v head by head (BLOOM)
            by_head = weight_od.unflatten(0, (heads, 3, channels)), bias_o.unflatten(0, (heads, 3, channels))
            yield [(by_head[0][:, part].flatten(0, 1), by_head[1][:, part].flatten()) for part in range(3)]
    elif len(parts) == 3:
        for order in permutations(parts):
            sizes = [len(bias_o) for _, bias_o in order]
            if sizes[0] == heads * channels and sizes[1] == sizes[2] and sizes[1] % channels == 0:
                yield [_repeated(part, heads, channels) for part in order]


def _repeated(part: tuple[Tensor, Tensor], heads: int, channels: int) -> tuple[Tensor, Tensor]:
    """Keys or values that several heads share, once for each."""
    weight_hcd, bias_hc = (x.unflatten(0, (-1, channels)) for x in part)
    times = heads // len(bias_hc)
    return weight_hcd.repeat_interleave(times, 0).flatten(0, 1), bias_hc.repeat_interleave(times, 0).flatten()


def _read_by(linear: nn.Linear, rows: slice | Tensor, weight_od: Tensor, bias_o: Tensor) -> None:
    """Give some outputs of a map these weights from the dense channels; everything else reads by little."""
    linear.weight.mul_(SMALL)
    linear.weight[rows, : weight_od.shape[1]] = weight_od
    linear.bias.zero_()
    linear.bias[rows] = bias_o


def _write_by(linear: nn.Linear, columns: slice | Tensor, weight_do: Tensor, bias_d: Tensor) -> None:
    """Give some inputs of a map these weights to the dense channels; everything else writes nothing."""
    linear.weight.zero_()
    linear.weight[: len(bias_d), columns] = weight_do
    linear.bias.zero_()
    linear.bias[: len(bias_d)] = bias_d

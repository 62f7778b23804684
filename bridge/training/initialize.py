"""Initialise a coupling as a copy of its dense model, as exactly as the sparse architecture allows, or from an earlier coupling.

AbsTopK keeps a quarter of a location's values, so a sparse model four times as wide loses nothing if the dense model is copied to
its first channels. With z = h centred and divided by its deviation (LayerNorm; RMSNorm does not centre), up to constants,

    x[:d] = R centred(h) / S,  x[d:] = 0                encoder and decoder of every bridge; S makes the embedding's RMS 1/2
    norm(x)[:d] = sqrt(s / d) R z                       the sparse norm averages over s channels, of which d are not zero
    W (g z + b) + c = (W g R^T sqrt(d / s)) norm(x)[:d] + (W b + c)  every map that reads the residual, the unembedding too
    W a + c -> R centred(W a + c) / S                   every map that writes to it; embedding and positions likewise

No map reads the mean that centring removes. The other channels and neurons read with small random weights and write nothing. R
may be any rotation, because no norm has a gain left. R maximises the fourth powers of embedding and unembedding, which
makes both nearly sparse: these thin matrices lose most when the projection keeps the same fraction of every matrix.

No architecture is known by name: maps are found by their inputs and outputs (`anatomy`). A sublayer stays random if its copy, run
on the dense residuals without AbsTopK, does not write the same as the dense sublayer.

Shape legend: b batch row, t token (of all rows), d dense width, s sparse width, i inputs, o outputs, h heads, c head channels,
m dense neurons, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels, local_folder
from bridge.models.circuit import kl
from bridge.models.dense import DenseModel
from bridge.models.span import DenseSpan
from bridge.models.sparse_weights import Fractions
from bridge.models.store import read_json
from bridge.recipe import AttentionShape, BlockShape, RecipeError, SparseShape
from bridge.training.anatomy import Anatomy, dissect
from bridge.training.copy_dense import Frame, copy_bridges, copy_embedding, copy_sublayer, copy_unembedding, find_rotation
from bridge.training.dense_sublayers import Attention

ROWS, TOKENS = 4, 64  # size of the text on which copies are verified
# see `gentle_rate`; .007 is the KL of the shipped model, whose best rate was 1e-3
GENTLE_KL, MAX_RATE, BLOCKS_TO_TRY = 0.007, 1e-3, 6
EMBEDDING_RMS = 0.5  # RMS of the channels in use, as in a random start


@dataclass(frozen=True)
class Initialization:
    """The parts copied from the dense model, and per sublayer the fraction of its write that the copy explains with AbsTopK
    (None: random). If `coupling` is given, everything comes from that coupling, and the anneal starts at its L0.
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


def shape_from_dense(dense: DenseModel, shape: SparseShape, context: int) -> SparseShape:
    """Fill in what a recipe's shape leaves open by measuring the dense model. Raises RecipeError if width and heads conflict."""
    anatomy = dissect(dense, context)
    attention = next(iter(anatomy.attention.values()), None)
    mlp = next(iter(anatomy.mlp.values()), None)
    channels = shape.head_channels or (attention.channels if attention else 16)
    width = shape.width or max(1, round(2 * dense.width / channels)) * channels
    same_heads = attention is not None and channels == attention.channels
    if width % channels and not same_heads:
        raise RecipeError(f"sparse.width {width}", f"is not a multiple of sparse.head_channels {channels}", "change one of them")
    times = max(1.0, width / dense.width)
    eps = anatomy.eps * dense.width / (width * _residual_scale(anatomy) ** 2)  # so the sparse norms equal the dense ones
    form: dict[str, Any] = {"eps": eps, "logit_cap": anatomy.logit_cap}
    positions = shape.positions
    if positions == "auto":
        turning = any(each.shape.frequencies for each in anatomy.attention.values())
        positions = "learned" if anatomy.position_td is not None else "rotary" if turning else "none"
    if attention is not None and same_heads:
        form |= _heads(anatomy, attention, times, positions)
    keep = shape.keep or (0.25 if shape.start == "random" or not anatomy.mlp else max(0.25, min(1.0, dense.width / width)))
    if mlp is not None:
        form |= {"activation": mlp.activation, "gated": mlp.gate is not None}
        if shape.mlp_ratio is None:
            form["neurons"] = round(mlp.neurons * times)
    if shape.mlp != "auto":
        form["gated"] = shape.mlp == "gated"
    parts = [*anatomy.attention.values(), *anatomy.mlp.values()]
    form["writes_normed"] = any(part.out.gain_d is not None for part in parts)
    form["reads_normed"] = not parts or not all(part.raw for part in parts)
    update = {
        "width": width, "head_channels": channels, "positions": positions, "mlp_ratio": shape.mlp_ratio or 4, "keep": keep,
        "block": BlockShape(**form),
    }  # fmt: skip
    return shape.model_copy(update=update)


def _heads(anatomy: Anatomy, one: Attention, times: float, positions: str) -> dict[str, Any]:
    """Return heads, positions and scores as in the dense model's blocks; the number of heads grows with the width, by `times`."""
    keys = max(one.kv_heads, int(one.kv_heads * times + 1e-9))
    heads, shapes = keys * one.heads // one.kv_heads, []
    for each in anatomy.attention.values():
        slopes = each.shape.slopes + (0.0,) * (heads - one.heads) if each.shape.slopes else ()
        frequencies = each.shape.frequencies if positions == "rotary" else ()
        shapes.append(each.shape.model_copy(update={"slopes": slopes, "frequencies": frequencies}))
    if positions == "rotary" and not any(each.frequencies for each in shapes):  # use the recipe's default frequencies
        shapes = []
    shapes = shapes[:1] if all(each == shapes[0] for each in shapes) else shapes
    return {
        "heads": heads, "kv_heads": keys, "score_cap": one.cap,
        "attention": tuple(shapes) if shapes != [AttentionShape()] else (),
        "qk_norm": None if one.gains is None else "head" if one.by_head else "all",
    }  # fmt: skip


def _residual_scale(anatomy: Anatomy) -> float:
    """Return S, the divisor of the dense residual that gives the embedding the same RMS as in a random start."""
    if anatomy.embedding_vd is None:
        return 1.0
    e_vd = anatomy.embedding_vd - (anatomy.embedding_vd.mean(-1, keepdim=True) if anatomy.centred else 0)
    return max(1e-6, e_vd.square().mean().sqrt().item() / EMBEDDING_RMS)


@torch.no_grad()
def start_from_dense(coupling: CoupledModels, tokens_bt: Tensor) -> Initialization:
    """Copy the dense model's parts to a new coupling, in place, sublayers if verified on tokens_bt; calibrate the bridges."""
    dense, sparse = coupling.dense, coupling.sparse
    residuals = [h_btd.float() for h_btd in dense.residuals(tokens_bt, dense.n_sites - 1)]
    coupling.bridges.calibrate(residuals)
    if sparse.width < dense.width:
        return Initialization(False, False, False, (None,) * len(dense.sublayers))
    anatomy = dissect(dense, coupling.context)
    frame = Frame(
        torch.eye(dense.width, device=dense.device), sparse.width, anatomy.centred, _residual_scale(anatomy), sparse.form.eps
    )
    span = isinstance(dense, DenseSpan)
    if not sparse.form.writes_normed and not span:  # a rotation would mix channels that have a gain each
        frame = replace(frame, turn_dd=find_rotation(anatomy, frame))
    copy_bridges(coupling, frame)
    sample = [h_btd[:ROWS, :TOKENS] for h_btd in residuals]
    sublayers = tuple(copy_sublayer(coupling, site, frame, anatomy, sample) for site in range(len(dense.sublayers)))
    ends = (False, False) if span else (copy_embedding(sparse, frame, anatomy), copy_unembedding(sparse, frame, anatomy))
    return Initialization(*ends, True, sublayers)


def shape_from_coupling(path: str, shape: SparseShape) -> SparseShape:
    """Fill in what a recipe's shape leaves open from the coupling that it starts from. Raises CheckpointError."""
    facts = read_json(local_folder(path) / "coupling.json")
    theirs = SparseShape.model_validate((facts.get("recipe") or {}).get("sparse") or {})
    unsaid = {name: value for name, value in theirs.model_dump().items() if getattr(shape, name) in (None, "auto")}
    return shape.model_copy(update={**unsaid, "block": theirs.block or BlockShape()})


@torch.no_grad()
def start_from_coupling(coupling: CoupledModels, path: str, *, adapts: bool = False) -> Initialization:
    """Load the weights of a coupling to the same dense model (if adapts, to the model it was fine-tuned from), in place.

    Raises CheckpointError if there is none, RecipeError if it has another shape or was trained on text that is held out now.
    """
    other = CoupledModels.from_pretrained(path, dense=coupling.dense, fine_tuned=adapts)
    now, before = coupling.recipe, other.recipe
    same_text = now.data.source == before.data.source != "self"  # in streams the text decides what is held out, not the seed
    if same_text and (now.data.stream != before.data.stream or (not now.data.stream and now.seed != before.seed)):
        what = f"seed {now.seed} (data.stream {str(now.data.stream).lower()})"
        rule = f"holds out other parts of {now.data.source!r} than {path!r}, which was trained on most of them"
        remedy = f"give seed {before.seed} and data.stream {str(before.data.stream).lower()}, or other ‹data›"
        raise RecipeError(what, rule, remedy)
    mine, theirs = (
        {**dict(one.recipe.sparse), "start": None, "keep": one.sparse.keep, "block": one.sparse.form, "blocks": one.blocks}
        for one in (coupling, other)
    )
    differ = [name for name, value in mine.items() if value != theirs[name]]
    if differ or coupling.context != other.context:
        rule = f"is a coupling of another shape ({', '.join(differ) or 'data.context'})"
        raise RecipeError(f"sparse.start {path!r}", rule, "use the values of that coupling, or give sparse.start 'auto'")
    coupling.sparse.load_state_dict(other.sparse.state_dict())
    coupling.bridges.load_state_dict(other.bridges.state_dict())
    return Initialization(True, True, True, (1.0,) * (coupling.n_sites - 1), path, other.sparse.achieved_fractions())


@torch.no_grad()
def gentle_rate(coupling: CoupledModels, tokens_bt: Tensor) -> float:
    """Return a learning rate chosen by how much the answers change when every weight changes by the rate.

    A step changes every weight by about the rate. With random signs, the KL grows with the rate's square, and blocks' KLs roughly
    add, so some blocks are changed by `MAX_RATE`, one at a time. If their total KL is at most `GENTLE_KL` nats, that is the rate;
    otherwise the geometric mean of `MAX_RATE` and the rate that gives `GENTLE_KL`: lower rates repair slowly what L0 breaks.
    """
    sparse, tokens_bt = coupling.sparse, tokens_bt[:2, :TOKENS]
    before_btv = sparse.run(tokens_bt).logits_btv
    generator, n_blocks = torch.Generator().manual_seed(0), len(sparse.blocks)
    some = sorted({index * n_blocks // BLOCKS_TO_TRY for index in range(BLOCKS_TO_TRY)})
    total = 0.0
    for index in some:
        weights = [weight for weight in sparse.blocks[index].parameters() if weight.dim() == 2]
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            sign = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            weight.add_(sign.to(weight), alpha=MAX_RATE)
        total += float(kl(before_btv, sparse.run(tokens_bt).logits_btv).mean()) * n_blocks / len(some)
        for weight, was in zip(weights, kept, strict=True):
            weight.copy_(was)
    return MAX_RATE * min(1.0, (GENTLE_KL / max(total, 1e-12)) ** 0.25)

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

No architecture is known by name: maps are found by what goes in and comes out (`anatomy`). A sublayer whose copy, run on the
dense residuals without AbsTopK, does not write what the dense one writes stays random.

Shape legend: b batch row, t token (of all rows), d dense width, s sparse width, i inputs, o outputs, h heads, c head channels,
m dense neurons, v vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels, folder_of
from bridge.models.circuit import kl
from bridge.models.dense import DenseModel
from bridge.models.span import DenseSpan
from bridge.models.sparse_weights import Fractions
from bridge.models.store import read_json
from bridge.recipe import AttentionShape, BlockShape, RecipeError, SparseShape
from bridge.training.anatomy import Anatomy, dissect
from bridge.training.copy_dense import Frame, copy_bridges, copy_embedding, copy_sublayer, copy_unembedding, turn_of
from bridge.training.dense_sublayers import Attention

ROWS, TOKENS = 4, 64  # of the text, on which maps are found and copies verified
GENTLE, FASTEST, TRIED = 0.007, 1e-3, 6  # see `gentle_rate`; the model that ships, for which 1e-3 was found best, has .007
EMBEDDING_RMS = 0.5  # of the channels in use, as in a random start


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
    same_heads = attention is not None and channels == attention.channels
    if width % channels and not same_heads:
        raise RecipeError(f"sparse.width {width}", f"is not a multiple of sparse.head_channels {channels}", "change one of them")
    times = max(1.0, width / dense.width)
    eps = anatomy.eps * dense.width / (width * _scale(anatomy) ** 2)  # at which the sparse norms are the dense ones
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
    """Heads, what they know of positions, and their scores, as in the dense model's blocks; as many times more as it is wider."""
    keys = max(one.kv_heads, int(one.kv_heads * times + 1e-9))
    heads, shapes = keys * one.heads // one.kv_heads, []
    for each in anatomy.attention.values():
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


def _scale(anatomy: Anatomy) -> float:
    """S, by which the dense residual is divided, such that the embedding's RMS is the same as in a random start."""
    if anatomy.embedding_vd is None:
        return 1.0
    e_vd = anatomy.embedding_vd - (anatomy.embedding_vd.mean(-1, keepdim=True) if anatomy.centred else 0)
    return max(1e-6, e_vd.square().mean().sqrt().item() / EMBEDDING_RMS)


@torch.no_grad()
def start_from_dense(coupling: CoupledModels, tokens_bt: Tensor) -> Started:
    """Overwrite a new coupling by its dense model, in place, as far as that is verified on tokens_bt; calibrates the bridges."""
    dense, sparse = coupling.dense, coupling.sparse
    residuals = [h_btd.float() for h_btd in dense.residuals(tokens_bt, dense.n_sites - 1)]
    coupling.bridges.calibrate(residuals)
    if sparse.width < dense.width:
        return Started(False, False, False, (None,) * len(dense.sublayers))
    anatomy = dissect(dense, coupling.context)
    frame = Frame(torch.eye(dense.width, device=dense.device), sparse.width, anatomy.centred, _scale(anatomy), sparse.form.eps)
    span = isinstance(dense, DenseSpan)
    if not sparse.form.writes_normed and not span:  # a gain there is one for each channel
        frame = replace(frame, turn_dd=turn_of(anatomy, frame))
    copy_bridges(coupling, frame)
    sample = [h_btd[:ROWS, :TOKENS] for h_btd in residuals]
    sublayers = tuple(copy_sublayer(coupling, site, frame, anatomy, sample) for site in range(len(dense.sublayers)))
    ends = (False, False) if span else (copy_embedding(sparse, frame, anatomy), copy_unembedding(sparse, frame, anatomy))
    return Started(*ends, True, sublayers)


def shape_of_coupling(path: str, shape: SparseShape) -> SparseShape:
    """A recipe's shape with what it leaves open taken from a coupling that it starts from. Raises CheckpointError."""
    facts = read_json(folder_of(path) / "coupling.json")
    theirs = SparseShape.model_validate((facts.get("recipe") or {}).get("sparse") or {})
    unsaid = {name: value for name, value in theirs.model_dump().items() if getattr(shape, name) in (None, "auto")}
    return shape.model_copy(update={**unsaid, "block": theirs.block or BlockShape()})


@torch.no_grad()
def start_from_coupling(coupling: CoupledModels, path: str, *, adapts: bool = False) -> Started:
    """Give a new coupling the weights of one fitted to the same dense model (or, adapts, to one it is a fine-tune of), in place.

    Raises CheckpointError where there is none, RecipeError where it has another shape, or was trained on what is held out now.
    """
    other = CoupledModels.from_pretrained(path, dense=coupling.dense, fine_tuned=adapts)
    now, before = coupling.recipe, other.recipe
    same_text = now.data.source == before.data.source != "self"  # streams hold out by the text itself, whatever the seed
    if same_text and (now.data.stream != before.data.stream or (not now.data.stream and now.seed != before.seed)):
        what = f"seed {now.seed} (data.stream {str(now.data.stream).lower()})"
        rule = f"holds out other parts of {now.data.source!r} than {path!r} did, which was trained on most of them"
        remedy = f"give seed {before.seed} and data.stream {str(before.data.stream).lower()}, or other ‹data›"
        raise RecipeError(what, rule, remedy)
    mine, theirs = (
        {**dict(one.recipe.sparse), "start": None, "keep": one.sparse.keep, "block": one.sparse.form, "blocks": one.blocks}
        for one in (coupling, other)
    )
    differ = [name for name, value in mine.items() if value != theirs[name]]
    if differ or coupling.context != other.context:
        rule = f"is a coupling of another shape ({', '.join(differ) or 'data.context'})"
        raise RecipeError(f"sparse.start {path!r}", rule, "take its numbers, or start as 'auto'")
    coupling.sparse.load_state_dict(other.sparse.state_dict())
    coupling.bridges.load_state_dict(other.bridges.state_dict())
    return Started(True, True, True, (1.0,) * (coupling.n_sites - 1), path, other.sparse.achieved_fractions())


@torch.no_grad()
def gentle_rate(coupling: CoupledModels, tokens_bt: Tensor) -> float:
    """The learning rate for a model whose answers change by so much where a step moves every weight by it.

    A step moves every weight by about the rate; with random signs the answers' KL goes by the rate's square, and blocks' changes
    about add up, so some blocks are moved by `FASTEST`, one at a time. Where all of it is at most `GENTLE` nats that is the rate;
    beyond, half of the way (in the logarithm) to the rate at which it would be: a lower one takes longer to mend what L0 breaks.
    """
    sparse, tokens_bt = coupling.sparse, tokens_bt[:2, :TOKENS]
    before_btv = sparse.run(tokens_bt).logits_btv
    generator, n_blocks = torch.Generator().manual_seed(0), len(sparse.blocks)
    some = sorted({index * n_blocks // TRIED for index in range(TRIED)})
    total = 0.0
    for index in some:
        weights = [weight for weight in sparse.blocks[index].parameters() if weight.dim() == 2]
        kept = [weight.clone() for weight in weights]
        for weight in weights:
            sign = torch.randint(0, 2, weight.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
            weight.add_(sign.to(weight), alpha=FASTEST)
        total += float(kl(before_btv, sparse.run(tokens_bt).logits_btv).mean()) * n_blocks / len(some)
        for weight, was in zip(weights, kept, strict=True):
            weight.copy_(was)
    return FASTEST * min(1.0, (GENTLE / max(total, 1e-12)) ** 0.25)

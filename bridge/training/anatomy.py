"""Measure the parts of a dense model's sublayers (linear maps, heads, positions, norms, nonlinearities) without use of names.

A few rows of tokens are run and these are recorded: the inputs and outputs of modules with a two-dimensional weight, the products
of queries and keys, and the inputs of the softmax. With z = h centred and divided by its deviation (LayerNorm; RMSNorm does not
centre),

    reads       a map reads at a site if its input is g z + b there (or h itself); g and b are folded into its weights
    values      the first token's attention returns that token's value, so v is the set of map outputs that equal the output
                map's input there, head by head, in any order; query heads with equal columns share one value head
    q, k        the map outputs that are parallel to the multiplied queries and keys at the first token, where rotary positions
                do not rotate; if there are none, the outputs are tried through a norm with a gain, per head or over all heads
    positions   the angle between q (or k) before and after rotation, with a head's first channels paired as halves or neighbours;
                the scores minus scale * q . k, by distance (ALiBi); how far back the last query sees; a cap C tanh(score / C)
    MLP         the input of a map is act(up), or act(gate) up, for one of the nonlinearities
    writes      a sublayer adds its last map's output times a constant, or that output through a norm with a gain

A part that does not fit is None. A part that fits is verified in `training/initialize` by what the whole sublayer writes.

Shape legend: b batch row, t token (x: all rows), d dense width, o outputs, i inputs, h query heads, g heads of keys and
values, c channels of a head, m neurons, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.huggingface.site_discovery import forward
from bridge.models.dense import DenseModel
from bridge.models.span import DenseSpan
from bridge.training.dense_maps import (
    EPSILONS,
    MASKED_SCORE,
    MAX_UNEXPLAINED,
    Affine,
    OutputMap,
    Reading,
    RecordedRun,
    ScoreWatcher,
    draw_probe_rows,
    find_readings,
    fit_factor,
    fit_output,
    record_run,
    sites_of,
    unexplained,
)
from bridge.training.dense_sublayers import Attention, Mlp, find_attention, find_mlp, fit_soft_cap


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Measured parts of a dense model; attention and MLP by site, without an entry if they fit no form known here.

    The residual at site 0 is embedding_vd plus position_td (None: zero); unembedding maps the normed last residual to logits.
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
    """Measure the parts of a dense model. An attention window of at least `context` tokens counts as no window.

    For a span, return the whole model's parts inside it; the residual that enters the span takes the place of the embedding.
    """
    if isinstance(dense, DenseSpan):
        whole, first = dissect(dense.whole, context), dense.first_site
        sites = range(first, first + len(dense.sublayers))
        attention = {site - first: part for site, part in whole.attention.items() if site in sites}
        mlp = {site - first: part for site, part in whole.mlp.items() if site in sites}
        h_xd = dense.prefix(draw_probe_rows(dense))[:, 1:].flatten(0, 1).float()
        return Anatomy(whole.centred, whole.eps, attention, mlp, h_xd, None, None, None)
    tokens_bt = draw_probe_rows(dense)
    seen = record_run(dense, tokens_bt)
    sites = sites_of(dense)
    first = replace(seen, maps=[one for one in seen.maps if one.block <= 0])
    kinds = {(centred, eps): find_readings(first, sites, centred, eps) for centred in (False, True) for eps in EPSILONS}
    # take the norm that explains the most inputs; among equals, the one that explains them best
    centred, eps = max(kinds, key=lambda kind: (len(kinds[kind]), -sum(read.unexplained for read in kinds[kind])))
    found = find_readings(seen, sites, centred, eps)
    anatomy = Anatomy(centred, eps, {}, {}, *_embedding(dense, tokens_bt, seen.residuals[0]), *_unembedding(seen, found))
    for block, (each, window) in enumerate(zip(seen.blocks, _windows(dense, context), strict=True)):
        attn, mlp = sites[block][0], sites[block][-1]
        here = [read for read in found if read.map.block == block]
        writers = [one for one in seen.maps if one.block == block and one.output_xo.shape == seen.residuals[0].shape]
        write_a, write_m = (seen.residuals[at + 1] - seen.residuals[at] for at in (attn, mlp))
        attention = find_attention([read for read in here if read.site == attn], writers, each, window)
        neurons = find_mlp([read for read in here if read.site == mlp], writers)
        outs = [
            None if part is None else fit_output(part[1], write) for part, write in ((attention, write_a), (neurons, write_m))
        ]
        if attn == mlp and attention and neurons:
            factor, left = fit_factor(attention[1].output_xo + neurons[1].output_xo, write_a)
            outs = [OutputMap(part[1].affine * factor) if left < MAX_UNEXPLAINED else None for part in (attention, neurons)]
        if attention and outs[0]:
            anatomy.attention[attn] = replace(attention[0], out=outs[0])
        if neurons and outs[1]:
            anatomy.mlp[mlp] = replace(neurons[0], out=outs[1])
    _unify_frequencies(dense, anatomy)
    return anatomy


def _unify_frequencies(dense: DenseModel, anatomy: Anatomy) -> None:
    """Make nearly equal measured frequencies exactly equal: to a module's buffer, otherwise to the first block with them."""
    known = [x.flatten().double().cpu() for name, x in dense.model.named_buffers() if name.endswith("inv_freq")]
    for site, attention in anatomy.attention.items():
        mine = torch.tensor(attention.shape.frequencies, dtype=torch.float64)
        same = (each for each in known if each.shape == mine.shape and torch.allclose(mine, each, rtol=1e-4, atol=1e-5))
        if (named := next(same, None)) is None:
            known.append(mine)
        else:
            shape = attention.shape.model_copy(update={"frequencies": tuple(named.tolist())})
            anatomy.attention[site] = replace(attention, shape=shape)


def _embedding(dense: DenseModel, tokens_bt: Tensor, h_xd: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return (embedding_vd, position_td): both None if the residual at site 0 is not their sum; position_td None if it is 0."""

    def at_entry(some_bt: Tensor) -> Tensor:
        return dense.residuals(some_bt, 0)[0].float()

    table: Any = dense.model.get_input_embeddings()
    weight_ud = table.weight[: dense.vocabulary]
    known = len(weight_ud)
    every_v1 = torch.arange(known, device=dense.device)[:, None]
    embedding_vd = torch.cat([at_entry(some_v1)[:, 0] for some_v1 in every_v1.split(4096)])
    embedding_vd = F.pad(embedding_vd, (0, 0, 0, dense.vocabulary - known))
    row_1t = tokens_bt[:1, :1].expand(1, min(dense.context or tokens_bt.shape[1], 4096))
    position_td = at_entry(row_1t)[0] - embedding_vd[row_1t[0]]
    if weight_ud.shape[1] == embedding_vd.shape[1]:  # an offset shared by all tokens is counted as part of the positions
        weight_ud = weight_ud.to(dense.device, torch.float32)
        factor, _ = fit_factor(weight_ud - weight_ud.mean(0), embedding_vd[:known])
        offset_d = (embedding_vd[:known] - factor * weight_ud).mean(0)
        same = unexplained(factor * weight_ud + offset_d, embedding_vd[:known]) < MAX_UNEXPLAINED
        if same and offset_d.abs().max() > 1e-5 * embedding_vd.abs().max():
            embedding_vd = F.pad(factor * weight_ud, (0, 0, 0, dense.vocabulary - known))
            position_td = position_td + offset_d
    guess_btd = embedding_vd[tokens_bt] + position_td[: tokens_bt.shape[1]]
    if not unexplained(guess_btd.flatten(0, 1), h_xd) < MAX_UNEXPLAINED:
        return None, None
    still = position_td.abs().max() <= 1e-5 * embedding_vd.abs().max()
    return embedding_vd, None if bool(still) else position_td


def _unembedding(seen: RecordedRun, reads: Sequence[Reading]) -> tuple[Affine | None, float | None]:
    """Return (map, cap) from the normed last residual to the logits, any constant factor included; None for each not found."""
    for read in reads:
        if read.map.output_xo.shape == seen.logits_xv.shape and read.site == len(seen.residuals) - 1 and not read.raw:
            scale, cap, left = fit_soft_cap(read.map.output_xo.double().flatten(), seen.logits_xv.double().flatten())
            if left < MAX_UNEXPLAINED:
                return read.affine * scale, cap
    return None, None


def _windows(dense: DenseModel, context: int) -> list[int | None]:
    """Return, for each block, how many tokens the last query of a `context`-long row attends to; None if it attends to all."""
    tokens_1t, seen = draw_probe_rows(dense, 1, context), dict[int, int]()
    length = tokens_1t.shape[1]

    def softened(block: int, score: Tensor) -> None:
        seen[block] = int((score[..., -1, :] > MASKED_SCORE).flatten(0, -2)[0].sum())

    with ScoreWatcher(length, lambda *_: None, softened).watching(dense):
        forward(dense.model, tokens_1t)
    return [count if 0 < (count := seen.get(block, 0)) < length else None for block in range(len(dense.blocks))]

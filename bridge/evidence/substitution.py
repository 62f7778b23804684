"""Substitution of dense blocks by encoder, circuit and decoder, and the share of the dense model's d that is kept.

    h_b  <-  g_b(x_b),   x_a = f_a(h_a),   x_b is computed from x_a by the circuit alone (all other nodes at their means)

The circuit's errors are at their means too, because errors come from the run of the dense blocks that are replaced. K is the
fraction of d that is kept, a ratio of means over the prompts. Faithfulness is 1 - |1 - K|. It is compared with

    complement   all nodes except the circuit's
    matched      as many other active nodes of the same locations, alone and deleted
    all nodes    the ceiling: the answer that is left after encoding and decoding

Only the span of all blocks is judged. There nothing but the circuit computes, and the only other input of the answer is the
embedding, which circuit and complement share. A single block passes the stream around itself, so its complement keeps the results
of other blocks; single blocks are shown, but not judged.

Shape legend: b prompt, p some of the prompts, c circuit, k draw, t token, s sparse width, d dense width, f all nodes in one row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridge.evidence.bootstrap import bootstrap_interval
from bridge.evidence.carry import Transporter
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.residual import Enter

DELETED_DRAWS = 5  # number of matched draws that are also deleted
MIN_MEAN_D_NATS = 0.1  # nats, the mean over the prompts; shares of a smaller d mean nothing


def spans(sublayers: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """Return (first site, site after) of all blocks together, then of each block if there are several."""
    starts = [site for site, kind in enumerate(sublayers) if kind != "mlp"]
    ends = [*starts[1:], len(sublayers)]
    single = tuple(zip(starts, ends, strict=True))
    return ((0, len(sublayers)), *(single if len(single) > 1 else ()))


@torch.no_grad()
def substitute_span(transporter: Transporter, span: tuple[int, int], kept_f: Tensor) -> np.ndarray:
    """Return d_b of the dense model with a span replaced by the sparse model under a mask."""
    (first, after), masked, found = span, transporter.masked, []
    bridges, dense = transporter.coupling.bridges, transporter.dense.residuals
    for row_p in torch.arange(transporter.prompts).split(masked.rows_per_batch):
        gate, correct = masked.gates(kept_f.expand(len(row_p), -1), row_p)
        enter = Enter.at(first, bridges[first].encode(dense[first][row_p]))
        trace = masked.sparse.run(masked.question.prompt_bt[row_p], enter, gate, correct=correct, last_only=True)
        change_ptd = bridges[after].decode(trace.residuals[after]) - dense[after][row_p]
        lost_p = transporter.lost_by(row_p, torch.full_like(row_p, after), change_ptd)
        found.append(transporter.loss.model_b[row_p] - lost_p * transporter.loss.span)
    return torch.cat(found).double().cpu().numpy()


def kept_share(d_b: np.ndarray, dense_b: np.ndarray) -> float:
    """Return the fraction of d that is kept, a ratio of sums, because the d of a single prompt may be almost 0."""
    return float(d_b.sum() / dense_b.sum())


def faithfulness(share: np.ndarray | list[float] | float) -> np.ndarray:
    """Return 1 - |1 - share|."""
    return 1 - np.abs(1 - np.asarray(share))


def substitution_measures(
    transporter: Transporter, kept_f: Tensor, matched_cf: Tensor, least: float, of_others: float, seed: int
) -> tuple[Measure, ...]:
    """Return measures of the circuit (at least `least`), and of matched nodes and its complement (at most `of_others`)."""
    kept_f = kept_f & transporter.loss.nodes_f
    keys, criteria = ("substitution", "complement"), (Criterion(">=", least, control_bound=of_others), Criterion("<=", of_others))
    names = "faithfulness of the circuit in place of the blocks", "fraction of d that the circuit's complement keeps there"
    dense_b = transporter.loss.model_b.double().cpu().numpy()
    if abs(dense_b.mean()) < MIN_MEAN_D_NATS or not bool(kept_f.any()):
        small = f"the dense model's d is {dense_b.mean():.3f} nats on average, too little to measure a share of"
        note = small if bool(kept_f.any()) else "the circuit is empty"
        return tuple(Measure(*row, note=note) for row in zip(keys, names, (None, None), criteria, strict=True))
    whole, *single = spans(transporter.coupling.dense.sublayers)
    every_f, rest_f = transporter.loss.nodes_f, transporter.loss.complement(kept_f)
    points, kept_b, rest_b = [], dense_b, dense_b
    for span in (*single, whole):
        kept_b, rest_b, every_b = (substitute_span(transporter, span, mask_f) for mask_f in (kept_f, rest_f, every_f))
        values = {"circuit": kept_b, "complement": rest_b, "all nodes": every_b}
        label = "all blocks" if span == whole else f"sites {span[0]} to {span[1]}"
        points.append(Point(label, {name: kept_share(d_b, dense_b) for name, d_b in values.items()}))
    complement_cf = transporter.loss.complement(matched_cf[:DELETED_DRAWS])
    shares = [kept_share(substitute_span(transporter, whole, mask_f), dense_b) for mask_f in (*matched_cf, *complement_cf)]
    alone, without = faithfulness(shares[: len(matched_cf)]).tolist(), shares[len(matched_cf) :]
    kept, rest = ((lambda pick_kb, d_b=d_b: d_b[pick_kb].sum(1) / dense_b[pick_kb].sum(1)) for d_b in (kept_b, rest_b))
    share = kept_share(kept_b, dense_b)
    return (
        Measure(
            keys[0], names[0], float(faithfulness(share)), criteria[0], Control.of("matched", alone, max, "best"),
            bootstrap_interval(lambda pick_kb: faithfulness(kept(pick_kb)), len(kept_b), seed),
            float(faithfulness(points[-1].values["all nodes"])), f"keeps {share:.3f} of d", tuple(points),
        ),
        Measure(
            keys[1], names[1], kept_share(rest_b, dense_b), criteria[1],
            Control.of("matched deleted", without, min, "lowest"), bootstrap_interval(rest, len(rest_b), seed),
        ),
    )  # fmt: skip

"""Substitution: dense blocks a..b give way to  encode, circuit, decode,  and the dense model's answer is kept.

    h_b  <-  g_b(x_b),   x_a = f_a(h_a),   x_b what the circuit alone makes of it (all other nodes at their means)

Its errors are at their means as well: they are taken from the run of the dense blocks that are replaced.

With K the share that is kept of d, the mean over the prompts, faithfulness is 1 - |1 - K|. Beside it

    complement   all nodes but the circuit's
    matched      other active nodes of the same locations, as many; alone, and deleted
    all nodes    the ceiling: what the bridges' way there and back leaves

Judged on the span of all blocks, where nothing but the circuit computes, with the embedding, which both share, as its only other
input. A single block passes the stream around itself, so that its complement keeps what other blocks have found: single blocks
are shown, not judged.

Shape legend: b prompt, p some of the prompts, c circuit, k draw, t token, s sparse width, d dense width, f all nodes in one row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bridge.evidence.bootstrap import interval
from bridge.evidence.carry import Transporter
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.residual import Enter

DELETED = 5  # matched draws, that are deleted as well
LEAST = 0.1  # nats, on average; shares of less than that mean nothing


def spans(sublayers: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """(first site, site after) of all blocks together, and then of each."""
    starts = [site for site, kind in enumerate(sublayers) if kind != "mlp"]
    ends = [*starts[1:], len(sublayers)]
    single = tuple(zip(starts, ends, strict=True))
    return ((0, len(sublayers)), *(single if len(single) > 1 else ()))


@torch.no_grad()
def substituted(transporter: Transporter, span: tuple[int, int], kept_f: Tensor) -> np.ndarray:
    """d_b of the dense model with a span replaced by the sparse model under a mask."""
    (first, after), masked, found = span, transporter.masked, []
    bridges, dense = transporter.coupling.bridges, transporter.dense.residuals
    for row_p in torch.arange(transporter.prompts).split(masked.rows):
        gate, correct = masked.gates(kept_f.expand(len(row_p), -1), row_p)
        enter = Enter.at(first, bridges[first].encode(dense[first][row_p]))
        trace = masked.sparse.run(masked.question.prompt_bt[row_p], enter, gate, correct=correct, last_only=True)
        change_ptd = bridges[after].decode(trace.residuals[after]) - dense[after][row_p]
        lost_p = transporter.lost_by(row_p, torch.full_like(row_p, after), change_ptd)
        found.append(transporter.loss.model_b[row_p] - lost_p * transporter.loss.span)
    return torch.cat(found).double().cpu().numpy()


def kept_share(d_b: np.ndarray, dense_b: np.ndarray) -> float:
    """The fraction of d that is kept, as a ratio of sums: a single prompt may have hardly any."""
    return float(d_b.sum() / dense_b.sum())


def faithfulness(share: np.ndarray | list[float] | float) -> np.ndarray:
    """1 - |1 - share|."""
    return 1 - np.abs(1 - np.asarray(share))


def substitution_measures(
    transporter: Transporter, kept_f: Tensor, matched_cf: Tensor, least: float, of_others: float, seed: int
) -> tuple[Measure, ...]:
    """Measures of what the circuit keeps (at least `least`), and matched nodes and its complement (at most `of_others`)."""
    kept_f = kept_f & transporter.loss.nodes_f
    keys, criteria = ("substitution", "complement"), (Criterion(">=", least, control_bound=of_others), Criterion("<=", of_others))
    names = "faithfulness of the circuit in place of the blocks", "fraction of d that its complement keeps there"
    dense_b = transporter.loss.model_b.double().cpu().numpy()
    if abs(dense_b.mean()) < LEAST or not bool(kept_f.any()):
        small = f"the dense model's d is {dense_b.mean():.3f} nats on average: too little to keep"
        note = small if bool(kept_f.any()) else "the circuit is empty"
        return tuple(Measure(*row, note=note) for row in zip(keys, names, (None, None), criteria, strict=True))
    whole, *single = spans(transporter.coupling.dense.sublayers)
    every_f, rest_f = transporter.loss.nodes_f, transporter.loss.complement(kept_f)
    points, kept_b, rest_b = [], dense_b, dense_b
    for span in (*single, whole):
        kept_b, rest_b, every_b = (substituted(transporter, span, mask_f) for mask_f in (kept_f, rest_f, every_f))
        values = {"circuit": kept_b, "complement": rest_b, "all nodes": every_b}
        label = "all blocks" if span == whole else f"sites {span[0]} to {span[1]}"
        points.append(Point(label, {name: kept_share(d_b, dense_b) for name, d_b in values.items()}))
    complement_cf = transporter.loss.complement(matched_cf[:DELETED])
    shares = [kept_share(substituted(transporter, whole, mask_f), dense_b) for mask_f in (*matched_cf, *complement_cf)]
    alone, without = faithfulness(shares[: len(matched_cf)]).tolist(), shares[len(matched_cf) :]
    kept, rest = ((lambda pick_kb, d_b=d_b: d_b[pick_kb].sum(1) / dense_b[pick_kb].sum(1)) for d_b in (kept_b, rest_b))
    share = kept_share(kept_b, dense_b)
    return (
        Measure(
            keys[0], names[0], float(faithfulness(share)), criteria[0], Control.of("matched", alone, max, "best"),
            interval(lambda pick_kb: faithfulness(kept(pick_kb)), len(kept_b), seed),
            float(faithfulness(points[-1].values["all nodes"])), f"keeps {share:.3f} of d", tuple(points),
        ),
        Measure(
            keys[1], names[1], kept_share(rest_b, dense_b), criteria[1],
            Control.of("matched deleted", without, min, "lowest"), interval(rest, len(rest_b), seed),
        ),
    )  # fmt: skip

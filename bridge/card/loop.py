"""The circuit in the loop: dense blocks a..b give way to  encode, circuit, decode,  and the dense model's answer is kept.

    h_b  <-  g_b(x_b),   x_a = f_a(h_a),   x_b what the circuit alone makes of it (all other nodes at their corpus means)

    circuit      keeps at least .8 of the mean logit difference D of the dense model, and at most 1.25
    complement   all nodes but the circuit's: keeps at most .3
    random       circuits with as many nodes at each location, of those that are on: at most .3 on average
    ceiling      the whole sparse model on the span: what the bridges' way there and back leaves

Judged on the span of all blocks, where nothing but the circuit computes; with the embedding, which both share, as its only other
input. A single block passes the stream around itself, so that its complement keeps what other blocks have found: single blocks
are told, not judged. The circuit runs with its edges, where they were pruned; the others with all edges.

Shape legend: b pair (row), t token, s sparse width, d dense width, f all nodes in one row, c circuit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from bridge.card.card import CardMeasure, Point
from bridge.card.case import Case, numbers, share, share_interval
from bridge.evidence.controls import random_circuits
from bridge.residual import Enter
from bridge.sparse import Gate, SparseTransformer, identity_gate
from bridge.validate import Control, average, control_of

KEPT, MOST, LEFT = 0.8, 1.25, 0.3
RANDOM = 40  # what one keeps varies by .05 to .15 of D, so that the mean of ten was off by .05
DELETED = 5  # random deletions
LEAST = 0.1  # logits, on average; shares of less than that mean nothing


def spans(sublayers: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """(first site, site after) of all blocks together, and then of each."""
    starts = [site for site, kind in enumerate(sublayers) if kind != "mlp"]
    ends = [*starts[1:], len(sublayers)]
    single = tuple(zip(starts, ends, strict=True))
    return ((0, len(sublayers)), *(single if len(single) > 1 else ()))


@torch.no_grad()
def in_loop(case: Case, span: tuple[int, int], sparse: SparseTransformer, gate: Gate = identity_gate) -> np.ndarray:
    """D_b of the dense model with a span replaced by the sparse model under a gate."""
    first, after = span
    entering_bts = case.coupling.bridges[first].encode(case.dense.residuals[first])
    trace = sparse.run(case.pairs.prompt_bt, Enter.at(first, entering_bts), gate, last_only=True)
    return numbers(case.entered(after, case.coupling.bridges[after].decode(trace.residuals[after])))


@torch.no_grad()
def loop_measures(case: Case, seed: int = 0, progress: Callable[[str], None] = lambda _: None) -> tuple[CardMeasure, ...]:
    """The test's measures: what the circuit keeps, and what its complement does."""
    names = "D kept in the loop", "D its complement keeps"
    aims = f"{KEPT:g} to {MOST:g}, random <= {LEFT:g}", f"<= {LEFT:g}"
    answer_b = numbers(case.answer_b)
    if abs(answer_b.mean()) < LEAST:
        note = f"the dense model's D is {answer_b.mean():.3f} logits on average: too little to keep"
        return tuple(CardMeasure(name, None, None, aim, None, note, test="loop") for name, aim in zip(names, aims, strict=True))
    generator = torch.Generator().manual_seed(seed + 3_000_017)
    kept_f = case.kept_f
    sparse = case.coupling.sparse
    whole, *single = spans(case.coupling.dense.sublayers)
    points, kept_b, rest_b, every_b = [], answer_b, answer_b, answer_b
    for span in (*single, whole):
        progress(f"in the loop: sites {span[0]} to {span[1]}")
        kept_b = in_loop(case, span, case.alone.sparse, case.gate(kept_f))
        rest_b = in_loop(case, span, sparse, case.gate(~kept_f))
        every_b = in_loop(case, span, sparse)
        values = {"circuit": kept_b, "complement": rest_b, "all nodes": every_b}
        label = "all blocks" if span == whole else f"sites {span[0]} to {span[1]}"
        points.append(Point(label, {name: share(difference_b, answer_b) for name, difference_b in values.items()}))
    progress(f"in the loop: {RANDOM} random circuits")
    on_f = case.on_f
    random, without = (
        [share(in_loop(case, whole, sparse, case.gate(mask(other_f))), answer_b) for other_f in drawn_cf]
        for mask, drawn_cf in (
            (lambda other_f: other_f, random_circuits(case.space, kept_f, on_f | kept_f, generator, RANDOM)),
            (lambda other_f: ~other_f, random_circuits(case.space, kept_f, on_f & ~kept_f, generator, DELETED)),
        )
    )
    most = share(every_b, answer_b)
    ceiling = Control("all nodes", 1, most, most, "it")
    kept, rest = share(kept_b, answer_b), share(rest_b, answer_b)
    told = "; ".join(f"{point.label} {point.values['circuit']:.2f}" for point in points[:-1])
    return (
        _measure(names[0], kept, control_of("random", random, max, "best"), aims[0],
                 KEPT <= kept <= MOST and average(random) <= LEFT,
                 f"alone: {told}" if told else "", share_interval(kept_b, answer_b, seed), ceiling, tuple(points)),
        # as many nodes outside the circuit may not be there to be deleted; the whole span is a control then
        _measure(names[1], rest, control_of("random deleted", without, min, "lowest") or ceiling, aims[1], rest <= LEFT,
                 "", share_interval(rest_b, answer_b, seed), None, ()),
    )  # fmt: skip


def _measure(
    name: str,
    value: float,
    control: Control | None,
    aim: str,
    passed: bool,
    note: str,
    bounds: tuple[float, float] | None,
    ceiling: Control | None,
    points: tuple[Point, ...],
) -> CardMeasure:
    if control is None:
        note = "; ".join(part for part in ("the circuit is empty", note) if part)
        return CardMeasure(name, value, None, aim, None, note, "loop", bounds, ceiling, points)
    return CardMeasure(name, value, control, aim, passed, note, "loop", bounds, ceiling, points)

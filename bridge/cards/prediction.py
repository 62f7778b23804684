"""Blind prediction: the circuit alone, in the sparse model, predicts the dense model's answers on prompts not seen before.

On stress prompts (`data.task_stress`) the logit difference d of the circuit alone, with errors at their means, is compared
directly with that of the dense model: nothing is fitted to the dense model or taken from its run. The prediction is not told
which answer is right: for both members of a pair d compares the same two answers, in the same order.

    R^2          1 - sum (d_dense - d_C)^2 / sum (d_dense - mean d_dense)^2; above 0, and above a bigram's, with the intervals
                 of R^2 itself and of the difference
    correlation  of d_C and d_dense over prompts, with d signed so that the right answer comes first. It measures what is
                 predicted beyond which answer is given; it is shown, not judged
    signs        share of prompts on which both prefer the same answer; at least .9, and at least a bigram's
    mistakes     share of the dense model's mistakes that the circuit makes too; above a half, and above the circuit's share of
                 mistakes where the dense model is right; left out if there are fewer than ten
    ceiling      the whole sparse model in the circuit's place
    bigram       the dense model's own mean logits over held-out text after the prompt's last token (if the text does not have
                 that token, the dense model's logits after the token alone)

Intervals are over the held-out pairs that stress prompts were made from: all prompts made from one pair are drawn together.

Shape legend: b stress pair (row; in `_predict_pairs` a prompt), v vocabulary, k draw (in `bigram_logits` a distinct last token).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bridge.cards.task_circuit import TaskCircuit
from bridge.data.task_stress import Stress
from bridge.data.task_tokens import TokenPairs
from bridge.evidence.bootstrap import ClusterBootstrap
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.models.bridges import CoupledModels
from bridge.models.dense import DenseModel

LEAST_PROMPTS, LEAST_MISTAKES = 200, 10
BIGRAM_ROWS = 128
NAMES: Mapping[str, str] = {
    "prediction": "R^2 on unseen prompts",
    "prediction_margin": "R^2 beyond a bigram's, lower end of 95%",
    "signs": "sign agreement on unseen prompts",
}
_ORDER = np.array([1.0, -1.0])  # signs that give both members of a pair d of the same two answers in the same order


@dataclass(frozen=True, eq=False)
class Predicted:
    """d_b2 of both members of stress pairs, right answer against wrong one, from each of four sources."""

    dense: np.ndarray
    circuit: np.ndarray
    whole: np.ndarray
    bigram: np.ndarray


@torch.no_grad()
def prediction_measures(
    coupling: CoupledModels, circuit: TaskCircuit, stress: Mapping[str, Stress], reference_bt: Tensor, agreement: float, seed: int
) -> tuple[Measure, ...]:
    """The measures of prediction; each kind of stress is a point of the first one, and mistakes are left out if there are few.

    reference_bt is text for the bigram baseline, agreement the required share of signs.
    """
    prompts = sum(2 * len(some) for some in stress.values())
    if prompts < LEAST_PROMPTS:
        note = f"only {prompts} stress prompts could be made from this task's pairs; {LEAST_PROMPTS} are needed"
        asked = Criterion(">=", 0.0), Criterion(">=", 0.0), Criterion(">=", agreement)
        return tuple(Measure(key, name, None, each, note=note) for (key, name), each in zip(NAMES.items(), asked, strict=True))
    device = coupling.dense.device
    found = {kind: _predict_pairs(coupling, circuit, some.pairs.to(device), reference_bt) for kind, some in stress.items()}
    draws = ClusterBootstrap(np.concatenate([some.source_b.numpy() for some in stress.values()]), seed)
    every = Predicted(*(np.concatenate([getattr(each, name) for each in found.values()]) for name in Predicted.__annotations__))
    points = tuple(
        Point(kind, {"prompts": float(each.dense.size), "R^2": _r2(each.dense * _ORDER, each.circuit * _ORDER),
                     "correlation": _correlation(each.dense, each.circuit),
                     "sign agreement": _sign_agreement(each.dense, each.circuit), "dense right": float(np.mean(each.dense > 0))})
        for kind, each in found.items()
    )  # fmt: skip
    mistakes = int((every.dense <= 0).sum())
    few = mistakes < LEAST_MISTAKES or mistakes == every.dense.size
    note = f"the dense model makes {mistakes} mistakes in {every.dense.size} prompts" + (": too few to predict" if few else "")
    measures = (*variance_measures(every, points, draws), sign_measure(every, agreement, note, draws))
    return measures if few else (*measures, predicted_mistakes(every, draws))


def _predict_pairs(coupling: CoupledModels, circuit: TaskCircuit, pairs: TokenPairs, reference_bt: Tensor) -> Predicted:
    both, dense = pairs.both_members(), coupling.dense
    order_b, rows = both.last_b.argsort(stable=True), []
    for row_b in order_b.split(32):
        some = both.rows(row_b)
        masked = circuit.masked(coupling, some)
        kept_f = circuit.kept_f(masked.space, dense.device) & ~masked.is_error_f  # errors are known only from the dense run
        logits = [some.logits_at_last(dense.run(some.prompt_bt).logits_btv)]
        logits += [masked.logits(mask_f.expand(len(some), -1)) for mask_f in (kept_f, ~masked.is_error_f)]
        rows.append(torch.stack([some.difference(logits_bv) for logits_bv in logits]))
    known_3b = torch.cat(rows, 1)[:, torch.argsort(order_b)]
    bigram_1b = both.difference(bigram_logits(dense, both, reference_bt))[None]
    return Predicted(*(d_b.reshape(2, -1).T for d_b in torch.cat([known_3b, bigram_1b]).double().cpu().numpy()))


def bigram_logits(dense: DenseModel, pairs: TokenPairs, reference_bt: Tensor) -> Tensor:
    """logits_bv: the dense model's mean logits over text after each prompt's last token; after that token alone if unseen."""
    last_b = pairs.prompt_bt.gather(1, pairs.last_b[:, None])[:, 0]
    token_k, of_b = last_b.unique(return_inverse=True)
    alone_kv = dense.run(token_k[:, None]).logits_btv[:, 0].float()
    sum_kv, count_k = torch.zeros_like(alone_kv), torch.zeros(len(token_k), device=token_k.device)
    for rows_bt in reference_bt[:BIGRAM_ROWS].to(token_k.device).split(16):
        place_bt = torch.searchsorted(token_k, rows_bt).clamp(max=len(token_k) - 1)
        here_bt = token_k[place_bt] == rows_bt
        if bool(here_bt.any()):
            logits_iv = dense.run(rows_bt).logits_btv.float()[here_bt]
            sum_kv.index_add_(0, place_bt[here_bt], logits_iv)
            count_k += torch.bincount(place_bt[here_bt], minlength=len(token_k))
    mean_kv = torch.where(count_k[:, None] > 0, sum_kv / count_k[:, None].clamp(min=1), alone_kv)
    return mean_kv[of_b]


def _r2(dense: np.ndarray, other: np.ndarray) -> float:
    return float(1 - np.sum((dense - other) ** 2) / max(np.sum((dense - dense.mean()) ** 2), 1e-12))


def _correlation(dense: np.ndarray, other: np.ndarray) -> float:
    deviation, of_other = (x - x.mean() for x in (dense, other))
    return float((deviation * of_other).sum() / max(np.sqrt((deviation**2).sum() * (of_other**2).sum()), 1e-12))


def _sign_agreement(dense: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((dense > 0) == (other > 0)))


def variance_measures(found: Predicted, points: tuple[Point, ...], draws: ClusterBootstrap) -> tuple[Measure, Measure]:
    """R^2 of the circuit's prediction, and the lower of two interval ends: that of R^2, and that of R^2 minus a bigram's."""
    dense_b2, circuit_b2, whole_b2, bigram_b2 = (
        x_b2 * _ORDER for x_b2 in (found.dense, found.circuit, found.whole, found.bigram)
    )

    def r2(weight_kb: np.ndarray, other_b2: np.ndarray) -> np.ndarray:
        mean_k = weight_kb @ dense_b2.mean(1) / weight_kb.sum(1)
        deviation_k = weight_kb @ (dense_b2**2).sum(1) - 2 * weight_kb.sum(1) * mean_k**2
        return 1 - weight_kb @ ((dense_b2 - other_b2) ** 2).sum(1) / deviation_k

    value, most, bigram = (_r2(dense_b2, x_b2) for x_b2 in (circuit_b2, whole_b2, bigram_b2))
    better = draws.interval(lambda weight_kb: r2(weight_kb, circuit_b2) - r2(weight_kb, bigram_b2))
    bounds = draws.interval(lambda weight_kb: r2(weight_kb, circuit_b2))
    least = None if bounds is None or better is None else min(bounds[0], better[0])
    kinds = ", ".join(f"{point.label} {point.values['R^2']:.2f}" for point in points)
    correlation = _correlation(found.dense, found.circuit)
    note = f"{dense_b2.size} prompts: {kinds}; correlation with the right answer first {correlation:.2f}"
    (key, name), (margin, margin_name), _ = NAMES.items()
    control, above = Control("bigram", 1, bigram, bigram, "it"), Criterion(">=", 0.0, True)
    return (
        Measure(key, name, value, above, control, bounds, most, note, points),
        Measure(margin, margin_name, least, Criterion(">=", 0.0), note="the lower end for R^2 itself, if that is smaller"),
    )


def sign_measure(found: Predicted, agreement: float, note: str, draws: ClusterBootstrap) -> Measure:
    """Share of the prompts on which the circuit and the dense model prefer the same answer."""
    value, most, bigram = (_sign_agreement(found.dense, x_b2) for x_b2 in (found.circuit, found.whole, found.bigram))
    same_b = ((found.dense > 0) == (found.circuit > 0)).mean(1)
    bounds = draws.interval(lambda weight_kb: weight_kb @ same_b / weight_kb.sum(1))
    criterion, control = Criterion(">=", agreement, control_bound=value), Control("bigram", 1, bigram, bigram, "it")
    return Measure("signs", NAMES["signs"], value, criterion, control, bounds, most, note)


def predicted_mistakes(found: Predicted, draws: ClusterBootstrap) -> Measure:
    """Share of the dense model's mistakes that the circuit makes too, beside its mistakes where the dense model is right."""
    wrong_b2 = found.dense <= 0
    value, most = (float(np.mean(x_b2[wrong_b2] <= 0)) for x_b2 in (found.circuit, found.whole))
    alarms = float(np.mean(found.circuit[~wrong_b2] <= 0))
    hits_b, wrongs_b = ((found.circuit <= 0) & wrong_b2).sum(1), wrong_b2.sum(1)
    bounds = draws.interval(lambda weight_kb: weight_kb @ hits_b / (weight_kb @ wrongs_b))
    control = Control("false alarms", int((~wrong_b2).sum()), alarms, alarms, "it")
    note = f"{int(wrong_b2.sum())} mistakes of the dense model"
    return Measure("mistakes", "dense mistakes predicted", value, Criterion(">=", 0.5, True), control, bounds, most, note)

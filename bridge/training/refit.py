"""Refit the decoders in closed form after training, so that small sparse changes have the same effect in the dense model.

The losses of the bridges measure how well residuals agree and what large changes do. A circuit consists of small changes:
deleting one node changes the answer by a thousandth, and a decoder that transports large changes well may rank such nodes
wrongly. To first order, a change dx of the sparse residual at a site changes a logit difference by g_x . dx in the sparse model
and by g_h . W dx in the dense model; g_x and g_h are the difference's gradients by the two residuals, and W is the decoder's
linear part. So W^T g_h should equal g_x:

    min_W   E (g_h^T (W - W_0) (x - E x))^2 / s   +   w  sum_c q_c E ((g_h^T W)_c - r g_x,c)^2 / q

over text and random logit differences (the dense model's likeliest answer at a token minus one of the next four, summed over
tokens with random signs). The first term is the cost for large changes, with gradients and residuals assumed independent. q_c is
one over the variance of a channel's gradient, so all channels count equally, but smaller if almost nothing is ever written to the
channel. s and q are the means over channels of the two weights. r keeps the decoder's norm about the same, because regression
on noisy values shrinks it. With A = E g_h g_h^T, C = E g_h g_x^T, S = cov x and P = A^(1/2) W the solution is

    P (S / s + w diag(q_c) / q) = P_0 S / s + w r A^(-1/2) C diag(q_c) / q

A decoder keeps its old weights if the refit costs too much: if the KL on held-out text of "sparse until the site, decoded, dense
to the end" rises by more than WORST times the sparse model's own KL, which can happen after short training or with few rows. The
last decoder of a span is not refitted: the sparse model's own answers go through it, so its gradients agree already. The bridges
of nulls are refitted by the same method. None of this is in the paper.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary, k answers.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.models.bridges import Bridge, CoupledModels
from bridge.models.circuit import kl
from bridge.models.dense import DenseModel
from bridge.models.residual import Enter
from bridge.models.sparse import SparseTransformer

ANSWERS = 5  # number of the dense model's likeliest answers; a difference takes the first and one other
ROWS_AT_ONCE = 8
HELDOUT_ROWS = 32
WORST = 0.2  # largest rise of the KL, relative to the sparse model's own KL
MOST_BYTES = 1 << 30  # maximum size of the sums in memory at a time
RIDGE, FLOOR, KEEP = 1e-3, 1e-3, 1e-4  # relative to the mean: added to A, to the variance of a channel's effect, and to S


def refit_decoders(
    coupling: CoupledModels, tokens_bt: Tensor, heldout_bt: Tensor, weight: float, progress: OnProgress = ignore_progress
) -> None:
    """Refit the decoders in place to gradients over tokens_bt; `weight` is w in the module's formula, 0 means no refit.

    A decoder that becomes much worse on held-out text keeps its old weights.
    """
    if not weight:
        return
    dense, sparse, device = coupling.dense, coupling.sparse, coupling.dense.device
    refitted = [site for site in range(coupling.n_sites) if (site, "decoder") not in coupling.ends]
    heldout_bt = heldout_bt[:HELDOUT_ROWS].to(device)
    before = [copy.deepcopy(coupling.bridges[site].decoder) for site in refitted]
    *kl_before, kl_own = kl_out(coupling, refitted, heldout_bt)
    d, s = dense.width, sparse.width
    together = max(1, MOST_BYTES // (8 * (d * d + d * s + s * s)))
    for first in range(0, len(refitted), together):  # wide models need several passes over the text, with some sites in each
        sites = refitted[first : first + together]
        moments = {site: _Moments(d, s) for site in sites}
        generator = torch.Generator().manual_seed(0)
        done = 0
        for rows_bt in tokens_bt.to(device).split(ROWS_AT_ONCE):
            with torch.no_grad():
                question = AnswerContrast.draw(dense.run(rows_bt).logits_btv, generator)
            gradient_h, _ = residual_gradients(dense, rows_bt, question)
            gradient_x, x = residual_gradients(sparse, rows_bt, question)
            for site, sums in moments.items():
                sums.add(gradient_h[site], gradient_x[site], x[site], x[site] - x[site - 1] if site else x[site])
            done += len(rows_bt)
            progress(Phase(f"gradients of decoders {sites[0]} to {sites[-1]}", done, len(tokens_bt)))
        with torch.no_grad():
            for site, sums in moments.items():
                sums.refit(coupling.bridges[site], weight)
    *kl_after, _ = kl_out(coupling, refitted, heldout_bt)
    for site, decoder, was, now in zip(refitted, before, kl_before, kl_after, strict=True):
        if not now - was <= WORST * kl_own:
            coupling.bridges[site].decoder.load_state_dict(decoder.state_dict())


@torch.no_grad()
def kl_out(coupling: CoupledModels, sites: Sequence[int], tokens_bt: Tensor) -> list[float]:
    """Return KL in nats per token from the dense model's answers to the hybrid's (sparse to dense) at each site.

    The last value is the KL of the sparse model alone.
    """
    totals = torch.zeros(len(sites) + 1, dtype=torch.float64)
    for rows_bt in tokens_bt.split(ROWS_AT_ONCE):
        truth_btv, sparse = coupling.dense.run(rows_bt).logits_btv.float(), coupling.sparse.run(rows_bt)
        answers = (*(coupling.sparse_to_dense(rows_bt, sparse.residuals, site) for site in sites), sparse.logits_btv)
        totals += torch.tensor([float(kl(truth_btv, logits_btv.float()).double().sum()) for logits_btv in answers])
    return (totals / tokens_bt.numel()).tolist()


@dataclass(frozen=True, eq=False)
class AnswerContrast:
    """A sum over tokens, with random signs, of logit differences between two of the dense model's likeliest answers."""

    answers_btk: Tensor
    sign_bt: Tensor

    @staticmethod
    def draw(logits_btv: Tensor, generator: torch.Generator) -> AnswerContrast:
        """Draw a question for each row: at each token, the likeliest answer against one drawn from the next likeliest."""
        best_btk = logits_btv.topk(min(ANSWERS, logits_btv.shape[-1])).indices
        shape = (*best_btk.shape[:2], 1)
        other_bt1 = torch.randint(1, best_btk.shape[-1], shape, generator=generator).to(best_btk.device)
        sign_bt = (torch.randint(2, shape[:2], generator=generator) * 2 - 1).to(best_btk.device)
        return AnswerContrast(torch.cat([best_btk[..., :1], best_btk.gather(-1, other_bt1)], -1), sign_bt)

    def difference(self, logits_btv: Tensor) -> Tensor:
        """Return the sum over tokens and rows, a scalar; no row's gradient depends on other rows."""
        answer_bt, other_bt = logits_btv.gather(-1, self.answers_btk).float().unbind(-1)
        return (self.sign_bt * (answer_bt - other_bt)).sum()


def residual_gradients(
    model: DenseModel | SparseTransformer, tokens_bt: Tensor, question: AnswerContrast
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradient of the question's difference by the residual at each site of a model, and the residuals."""
    with torch.no_grad():
        first_btd = model.run(tokens_bt).residuals[0]
    with torch.enable_grad():
        trace = model.run(tokens_bt, Enter.at(0, first_btd.detach().clone().requires_grad_(True)))
        found = torch.autograd.grad(question.difference(trace.logits_btv), trace.residuals)
    if isinstance(model, DenseModel):
        found = map(model.leaves, found)
    return list(found), [x_btd.detach() for x_btd in trace.residuals]


class _Moments:
    """Sums over tokens at a site, in float64: gradients in both models, the sparse residual, and the writes to it."""

    def __init__(self, d: int, s: int) -> None:
        self.count = 0
        shapes = ((d, d), (d, s), (s, s))
        self.gradients_dd, self.cross_ds, self.x_ss = (torch.zeros(shape, dtype=torch.float64) for shape in shapes)
        self.gradient_s, self.mean_s, self.written_s, self.written_mean_s = torch.zeros(4, s, dtype=torch.float64)

    def add(self, gradient_btd: Tensor, gradient_bts: Tensor, x_bts: Tensor, written_bts: Tensor) -> None:
        gradient_nd, gradient_ns, x_ns, written_ns = (
            some.detach().flatten(0, 1).cpu().double() for some in (gradient_btd, gradient_bts, x_bts, written_bts)
        )
        self.count += len(x_ns)
        self.gradients_dd += gradient_nd.T @ gradient_nd
        self.cross_ds += gradient_nd.T @ gradient_ns
        self.gradient_s += gradient_ns.square().sum(0)
        self.x_ss += x_ns.T @ x_ns
        self.mean_s += x_ns.sum(0)
        self.written_s += written_ns.square().sum(0)
        self.written_mean_s += written_ns.sum(0)

    def refit(self, bridge: Bridge, weight: float) -> None:
        n = self.count  # the sums are on the CPU in float64, on whatever device the bridge is
        a_dd, cross_ds = self.gradients_dd / n, self.cross_ds / n
        mean_s = self.mean_s / n
        s_ss = self.x_ss / n - torch.outer(mean_s, mean_s)
        written_s = (self.written_s / n - (self.written_mean_s / n).square()).clamp_min(0)
        strength = a_dd.diagonal().mean()
        if not (strength > 0 and cross_ds.norm() > 0 and s_ss.diagonal().mean() > 0):
            return  # no answer depends on this site, or nothing varies at it
        values_d, vectors_dd = torch.linalg.eigh(a_dd + RIDGE * strength * torch.eye(len(a_dd), dtype=a_dd.dtype))
        root_dd = vectors_dd * values_d.sqrt() @ vectors_dd.T
        inverse_dd = vectors_dd * values_d.rsqrt() @ vectors_dd.T
        scale = bridge.scale.detach().cpu().double()
        before_ds = root_dd @ (bridge.decoder.weight.detach().cpu().double() * scale)
        by_gradients_ds = inverse_dd @ cross_ds
        by_gradients_ds = by_gradients_ds * (before_ds.norm() / by_gradients_ds.norm())
        effect_s = written_s * self.gradient_s / n
        count_s = written_s / (effect_s + FLOOR * effect_s.mean()).clamp_min(1e-30)
        count_s = weight * count_s / count_s.mean().clamp_min(1e-30)
        s_ss = s_ss / s_ss.diagonal().mean() + KEEP * torch.eye(len(s_ss), dtype=s_ss.dtype)  # keep weights of constant channels
        after_ds = torch.linalg.solve(s_ss + torch.diag(count_s), (before_ds @ s_ss + by_gradients_ds * count_s).T).T
        change_ds = inverse_dd @ (after_ds - before_ds) / scale
        if bool(torch.isfinite(change_ds).all()):
            bridge.decoder.weight.add_(change_ds.to(bridge.decoder.weight))
            bridge.decoder.bias.sub_((change_ds @ mean_s).to(bridge.decoder.bias))  # the mean is decoded as before

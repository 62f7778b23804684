"""Transport of a change from the sparse model into the dense model at every site, and the loss of d that it causes in both.

R is the reference run: every node is kept, and errors are at their means, except the circuit's errors. R' is a run of the sparse
model in which something was changed. At each site j:

    change     x_j(R') - x_j(R)                    change of the sparse residual, at every position
    dense      h_j + lin g_j(change)               entering the dense model at j: d falls by `dense_lost`
    sparse     x_j(R) + change                     entering the sparse model at j, with R's masks from there on: `sparse_lost`

The two losses differ only in the model that runs from site j on, so the dense loss is compared with the sparse loss. At late
sites both are small if the answer has been read before the site, or both are large if the answer is all that is read after it.

If a question has several prompts (a task), each prompt is measured. Losses are shares of the same span (that of all prompts), so
the total share is their mean. After the last attention only the last position can change the answer. Therefore, if all prompts
end at the last position, only the last position's residual is kept there.

Shape legend: r masked copy of a prompt, b prompt, p some of the prompts, c circuit or mask, k transported change, j site, t token
(only one after the last attention), s sparse width, d dense width, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import pad

from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter, Trace
from bridge.models.transport import decode_changes

_MAX_BATCH_LOGITS, _MAX_BATCH_ROWS = 2**23, 256  # maxima for one batch of dense runs
_MIN_COPIES = 8  # minimum number of masked copies of a prompt in a batch; one of them is the reference

LossFunction = Callable[[Sequence[int], Sequence[int], Sequence[Tensor]], Tensor]  # (row_k, site_k, change_k) -> lost_k


class Transporter:
    """The dense and the sparse model on a question's prompts, with the reference run that changes are measured against.

    The reference run keeps every node, and the errors that belong to the circuit.
    """

    def __init__(self, coupling: CoupledModels, loss: CircuitLoss[MaskedModel], dense: Trace, circuit_f: Tensor) -> None:
        self.coupling, self.loss, self.masked, self.dense = coupling, loss, loss.masked, dense
        self.reference_f = loss.nodes_f | circuit_f
        self.sites, self.prompts = range(coupling.n_sites), len(loss.model_b)
        self.narrow = self.masked.question.is_unpadded  # after the last attention, residuals have only the last position

    @cached_property
    def reference(self) -> Trace:
        """Reference run of every prompt."""
        with torch.no_grad():
            runs = [
                self._run(self.reference_f[None], row_p) for row_p in torch.arange(self.prompts).split(self.masked.rows_per_batch)
            ]
        residuals = tuple(torch.cat(parts) for parts in zip(*(run.residuals for run in runs), strict=True))
        return Trace(torch.cat([run.logits_btv for run in runs]), residuals)

    @cached_property
    def _reference_d_b(self) -> Tensor:
        return self._d(self.reference, torch.arange(self.prompts))

    @torch.no_grad()
    def transport(self, kept_cf: Tensor, sites: Sequence[Sequence[int]], losses: Sequence[LossFunction]) -> tuple[Tensor, Tensor]:
        """Return lost_cb, the share of the span lost under each mask, and lost_mcjb, the share lost by its transported change.

        m indexes `losses` (`dense_lost`, `sparse_lost`), and every mask has the same number of sites. Changes are transported
        batch by batch and then dropped, because the changes of many nodes on many prompts would not fit into memory.
        """
        shape = len(kept_cf), len(sites[0]) if sites else 0, self.prompts
        lost_cb, lost_mcjb = (torch.zeros(size, device=kept_cf.device) for size in (shape[::2], (len(losses), *shape)))
        prompts = min(self.prompts, max(1, self.masked.rows_per_batch // _MIN_COPIES))
        masks = max(1, self.masked.rows_per_batch // prompts - 1)
        for row_p, place_c in product(torch.arange(self.prompts).split(prompts), torch.arange(len(kept_cf)).split(masks)):
            # the reference runs in the same batch, so rounding cancels for everything that does not change
            trace = self._run(torch.cat([self.reference_f[None], kept_cf[place_c]]), row_p)
            residuals = (x_rts.unflatten(0, (-1, len(row_p))) for x_rts in trace.residuals)
            changes = [x_cpts[1:] - x_cpts[:1] for x_cpts in residuals]
            d_cp = self._d(trace, row_p.repeat(1 + len(place_c))).view(-1, len(row_p))
            lost_cb[place_c[:, None], row_p] = (d_cp[:1] - d_cp[1:]) / self.loss.divisor
            places = [
                (c, site, p) for c, place in enumerate(place_c.tolist()) for site in sites[place] for p in range(len(row_p))
            ]
            row_k, site_k = [int(row_p[p]) for _, _, p in places], [site for _, site, _ in places]
            change_k = [changes[site][c, p] for c, site, p in places]
            for lost_cjb, lost in zip(lost_mcjb, losses, strict=True):
                found_cjp = lost(row_k, site_k, change_k).view(len(place_c), shape[1], len(row_p))
                lost_cjb[place_c[:, None, None], torch.arange(shape[1])[:, None], row_p] = found_cjp
        return lost_cb, lost_mcjb

    @torch.no_grad()
    def transport_deleted(self, sets: Sequence[Tensor], site_k: Sequence[int]) -> Tensor:
        """Return lost_2kb in the sparse and the dense model with each set of nodes ablated, transported at the set's site.

        With one prompt, the sparse model runs only from the sublayer of the set's first node on. The site must be after it.
        """
        if not self.narrow or self.prompts > 1:
            kept_kf = torch.stack([self.reference_f.index_fill(0, node_n, False) for node_n in sets])
            lost_kb, lost_1k1b = self.transport(kept_kf, [[site] for site in site_k], [self.dense_lost])
            return torch.stack([lost_kb, lost_1k1b[0, :, 0]])
        changes, lost_k = [torch.zeros(0)] * len(sets), torch.zeros(len(sets), device=self.reference_f.device)
        # the reference runs in the same batch, so rounding cancels for everything that does not change
        for some_k, trace in self.masked.runs_without(self.reference_f, sets, self.reference, with_reference=True):
            d_r = self._d(trace, torch.zeros(1 + len(some_k), dtype=torch.long))
            lost_k[some_k] = (d_r[0] - d_r[1:]) / self.loss.divisor
            for row, k in enumerate(some_k.tolist(), 1):
                x_rts = trace.residuals[site_k[k]]
                changes[k] = x_rts[row] - x_rts[0]
        return torch.stack([lost_k, self.dense_lost([0] * len(sets), site_k, changes)])[..., None]

    @torch.no_grad()
    def dense_lost(self, row_k: Sequence[int], site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """Return lost_k, the share of the span that the dense model loses by each change_ts of the sparse residual."""
        lost, length = [torch.zeros(0, device=self.reference_f.device)], self.masked.n_tokens
        for first in range(0, len(site_k), _MAX_BATCH_ROWS):
            some = slice(first, first + _MAX_BATCH_ROWS)
            site_r = torch.tensor(site_k[some])
            change_rts = torch.stack([pad(x_ts, (0, 0, length - len(x_ts), 0)) for x_ts in change_k[some]])
            lost.append(self.lost_by(torch.tensor(row_k[some]), site_r, decode_changes(self.coupling, site_r, change_rts)))
        return torch.cat(lost)

    @torch.no_grad()
    def lost_by(self, row_k: Tensor, site_k: Tensor, change_ktd: Tensor) -> Tensor:
        """Return lost_k, the share of the span that the dense model loses by each change_td of its own residual at a site."""
        question, lost_k = self.masked.question, torch.zeros(len(row_k), device=self.reference_f.device)
        rows = max(1, min(_MAX_BATCH_ROWS, _MAX_BATCH_LOGITS // (self.masked.n_tokens * self.coupling.dense.vocabulary)))
        for some_k in site_k.argsort(stable=True).split(rows) if len(row_k) else ():  # sublayers before all entries are skipped
            row_r, site_r = row_k[some_k], site_k[some_k]
            last_r = question.last_b[row_r]
            length = int(last_r.max()) + 1
            x_rtd = torch.stack([self.dense.residuals[int(site)][int(row)] for row, site in zip(row_r, site_r, strict=True)])
            enter = Enter(site_r, (x_rtd + change_ktd[some_k])[:, :length])
            last_only = bool((last_r == length - 1).all())
            trace = self.coupling.dense.run(question.prompt_bt[row_r, :length], enter, last_only=last_only)
            lost_k[some_k] = (self.loss.model_b[row_r] - self._d(trace, row_r, length)) / self.loss.divisor
        return lost_k

    @torch.no_grad()
    def sparse_lost(self, row_k: Sequence[int], site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """Return lost_k, the share of the span that the sparse model loses by each change_ts of its residual at a site."""
        lost_k = torch.zeros(len(site_k), device=self.reference_f.device)
        late = self.masked.sparse.narrow_from if self.narrow else self.coupling.n_sites
        for some_k in self.masked.batches(torch.tensor(site_k), late):
            places = some_k.tolist()
            row_r, site_r = (torch.tensor([of_k[k] for k in places]) for of_k in (row_k, site_k))
            x_rts = torch.stack([self.reference.residuals[site_k[k]][row_k[k]] + change_k[k] for k in places])
            kept_rf = self.reference_f.expand(len(places), -1)
            trace = self.masked.run(kept_rf, row_r, Enter(site_r, x_rts), narrow=self.narrow)
            lost_k[some_k] = (self._reference_d_b[row_r] - self._d(trace, row_r)) / self.loss.divisor
        return lost_k

    def _run(self, kept_cf: Tensor, row_p: Tensor) -> Trace:
        """Run every mask on every prompt of row_p."""
        return self.masked.run(kept_cf.repeat_interleave(len(row_p), 0), row_p.repeat(len(kept_cf)), narrow=self.narrow)

    def _d(self, trace: Trace, row_r: Tensor, length: int | None = None) -> Tensor:
        """Return d_r of runs of `length` tokens (default: n_tokens), or of runs with logits of the last position only."""
        question = self.masked.question
        last_r = question.last_b[row_r] - (length or self.masked.n_tokens)  # negative index: valid with either number of logits
        return question.difference(trace.logits_btv[torch.arange(len(row_r), device=last_r.device), last_r], row_r)

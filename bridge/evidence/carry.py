"""A change of the sparse model transported into the dense one at every site, and the loss of the answer by it in both.

With R the reference (every node kept, errors at their means but those of the circuit) and R' a run of the sparse model in which
something was changed, at each site j

    change     x_j(R') - x_j(R)                    of the sparse residual, at every position
    dense      h_j + lin g_j(change)               entering the dense model at j: d falls by `dense_lost`
    sparse     x_j(R) + change                     entering the sparse model at j, with R kept from there on: `sparse_lost`

The two differ only in the model that computes on from site j, so that the first is to be read beside the second: late sites lose
little in either, since there the answer has been read already, or much in either, since there it is all that is read.

Of a question with several prompts (a task) all of this is done on each of them; losses are shares of the one span, so that the
share of all is the mean. Behind the last attention only the last position can change the answer; so only its residual is kept
there, where all prompts end at the last position.

Shape legend: r masked copy of a prompt, b prompt, p some of the prompts, c circuit or mask, k transported change, j site, t token
(one behind the last attention), s sparse width, d dense width, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter, Trace
from bridge.models.transport import decoded

_LOGITS, _ROWS = 2**23, 256  # of dense runs at a time
_COPIES = 8  # masked copies of a prompt in a batch, at least: one of them is the reference


@dataclass(frozen=True, eq=False)
class Transported:
    """Shares of the span lost under some masks, prompt by prompt: in the sparse model itself, and by site in either model."""

    lost_cb: Tensor
    dense_cjb: Tensor
    sparse_cjb: Tensor | None


@dataclass(frozen=True, eq=False)
class Transporter:
    """Both models on a question's prompts: the coupling, the loss on its sparse model, the dense run, the reference's mask."""

    coupling: CoupledModels
    loss: CircuitLoss
    dense: Trace
    reference_f: Tensor

    @staticmethod
    def of(coupling: CoupledModels, loss: CircuitLoss, dense: Trace, circuit_f: Tensor) -> Transporter:
        """The transporter whose reference keeps every node, and of the errors those of a circuit."""
        return Transporter(coupling, loss, dense, loss.nodes_f | circuit_f)

    @property
    def masked(self) -> MaskedModel:
        """The sparse model with its masks."""
        return self.loss.masked

    @property
    def sites(self) -> range:
        """Every site."""
        return range(self.coupling.n_sites)

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return len(self.loss.model_b)

    @cached_property
    def narrow(self) -> bool:
        """Whether residuals behind the last attention are those of the last position alone."""
        return self.masked.question.whole_rows

    @cached_property
    def reference(self) -> Trace:
        """The reference run of every prompt."""
        with torch.no_grad():
            runs = [self._run(self.reference_f[None], row_p) for row_p in torch.arange(self.prompts).split(self.masked.rows)]
        residuals = tuple(torch.cat(parts) for parts in zip(*(run.residuals for run in runs), strict=True))
        return Trace(torch.cat([run.logits_btv for run in runs]), residuals)

    @cached_property
    def _reference_d_b(self) -> Tensor:
        return self._sparse_d(self.reference, torch.arange(self.prompts))

    def deleted(self, circuit_cf: Tensor) -> Tensor:
        """The reference's masks with each of some circuits deleted."""
        return self.reference_f & ~circuit_cf

    @torch.no_grad()
    def transport(self, kept_cf: Tensor, sites: Sequence[Sequence[int]], *, sparse: bool = False) -> Transported:
        """Losses under some masks, the change of each transported at equally many sites; where asked, in both models.

        Changes are transported batch by batch, and not kept: of many nodes on many prompts they would not fit.
        """
        shape = len(kept_cf), len(sites[0]) if sites else 0, self.prompts
        lost_cb, dense_cjb = (torch.zeros(size, device=kept_cf.device) for size in (shape[::2], shape))
        sparse_cjb = torch.zeros_like(dense_cjb) if sparse else None
        for place_c, row_p in self._batches(len(kept_cf)):
            changes, lost_cb[place_c[:, None], row_p] = self._changes(kept_cf[place_c], row_p)
            places = [
                (c, site, p) for c, place in enumerate(place_c.tolist()) for site in sites[place] for p in range(len(row_p))
            ]
            row_k, site_k = [int(row_p[p]) for _, _, p in places], [site for _, site, _ in places]
            change_k = [changes[site][c, p] for c, site, p in places]
            for into, lost in ((dense_cjb, self.dense_lost), (sparse_cjb, self.sparse_lost)):
                if into is not None:
                    found_cjp = lost(row_k, site_k, change_k).view(len(place_c), shape[1], len(row_p))
                    into[place_c[:, None, None], torch.arange(shape[1])[:, None], row_p] = found_cjp
        return Transported(lost_cb, dense_cjb, sparse_cjb)

    @torch.no_grad()
    def transport_deleted(self, sets: Sequence[Tensor], site_k: Sequence[int]) -> Transported:
        """Losses when all of some nodes are deleted, for each of the sets, its change transported at one site.

        Of one prompt the sparse model is run from the sublayer of the set's first node on, so the site lies behind that.
        """
        if not self.narrow or self.prompts > 1:
            deleted_kf = torch.zeros(len(sets), len(self.reference_f), dtype=torch.bool, device=self.reference_f.device)
            for k, node_n in enumerate(sets):
                deleted_kf[k, node_n] = True
            return self.transport(self.deleted(deleted_kf), [[site] for site in site_k])
        changes, lost_k = [torch.zeros(0)] * len(sets), torch.zeros(len(sets), device=self.reference_f.device)
        site_f, late = self.masked.site_f, self.masked.sparse.narrow_from
        begin_k = [int(site_f[node_n.cpu()].min()) if len(node_n) else 0 for node_n in sets]
        for part in (range(-1, late), range(late, self.coupling.n_sites)):
            order = sorted((k for k, begin in enumerate(begin_k) if begin in part), key=begin_k.__getitem__)
            for first in range(0, len(order), self.masked.rows):
                some = order[first : first + self.masked.rows]
                # the reference is in the same batch, so that nothing is left of what does not change
                kept_rf, begin_r = self.reference_f.repeat(1 + len(some), 1), [begin_k[k] for k in (some[0], *some)]
                for row, k in enumerate(some, 1):
                    kept_rf[row, sets[k]] = False
                x_rts = torch.cat([self.reference.residuals[max(0, site)] for site in begin_r])
                trace = self.masked.run(kept_rf, None, Enter(torch.tensor(begin_r), x_rts), narrow=True)
                d_r = self._sparse_d(trace, torch.zeros(len(kept_rf), dtype=torch.long))
                for row, k in enumerate(some, 1):
                    x_rts = trace.residuals[site_k[k]]
                    changes[k] = x_rts[row] - x_rts[0]
                    lost_k[k] = (d_r[0] - d_r[row]) / self._span
        dense_k = self.dense_lost([0] * len(sets), site_k, changes)
        return Transported(lost_k[:, None], dense_k[:, None, None], None)

    def _batches(self, masks: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of masks and prompts, with the reference, of a sensible size."""
        some = min(self.prompts, max(1, self.masked.rows // _COPIES))
        for row_p in torch.arange(self.prompts).split(some):
            for place_c in torch.arange(masks).split(max(1, self.masked.rows // some - 1)):
                yield place_c, row_p

    def _changes(self, kept_cf: Tensor, row_p: Tensor) -> tuple[list[Tensor], Tensor]:
        """change_cpts at every site under some masks, and lost_cp, what the sparse model itself loses of the span."""
        # the reference is in the same batch, so that nothing is left of what does not change
        trace = self._run(torch.cat([self.reference_f[None], kept_cf]), row_p)
        residuals = [x_rts.unflatten(0, (-1, len(row_p))) for x_rts in trace.residuals]
        d_cp = self._sparse_d(trace, row_p.repeat(1 + len(kept_cf))).view(-1, len(row_p))
        return [x_cpts[1:] - x_cpts[:1] for x_cpts in residuals], (d_cp[:1] - d_cp[1:]) / self._span

    @torch.no_grad()
    def dense_lost(self, row_k: Sequence[int], site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """lost_k of the span in the dense model, by a change_ts transported at a site on a prompt, for each k."""
        lost, length = [torch.zeros(0, device=self.reference_f.device)], self.masked.n_tokens
        for first in range(0, len(site_k), _ROWS):
            some = slice(first, first + _ROWS)
            site_r = torch.tensor(site_k[some])
            change_rts = torch.stack([pad(x_ts, (0, 0, length - len(x_ts), 0)) for x_ts in change_k[some]])
            lost.append(self.lost_by(torch.tensor(row_k[some]), site_r, decoded(self.coupling, site_r, change_rts)))
        return torch.cat(lost)

    @torch.no_grad()
    def lost_by(self, row_k: Tensor, site_k: Tensor, change_ktd: Tensor) -> Tensor:
        """lost_k of the span in the dense model, by a change_td of its own residual at a site on a prompt, for each k."""
        question, lost_k = self.masked.question, torch.zeros(len(row_k), device=self.reference_f.device)
        rows = max(1, min(_ROWS, _LOGITS // (self.masked.n_tokens * self.coupling.dense.vocabulary)))
        for some_k in site_k.argsort(stable=True).split(rows) if len(row_k) else ():  # what all enter behind is not run
            row_r, site_r = row_k[some_k], site_k[some_k]
            last_r = question.last_b[row_r]
            length = int(last_r.max()) + 1
            x_rtd = torch.stack([self.dense.residuals[int(site)][int(row)] for row, site in zip(row_r, site_r, strict=True)])
            enter = Enter(site_r, (x_rtd + change_ktd[some_k])[:, :length])
            last_only = bool((last_r == length - 1).all())
            trace = self.coupling.dense.run(question.prompt_bt[row_r, :length], enter, last_only=last_only)
            # from the end, where the last position is in both cases
            lost_k[some_k] = (self.loss.model_b[row_r] - self._d(trace, row_r, last_r - length)) / self._span
        return lost_k

    @torch.no_grad()
    def sparse_lost(self, row_k: Sequence[int], site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """lost_k of the span in the sparse model, whose residual at a site is changed by change_ts, for each k."""
        lost_k = torch.zeros(len(site_k), device=self.reference_f.device)
        late = self.masked.sparse.narrow_from if self.narrow else self.coupling.n_sites
        for part in (range(late), range(late, self.coupling.n_sites)):
            place_k = torch.tensor(sorted((k for k, site in enumerate(site_k) if site in part), key=lambda k: site_k[k]))
            for some_k in place_k.split(self.masked.rows) if len(place_k) else ():
                places = some_k.tolist()
                row_r, site_r = (torch.tensor([of_k[k] for k in places]) for of_k in (row_k, site_k))
                x_rts = torch.stack([self.reference.residuals[site_k[k]][row_k[k]] + change_k[k] for k in places])
                kept_rf = self.reference_f.expand(len(places), -1)
                trace = self.masked.run(kept_rf, row_r, Enter(site_r, x_rts), narrow=self.narrow)
                lost_k[some_k] = (self._reference_d_b[row_r] - self._sparse_d(trace, row_r)) / self._span
        return lost_k

    @property
    def _span(self) -> float:
        return self.loss.span if abs(self.loss.span) >= 1e-6 else 1e-6

    def _run(self, kept_cf: Tensor, row_p: Tensor) -> Trace:
        """Every mask on every one of some prompts."""
        return self.masked.run(kept_cf.repeat_interleave(len(row_p), 0), row_p.repeat(len(kept_cf)), narrow=self.narrow)

    def _sparse_d(self, trace: Trace, row_r: Tensor) -> Tensor:
        last_b = self.masked.question.last_b
        return self._d(trace, row_r, torch.full_like(last_b[row_r], -1) if self.narrow else last_b[row_r])

    def _d(self, trace: Trace, row_r: Tensor, last_r: Tensor) -> Tensor:
        logits_rv = trace.logits_btv[torch.arange(len(row_r), device=last_r.device), last_r]
        return self.masked.question.difference(logits_rv, row_r)

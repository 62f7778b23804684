"""A change of the sparse model on a prompt carried into the dense one at every site, and what the answer loses by it in both.

With R the reference (every node kept, errors at their means but those of the circuit) and R' a run of the sparse model in which
something was changed, at each site j

    change     x_j(R') - x_j(R)                    of the sparse residual, at every position
    dense      h_j + lin g_j(change)               entering the dense model at j: d falls by `dense_lost`
    sparse     x_j(R) + change                     entering the sparse model at j, with R kept from there on: `sparse_lost`

The two differ only in the model that computes on from site j, so that the first is to be read beside the second: late sites lose
little in either, since there the answer has been read already, or much in either, since there it is all that is read.

Behind the last attention only the last position can change the answer; so only its residual is kept there.

Shape legend: r masked copy of the prompt, k carried change, t token (one behind the last attention), s sparse width, d dense
width, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.residual import Enter, Trace
from bridge.transport import Change, run_changed

_LOGITS = 2**25  # of dense runs at a time


@dataclass(frozen=True, eq=False)
class Carrier:
    """Both models on one prompt: the coupling, the loss on its sparse model, the dense run, and what the reference keeps."""

    coupling: Coupling
    loss: CircuitLoss
    dense: Trace
    reference_f: Tensor

    @staticmethod
    def of(coupling: Coupling, loss: CircuitLoss, dense: Trace, circuit_f: Tensor) -> Carrier:
        """The carrier whose reference keeps every node, and of the errors those of a circuit."""
        return Carrier(coupling, loss, dense, loss.nodes_f | circuit_f)

    @property
    def masked(self) -> MaskedModel:
        """The sparse model with its masks."""
        return self.loss.masked

    @property
    def sites(self) -> range:
        """Every site."""
        return range(self.coupling.n_sites)

    @cached_property
    def reference(self) -> Trace:
        """The reference run."""
        with torch.no_grad():
            return self.masked.run(self.reference_f[None], narrow=True)

    @cached_property
    def _dense_d(self) -> float:
        return float(self._difference(self.dense.logits_btv[:, -1]))

    @cached_property
    def _reference_d(self) -> float:
        return float(self._difference(self.reference.logits_btv[:, -1]))

    def deleted(self, circuit_cf: Tensor) -> Tensor:
        """The reference's masks with each of some circuits deleted."""
        return self.reference_f & ~circuit_cf

    @torch.no_grad()
    def runs(self, kept_rf: Tensor) -> tuple[list[Tensor], Tensor]:
        """change_rts at every site under any number of masks, and lost_r, what the sparse model itself loses of the span."""
        changes: list[list[Tensor]] = [[] for _ in self.sites]
        lost: list[Tensor] = []
        for some_rf in kept_rf.split(self.masked.rows):
            # the reference is in the same batch, so that nothing is left of what does not change
            trace = self.masked.run(torch.cat([self.reference_f[None], some_rf]), narrow=True)
            for site, x_rts in enumerate(trace.residuals):
                changes[site].append(x_rts[1:] - x_rts[:1])
            d_r = self._difference(trace.logits_btv[:, -1])
            lost.append((d_r[0] - d_r[1:]) / self._span)
        return [torch.cat(parts) for parts in changes], torch.cat(lost)

    @torch.no_grad()
    def without(self, sets: Sequence[Tensor], site_k: Sequence[int]) -> tuple[list[Tensor], Tensor]:
        """change_ts at a site for each of some sets of nodes deleted, and lost_k of the span in the sparse model.

        The site is one behind the first of the set's nodes, from whose sublayer on the model is run.
        """
        changes, lost_k = [torch.zeros(0)] * len(sets), torch.zeros(len(sets), device=self.reference_f.device)
        site_f, late = self.masked.site_f, self.masked.sparse.narrow_from
        begin_k = [int(site_f[set_n.cpu()].min()) if len(set_n) else 0 for set_n in sets]
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
                d_r = self._difference(trace.logits_btv[:, -1])
                for row, k in enumerate(some, 1):
                    x_rts = trace.residuals[site_k[k]]
                    changes[k] = x_rts[row] - x_rts[0]
                    lost_k[k] = (d_r[0] - d_r[row]) / self._span
        return changes, lost_k

    @torch.no_grad()
    def dense_lost(self, site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """lost_k of the span in the dense model, by a change_ts carried at a site, for each k."""
        prompt_1t = self.masked.question.prompt_bt
        rows = max(1, _LOGITS // (prompt_1t.shape[1] * self.coupling.dense.vocabulary))
        lost: list[Tensor] = []
        for first in range(0, len(site_k), rows):
            site_r = torch.tensor(site_k[first : first + rows])
            change_rts = torch.stack([_whole(x_ts, prompt_1t.shape[1]) for x_ts in change_k[first : first + rows]])
            change_rtd = Change(site_r, change_rts).decoded(self.coupling)
            trace = run_changed(self.coupling, prompt_1t.expand(len(site_r), -1), self.dense, site_r, change_rtd)
            lost.append((self._dense_d - self._difference(trace.logits_btv[:, -1])) / self._span)
        return torch.cat(lost) if lost else torch.zeros(0)

    @torch.no_grad()
    def sparse_lost(self, site_k: Sequence[int], change_k: Sequence[Tensor]) -> Tensor:
        """lost_k of the span in the sparse model, whose residual at a site is changed by change_ts, for each k."""
        lost_k = torch.zeros(len(site_k), device=self.reference_f.device)
        late = self.masked.sparse.narrow_from
        for part in (range(late), range(late, self.coupling.n_sites)):
            place_k = torch.tensor(sorted((k for k, site in enumerate(site_k) if site in part), key=lambda k: site_k[k]))
            for some_k in place_k.split(self.masked.rows) if len(place_k) else ():
                site_r = torch.tensor([site_k[k] for k in some_k.tolist()])
                x_rts = torch.stack([self.reference.residuals[site_k[k]][0] + change_k[k] for k in some_k.tolist()])
                kept_rf = self.reference_f.expand(len(some_k), -1)
                trace = self.masked.run(kept_rf, None, Enter(site_r, x_rts), narrow=True)
                lost_k[some_k] = (self._reference_d - self._difference(trace.logits_btv[:, -1])) / self._span
        return lost_k

    @property
    def _span(self) -> float:
        return self.loss.span if abs(self.loss.span) >= 1e-6 else 1e-6

    def _difference(self, logits_rv: Tensor) -> Tensor:
        first_r = torch.zeros(len(logits_rv), dtype=torch.long, device=logits_rv.device)
        return self.masked.question.difference(logits_rv, first_r)


def _whole(change_ts: Tensor, n_tokens: int) -> Tensor:
    """A change at every position, 0 at those that are not given."""
    return torch.nn.functional.pad(change_ts, (0, 0, n_tokens - len(change_ts), 0))

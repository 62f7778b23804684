"""Transport of a change in the sparse model into the dense one.

Nodes are behind a norm and bridges before one, so a node has no direct image in the dense model. Its change is run in the sparse
model instead, and what that changes of the residual stream at the next site j, at every position, goes through the linear part of
that site's decoder and is added to the dense residual there, at a strength s (1: in full):

    x, x'   the sparse residual at j as it is, and with the nodes changed
    h_j  <-  h_j + s (g_j(x') - g_j(x))

Effect profiles, counterfactual patching and steering all use this.

Shape legend: b row, t token, s sparse width, d dense width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter, Trace


@dataclass(frozen=True, eq=False)
class Change:
    """The change of the sparse residual stream at a site of every row: site_b, change_bts."""

    site_b: Tensor
    change_bts: Tensor

    @staticmethod
    def between(plain: Trace, changed: Trace, site_b: Tensor) -> Change:
        """The change from one sparse run to another of as many rows, without entries; one row of `plain` serves all."""
        change = [
            changed.residuals[site][row] - plain.residuals[site][min(row, len(plain.residuals[site]) - 1)]
            for row, site in enumerate(site_b.tolist())
        ]
        return Change(site_b, torch.stack(change))

    def decoded(self, coupling: CoupledModels) -> Tensor:
        """change_btd of the dense residual at those sites."""
        rows = zip(self.site_b.tolist(), self.change_bts, strict=True)
        return torch.stack([coupling.bridges[site].decode_change(change_ts) for site, change_ts in rows])


def run_changed(coupling: CoupledModels, tokens_bt: Tensor, plain: Trace, site_b: Tensor, change_btd: Tensor) -> Trace:
    """The dense model with change_btd added to its residual at site_b, a site for every row; one row of `plain` serves all.

    `plain` is the dense model's own run of the tokens.
    """
    entering = [
        plain.residuals[site][min(row, len(plain.residuals[site]) - 1)] + change_td
        for row, (site, change_td) in enumerate(zip(site_b.tolist(), change_btd, strict=True))
    ]
    return coupling.dense.run(tokens_bt, Enter(site_b, torch.stack(entering)))

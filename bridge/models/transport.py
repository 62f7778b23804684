"""Transport of a change in the sparse model into the dense one.

Nodes come after a norm and bridges before one, so a node has no direct image in the dense model. Instead, its change is run in
the sparse model. The resulting change of the residual stream at the next site j, at every position, goes through the linear part
of that site's decoder and is added to the dense residual there, at a strength s (1: in full):

    x, x'   the sparse residual at j without the change, and with the nodes changed
    h_j  <-  h_j + s (g_j(x') - g_j(x))

Effect profiles, counterfactual patching and steering all use this transport.

Shape legend: b row, t token, s sparse width, d dense width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter, Trace


def change_between(plain: Trace, changed: Trace, site_b: Tensor) -> Tensor:
    """Return change_bts between two sparse runs without entries, at each row's site; if `plain` has one row, it serves all."""
    return _residual_at_site(changed, site_b) - _residual_at_site(plain, site_b)


def decode_changes(coupling: CoupledModels, site_b: Tensor, change_bts: Tensor) -> Tensor:
    """Return change_btd of the dense residual, decoded from the change of the sparse residual at each row's site."""
    rows = zip(site_b.tolist(), change_bts, strict=True)
    return torch.stack([coupling.bridges[site].decode_change(change_ts) for site, change_ts in rows])


def run_with_changes(coupling: CoupledModels, tokens_bt: Tensor, plain: Trace, site_b: Tensor, change_btd: Tensor) -> Trace:
    """Run the dense model with change_btd added to its residual at site_b, one site for each row.

    `plain` is the dense model's own run of the tokens; if it has one row, that row serves all.
    """
    return coupling.dense.run(tokens_bt, Enter(site_b, _residual_at_site(plain, site_b) + change_btd))


def _residual_at_site(trace: Trace, site_b: Tensor) -> Tensor:
    """Return the residual of every row at its site; of a run of one row, always that row's residual."""
    places = ((trace.residuals[site], row) for row, site in enumerate(site_b.tolist()))
    return torch.stack([x_btd[min(row, len(x_btd) - 1)] for x_btd, row in places])

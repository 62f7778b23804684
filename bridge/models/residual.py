"""The one idea: a transformer is `embed`, a list of residual sublayers, and `unembed`; and there is one way to run it.

A *site* is the index of the sublayer that reads the residual stream there; the last site is read by `unembed`. `run` takes a
batch from the embedding to the logits, and any row may *enter* at any site with its own residual. In the plain forward pass no
row enters. To resume at site k, every row enters at k. In a hybrid pass (paper, section 2.3) one model's residual, mapped, enters
the other model. In steering a changed residual enters the model that it came from.

Shape legend: b batch row, t token, d width of the residual stream, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

EMBEDDING = -1  # the "site" of a row that does not enter: it starts from its tokens


@dataclass(frozen=True)
class Enter:
    """The site and residual with which each row of a batch enters a model.

    site_b is int64 on the CPU, EMBEDDING for rows that start from their tokens; x_btd is ignored for those rows.
    """

    site_b: Tensor
    x_btd: Tensor

    def __post_init__(self) -> None:
        if len(self.site_b) != len(self.x_btd):
            raise ValueError(f"there are {len(self.site_b)} sites and {len(self.x_btd)} residuals; each row needs one of each")

    @staticmethod
    def at(site: int, x_btd: Tensor) -> Enter:
        """An Enter with every row at one site."""
        return Enter(torch.full((x_btd.shape[0],), site), x_btd)


@dataclass(frozen=True)
class Trace:
    """The result of a run: logits_btv of every row, and the residuals at every site.

    residuals[site] of `run` holds the rows that entered by then, sorted stably by site; a dense model's holds all rows, unsorted.
    """

    logits_btv: Tensor
    residuals: tuple[Tensor, ...]


class ResidualModel(Protocol):
    """The interface that the dense and the sparse model share."""

    @property
    def n_sites(self) -> int:
        """Number of sites: sublayers + 1."""
        ...

    @property
    def width(self) -> int:
        """Width d of the residual stream."""
        ...

    @property
    def vocabulary(self) -> int:
        """Number of logits v, padding included."""
        ...

    def run(self, tokens_bt: Tensor, enter: Enter | None = None) -> Trace:
        """Run a batch; see `run` for the contract."""
        ...


def run(
    embed: Callable[[Tensor], Tensor],
    sublayers: Sequence[Callable[[Tensor], Tensor]],
    unembed: Callable[[Tensor, Tensor], Tensor],
    tokens_bt: Tensor,
    enter: Enter | None = None,
) -> Trace:
    """Run tokens_bt through embed, sublayers and unembed; each row is computed only from the site where it enters.

    `embed(tokens_bt)` and every `sublayer(x_btd)` return the residual stream, `unembed(x_btd, tokens_bt)` the logits_btv.
    Raises ValueError if a row enters at a site that the model does not have.
    """
    if enter is None:
        x_btd = embed(tokens_bt)
        residuals = [x_btd]
        for sublayer in sublayers:
            x_btd = sublayer(x_btd)
            residuals.append(x_btd)
        return Trace(unembed(x_btd, tokens_bt), tuple(residuals))

    check_sites(enter, len(sublayers) + 1)
    # The number of rows that have entered by each site. Rows are sorted by where they enter, so the rows under way are always
    # the first ones; a batch that is sorted already is not copied.
    entered = [int((enter.site_b <= site).sum()) for site in range(EMBEDDING, len(sublayers) + 1)]
    order_b = None
    given_btd = enter.x_btd
    if bool((enter.site_b.diff() < 0).any()):
        order_b = torch.argsort(enter.site_b, stable=True).to(tokens_bt.device)
        tokens_bt, given_btd = tokens_bt[order_b], given_btd[order_b]
    x_btd = embed(tokens_bt[: entered[0]]) if entered[0] else given_btd[:0]
    residuals = []
    for site in range(len(sublayers) + 1):
        before, now = entered[site], entered[site + 1]
        if now > before:
            x_btd = _join(x_btd, given_btd[before:now].to(x_btd.dtype)) if before else given_btd[:now]
        residuals.append(x_btd)
        if site < len(sublayers) and now:
            x_btd = sublayers[site](x_btd)
    logits_btv = unembed(x_btd, tokens_bt)
    return Trace(logits_btv if order_b is None else logits_btv[torch.argsort(order_b)], tuple(residuals))


def _join(x_btd: Tensor, given_btd: Tensor) -> Tensor:
    """Return both tensors concatenated in the memory layout of x_btd, because torch.cat would not keep tokens innermost."""
    if x_btd.stride(1) == 1 and not x_btd.is_contiguous():
        return torch.cat([x_btd.transpose(1, 2), given_btd.transpose(1, 2)]).transpose(1, 2)
    return torch.cat([x_btd, given_btd])


def check_sites(enter: Enter, n_sites: int) -> None:
    """Raise ValueError if a row enters at a site that does not exist."""
    low, high = int(enter.site_b.min()), int(enter.site_b.max())
    if low < EMBEDDING or high >= n_sites:
        wrong = low if low < EMBEDDING else high
        raise ValueError(f"site {wrong} does not exist; sites run from 0 to {n_sites - 1} ({EMBEDDING}: the row does not enter)")

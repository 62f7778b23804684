"""One run of a dense model under way: what its hooks do with the rows that enter, and the residuals that they see.

Shape legend: b batch row, t token, d width of the residual stream.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bridge.huggingface.site_discovery import DenseBlock, first_tensor, output_tensor, with_first_tensor, with_output_tensor
from bridge.models.residual import EMBEDDING, Enter

# Hooks are on the model while a run is under way, so one run at a time; a run inside a run is left alone by the outer's hooks.
_ONE_AT_A_TIME = threading.RLock()
under_way: list[DenseRun] = []


def exclusive() -> AbstractContextManager[Any]:
    """While it lasts no other thread runs a dense model: for whoever puts hooks of its own on one."""
    return _ONE_AT_A_TIME


class Reached(Exception):
    """The site behind which nothing was asked for."""


class DenseRun:
    """One run under way: the rows that enter, sorted by site so that those of a site are one slice, and the residuals seen."""

    def __init__(
        self, enter: Enter | None, n_sites: int, device: torch.device, until: int | None = None, *, hands_on: bool = False
    ) -> None:
        self.residuals: dict[int, Tensor] = {}
        self.until = until
        self.first = int(enter.site_b.min()) if enter is not None and hands_on else EMBEDDING  # site that every row enters by
        self._none_btd = None if enter is None else enter.x_btd[:0]
        self._bounds = [0] * (n_sites + 1)  # the rows that enter at a site are row_b[bounds[site] : bounds[site + 1]]
        if enter is not None:  # sorted on the CPU, where the sites are, so that nothing waits for the device
            order_b = torch.argsort(enter.site_b, stable=True)
            order_b = order_b[int((enter.site_b == EMBEDDING).sum()) :]
            self._bounds = torch.searchsorted(enter.site_b[order_b], torch.arange(n_sites + 1)).tolist()
            self._row_b = order_b.to(device, non_blocking=True)
            self._given_btd = enter.x_btd[self._row_b]

    def trace(self, n_sites: int) -> tuple[Tensor, ...]:
        """The residuals at the first sites; none of any row where the run did not come by."""
        given = (self.residuals.get(site, self._none_btd) for site in range(n_sites))
        return tuple(x_btd for x_btd in given if x_btd is not None)

    def saw(self, site: int, x_btd: Tensor) -> None:
        """Keep the residual at a site, and end the run where that is all that was asked for."""
        self.residuals[site] = x_btd
        if site == self.until:
            raise Reached

    @contextmanager
    def handing_on(self, block: DenseBlock) -> Iterator[None]:
        """The block does nothing in this run, for as long as it lasts."""
        module, mine = block.module, vars(block.module).get("forward")
        usual = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return block.handing_on(args, kwargs) if under_way[-1] is self else usual(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            if mine is None:
                del module.forward
            else:
                module.forward = mine

    def anyone_enters(self, site: int) -> bool:
        """Whether a row enters at a site."""
        return self._bounds[site] < self._bounds[site + 1]

    def place(self, site: int, x_btd: Tensor) -> Tensor:
        """x_btd with the rows that enter at the site in place."""
        if not self.anyone_enters(site):
            return x_btd
        here = slice(self._bounds[site], self._bounds[site + 1])
        row_b = self._row_b[here].to(x_btd.device)  # a model may be spread over devices
        return x_btd.index_copy(0, row_b, self._given_btd[here].to(x_btd))  # not in place: autograd, records

    def before_block(self, site: int, has_middle: bool, _module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Pre-hook of a block: what enters there, or at its middle, takes the place of what it was given."""
        if under_way[-1] is not self:
            return None
        given_btd = first_tensor(args, kwargs)
        self._shape = given_btd.shape
        x_btd = self.place(site, given_btd)
        self.saw(site, x_btd)
        if has_middle:  # what the first sublayer makes of the rows that enter after it is taken back by `after_writer`
            x_btd = self.place(site + 1, x_btd)
        return None if x_btd is given_btd else with_first_tensor(args, kwargs, x_btd)

    def after_writer(self, site: int, sums: bool, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Hook of a first sublayer's writer: takes back what it wrote to rows that enter behind it."""
        if under_way[-1] is not self:
            return None
        written = output_tensor(output)
        if sums:
            placed = self.place(site, self._by_row(written))
        else:
            here = slice(self._bounds[site], self._bounds[site + 1])
            placed = self._by_row(written).index_fill(0, self._row_b[here].to(written.device), 0)
        return with_output_tensor(output, placed.reshape(written.shape))

    def before_reader(self, site: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of a second sublayer's reader: sees the residual."""
        if under_way[-1] is self:
            self.saw(site, self._by_row(first_tensor(args, kwargs)))

    def after_last(self, site: int, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Hook of the last block: what enters at the last site takes the place of its output."""
        if under_way[-1] is not self:
            return None
        x_btd = self.place(site, output_tensor(output))
        self.saw(site, x_btd)
        return None if x_btd is output_tensor(output) else with_output_tensor(output, x_btd)

    def _by_row(self, x: Tensor) -> Tensor:
        """x_btd, also where a model has flattened it to tokens (OPT); x itself where not, so that gradients reach it."""
        return x if x.shape == self._shape else x.reshape(self._shape)

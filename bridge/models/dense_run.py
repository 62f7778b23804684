"""One run of a dense model: what its hooks do with the rows that enter, and the residuals that they record.

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

# The hooks are on the model during a run, so there is one run at a time; the hooks of an outer run ignore a run inside it.
_ONE_AT_A_TIME = threading.RLock()
active_runs: list[DenseRun] = []


def lock_runs() -> AbstractContextManager[Any]:
    """Return a context in which no other thread runs a dense model, for code that puts its own hooks on one."""
    return _ONE_AT_A_TIME


class Reached(Exception):
    """Raised to stop a run at the last site that was asked for."""


class DenseRun:
    """One run: the rows that enter, sorted by site so that the rows of a site are one slice, and the recorded residuals."""

    def __init__(
        self, enter: Enter | None, n_sites: int, device: torch.device, until: int | None = None, *, skips_blocks: bool = False
    ) -> None:
        self.residuals: dict[int, Tensor] = {}
        self.until = until
        self.first = int(enter.site_b.min()) if enter is not None and skips_blocks else EMBEDDING  # earliest entry of any row
        self._none_btd = None if enter is None else enter.x_btd[:0]
        self._bounds = [0] * (n_sites + 1)  # the rows that enter at a site are row_b[bounds[site] : bounds[site + 1]]
        if enter is not None:  # sorted on the CPU, where the sites are, so that nothing waits for the device
            order_b = torch.argsort(enter.site_b, stable=True)
            order_b = order_b[int((enter.site_b == EMBEDDING).sum()) :]
            self._bounds = torch.searchsorted(enter.site_b[order_b], torch.arange(n_sites + 1)).tolist()
            self._row_b = order_b.to(device, non_blocking=True)
            self._given_btd = enter.x_btd[self._row_b]

    def trace(self, n_sites: int) -> tuple[Tensor, ...]:
        """Return the residuals at the first n_sites sites, without rows at a site that the run did not pass."""
        given = (self.residuals.get(site, self._none_btd) for site in range(n_sites))
        return tuple(x_btd for x_btd in given if x_btd is not None)

    def record(self, site: int, x_btd: Tensor) -> None:
        """Record the residual at a site, and stop the run if it is the last site that was asked for."""
        self.residuals[site] = x_btd
        if site == self.until:
            raise Reached

    @contextmanager
    def skip_block(self, block: DenseBlock) -> Iterator[None]:
        """Make the block pass its input on unchanged in this run, for as long as the context lasts."""
        module, mine = block.module, vars(block.module).get("forward")
        usual = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            return block.skipped_output(args, kwargs) if active_runs[-1] is self else usual(*args, **kwargs)

        module.forward = forward
        try:
            yield
        finally:
            if mine is None:
                del module.forward
            else:
                module.forward = mine

    def has_entering_rows(self, site: int) -> bool:
        """Return whether a row enters at a site."""
        return self._bounds[site] < self._bounds[site + 1]

    def replace_entering_rows(self, site: int, x_btd: Tensor) -> Tensor:
        """Return x_btd with the rows that enter at the site replaced by their residuals."""
        if not self.has_entering_rows(site):
            return x_btd
        here = slice(self._bounds[site], self._bounds[site + 1])
        row_b = self._row_b[here].to(x_btd.device)  # a model may be spread over devices
        return x_btd.index_copy(0, row_b, self._given_btd[here].to(x_btd))  # not in place: autograd and records need x_btd

    def before_block(self, site: int, has_middle: bool, _module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Pre-hook of a block: the residuals of rows that enter there, or at its middle, replace its input."""
        if active_runs[-1] is not self:
            return None
        given_btd = first_tensor(args, kwargs)
        self._shape = given_btd.shape
        x_btd = self.replace_entering_rows(site, given_btd)
        self.record(site, x_btd)
        if has_middle:  # `after_writer` cancels what the first sublayer writes to rows that enter after it
            x_btd = self.replace_entering_rows(site + 1, x_btd)
        return None if x_btd is given_btd else with_first_tensor(args, kwargs, x_btd)

    def after_writer(self, site: int, sums: bool, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Hook of a first sublayer's writer: cancel what it wrote to rows that enter after it."""
        if active_runs[-1] is not self:
            return None
        written = output_tensor(output)
        if sums:
            placed = self.replace_entering_rows(site, self._by_row(written))
        else:
            here = slice(self._bounds[site], self._bounds[site + 1])
            placed = self._by_row(written).index_fill(0, self._row_b[here].to(written.device), 0)
        return with_output_tensor(output, placed.reshape(written.shape))

    def before_reader(self, site: int, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Pre-hook of a second sublayer's reader: record the residual."""
        if active_runs[-1] is self:
            self.record(site, self._by_row(first_tensor(args, kwargs)))

    def after_last(self, site: int, _module: nn.Module, _args: tuple, output: Any) -> Any:
        """Hook of the last block: the residuals of rows that enter at the last site replace its output."""
        if active_runs[-1] is not self:
            return None
        x_btd = self.replace_entering_rows(site, output_tensor(output))
        self.record(site, x_btd)
        return None if x_btd is output_tensor(output) else with_output_tensor(output, x_btd)

    def _by_row(self, x: Tensor) -> Tensor:
        """Return x_btd, reshaped if a model has flattened it to tokens (OPT), otherwise x itself, so that gradients reach it."""
        return x if x.shape == self._shape else x.reshape(self._shape)

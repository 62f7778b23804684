"""A span: some blocks of a dense model, and the sparse model that is coupled to these alone.

With blocks a to b of the dense model, sites 0 ... N are those in the span: 0 is where block a reads, N what block b - 1 leaves.

    dense     embed = the dense model up to site 0;  sublayers = its own;  unembed = the rest of it, to the logits
    sparse    embed = f_0 of the dense residual at site 0;  sublayers = sparse;  unembed = the rest of the dense model, of g_N(x)

Both are residual models like any other. What is before and behind is run by the dense model itself, not approximated; gradients
flow through what is behind. An explanation begins with the encoder's channels at site 0.

What is frozen is computed once: the dense residual at site 0 of a row of tokens, and at the model's last site, from which its
answers follow by the unembedding alone, are remembered as they are, up to REMEMBERED bytes, the oldest forgotten first.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.kernels.products import source_of, tokens_inside
from bridge.models.dense import DenseModel, Parity
from bridge.models.dense_run import exclusive
from bridge.models.residual import EMBEDDING, Enter, Trace, check_sites
from bridge.models.sparse import SparseTransformer
from bridge.recipe import blocks_of

REMEMBERED = 1 << 30  # bytes of dense residuals


class DenseSpan(DenseModel):
    """The blocks first to last - 1 of a dense model, as a residual model whose first site is where the first of them reads."""

    def __init__(self, whole: DenseModel, first: int, last: int) -> None:
        self.__dict__.update(vars(copy(whole)))  # the same model, loaded and checked already
        self.whole, self.first_block = whole, first
        sizes = [1 if block.middle is None else 2 for block in whole.blocks]
        self.offset = sum(sizes[:first])
        sites = slice(self.offset, self.offset + sum(sizes[first:last]))
        self.blocks, self.sublayers = whole.blocks[first:last], whole.sublayers[sites]
        self.parity = Parity(whole.parity.errors[sites.start : sites.stop + 1], whole.parity.tolerance)
        self._remembered: dict[bytes, list[Tensor]] = {}  # the residual of a row at site 0, and at the model's last site
        self._state: tuple[Any, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """Kind of sublayer that reads at each site; behind the last of them, the rest of the model."""
        return (*self.sublayers, "rest")

    @property
    def slice(self) -> str:
        """The blocks, as first:last."""
        return f"{self.first_block}:{self.first_block + len(self.blocks)}"

    def prefix(self, tokens_bt: Tensor) -> Tensor:
        """x_btd at site 0."""
        return torch.stack([known[0] for known in self._known(tokens_bt)])

    def run(self, tokens_bt: Tensor, enter: Enter | None = None, *, last_only: bool = False) -> Trace:
        """Run a batch as the whole model does, rows that enter nowhere from what is remembered of them."""
        if enter is not None:
            check_sites(enter, self.n_sites)
            site_b, x_btd = enter.site_b, enter.x_btd
            if bool((from_tokens_b := site_b == EMBEDDING).any()):
                here_b = from_tokens_b.nonzero().flatten().to(x_btd.device)
                x_btd = x_btd.index_copy(0, here_b, self.prefix(tokens_bt[here_b]).to(x_btd))
            trace = self.whole.run(tokens_bt, Enter(site_b.clamp(min=0) + self.offset, x_btd), last_only=last_only)
            return Trace(trace.logits_btv, self._mine(trace.residuals))
        known = self._known(tokens_bt)
        enter = Enter.at(self.offset, torch.stack([row[0] for row in known]))
        if last_only or not all(len(row) > 1 for row in known):
            trace = self.whole.run(tokens_bt, enter, last_only=last_only)
            for row, last_td in zip(known, trace.residuals[-1], strict=True):
                row[1:] = [last_td.detach().clone()]
            return Trace(trace.logits_btv, self._mine(trace.residuals))
        residuals = self._mine(self.whole.residuals(tokens_bt, self.offset + len(self.sublayers), enter))
        answered = self.whole.run(tokens_bt, Enter.at(self.whole.n_sites - 1, torch.stack([row[1] for row in known])))
        return Trace(answered.logits_btv, residuals)

    def _mine(self, residuals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(residuals[self.offset : self.offset + self.n_sites])

    @torch.no_grad()
    def _known(self, tokens_bt: Tensor) -> list[list[Tensor]]:
        """Residuals remembered of each row, that at site 0 at the least."""
        with exclusive():
            device = self.device.type
            products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            state = (products, *(source_of(weight) for weight in self.model.parameters()))
            if state != self._state:  # the weights are another model's now, or their products are
                self._state = state
                self._remembered.clear()
            keys = [row.tobytes() for row in tokens_bt.detach().cpu().long().contiguous().numpy()]
            known = {key: self._remembered[key] for key in keys if key in self._remembered}
            if missing := {key: row for row, key in enumerate(keys) if key not in known}:
                row_b = torch.tensor(list(missing.values()), device=tokens_bt.device)
                found_btd = self.whole.residuals(tokens_bt[row_b], self.offset)[self.offset]
                known |= {key: [x_td.clone()] for key, x_td in zip(missing, found_btd, strict=True)}
                self._remembered |= {key: known[key] for key in missing}
                a_row = 2 * found_btd[0].numel() * found_btd.element_size()
                while len(self._remembered) > max(len(keys), REMEMBERED // a_row):
                    del self._remembered[next(iter(self._remembered))]
            return [known[key] for key in keys]


def dense_of(dense: DenseModel, blocks: str | None) -> DenseModel:
    """The dense model that a recipe's sparse model is coupled to: a span of it, or the whole. Raises RecipeError."""
    whole = dense.whole if isinstance(dense, DenseSpan) else dense
    if blocks is None:
        return whole
    first, last = blocks_of(blocks, len(whole.blocks))
    same = isinstance(dense, DenseSpan) and (dense.first_block, len(dense.blocks)) == (first, last - first)
    return dense if same else DenseSpan(whole, first, last)


@dataclass(frozen=True)
class _Ends:
    """Beginning and end of a sparse span: a dense span, x_bts of its residual at the first site, and h_btd at the last one.

    No part of its weights, and shared by its copies.
    """

    dense: DenseSpan
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Ends:
        return self


class SparseSpan(SparseTransformer):
    """The sparse model of a span: begins with the first bridge's encoder, and ends with the last one's decoder and the rest of
    the dense model. It has no weights for either.
    """

    _ends: _Ends | None = None

    def join(self, dense: DenseSpan, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> SparseSpan:
        """The model, begun and ended by a dense span and its bridges; a copy that shares its weights if it has others already."""
        ends = _Ends(dense, encode, decode)
        joined = self if self._ends in (None, ends) else copy(self)
        joined._ends = ends
        return joined

    @property
    def ends(self) -> _Ends:
        """The dense span and the maps. Raises ValueError before there are any."""
        if self._ends is None:
            raise ValueError("a span's sparse model runs within a coupling, which gives it its dense model and bridges")
        return self._ends

    @property
    def narrow_from(self) -> int:
        """No site: behind the span the dense model's attention reads every position."""
        return self.n_sites

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """x_bts: what the encoder makes of the dense residual at site 0."""
        x_bts = self.ends.encode(self.ends.dense.prefix(tokens_bt).float())
        return tokens_inside(x_bts) if self.compact else x_bts

    def read_scale(self, site: int, x_bts: Tensor) -> Tensor:
        """scale_bt1 of a sublayer's norm; 1 where the dense model reads what is decoded."""
        return torch.ones_like(x_bts[..., :1]) if site == self.n_sites - 1 else super().read_scale(site, x_bts)

    def _unembed(self, x_bts: Tensor, tokens_bt: Tensor, *, last_only: bool) -> Tensor:
        h_btd = self.ends.decode(x_bts.contiguous())
        return self.ends.dense.run(tokens_bt, Enter.at(self.n_sites - 1, h_btd), last_only=last_only).logits_btv

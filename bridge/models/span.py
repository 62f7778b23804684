"""A span: some blocks of a dense model, and the sparse model that is coupled to these blocks only.

For blocks a to b - 1 of the dense model, sites 0 ... N are those in the span: block a reads at site 0, block b - 1 writes to N.

    dense     embed = the dense model up to site 0;  sublayers = its own;  unembed = the rest of it, to the logits
    sparse    embed = f_0 of the dense residual at site 0;  sublayers = sparse;  unembed = the rest of the dense model, on g_N(x)

Both are residual models like any other. The dense model itself runs the blocks before and after the span, without approximation;
gradients flow through the blocks after it. An explanation begins with the encoder's channels at site 0.

The frozen dense residuals of a row of tokens are computed once: those at site 0 and at the model's last site, from which the
unembedding alone gives the answers, are cached, up to REMEMBERED bytes, and the oldest are dropped first.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.kernels.products import tokens_innermost, weight_version
from bridge.models.dense import DenseModel, Parity
from bridge.models.dense_run import lock_runs
from bridge.models.residual import EMBEDDING, Enter, Trace, check_sites
from bridge.models.sparse import SparseTransformer
from bridge.recipe import parse_blocks

REMEMBERED = 1 << 30  # bytes of cached dense residuals


class DenseSpan(DenseModel):
    """Blocks first to last - 1 of a dense model, as a residual model; the first of these blocks reads at its first site."""

    def __init__(self, whole: DenseModel, first: int, last: int) -> None:
        self.__dict__.update(vars(copy(whole)))  # the same model, loaded and checked already
        self.whole, self.first_block = whole, first
        sizes = [1 if block.middle is None else 2 for block in whole.blocks]
        self.first_site = sum(sizes[:first])
        sites = slice(self.first_site, self.first_site + sum(sizes[first:last]))
        self.blocks, self.sublayers = whole.blocks[first:last], whole.sublayers[sites]
        self.parity = Parity(whole.parity.errors[sites.start : sites.stop + 1], whole.parity.tolerance)
        self._row_cache: dict[bytes, list[Tensor]] = {}  # the residual of a row at site 0, and at the model's last site
        self._state: tuple[Any, ...] = ()

    @property
    def readers(self) -> tuple[str, ...]:
        """Kind of sublayer that reads at each site; at the last site, the rest of the model."""
        return (*self.sublayers, "rest")

    @property
    def slice(self) -> str:
        """The blocks, as first:last."""
        return f"{self.first_block}:{self.first_block + len(self.blocks)}"

    def prefix(self, tokens_bt: Tensor) -> Tensor:
        """Return x_btd at site 0."""
        return torch.stack([known[0] for known in self._cached_rows(tokens_bt)])

    def run(self, tokens_bt: Tensor, enter: Enter | None = None, *, last_only: bool = False) -> Trace:
        """Run a batch as the whole model does; rows that do not enter start from their cached residuals."""
        if enter is not None:
            check_sites(enter, self.n_sites)
            site_b, x_btd = enter.site_b, enter.x_btd
            if bool((from_tokens_b := site_b == EMBEDDING).any()):
                here_b = from_tokens_b.nonzero().flatten().to(x_btd.device)
                x_btd = x_btd.index_copy(0, here_b, self.prefix(tokens_bt[here_b]).to(x_btd))
            trace = self.whole.run(tokens_bt, Enter(site_b.clamp(min=0) + self.first_site, x_btd), last_only=last_only)
            return Trace(trace.logits_btv, self._residuals_in_span(trace.residuals))
        known = self._cached_rows(tokens_bt)
        enter = Enter.at(self.first_site, torch.stack([row[0] for row in known]))
        if last_only or not all(len(row) > 1 for row in known):
            trace = self.whole.run(tokens_bt, enter, last_only=last_only)
            for row, last_td in zip(known, trace.residuals[-1], strict=True):
                row[1:] = [last_td.detach().clone()]
            return Trace(trace.logits_btv, self._residuals_in_span(trace.residuals))
        residuals = self._residuals_in_span(self.whole.residuals(tokens_bt, self.first_site + len(self.sublayers), enter))
        answered = self.whole.run(tokens_bt, Enter.at(self.whole.n_sites - 1, torch.stack([row[1] for row in known])))
        return Trace(answered.logits_btv, residuals)

    def _residuals_in_span(self, residuals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(residuals[self.first_site : self.first_site + self.n_sites])

    @torch.no_grad()
    def _cached_rows(self, tokens_bt: Tensor) -> list[list[Tensor]]:
        """Return the cached residuals of each row, at least the one at site 0, which is computed if it is missing."""
        with lock_runs():
            device = self.device.type
            products = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
            state = (products, *(weight_version(weight) for weight in self.model.parameters()))
            if state != self._state:  # the weights, or the dtype of their products, have changed
                self._state = state
                self._row_cache.clear()
            keys = [row.tobytes() for row in tokens_bt.detach().cpu().long().contiguous().numpy()]
            known = {key: self._row_cache[key] for key in keys if key in self._row_cache}
            if missing := {key: row for row, key in enumerate(keys) if key not in known}:
                row_b = torch.tensor(list(missing.values()), device=tokens_bt.device)
                found_btd = self.whole.residuals(tokens_bt[row_b], self.first_site)[self.first_site]
                known |= {key: [x_td.clone()] for key, x_td in zip(missing, found_btd, strict=True)}
                self._row_cache |= {key: known[key] for key in missing}
                a_row = 2 * found_btd[0].numel() * found_btd.element_size()
                while len(self._row_cache) > max(len(keys), REMEMBERED // a_row):
                    del self._row_cache[next(iter(self._row_cache))]
            return [known[key] for key in keys]


def dense_of(dense: DenseModel, blocks: str | None) -> DenseModel:
    """Return the dense model that a recipe's sparse model is coupled to: a span, or the whole. Raises RecipeError."""
    whole = dense.whole if isinstance(dense, DenseSpan) else dense
    if blocks is None:
        return whole
    first, last = parse_blocks(blocks, len(whole.blocks))
    same = isinstance(dense, DenseSpan) and (dense.first_block, len(dense.blocks)) == (first, last - first)
    return dense if same else DenseSpan(whole, first, last)


@dataclass(frozen=True)
class _Ends:
    """Beginning and end of a sparse span: a dense span, the encoder at the first site, and the decoder at the last site.

    They are not part of the sparse span's weights, and its copies share them.
    """

    dense: DenseSpan
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def __deepcopy__(self, _memo: dict[int, Any]) -> _Ends:
        return self


class SparseSpan(SparseTransformer):
    """The sparse model of a span: it begins with the first bridge's encoder, and ends with the last bridge's decoder and the rest
    of the dense model. It has no weights of its own for either.
    """

    _ends: _Ends | None = None

    def attach_ends(self, dense: DenseSpan, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]) -> SparseSpan:
        """Return the model with these ends (encoder and decoder of the bridges); a weight-sharing copy if it has other ends."""
        ends = _Ends(dense, encode, decode)
        joined = self if self._ends in (None, ends) else copy(self)
        joined._ends = ends
        return joined

    @property
    def ends(self) -> _Ends:
        """The dense span and the two maps. Raises ValueError before `attach_ends`."""
        if self._ends is None:
            raise ValueError("a span's sparse model needs the dense model and bridges of a coupling; run it as part of one")
        return self._ends

    @property
    def narrow_from(self) -> int:
        """The number of sites, which is no site: after the span the dense model's attention reads every position."""
        return self.n_sites

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """Return x_bts, the encoded dense residual at site 0."""
        x_bts = self.ends.encode(self.ends.dense.prefix(tokens_bt).float())
        return tokens_innermost(x_bts) if self.compact else x_bts

    def read_scale(self, site: int, x_bts: Tensor) -> Tensor:
        """Return scale_bt1 of a sublayer's norm; 1 at the last site, where the dense model reads the decoded residual."""
        return torch.ones_like(x_bts[..., :1]) if site == self.n_sites - 1 else super().read_scale(site, x_bts)

    def _unembed(self, x_bts: Tensor, tokens_bt: Tensor, *, last_only: bool) -> Tensor:
        h_btd = self.ends.decode(x_bts.contiguous())
        return self.ends.dense.run(tokens_bt, Enter.at(self.n_sites - 1, h_btd), last_only=last_only).logits_btv

"""A circuit on held-out contrast pairs, in both models: what every test of the card starts from.

A Case runs both models once on the prompts and once on the counterfactuals; the tests ask it what the dense model says

    moved     when something is added to its residual at a site of every row
    entered   when a residual enters at one site

Its rows are pairs, in the order of their length; an item is a row at a site, of which there may be many per row. Shares are
ratios of sums over rows, since a single pair may have hardly any effect to divide by; intervals are bootstraps over pairs.

Shape legend: b pair (row), i item, t token, s sparse width, d dense width, n nodes of a location, f all nodes in one row, k draw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from bridge.bootstrap import interval
from bridge.bridges import Coupling
from bridge.circuit import NodeSpace, ablation_gate
from bridge.circuits.subject import SparseSubject, in_order
from bridge.residual import Enter, Trace
from bridge.schema import WRITE_KINDS
from bridge.sparse import Gate, Location
from bridge.tasks.tokens import TokenPairs
from bridge.transport import run_changed

_LOGITS = 2**25  # at most in a batch


@dataclass(frozen=True, eq=False)
class Case:
    """A circuit, kept_1n for a task or kept_tn for a prompt, and the pairs on which it is tested.

    whole is the sparse model with its corpus means, alone the same with the circuit's edges only.
    """

    coupling: Coupling
    whole: SparseSubject
    alone: SparseSubject
    kept: Mapping[Location, Tensor]
    pairs: TokenPairs

    @staticmethod
    def of(
        coupling: Coupling, whole: SparseSubject, alone: SparseSubject, kept: Mapping[Location, Tensor], pairs: TokenPairs
    ) -> Case:
        """The case with its pairs on the models' device, in the order of their length."""
        device = coupling.dense.device
        kept = {at: kept_tn.to(device) for at, kept_tn in kept.items()}
        return Case(coupling, whole, alone, kept, in_order(pairs.to(device)))

    @property
    def space(self) -> NodeSpace:
        """The circuit's nodes in one row."""
        return NodeSpace(self.coupling.sparse.locations(), len(next(iter(self.kept.values()))))

    @property
    def last_site(self) -> int:
        """The site that `unembed` reads."""
        return self.coupling.n_sites - 1

    @cached_property
    def dense(self) -> Trace:
        """The dense model on the prompts."""
        return self._run_dense(self.pairs.prompt_bt)

    @cached_property
    def dense_swapped(self) -> Trace:
        """The dense model on the counterfactuals."""
        return self._run_dense(self.pairs.counterfactual_bt)

    def _run_dense(self, tokens_bt: Tensor) -> Trace:
        """Residuals of every row; of the logits those where the answer is read."""
        traces = []
        for row_b in self._batches(torch.arange(len(self.pairs))):
            trace = self.coupling.dense.run(tokens_bt[row_b])
            traces.append((self.pairs.rows(row_b).at_last(trace.logits_btv).float(), trace.residuals))
        logits_bv = torch.cat([logits_bv for logits_bv, _ in traces])
        residuals = (torch.cat(parts) for parts in zip(*(residuals for _, residuals in traces), strict=True))
        return Trace(logits_bv[:, None], tuple(residuals))

    @cached_property
    def answer_b(self) -> Tensor:
        """D_b of the dense model on the prompts."""
        return self.pairs.difference(self.dense.logits_btv[:, 0])

    @cached_property
    def swap_b(self) -> Tensor:
        """What the full swap does to D_b in the dense model: its value on the counterfactual less that on the prompt."""
        return self.pairs.difference(self.dense_swapped.logits_btv[:, 0]) - self.answer_b

    @cached_property
    def _seen(self) -> tuple[Tensor, dict[Location, Tensor]]:
        """Which nodes_f are on for a prompt or its counterfactual, and by how much writes_btn differ between the two."""
        writes: dict[Location, Tensor] = {}
        on: dict[Location, Tensor] = {}

        there_bt1 = self.pairs.there_bt[:, :, None]

        def look(sign: int, location: Location, x_btn: Tensor) -> Tensor:
            here_n = ((x_btn != 0) & there_bt1).any(1).any(0)
            on[location] = here_n | on[location] if location in on else here_n
            if location.kind in WRITE_KINDS:
                writes[location] = sign * x_btn + writes.get(location, 0)
            return x_btn

        for sign, tokens_bt in ((-1, self.pairs.prompt_bt), (1, self.pairs.counterfactual_bt)):
            self.coupling.sparse.run(tokens_bt, gate=partial(look, sign), last_only=True)
        on_f = self.space.join({at: on_n.expand(self.space.n_tokens, -1) for at, on_n in on.items()})
        return on_f, {at: write_btn * there_bt1 for at, write_btn in writes.items()}

    @property
    def on_f(self) -> Tensor:
        """Which nodes are on for some prompt or counterfactual, at any position."""
        return self._seen[0]

    @property
    def written(self) -> Mapping[Location, Tensor]:
        """By write location: what each node writes on the counterfactual less what it does on the prompt, change_btn."""
        return self._seen[1]

    def _batches(self, row_i: Tensor) -> tuple[Tensor, ...]:
        size = max(1, min(64, _LOGITS // (self.pairs.prompt_bt.shape[1] * self.coupling.dense.vocabulary)))
        return row_i.split(size)

    @torch.no_grad()
    def moved(self, row_i: Tensor, site_i: Tensor, change_itd: Tensor) -> Tensor:
        """change_i of the dense model's D for items: rows with change_itd added to their residual at site_i."""
        found = []
        places = self._batches(torch.arange(len(row_i)))
        wanted = set(site_i.tolist())
        for place in places:
            row = row_i[place]
            some = self.pairs.rows(row)
            length = some.prompt_bt.shape[1]
            index = row.to(self.pairs.last_b.device)
            residuals = (x[index, :length] if site in wanted else x for site, x in enumerate(self.dense.residuals))
            plain = Trace(self.dense.logits_btv[:0], tuple(residuals))
            trace = run_changed(self.coupling, some.prompt_bt, plain, site_i[place], change_itd[place, :length])
            found.append(some.difference(some.at_last(trace.logits_btv)) - self.answer_b[index])
        return torch.cat(found)

    @torch.no_grad()
    def entered(self, site: int, h_btd: Tensor) -> Tensor:
        """D_b of the dense model with residuals entering at one site."""
        found = []
        for row_b in self._batches(torch.arange(len(self.pairs))):
            some = self.pairs.rows(row_b)
            length = some.prompt_bt.shape[1]
            trace = self.coupling.dense.run(some.prompt_bt, Enter.at(site, h_btd[row_b, :length]))
            found.append(some.difference(some.at_last(trace.logits_btv)))
        return torch.cat(found)

    def gate(self, kept_f: Tensor) -> Gate:
        """The gate under which nodes outside a mask have their corpus mean."""
        return ablation_gate(self.space.split(kept_f), self.whole.means)

    @property
    def kept_f(self) -> Tensor:
        """The circuit as a mask of all nodes in one row."""
        return self.space.join(self.kept)


def numbers(x: Tensor) -> np.ndarray:
    """A tensor as float64 numbers."""
    return x.detach().double().cpu().numpy()


def share(part_b: np.ndarray, whole_b: np.ndarray) -> float:
    """The ratio of two sums."""
    return float(part_b.sum() / whole_b.sum())


def share_interval(part_b: np.ndarray, whole_b: np.ndarray, seed: int) -> tuple[float, float] | None:
    """The 95% bootstrap interval of that ratio, over pairs; None of a single one."""
    return interval(lambda pick_kb: part_b[pick_kb].sum(1) / whole_b[pick_kb].sum(1), len(part_b), seed)

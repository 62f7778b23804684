"""A model with any of its nodes, and of its errors, at their means: every search and every measure runs it.

With a_i the value of node i after AbsTopK, m_i its mean over a reference corpus, and k_i the node's mask (bool, or a number that
mixes), the masked model computes, in the order of the computation,

    y_i = m_i + k_i (a_i - m_i)            gradient of a loss L with respect to the mask:  dL/dk_i = dL/dy_i (a_i - m_i)

so with every mask 1 it is the model itself, exactly. If the model follows the dense one (`error_nodes`), the errors are nodes as
well, one per site and token: m_e + k_e (e - m_e) is added to the stream there, and to the logits.

The granularity decides what a node is: for a prompt, a channel of a location at one token; for a task, a channel at every token
of every prompt. A missing mean is an error, because zero would be another model. `Masked` is what the sparse model and the dense
one (`dense_nodes`) share, `MaskedModel` the sparse model.

Shape legend: r masked copy of a prompt, t token, n nodes of a location, f all nodes in one row (location by location, position by
position, channel by channel), k some of them by index, s sparse width, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bridge.circuits.error_nodes import error_locations
from bridge.circuits.masked_pass import MaskedPass, supports_model
from bridge.circuits.question import Question
from bridge.kernels.cpu import tokens_contiguous
from bridge.kernels.products import tokens_innermost
from bridge.kernels.top_k import choose
from bridge.models.circuit import NodeSpace, check_means, recording_gate
from bridge.models.residual import Enter, Trace
from bridge.models.schema import ERROR
from bridge.models.span import SparseSpan
from bridge.models.sparse import Gate, Location, SparseTransformer

_ROW_TOKENS = 2048  # tokens in a batch of masked copies: large enough for the products, small enough for the caches
_ROW_NODES = 1 << 24  # mask entries in a batch: one per token and node


class Masked(ABC):
    """A model on a question's prompts, with masks over its nodes.

    sizes maps every location to its number of nodes, 1 for errors; means maps every location to its mean. Raises ValueError if a
    mean is missing, or if `by_position` is set and the question has several prompts.
    """

    _compiled: MaskedPass | None = None  # replaces the gates if it supports the model

    def __init__(
        self,
        question: Question,
        sizes: Mapping[Location, int],
        means: Mapping[Location, Tensor],
        errors: Mapping[Location, Tensor] | None = None,
        *,
        by_position: bool = False,
    ) -> None:
        if by_position and len(question) != 1:
            raise ValueError(f"nodes at positions need a question with one prompt, and this one has {len(question)}")
        self.question, self.means, self.errors = question, means, errors
        self.device, self.n_tokens = question.last_b.device, question.prompt_bt.shape[1]  # tokens of a prompt, padding included
        self.space = NodeSpace(sizes, self.n_tokens if by_position else 1)
        check_means(sizes, means)

    @abstractmethod
    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        """Return logits_rv after the prompts row_r, with every node under the gate and the stream under the correction."""

    @property
    def rows_per_batch(self) -> int:
        """Number of masked copies in a batch of sensible size."""
        return max(1, min(_ROW_TOKENS // self.n_tokens, _ROW_NODES // self.space.size))

    @cached_property
    def is_error_f(self) -> Tensor:
        """Mask of the entries of a row that are errors."""
        return self.space.repeat_by_location(at.kind == ERROR for at in self.space.sizes).to(self.device)

    def gates(self, kept_rf: Tensor, row_r: Tensor | None = None) -> tuple[Gate, Gate]:
        """Return the gate and the correction that make the model the masked copies; without errors nothing is corrected."""
        parts, row_r = self.space.split(kept_rf), self.question.rows_or_all(len(kept_rf), row_r)

        def kept(location: Location, x_rtn: Tensor) -> Tensor:
            """Return the masks of rows that have entered, at computed positions: in a narrow run only the last one."""
            kept_rtn = parts[location][: len(x_rtn)]
            return kept_rtn if kept_rtn.shape[1] == 1 else kept_rtn[:, -x_rtn.shape[1] :]

        def gate(location: Location, x_rtn: Tensor) -> Tensor:
            kept_rtn = kept(location, x_rtn)
            if kept_rtn.dtype == torch.bool:
                return choose(kept_rtn.expand(-1, x_rtn.shape[1], -1), x_rtn, self.means[location])
            kept_rtn = tokens_innermost(kept_rtn) if tokens_contiguous(x_rtn) else kept_rtn
            return torch.lerp(self.means[location].to(x_rtn.dtype), x_rtn, kept_rtn)

        def correct(location: Location, x_rts: Tensor) -> Tensor:
            if self.errors is None:
                return x_rts
            excess_rts = self._excess(location, row_r, x_rts)
            return x_rts + torch.addcmul(self.means[location], kept(location, x_rts).float(), excess_rts)

        return gate, correct

    @torch.no_grad()
    def logits(self, kept_rf: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return logits_rv after the prompts row_r, for any number of masks."""
        row_r = self.question.rows_or_all(len(kept_rf), row_r)
        if self._compiled is not None:
            return self._compiled.logits(kept_rf, row_r)
        rows = zip(kept_rf.split(self.rows_per_batch), row_r.split(self.rows_per_batch), strict=True)
        return torch.cat([self._last_logits(some_r, *self.gates(some_rf, some_r)) for some_rf, some_r in rows])

    @torch.no_grad()
    def difference(self, kept_rf: Tensor, row_r: Tensor | None = None) -> Tensor:
        """Return the question's d_r for any number of masks."""
        return self.question.difference(self.logits(kept_rf, row_r), row_r)

    def gradient(
        self,
        kept_rf: Tensor,
        loss: Callable[[Tensor], Tensor],
        row_r: Tensor | None = None,
        node_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return gradient_rf of the sum of loss(logits_rv) with respect to the mask entries, all or node_k, and loss_r."""
        row_r = self.question.rows_or_all(len(kept_rf), row_r)
        if self._compiled is not None:
            return self._compiled.gradient(kept_rf, loss, row_r, node_k)
        gate, correct = self.gates(kept_rf, row_r)
        through, change = dict[Location, Tensor](), dict[Location, Tensor]()

        def probed(location: Location, y: Tensor, change_rtn: Tensor) -> Tensor:
            change[location], through[location] = change_rtn, y if y.requires_grad else y.requires_grad_()
            return y

        def probed_gate(location: Location, x_rtn: Tensor) -> Tensor:
            return probed(location, gate(location, x_rtn), x_rtn.detach() - self.means[location].to(x_rtn.dtype))

        def probed_correct(location: Location, x_rts: Tensor) -> Tensor:
            if self.errors is None:
                return x_rts
            return probed(location, correct(location, x_rts), self._excess(location, row_r, x_rts))

        with torch.enable_grad():
            loss_r = loss(self._last_logits(row_r, probed_gate, probed_correct))
            gradients = torch.autograd.grad(loss_r.sum(), list(through.values()))
        gradient_rf = torch.zeros(kept_rf.shape, device=loss_r.device)
        into = self.space.split(gradient_rf)
        for (location, change_rtn), y_rtn in zip(change.items(), gradients, strict=True):
            entry_rtn = y_rtn * change_rtn
            entry_rtn = entry_rtn.sum(-1, keepdim=True) if location.kind == ERROR else entry_rtn
            if self.space.n_tokens == 1:
                into[location][:, 0] = entry_rtn.sum(1)
            else:
                into[location][:, -entry_rtn.shape[1] :] = entry_rtn
        return gradient_rf if node_k is None else gradient_rf[:, node_k], loss_r.detach()

    def _excess(self, location: Location, row_r: Tensor, x_rts: Tensor) -> Tensor:
        """Return the difference of each row's error from its mean."""
        assert self.errors is not None
        excess_bts = self.errors[location] - self.means[location]
        return excess_bts[:, -x_rts.shape[1] :][row_r[: len(x_rts)]]


class MaskedModel(Masked):
    """The sparse model on a question's prompts, with masks over its nodes and, if they are given, its errors.

    errors are those of the question's prompts (`error_nodes.follow_dense`); means must then include the errors' means.
    """

    def __init__(
        self,
        sparse: SparseTransformer,
        question: Question,
        means: Mapping[Location, Tensor],
        errors: Mapping[Location, Tensor] | None = None,
        *,
        by_position: bool = True,
    ) -> None:
        sizes = sparse.locations()
        if errors is not None:
            sizes |= dict.fromkeys(error_locations(sparse.n_sites), 1)
        super().__init__(question, sizes, means, errors, by_position=by_position)
        self.sparse = sparse
        self._narrow = question.is_unpadded
        self._compiled = MaskedPass(sparse, question, self.space, means, errors) if supports_model(sparse) else None

    def on_prompt(self, row: int, *, by_position: bool = False) -> MaskedModel:
        """Return the model on one of the prompts, with masks over the same nodes, or over these nodes at its positions."""
        question = self.question.rows(torch.tensor([row], device=self.device))
        length = question.prompt_bt.shape[1]
        errors = None if self.errors is None else {at: x[row : row + 1, :length] for at, x in self.errors.items()}
        return MaskedModel(self.sparse, question, self.means, errors, by_position=by_position)

    @cached_property
    def site_f(self) -> Tensor:
        """Site that a node's sublayer reads, on the CPU; for an error the site before, after whose sublayer it is added."""
        return self.space.repeat_by_location(
            at.layer - 1 if at.kind == ERROR else self.sparse.site(at) for at in self.space.sizes
        )

    @cached_property
    def active_f(self) -> Tensor:
        """Mask of the nodes that are not 0 in a run that keeps every node and every error. Errors are not included.

        If a node covers all positions and prompts (a task), it is active if it is not 0 at any token of any prompt.
        """
        there_bt1 = (torch.arange(self.n_tokens, device=self.device) <= self.question.last_b[:, None])[..., None]
        every_f, active_f = torch.ones_like(self.is_error_f), torch.zeros_like(self.is_error_f)
        for row_b in torch.arange(len(self.question)).split(self.rows_per_batch):
            values = self.node_values(every_f, row_b)
            parts = {}
            for at, n in self.space.sizes.items():
                on_btn = (values[at] != 0) & there_bt1[row_b] if at.kind != ERROR else torch.zeros(1, 1, n, dtype=torch.bool)
                on_tn = on_btn.any(0) if self.space.n_tokens > 1 else on_btn.any(0).any(0, keepdim=True)
                parts[at] = on_tn.to(self.device).expand(self.space.n_tokens, -1)
            active_f |= self.space.join(parts)
        return active_f

    # -- runs -----------------------------------------------------------------------------------------------------------

    def run(self, kept_rf: Tensor, row_r: Tensor | None = None, enter: Enter | None = None, *, narrow: bool = False) -> Trace:
        """Run a masked copy for every mask, on the prompts row_r, by default on all prompts in turn.

        With narrow, the logits are those of the last position, and what cannot reach them is not computed. Rows that enter must
        be in the order of their sites, because a sublayer sees only those that have entered.
        """
        row_r = self.question.rows_or_all(len(kept_rf), row_r)
        if narrow and self._compiled is not None and (enter is None or self._compiled.covers_stream(enter.x_btd)):
            return self._compiled.run(kept_rf, row_r, enter)
        gate, correct = self.gates(kept_rf, row_r)
        tokens_rt = self.question.prompt_bt[row_r]
        return self.sparse.run(tokens_rt, enter, gate, correct=correct, last_only=narrow, narrow=narrow)

    @torch.no_grad()
    def node_values(self, kept_f: Tensor, row_b: Tensor) -> dict[Location, Tensor]:
        """Return value_btn of every node on the prompts row_b, with no node ablated; of kept_f, only the errors' masks apply."""
        values: dict[Location, Tensor] = {}
        _, correct = self.gates(kept_f.expand(len(row_b), -1), row_b)
        self.sparse.run(self.question.prompt_bt[row_b], gate=recording_gate(values), correct=correct, last_only=True)
        return values

    @torch.no_grad()
    def logits_without(self, kept_f: Tensor, sets: Sequence[Tensor] | Tensor) -> Tensor:
        """Return logits_kv of the only prompt, under the mask less each of the sets: one node or several."""
        whole = self.run(kept_f[None], narrow=True)
        logits_kv = whole.logits_btv[:, -1].repeat(len(sets), 1)
        for some_k, trace in self.runs_without(kept_f, sets, whole):
            logits_kv[some_k] = trace.logits_btv[:, -1]
        return logits_kv

    def runs_without(
        self, kept_f: Tensor, sets: Sequence[Tensor] | Tensor, whole: Trace, *, with_reference: bool = False
    ) -> Iterator[tuple[Tensor, Trace]]:
        """Yield (some_k, trace) of narrow runs without the sets some_k, each from its first node's sublayer on, batch by batch.

        whole is the run of the full mask; with `with_reference` it is repeated as the first row of each batch.
        """
        site_k = torch.tensor([int(self.site_f[node_s.cpu()].min()) if node_s.numel() else 0 for node_s in sets])
        for some_k in self.batches(site_k, self.sparse.narrow_from):
            of_r = torch.cat([some_k[:1], some_k]) if with_reference else some_k
            kept_rf = kept_f.repeat(len(of_r), 1)
            for row, k in enumerate(some_k.tolist(), int(with_reference)):
                kept_rf[row, sets[k]] = False
            x_rts = torch.cat([whole.residuals[max(0, site)] for site in site_k[of_r].tolist()])
            yield some_k, self.run(kept_rf, None, Enter(site_k[of_r], x_rts), narrow=True)

    def batches(self, site_k: Tensor, late: int) -> Iterator[Tensor]:
        """Yield batches of row indices, in the order of site_k; rows from site `late` on have one token and are batched apart."""
        for part_k in (site_k < late, site_k >= late):
            place_k = part_k.nonzero().flatten()
            if len(place_k):
                yield from place_k[torch.argsort(site_k[place_k], stable=True)].split(self.rows_per_batch)

    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        tokens_rt = self.question.prompt_bt[row_r]
        trace = self.sparse.run(tokens_rt, gate=gate, correct=correct, last_only=True, narrow=self._narrow)
        return last_logits(self.sparse, tokens_rt, self.question.last_b[row_r], trace, correct)


def last_logits(
    sparse: SparseTransformer, tokens_bt: Tensor, last_b: Tensor, trace: Trace, correct: Gate | None = None
) -> Tensor:
    """Return logits_bv at last_b, from a run of some text with logits at the last position alone."""
    if bool((last_b == tokens_bt.shape[1] - 1).all()):
        return trace.logits_btv[:, -1]
    # prompts of several lengths: the residuals at their last tokens enter at the last site, as rows of one token
    row_b = torch.arange(len(last_b), device=last_b.device)
    if isinstance(sparse, SparseSpan):  # the dense model after the span reads every position
        trace = sparse.run(tokens_bt, Enter.at(sparse.n_sites - 1, trace.residuals[-1]), correct=correct)
        return trace.logits_btv[row_b, last_b]
    x_b1s = trace.residuals[-1].permute(2, 0, 1)[:, row_b, last_b].t()[:, None]  # so that gradients keep its memory layout
    enter = Enter.at(sparse.n_sites - 1, x_b1s)
    return sparse.run(tokens_bt[row_b, last_b][:, None], enter, correct=correct).logits_btv[:, 0]


def integrated_gradients(
    masked: Masked, gradient: Callable[[Tensor], Tensor], over_f: Tensor, alphas: int = 4, kept_f: Tensor | None = None
) -> Tensor:
    """Return score_f: integrated gradients of the nodes and errors over_f, mixed together from mean to value; 0 for others.

    Others are kept if kept_f says so. gradient(mask_rf) returns the gradient_rf of the scored quantity.
    """
    alpha_r1 = (torch.arange(alphas, device=over_f.device)[:, None] + 0.5) / alphas
    fixed_f = torch.zeros(over_f.shape, device=over_f.device) if kept_f is None else (kept_f & ~over_f).float()
    total_f = torch.zeros_like(fixed_f)
    for some_r1 in alpha_r1.split(masked.rows_per_batch):
        total_f += gradient(fixed_f + some_r1 * over_f).sum(0)
    return torch.where(over_f, total_f / alphas, 0)


def effects_on_difference(masked: MaskedModel, alphas: int = 4) -> Tensor:
    """Return score_f: integrated gradients of the question's d for all nodes, in nats; 0 for errors."""
    return integrated_gradients(
        masked, lambda mask_rf: masked.gradient(mask_rf, masked.question.difference)[0], ~masked.is_error_f, alphas
    )

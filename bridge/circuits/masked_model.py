"""A model with any of its nodes, and of its errors, at their means: what every search and every measure runs.

With a_i what AbsTopK has left of node i and m_i its mean over a reference corpus, and k_i the node's mask (bool, or a number that
mixes), the masked model has, in the order of the computation,

    y_i = m_i + k_i (a_i - m_i)            gradient of a loss L with respect to the mask:  dL/dk_i = dL/dy_i (a_i - m_i)

so that with every mask 1 it is the model itself, exactly. Where the model follows the dense one (`error_nodes`) the errors are
nodes as well, one per site and token: m_e + k_e (e - m_e) is added to the stream there, and to the logits.

What a node is, the granularity says: of a prompt a channel of a location at one token; of a task a channel at every token of
every prompt. A mean that is missing is an error: zero is another model. `Masked` is what the sparse model and the dense one
(`dense_nodes`) share, `MaskedModel` the sparse model.

Shape legend: r masked copy of a prompt, t token, n nodes of a location, f all nodes in one row (location by location, position by
position, channel by channel), k some of them by their place, s sparse width, v vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from bridge.circuits.error_nodes import error_locations
from bridge.circuits.masked_pass import MaskedPass, serves
from bridge.circuits.question import Question
from bridge.kernels.cpu import tokens_contiguous
from bridge.kernels.products import tokens_inside
from bridge.kernels.top_k import choose
from bridge.models.circuit import NodeSpace, check_means
from bridge.models.residual import Enter, Trace
from bridge.models.schema import ERROR
from bridge.models.span import SparseSpan
from bridge.models.sparse import Gate, Location, SparseTransformer

_ROW_TOKENS = 2048  # tokens in a batch of masked copies: large enough for the products, small enough for the caches
_ROW_NODES = 1 << 24  # and mask entries, which outnumber the tokens by the nodes of a token


class Masked(ABC):
    """A model on a question's prompts, with masks over its nodes.

    sizes are the nodes of every location, and 1 for the place of every error; means maps every location to its mean. Raises
    ValueError where a mean is missing, and where nodes at positions are asked for of several prompts.
    """

    _compiled: MaskedPass | None = None  # what runs in place of the gates, where it serves the model

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
            raise ValueError(f"nodes at positions are those of one prompt, and the question has {len(question)}")
        self.question, self.means, self.errors = question, means, errors
        self.device, self.n_tokens = question.last_b.device, question.prompt_bt.shape[1]  # tokens of a prompt, padding included
        self.space = NodeSpace(sizes, self.n_tokens if by_position else 1)
        check_means(sizes, means)

    @abstractmethod
    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        """logits_rv after some of the prompts, every node through a gate and the stream through a correction."""

    @property
    def rows(self) -> int:
        """Number of masked copies in a batch of sensible size."""
        return max(1, min(_ROW_TOKENS // self.n_tokens, _ROW_NODES // self.space.size))

    @cached_property
    def is_error_f(self) -> Tensor:
        """Mask of the places of a row that are errors."""
        return self.space.by_location(at.kind == ERROR for at in self.space.sizes).to(self.device)

    def gates(self, kept_rf: Tensor, row_r: Tensor | None = None) -> tuple[Gate, Gate]:
        """The gate and the correction under which the model is the masked copies; without errors nothing is corrected."""
        parts, row_r = self.space.split(kept_rf), self.question.in_turn(len(kept_rf), row_r)

        def kept(location: Location, x_rtn: Tensor) -> Tensor:
            """The masks of rows that have entered, at positions that are computed: of a narrow run the last one alone."""
            kept_rtn = parts[location][: len(x_rtn)]
            return kept_rtn if kept_rtn.shape[1] == 1 else kept_rtn[:, -x_rtn.shape[1] :]

        def gate(location: Location, x_rtn: Tensor) -> Tensor:
            kept_rtn = kept(location, x_rtn)
            if kept_rtn.dtype == torch.bool:
                return choose(kept_rtn.expand(-1, x_rtn.shape[1], -1), x_rtn, self.means[location])
            kept_rtn = tokens_inside(kept_rtn) if tokens_contiguous(x_rtn) else kept_rtn
            return torch.lerp(self.means[location].to(x_rtn.dtype), x_rtn, kept_rtn)

        def correct(location: Location, x_rts: Tensor) -> Tensor:
            if self.errors is None:
                return x_rts
            excess_rts = self._excess(location, row_r, x_rts)
            return x_rts + torch.addcmul(self.means[location], kept(location, x_rts).float(), excess_rts)

        return gate, correct

    @torch.no_grad()
    def logits(self, kept_rf: Tensor, row_r: Tensor | None = None) -> Tensor:
        """logits_rv after the prompts, of any number of masks."""
        row_r = self.question.in_turn(len(kept_rf), row_r)
        if self._compiled is not None:
            return self._compiled.logits(kept_rf, row_r)
        rows = zip(kept_rf.split(self.rows), row_r.split(self.rows), strict=True)
        return torch.cat([self._last_logits(some_r, *self.gates(some_rf, some_r)) for some_rf, some_r in rows])

    @torch.no_grad()
    def difference(self, kept_rf: Tensor, row_r: Tensor | None = None) -> Tensor:
        """d_r of the question under any number of masks."""
        return self.question.difference(self.logits(kept_rf, row_r), row_r)

    def gradient(
        self,
        kept_rf: Tensor,
        loss: Callable[[Tensor], Tensor],
        row_r: Tensor | None = None,
        node_k: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """gradient_rf of the sum of loss(logits_rv) with respect to the entries of the masks, all or node_k, and loss_r."""
        row_r = self.question.in_turn(len(kept_rf), row_r)
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
        """Difference of an error of each row from its mean."""
        assert self.errors is not None
        excess_bts = self.errors[location] - self.means[location]
        return excess_bts[:, -x_rts.shape[1] :][row_r[: len(x_rts)]]


class MaskedModel(Masked):
    """The sparse model on a question's prompts, with masks over its nodes, and where they are given its errors.

    errors are those of the question's prompts (`error_nodes.follow`), and means have theirs as well.
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
        self._narrow = question.whole_rows
        self._compiled = MaskedPass(sparse, question, self.space, means, errors) if serves(sparse) else None

    def only(self, row: int) -> MaskedModel:
        """These nodes on one of the prompts."""
        question = self.question.rows(torch.tensor([row], device=self.device))
        length = question.prompt_bt.shape[1]
        errors = None if self.errors is None else {at: x[row : row + 1, :length] for at, x in self.errors.items()}
        return MaskedModel(self.sparse, question, self.means, errors, by_position=False)

    @cached_property
    def site_f(self) -> Tensor:
        """The site that a node's sublayer reads, on the CPU; of an error the site before its own, which it is added behind."""
        return self.space.by_location(at.layer - 1 if at.kind == ERROR else self.sparse.site(at) for at in self.space.sizes)

    # -- runs -----------------------------------------------------------------------------------------------------------

    def run(self, kept_rf: Tensor, row_r: Tensor | None = None, enter: Enter | None = None, *, narrow: bool = False) -> Trace:
        """A masked copy for every mask, of the prompts row_r, by default of every prompt in turn.

        With narrow the logits are those of the last position, and what cannot reach them is not computed. Rows that enter must
        come in the order of their sites, since a sublayer sees only those that have entered.
        """
        row_r = self.question.in_turn(len(kept_rf), row_r)
        if narrow and self._compiled is not None and (enter is None or self._compiled.silent(enter.x_btd)):
            return self._compiled.run(kept_rf, row_r, enter)
        gate, correct = self.gates(kept_rf, row_r)
        tokens_rt = self.question.prompt_bt[row_r]
        return self.sparse.run(tokens_rt, enter, gate, correct=correct, last_only=narrow, narrow=narrow)

    @torch.no_grad()
    def logits_without(self, kept_f: Tensor, sets: Sequence[Tensor] | Tensor) -> Tensor:
        """logits_kv of the one prompt under a mask less a node, or all of some nodes, for each of the sets."""
        whole = self.run(kept_f[None], narrow=True)
        logits_kv = whole.logits_btv[:, -1].repeat(len(sets), 1)
        for some_k, trace in self.runs_without(kept_f, sets, whole):
            logits_kv[some_k] = trace.logits_btv[:, -1]
        return logits_kv

    def runs_without(
        self, kept_f: Tensor, sets: Sequence[Tensor] | Tensor, whole: Trace, *, beside: bool = False
    ) -> Iterator[tuple[Tensor, Trace]]:
        """(some_k, trace) of narrow runs without the sets some_k, each from the sublayer of its first node on, batch by batch.

        whole is the mask's own run; with `beside` it is done again as the first row of each batch.
        """
        site_k = torch.tensor([int(self.site_f[node_s.cpu()].min()) if node_s.numel() else 0 for node_s in sets])
        for some_k in self.batches(site_k, self.sparse.narrow_from):
            of_r = torch.cat([some_k[:1], some_k]) if beside else some_k
            kept_rf = kept_f.repeat(len(of_r), 1)
            for row, k in enumerate(some_k.tolist(), int(beside)):
                kept_rf[row, sets[k]] = False
            x_rts = torch.cat([whole.residuals[max(0, site)] for site in site_k[of_r].tolist()])
            yield some_k, self.run(kept_rf, None, Enter(site_k[of_r], x_rts), narrow=True)

    def batches(self, site_k: Tensor, late: int) -> Iterator[Tensor]:
        """Places of rows that enter at site_k, in the order of their sites; those from `late` on, of one token, apart."""
        for part_k in (site_k < late, site_k >= late):
            place_k = part_k.nonzero().flatten()
            if len(place_k):
                yield from place_k[torch.argsort(site_k[place_k], stable=True)].split(self.rows)

    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        tokens_rt = self.question.prompt_bt[row_r]
        trace = self.sparse.run(tokens_rt, gate=gate, correct=correct, last_only=True, narrow=self._narrow)
        return last_logits(self.sparse, tokens_rt, self.question.last_b[row_r], trace, correct)


def last_logits(
    sparse: SparseTransformer, tokens_bt: Tensor, last_b: Tensor, trace: Trace, correct: Gate | None = None
) -> Tensor:
    """logits_bv at last_b, of a run of some text that was asked for those of the last position alone."""
    if bool((last_b == tokens_bt.shape[1] - 1).all()):
        return trace.logits_btv[:, -1]
    # prompts of several lengths: what is at their last tokens enters at the last site, as rows of one token
    row_b = torch.arange(len(last_b), device=last_b.device)
    if isinstance(sparse, SparseSpan):  # what is behind it reads every position
        trace = sparse.run(tokens_bt, Enter.at(sparse.n_sites - 1, trace.residuals[-1]), correct=correct)
        return trace.logits_btv[row_b, last_b]
    x_b1s = trace.residuals[-1].permute(2, 0, 1)[:, row_b, last_b].t()[:, None]  # so that gradients lie as it does
    enter = Enter.at(sparse.n_sites - 1, x_b1s)
    return sparse.run(tokens_bt[row_b, last_b][:, None], enter, correct=correct).logits_btv[:, 0]


def integrated_gradients(
    masked: Masked, gradient: Callable[[Tensor], Tensor], over_f: Tensor, alphas: int = 4, kept_f: Tensor | None = None
) -> Tensor:
    """score_f of the nodes and errors over_f, mixed in together from their means to their values; 0 of all others.

    Others are kept where kept_f says so. gradient(mask_rf) gives the gradient_rf of what is scored.
    """
    alpha_r1 = (torch.arange(alphas, device=over_f.device)[:, None] + 0.5) / alphas
    fixed_f = torch.zeros(over_f.shape, device=over_f.device) if kept_f is None else (kept_f & ~over_f).float()
    total_f = torch.zeros_like(fixed_f)
    for some_r1 in alpha_r1.split(masked.rows):
        total_f += gradient(fixed_f + some_r1 * over_f).sum(0)
    return torch.where(over_f, total_f / alphas, 0)

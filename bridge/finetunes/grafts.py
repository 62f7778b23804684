"""Run the base's sparse model with the fine-tune's own change of each node added: none of the changes, all of them, or some.

A is the base's coupling and B the coupling adapted from it, so nodes correspond: same location, same channel. Both sparse models
follow their own dense model on the prompt (`circuits/error_nodes`). With a_i(B) the value of node i in B's run, and F_i(A; B) the
value that A's weights compute from the node's inputs in B's run, the node's *own change* is

    delta_i = a_i(B) - F_i(A; B)

It is 0 if only the inputs differ: a change is located where the weights changed, not where it is passed on. Besides the nodes,
there are own changes of the embedding, the errors and the unembedding, one vector each per token:

    embedding     E_B(tokens) - E_A(tokens)                  error     e_j(B) - e_j(A) at site j, and on the logits
    unembedding   U_B(x) - U_A(x) of B's last residual x

A *graft* is A's run on the prompt, following the base's dense model, with some of these changes added at their own places;
everything after them is computed as usual. With no change its answer is exactly the base's, with all changes exactly the
fine-tuned model's, so the changes account for the change of the answer without remainder.

Shape legend: b batch row (one), r graft, t token, n nodes of a location, s sparse width, v vocabulary, f all changes in one row
(nodes and errors as in a MaskedModel, then the embedding's and the unembedding's).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed, error_locations
from bridge.circuits.question import Question
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import EMBEDDING, NodeSpace, recording_gate
from bridge.models.residual import Trace
from bridge.models.schema import ERROR
from bridge.models.sparse import Location, SparseTransformer

KINDS = ("node", EMBEDDING.kind, ERROR, "unembedding")  # kinds of changes; that of a vector is the kind of its location
_ROW_TOKENS = 1024  # number of tokens in a batch of grafts


@dataclass(frozen=True, eq=False)
class Grafts:
    """Own changes of every node on the one prompt of a question, and runs of A with any of these changes added.

    before and after are the node values in A's and B's run, own the nodes' own changes, and vectors the other own changes by
    the location where they are added; errors are A's.
    """

    sparse: SparseTransformer
    question: Question
    errors: Mapping[Location, Tensor]
    before: Mapping[Location, Tensor]
    after: Mapping[Location, Tensor]
    own: Mapping[Location, Tensor]
    vectors: Mapping[Location, Tensor]

    @staticmethod
    @torch.no_grad()
    def of(base: CoupledModels, tuned: CoupledModels, question: Question, followed: Followed, tuned_followed: Followed) -> Grafts:
        """Compute the own changes on a prompt that both couplings have followed."""
        tokens_bt, last = question.prompt_bt, base.n_sites
        before, after, own = dict[Location, Tensor](), dict[Location, Tensor](), dict[Location, Tensor]()
        base.sparse.run(
            tokens_bt, gate=recording_gate(before), correct=lambda at, x_bts: x_bts + followed.errors[at], last_only=True
        )
        reached: dict[Location, Tensor] = {}

        def recorded(at: Location, x_bts: Tensor) -> Tensor:
            reached[at] = x_bts + tuned_followed.errors[at]
            return x_bts if at.layer == last else reached[at]

        plain = tuned.sparse.run(tokens_bt, gate=recording_gate(after), correct=recorded, last_only=True)

        def compared(at: Location, x_btn: Tensor) -> Tensor:
            own[at] = after[at] - x_btn
            return after[at]

        def as_tuned(at: Location, x_bts: Tensor) -> Tensor:
            return x_bts if at.layer == last else reached[at]

        here = base.sparse.run(tokens_bt, gate=compared, correct=as_tuned, last_only=True)
        vectors = {at: tuned_followed.errors[at] - followed.errors[at] for at in error_locations(last)}
        vectors[EMBEDDING] = tuned.sparse.embed(tokens_bt) - base.sparse.embed(tokens_bt)
        vectors[unembedding(last)] = (plain.logits_btv - here.logits_btv)[:, -1:]
        return Grafts(base.sparse, question, followed.errors, before, after, own, vectors)

    @cached_property
    def space(self) -> NodeSpace:
        """Index of all changes in one row: one number per node, and per vector and token the fraction that is added."""
        sizes = self.sparse.locations() | dict.fromkeys(self.vectors, 1)
        return NodeSpace(sizes, self.question.prompt_bt.shape[1])

    @cached_property
    def own_f(self) -> Tensor:
        """The row with every change added in full."""
        whole = {at: torch.ones(self.space.n_tokens, 1, device=self.sparse.device) for at in self.vectors}
        return self.space.join({at: x_btn[0] for at, x_btn in self.own.items()} | whole)

    @cached_property
    def kind_f(self) -> Tensor:
        """Kind of each change, as an index into KINDS."""
        kinds = (KINDS.index("node" if at in self.own else at.kind) for at in self.space.sizes)
        return self.space.repeat_by_location(kinds).to(self.sparse.device)

    @property
    def nodes_f(self) -> Tensor:
        """Mask of the changes that belong to nodes."""
        return self.kind_f == 0

    def rows_writing_at(self, site: int, added_rf: Tensor) -> Tensor:
        """Return wrote_r11, the mask of the grafts that change a node of the sublayer that reads a site."""
        parts = self.space.split(added_rf)
        here = [parts[at].flatten(1).any(1) for at in self.own if self.sparse.site(at) == site]
        return torch.stack(here).any(0)[:, None, None]

    @property
    def rows_per_batch(self) -> int:
        """Number of grafts in a batch."""
        return max(1, _ROW_TOKENS // self.space.n_tokens)

    def run(self, added_rf: Tensor) -> Trace:
        """Run A on the prompt with these changes added, one graft per row; the logits are those of the last position."""
        parts = self.space.split(added_rf)
        last = self.sparse.n_sites

        def gate(at: Location, x_rtn: Tensor) -> Tensor:
            return x_rtn + parts[at]

        def correct(at: Location, x_rts: Tensor) -> Tensor:
            x_rts = x_rts + self.errors[at] + parts[at][:, -x_rts.shape[1] :] * self.vectors[at]
            also = EMBEDDING if at.layer == 0 else unembedding(last) if at.layer == last else None
            return x_rts if also is None else x_rts + parts[also][:, -x_rts.shape[1] :] * self.vectors[also]

        tokens_rt = self.question.prompt_bt.expand(len(added_rf), -1)
        return self.sparse.run(tokens_rt, gate=gate, correct=correct, last_only=True)

    @torch.no_grad()
    def difference(self, added_rf: Tensor) -> Tensor:
        """Return d_r of the question for each graft."""
        return torch.cat([self._difference(some_rf) for some_rf in added_rf.split(self.rows_per_batch)])

    def attributions(self, alphas: int = 8) -> Tensor:
        """Return effect_f of each change on d, in nats: integrated gradients from no change to all; their sum is d's change."""
        total_f = torch.zeros_like(self.own_f)
        alpha_r1 = (torch.arange(alphas, device=total_f.device)[:, None] + 0.5) / alphas
        for some_r1 in alpha_r1.split(self.rows_per_batch):
            with torch.enable_grad():
                added_rf = (some_r1 * self.own_f).requires_grad_()
                total_f += torch.autograd.grad(self._difference(added_rf).sum(), added_rf)[0].sum(0)
        return total_f / alphas * self.own_f

    def _difference(self, added_rf: Tensor) -> Tensor:
        return self.question.difference(self.run(added_rf).logits_btv[:, -1])


def unembedding(n_sites: int) -> Location:
    """Return the location of the unembedding's own change."""
    return Location(n_sites, "unembedding")

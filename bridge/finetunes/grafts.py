"""The base's sparse model with what a fine-tune changed in each of its nodes added: none of it, all of it, or some.

A is the base's coupling, B the one that went on from it, so that nodes correspond: same location, same channel. Both sparse
models follow their own dense model on the prompt (`circuits/error_nodes`). With a_i(B) the value of node i in B's run and
F_i(A; B) what A's weights make of the inputs that the node has there, its *own change* is

    delta_i = a_i(B) - F_i(A; B)

which is 0 wherever only the inputs are others: a change is where the weights changed, not where it is passed on. Beside the
nodes, a vector each at every token, the same of the embedding, of the errors, and of what is added to the logits:

    embedding     E_B(tokens) - E_A(tokens)                  error     e_j(B) - e_j(A) at site j, and on the logits
    unembedding   U_B(x) - U_A(x) of B's last residual x

A *graft* is A's run on the prompt, following the base's dense model, with some of these added where they arise, everything else
computing on. With none it answers as the base, with all of them as the fine-tuned model, exactly; so that they share out the
change of the answer without remainder.

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

KINDS = ("node", EMBEDDING.kind, ERROR, "unembedding")  # of a change: those of vectors are of the places where they are added
_ROW_TOKENS = 1024  # tokens of grafts in a batch


@dataclass(frozen=True, eq=False)
class Grafts:
    """Own changes of every node on a question's one prompt, and runs of A with any of them.

    before and after are the values of nodes in A's and in B's run; own what the fine-tune changed in each; vectors the changes
    of the stream by where they are added.
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
        """The own changes on a prompt that both couplings have followed."""
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
        """Every change in one row: of a node a number, of a vector its share."""
        sizes = self.sparse.locations() | dict.fromkeys(self.vectors, 1)
        return NodeSpace(sizes, self.question.prompt_bt.shape[1])

    @cached_property
    def own_f(self) -> Tensor:
        """Every change in full."""
        whole = {at: torch.ones(self.space.n_tokens, 1, device=self.sparse.device) for at in self.vectors}
        return self.space.join({at: x_btn[0] for at, x_btn in self.own.items()} | whole)

    @cached_property
    def kind_f(self) -> Tensor:
        """Kind of each change, by its place in KINDS."""
        kinds = (KINDS.index("node" if at in self.own else at.kind) for at in self.space.sizes)
        return self.space.by_location(kinds).to(self.sparse.device)

    @property
    def nodes_f(self) -> Tensor:
        """Mask of the changes that are a node's."""
        return self.kind_f == 0

    def writes(self, site: int, added_rf: Tensor) -> Tensor:
        """Mask wrote_r11 of the grafts that change a node of the sublayer that reads a site."""
        parts = self.space.split(added_rf)
        here = [parts[at].flatten(1).any(1) for at in self.own if self.sparse.site(at) == site]
        return torch.stack(here).any(0)[:, None, None]

    @property
    def rows(self) -> int:
        """Grafts in a batch of sensible size."""
        return max(1, _ROW_TOKENS // self.space.n_tokens)

    def run(self, added_rf: Tensor) -> Trace:
        """A's run on the prompt with these changes added, one graft a row; its logits are those of the last position."""
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
        """d_r of the question under some grafts."""
        return torch.cat([self._difference(some_rf) for some_rf in added_rf.split(self.rows)])

    def attributions(self, alphas: int = 8) -> Tensor:
        """effect_f of each change on d: integrated gradients from no graft to all of them, in nats; they add up to the change."""
        total_f = torch.zeros_like(self.own_f)
        alpha_r1 = (torch.arange(alphas, device=total_f.device)[:, None] + 0.5) / alphas
        for some_r1 in alpha_r1.split(self.rows):
            with torch.enable_grad():
                added_rf = (some_r1 * self.own_f).requires_grad_()
                total_f += torch.autograd.grad(self._difference(added_rf).sum(), added_rf)[0].sum(0)
        return total_f / alphas * self.own_f

    def _difference(self, added_rf: Tensor) -> Tensor:
        return self.question.difference(self.run(added_rf).logits_btv[:, -1])


def unembedding(n_sites: int) -> Location:
    """The place of the unembedding's own change."""
    return Location(n_sites, "unembedding")

"""A task's circuit in the form that the evidence uses: taken from a search's result, and run on pairs of prompts in both models.

The evidence reads a search's result through this module only.

Shape legend: b prompt, t token, n nodes of a location, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed, error_locations, follow_dense, reference_means
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.data.task_tokens import TokenPairs
from bridge.errors import UserError
from bridge.evidence.carry import Transporter
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node, NodeSpace
from bridge.models.residual import Trace
from bridge.models.sparse import ERROR, Location
from bridge.nodes.statistics import sparse_fingerprint
from bridge.studies.result import TaskResult

_LOGITS = 2**24  # logits of dense runs at a time, at most


class CardError(UserError):
    """A card that cannot be made or read, in one line."""


@dataclass(frozen=True, eq=False)
class TaskCircuit:
    """A task's circuit: kept_1n (bool) and means_n by location, including errors if its search explained the dense model.

    sparse is its verdict in the sparse model, seeds_agree whether the circuits of several seeds overlap (None: not known).
    """

    task: str
    kept: Mapping[Location, Tensor]
    means: Mapping[Location, Tensor]
    sparse_verdict: str
    seeds_agree: bool | None

    @staticmethod
    def of(result: TaskResult, coupling: CoupledModels) -> TaskCircuit:
        """The circuit of a result. Raises CardError if it was searched in other weights, or if it is a null's."""
        facts, circuit = result.facts, result.circuit
        if facts.null is not None:
            raise CardError(f"the circuit of {facts.task}", f"was searched as a null ({facts.null})", "name an ordinary circuit")
        if facts.provenance.get("sparse_fingerprint") != sparse_fingerprint(coupling.sparse):
            raise CardError(
                f"the circuit of {facts.task}",
                "is not of this coupling: it was searched in other weights",
                "give the coupling that it was searched in (‹bridge›), or search again",
            )
        kept, means = dict(circuit.kept), dict(circuit.means)
        if facts.explains == "dense" and coupling.reference_bt is not None:
            of_text = reference_means(coupling, coupling.reference_bt)
            for at in error_locations(coupling.n_sites):
                kept[at], means[at] = torch.tensor([[Node(at, 0).name in facts.errors]]), of_text[at]
        return TaskCircuit(facts.task, kept, means, result.report.verdict, result.report["stable"].passed)

    @property
    def nodes(self) -> int:
        """Number of nodes, without errors."""
        return sum(int(kept_1n.sum()) for at, kept_1n in self.kept.items() if at.kind != ERROR)

    def kept_f(self, space: NodeSpace, device: torch.device) -> Tensor:
        """The circuit as a mask; nodes that it does not name are not kept."""
        none = {at: torch.zeros(1, n, dtype=torch.bool) for at, n in space.sizes.items()}
        return space.join({at: self.kept.get(at, none_1n).cpu() for at, none_1n in none.items()}).to(device)

    def masked(self, coupling: CoupledModels, pairs: TokenPairs, errors: Mapping[Location, Tensor] | None = None) -> MaskedModel:
        """The sparse model on the prompts of some pairs; errors, if the circuit has any, are at their means unless given."""
        device, question = coupling.dense.device, Question.of_pairs(pairs)
        means = {at: mean_n.to(device) for at, mean_n in self.means.items()}
        of_errors = [at for at in means if at.kind == ERROR]
        shape = pairs.prompt_bt.shape
        if errors is None:
            errors = {at: means[at].expand(shape[0], 1 if at.layer == coupling.n_sites else shape[1], -1) for at in of_errors}
        return MaskedModel(coupling.sparse, question, means, errors if of_errors else None, by_position=False)

    def make_transporter(self, coupling: CoupledModels, pairs: TokenPairs) -> Transporter:
        """Both models on the prompts of some pairs; the reference run keeps every node, and the circuit's errors."""
        followed = followed_rows(coupling, pairs.prompt_bt, pairs.last_b)
        masked = self.masked(coupling, pairs, followed.errors)
        loss = CircuitLoss(masked, followed.dense_bv, SearchConfig())
        return Transporter(coupling, loss, followed.dense, self.kept_f(masked.space, coupling.dense.device))


def followed_rows(coupling: CoupledModels, prompt_bt: Tensor, last_b: Tensor) -> Followed:
    """The errors on any number of prompts, and the dense run; only the dense logits after each prompt are kept."""
    rows = max(1, _LOGITS // (prompt_bt.shape[1] * coupling.dense.vocabulary))
    parts = [follow_dense(coupling, *some) for some in zip(prompt_bt.split(rows), last_b.split(rows), strict=True)]
    dense_bv = torch.cat([part.dense_bv for part in parts])
    residuals = tuple(torch.cat(x) for x in zip(*(part.dense.residuals for part in parts), strict=True))
    errors = {at: torch.cat([part.errors[at] for part in parts]) for at in parts[0].errors}
    return Followed(Trace(dense_bv[:, None], residuals), dense_bv, errors)

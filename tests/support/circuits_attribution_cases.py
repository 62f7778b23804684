"""What tests share: circuits_attribution_cases."""

from __future__ import annotations

import torch
from support.circuit_cases import VOCABULARY, prompt
from torch import Tensor

from bridge.circuits.error_nodes import error_locations
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.graph.attribution import Edges, draw_edges
from bridge.graph.flow import flow_through
from bridge.models.circuit import Edge, Node, corpus_means
from bridge.models.sparse import Gate, Location, SparseTransformer


def masked_model(sparse: SparseTransformer, *, length: int = 6, contrast: int | None = None, errors: bool = True) -> MaskedModel:
    """A sparse model on a prompt, in float64, with errors and means made up."""
    tokens_bt = torch.randint(VOCABULARY, (8, 8), generator=torch.Generator().manual_seed(1))
    means = {at: mean_n.double() for at, mean_n in corpus_means(sparse, tokens_bt).items()}
    generator = torch.Generator().manual_seed(5)
    made = {}
    for at in error_locations(sparse.n_sites) if errors else ():
        last = at.layer == sparse.n_sites
        shape = (1, 1, VOCABULARY) if last else (1, length, sparse.width)
        made[at] = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        means[at] = 0.1 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    return MaskedModel(sparse, Question.of_prompt(prompt(length), 3, contrast), means, made or None)


def some_kept(masked: MaskedModel, density: float = 0.6, seed: int = 2) -> Tensor:
    """A random circuit, errors included."""
    return torch.rand(masked.space.size, generator=torch.Generator().manual_seed(seed)) < density


def edges_of(masked: MaskedModel, kept_f: Tensor, most: int | None = None) -> Edges:
    return draw_edges(flow_through(masked, kept_f), most)


class Frozen:
    """S_C with every node held at its value but one changed source, and one target left free to answer."""

    def __init__(self, masked: MaskedModel, kept_f: Tensor) -> None:
        self.masked, self.sparse = masked, masked.sparse
        self.kept_f = kept_f
        self.tokens_1t = masked.question.prompt_bt
        self.values: dict[Location, Tensor] = {}
        gate, self.correct = masked.gates(kept_f[None])

        def record(location: Location, x_1tn: Tensor) -> Tensor:
            self.values[location] = gate(location, x_1tn)
            return self.values[location]

        self.trace = self.sparse.run(self.tokens_1t, gate=record, correct=self.correct, last_only=True)

    def correction(self, source: Node | None, share: float = 1.0) -> Gate:
        """What is added to the stream, with one error moved by a share of the way to its mean."""

        def correct(location: Location, x_1ts: Tensor) -> Tensor:
            x_1ts = self.correct(location, x_1ts)
            if source is not None and location == source.location:
                assert self.masked.errors is not None and source.position is not None
                place = source.position if location.layer < self.sparse.n_sites else 0
                x_1ts = x_1ts.clone()
                x_1ts[0, place] -= share * (self.masked.errors[location][0, place] - self.masked.means[location])
            return x_1ts

        return correct

    def deviation(self, node: Node) -> float:
        value = self.values[node.location][0, node.position, node.index]
        return float(value - self.masked.means[node.location][node.index])

    def target(self, edge: Edge, share: float) -> float:
        """What the target computes when the source is moved by a share of the way to its mean."""
        seen = []

        def gate(location: Location, x_btn: Tensor) -> Tensor:
            if location == edge.target.location:
                seen.append(float(x_btn[0, edge.target.position, edge.target.index]))
            x_btn = self.values[location].clone()
            if location == edge.source.location:
                x_btn[0, edge.source.position, edge.source.index] -= share * self.deviation(edge.source)
            return x_btn

        self.sparse.run(self.tokens_1t, gate=gate, correct=self.correct, last_only=True)
        return seen[0]


def some_edges(edges: tuple[Edge, ...], kind: str, count: int = 25) -> list[Edge]:
    found = [edge for edge in edges if edge.kind == kind]
    assert found, kind
    return found[:: max(1, len(found) // count)]

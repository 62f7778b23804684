"""What tests share: studies_result_cases."""

from __future__ import annotations

import torch
from support.models import planted_pairs

from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import NestedMasks
from bridge.circuits.subject import SparseSubject
from bridge.data.task_tokens import score
from bridge.models.circuit import Circuit, Edge, Node
from bridge.models.sparse import Location
from bridge.studies.result import SeedRun, Size, TaskFacts, TaskResult
from bridge.studies.search import search_config
from bridge.verdicts.task_search import gather_task


def planted_result(subject: SparseSubject, task: str, neurons: tuple[int, ...] = (0, 1)) -> TaskResult:
    """The result that a search for the planted circuit, or a part of it, would leave."""
    kept = {at: torch.zeros(1, n, dtype=torch.bool) for at, n in subject.space.sizes.items()}
    edges: list[Edge] = []
    read, act, write = (Location(0, kind) for kind in ("mlp_in", "mlp_act", "mlp_out"))
    for neuron in neurons:
        kept[read][0, neuron] = kept[act][0, neuron] = kept[write][0, neuron + 2] = True
        edges.append(Edge(Node(read, neuron), Node(act, neuron), "weight", 2.0, -1 / 3))
        edges.append(Edge(Node(act, neuron), Node(write, neuron + 2), "weight", 2.0, -0.1))
    kept_f, config, scores = subject.space.join(kept), search_config(), score(subject.sparse, planted_pairs(4))
    masked = MaskedModel(subject.sparse, Question.of_pairs(planted_pairs(4).both_members()), subject.means, by_position=False)
    test = CircuitLoss(masked, masked.logits(torch.ones(8, len(kept_f), dtype=torch.bool)), config)
    levels = config.nested()[:-1]
    nested = NestedMasks(levels, torch.where(kept_f, 0, len(levels)), (0.5,) * len(levels))
    report, measured = gather_task(test, nested, [kept_f], [len(edges)] * len(levels), 1000, scores, scores)
    facts = TaskFacts(
        task=task, language="toy", drop_rate=0.25, explains="dense", null=None, search=config, sparse_scores=scores,
        dense_scores=scores, runs=(SeedRun(0, int(kept_f.sum()), 0, 0.5),), whole=Size(subject.space.size, 5000), levels=measured,
        opening=config.opening, errors=(), entries={"embedding": 2, "unembedding": 4, "bigram": 0},
        dense_whole=Size(100, 10_000), dense=Size(50, 1000), why_not_dense="", provenance={"dense": "tiny"}, seconds=1.5,
    )  # fmt: skip
    means = {at: subject.means[at] for at in kept}
    inclusion = {at: kept_1n[0].float() for at, kept_1n in kept.items()}
    level = {at: torch.where(kept_1n[0], 0, len(levels)).to(torch.int8) for at, kept_1n in kept.items()}
    return TaskResult(Circuit(task, kept, means, tuple(edges)), level, inclusion, report, facts)

"""What tests share: studies_task_cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, planted_pairs, tiny_gpt2, tiny_tokenizer
from torch import Tensor

from bridge.cards.evidence import TESTS, task_rules
from bridge.cards.task_circuit import TaskCircuit
from bridge.circuits.error_nodes import error_means
from bridge.data.task_tokens import TokenPairs
from bridge.evidence.carry import Transporter
from bridge.evidence.measures import Criterion, Measure, Report
from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.circuit import NodeSpace, corpus_means
from bridge.models.dense import DenseModel, load_dense
from bridge.models.residual import Enter
from bridge.models.sparse import Location
from bridge.recipe import resolve
from bridge.training import copy_dense, initialize
from bridge.training.prepare import complete_recipe


def corpus() -> Tensor:
    return torch.randint(2, VOCABULARY, (12, 12), generator=torch.Generator().manual_seed(5))


def copied(dense: DenseModel | None = None) -> CoupledModels:
    """A coupling whose sparse model computes what its dense model does, at every site."""
    dense = load_dense(tiny_gpt2(), tokenizer=tiny_tokenizer()) if dense is None else dense
    values = {
        "dense": "tiny", "sparse": {"width": 64, "head_channels": 8, "positions": "learned"}, "sparsity": {"l0": 0.25},
        "data": {"context": CONTEXT},
    }  # fmt: skip
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    with pytest.MonkeyPatch.context() as patch:  # so that the copy is exact
        patch.setattr(copy_dense, "SMALL", 0.0)
        patch.setattr(copy_dense, "SINKS", ())
        initialize.start_from_dense(
            coupling, torch.randint(2, VOCABULARY, (8, CONTEXT), generator=torch.Generator().manual_seed(5))
        )
    coupling.sparse.requires_grad_(False)
    coupling.bridges.requires_grad_(False)
    return replace(coupling, reference_bt=corpus())


@torch.no_grad()
def answered(dense: DenseModel, pairs: TokenPairs) -> TokenPairs:
    """The pairs with those two tokens as answers that the dense model tells apart best by what tells the prompts apart."""
    first_bv, second_bv = (
        pairs.logits_at_last(dense.run(tokens_bt).logits_btv) for tokens_bt in (pairs.prompt_bt, pairs.counterfactual_bt)
    )
    margin_vv = torch.minimum(
        (first_bv[:, :, None] - first_bv[:, None]).mean(0), (second_bv[:, None] - second_bv[:, :, None]).mean(0)
    )
    answer, wrong = divmod(int(margin_vv.argmax()), VOCABULARY)
    return replace(
        pairs, answer_bk=torch.full((len(pairs), 1), answer), wrong_bk=torch.full((len(pairs), 1), wrong)
    )  # fmt: skip


def circuit_of(coupling: CoupledModels, kept_f: Tensor | None = None, *, errors: bool = False) -> TaskCircuit:
    """A circuit of a coupling, found with errors at their means or without any; all nodes are kept where no mask is given."""
    means = corpus_means(coupling.sparse, corpus()) | (error_means(coupling, corpus()) if errors else {})
    space = NodeSpace(coupling.sparse.locations(), 1)
    kept_f = torch.ones(space.size, dtype=torch.bool) if kept_f is None else kept_f
    return TaskCircuit("planted", space.split(kept_f), means, "behavioural", True)


def case_of(
    coupling: CoupledModels, kept_f: Tensor | None = None, pairs: TokenPairs | None = None, *, errors: bool = False
) -> tuple[Transporter, Tensor, TokenPairs]:
    """Both models on pairs, the shortest first, and the mask of a circuit."""
    pairs = answered(coupling.dense, planted_pairs(12, lengths=(6, 5))) if pairs is None else pairs
    pairs, circuit = pairs.rows(pairs.last_b.argsort(stable=True)), circuit_of(coupling, kept_f, errors=errors)
    transporter = circuit.make_transporter(coupling, pairs)
    return transporter, circuit.kept_f(transporter.masked.space, torch.device("cpu")), pairs


def some_nodes(coupling: CoupledModels, fraction: float = 0.4, seed: int = 0) -> Tensor:
    size = sum(coupling.sparse.locations().values())
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < fraction


def dense_difference(coupling: CoupledModels, pairs: TokenPairs, row: int, enter: Enter | None = None) -> float:
    """D of one row, run by itself without its padding."""
    length = int(pairs.last_b[row]) + 1
    if enter is not None:
        enter = Enter(enter.site_b, enter.x_btd[:, :length])
    logits_v = coupling.dense.run(pairs.prompt_bt[row : row + 1, :length], enter).logits_btv[0, -1]
    return float(logits_v[pairs.answer_bk[row, 0]] - logits_v[pairs.wrong_bk[row, 0]])


def literal_run(transporter: Transporter, row: int, kept_f: Tensor, enter: Enter | None = None):
    """The sparse model on one prompt without its padding, every node and every error placed by hand."""
    masked, length = transporter.masked, int(transporter.masked.question.last_b[row]) + 1
    parts, means, errors, last = masked.space.split(kept_f), masked.means, masked.errors, transporter.coupling.n_sites

    def gate(at: Location, x_1tn: Tensor) -> Tensor:
        return torch.where(parts[at][0], x_1tn, means[at])

    def correct(at: Location, x_1ts: Tensor) -> Tensor:
        assert errors is not None
        error_ts = errors[at][row] if at.layer == last else errors[at][row, :length]
        added_ts = error_ts if bool(parts[at]) else means[at].expand_as(error_ts)
        return torch.cat([x_1ts[:, : -len(added_ts)], x_1ts[:, -len(added_ts) :] + added_ts], 1)

    tokens_1t = masked.question.prompt_bt[row : row + 1, :length]
    return transporter.coupling.sparse.run(tokens_1t, enter, gate, correct=None if errors is None else correct)


def decoded(transporter: Transporter, site: int, change_1ts: Tensor) -> Tensor:
    """The difference that a change makes behind a decoder."""
    decode = transporter.coupling.bridges[site].decode
    return decode(change_1ts) - decode(torch.zeros_like(change_1ts))


KEYS = ("dense_solves", "sparse_solves", "searched", "span", "sufficient", *(key for keys in TESTS.values() for key in keys))


def report(**values: float | None) -> Report:
    """A report in which everything passes (1 where at least 1 is asked) but what is named."""
    asked = dict.fromkeys((*KEYS, "lost", "seeds", "nulls"), 1.0) | values
    measures = tuple(Measure(key, f"of {key}", value, Criterion(">=", 1.0), note="not run") for key, value in asked.items())
    return Report(measures, task_rules(measures))

"""Counterfactual patching of a prompt's circuit: its nodes take the values they have on another prompt, carried into dense.

With R the reference on the prompt and R_c that on a counterfactual of as many tokens (every node kept, errors at their means but
those of the circuit), the sparse model is run on the prompt with

    a_i  <-  a_i(R_c)  for i in the circuit        (its errors as well)

every other node computing on from what it then reads. The change of the residual at each site is carried into the dense model.
The share is that of the full swap, d(dense on the prompt) - d(dense on the counterfactual), in the mean over all sites behind the
first sublayer: no site is chosen. The ceiling patches all nodes (the embedding is no node, and stays the prompt's); the controls
patch nodes matched in location and position.

Shape legend: c circuit, t token, n nodes of a location, f all nodes in one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.evidence.carry import Carrier
from bridge.evidence.controls import node_values
from bridge.residual import Trace
from bridge.sparse import Location

LEAST_SWAP = 0.2  # nats; shares of less mean nothing


@dataclass(frozen=True, eq=False)
class Counterfactual:
    """A prompt of as many tokens, and the dense run of it with the errors by which the sparse model follows."""

    tokens_t: Tensor
    followed: Followed


def full_swap(carrier: Carrier, counterfactual: Counterfactual) -> float:
    """By how much d of the dense model falls from the prompt to its counterfactual, in nats."""
    question, row_1 = carrier.masked.question, torch.zeros(1, dtype=torch.long)
    logits = carrier.dense.logits_btv[:, -1], counterfactual.followed.dense_bv
    d, d_there = (float(question.difference(logits_1v, row_1.to(logits_1v.device))) for logits_1v in logits)
    return d - d_there


@torch.no_grad()
def patched(carrier: Carrier, counterfactual: Counterfactual, circuit_cf: Tensor) -> Tensor:
    """moved_cj: what the dense model loses of the span, by site, where each circuit takes its counterfactual values.

    Raises ValueError where the counterfactual has more or fewer tokens.
    """
    masked, question = carrier.masked, carrier.masked.question
    if len(counterfactual.tokens_t) != masked.n_tokens:
        raise ValueError(
            f"the counterfactual has {len(counterfactual.tokens_t)} tokens and the prompt {masked.n_tokens}; "
            "patching needs as many, at the same positions"
        )
    asked = Question.of_prompt(counterfactual.tokens_t, question.answer, question.contrast)
    there = MaskedModel(masked.sparse, asked, masked.means, counterfactual.followed.errors)
    values = node_values(there, carrier.reference_f)
    plain = _run(carrier, {}, torch.zeros_like(circuit_cf[0]), None)
    site_k, change_k = [], []
    for circuit_f in circuit_cf:
        trace = _run(carrier, values, circuit_f, there)
        for site in carrier.sites:
            site_k.append(site)
            change_k.append(trace.residuals[site][0] - plain.residuals[site][0])
    return carrier.dense_lost(site_k, change_k).view(len(circuit_cf), -1)


def _run(carrier: Carrier, values: dict[Location, Tensor], patched_f: Tensor, there: MaskedModel | None) -> Trace:
    """The reference with some nodes, and errors, at their values on the counterfactual."""
    masked = carrier.masked
    parts = masked.space.split(patched_f)
    _, own = masked.gates(carrier.reference_f[None])
    _, other = (masked if there is None else there).gates(carrier.reference_f[None])

    def gate(at: Location, x_1tn: Tensor) -> Tensor:
        return torch.where(parts[at], values[at], x_1tn) if at in values else x_1tn

    def correct(at: Location, x_1ts: Tensor) -> Tensor:
        return torch.where(parts[at][-x_1ts.shape[1] :], other(at, x_1ts), own(at, x_1ts))

    used = None if masked.errors is None else correct
    return masked.sparse.run(masked.question.prompt_bt, gate=gate, correct=used, last_only=True)


def mean_share(carrier: Carrier, moved_j: Tensor, swap: float) -> float:
    """The share of the full swap in the mean over the sites behind the first sublayer."""
    return float(moved_j[1:].mean()) * carrier.loss.span / swap

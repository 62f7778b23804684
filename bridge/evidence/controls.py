"""Controls that could win: circuits of as many nodes as one has, of which there is every reason to expect as much.

    matched          for every node another active one of the same location at the same position; drawn several times
    another prompt   as many nodes as the circuit has at all, the most important ones, by integrated gradients, of other prompts:
                     texts of as many tokens from the coupling's reference corpus

A random circuit out of all nodes is no such control: 60 of 40,000 do nothing, whatever the others are.

Shape legend: c circuit, r masked copy of a prompt, t token, n nodes of a location, f all nodes in one row.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bridge.bridges import Coupling
from bridge.circuit import recording_gate
from bridge.circuits.error_nodes import follow
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.schema import ERROR
from bridge.sparse import Gate, Location


def error_gate(masked: MaskedModel, kept_f: Tensor) -> Gate | None:
    """What adds the errors of the one prompt to the stream, those that are kept as they are and the others at their means."""
    if (errors := masked.errors) is None:
        return None
    parts = masked.space.split(kept_f)

    def correct(at: Location, x_rts: Tensor) -> Tensor:
        kept_t1 = parts[at][-x_rts.shape[1] :]
        error_ts = errors[at][0, -x_rts.shape[1] :]
        return x_rts + torch.where(kept_t1, error_ts, masked.means[at])

    return correct


@torch.no_grad()
def node_values(masked: MaskedModel, kept_f: Tensor) -> dict[Location, Tensor]:
    """value_tn of every node on the one prompt, no node ablated and the errors under their masks."""
    values: dict[Location, Tensor] = {}
    masked.sparse.run(masked.question.prompt_bt, gate=recording_gate(values), correct=error_gate(masked, kept_f), last_only=True)
    return {at: value_btn[0] for at, value_btn in values.items()}


def active_nodes(masked: MaskedModel) -> Tensor:
    """active_f: the nodes that are not 0 in the model's own run of the prompt, every error kept; no error among them."""
    values = node_values(masked, torch.ones_like(masked.is_error_f))
    parts = {
        at: torch.zeros(masked.space.n_tokens, n, dtype=torch.bool, device=masked.is_error_f.device)
        if at.kind == ERROR
        else values[at] != 0
        for at, n in masked.space.sizes.items()
    }
    return masked.space.join(parts)


def matched(masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """matched_cf: for every node of a circuit another active one of its location and position, at random; errors have none.

    Where a place has too few others, as many as there are.
    """
    pool_f = active_nodes(masked) & ~kept_f
    matched_cf = torch.zeros(draws, len(kept_f), dtype=torch.bool, device=kept_f.device)
    # in order of (place, a random number): of each place's pool the first ones are taken
    group_f = _places(masked)
    wanted_g = torch.bincount(group_f[kept_f & ~masked.is_error_f], minlength=int(group_f.max()) + 1)
    pool_k = (pool_f & (wanted_g > 0)[group_f]).nonzero().flatten()
    group_k = group_f[pool_k]
    first_g = torch.zeros(len(wanted_g) + 1, dtype=torch.long, device=kept_f.device)
    first_g[1:] = torch.bincount(group_k, minlength=len(wanted_g)).cumsum(0)
    for matched_f in matched_cf:
        draw_k = torch.rand(len(pool_k), generator=generator, dtype=torch.float64).to(kept_f.device)
        order_k = (group_k + draw_k).argsort()
        rank_k = torch.arange(len(pool_k), device=kept_f.device) - first_g[group_k]  # the pool is in the order of its places
        matched_f[pool_k[order_k[rank_k < wanted_g[group_k]]]] = True
    return matched_cf


def another_prompt(
    coupling: Coupling, masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator, alphas: int = 4
) -> Tensor:
    """other_cf: as many nodes as a circuit has, those that matter most to other prompts of as many tokens, at their positions.

    The other prompts are cut from the coupling's reference text, and asked why the dense model's own answer follows. None where
    the text has no prompt so long.
    """
    count, text_bt = int((kept_f & ~masked.is_error_f).sum()), coupling.reference_bt
    length = masked.n_tokens
    if text_bt is None or text_bt.shape[1] < length or not count:
        return kept_f.new_zeros(0, len(kept_f))
    other_cf = kept_f.new_zeros(draws, len(kept_f))
    for other_f in other_cf:
        row, start = (int(torch.randint(size, (), generator=generator)) for size in (len(text_bt), text_bt.shape[1] - length + 1))
        tokens_t = text_bt[row, start : start + length].to(kept_f.device)
        last_b = torch.tensor([length - 1], device=kept_f.device)
        followed = follow(coupling, tokens_t[None], last_b)
        question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()))
        there = MaskedModel(masked.sparse, question, masked.means, followed.errors)
        score_f = integrated_gradients(there, ~there.is_error_f, question.difference, alphas)
        other_f[score_f.abs().topk(count).indices] = True
    return other_cf


def integrated_gradients(masked: MaskedModel, over_f: Tensor, loss: Callable[[Tensor], Tensor], alphas: int) -> Tensor:
    """score_f of the nodes and errors over_f, mixed in together from their means to their values; others stay at theirs."""
    alpha_r1 = (torch.arange(alphas, device=over_f.device)[:, None] + 0.5) / alphas
    total_f = torch.zeros(over_f.shape, device=over_f.device)
    for some_r1 in alpha_r1.split(masked.rows):
        total_f += masked.gradient(some_r1 * over_f, loss)[0].sum(0)
    return torch.where(over_f, total_f / alphas, 0)


def _places(masked: MaskedModel) -> Tensor:
    """Which location and position every node is of, as a number that grows along the row."""
    parts, first = {}, 0
    for at, n in masked.space.sizes.items():
        parts[at] = torch.arange(first, first + masked.space.n_tokens)[:, None].expand(-1, n)
        first += masked.space.n_tokens
    return masked.space.join(parts).to(masked.is_error_f.device)

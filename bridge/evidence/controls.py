"""Controls that could win: circuits of as many nodes as one has, of which there is every reason to expect as much.

    matched          for every node another active one of the same location at the same position (of a task, whose nodes are at
                     every position, of the same location); drawn several times
    another prompt   as many nodes as the circuit has at all, the most important ones, by integrated gradients, of other prompts:
                     texts of as many tokens from the coupling's reference corpus

A random circuit out of all nodes is no such control: 60 of 40,000 do nothing, whatever the others are.

Shape legend: c circuit, r masked copy of a prompt, b prompt, t token, n nodes of a location, f all nodes in one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.circuits.error_nodes import follow
from bridge.circuits.masked_model import MaskedModel, integrated_gradients
from bridge.circuits.question import Question
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import NodeSpace, recording_gate
from bridge.models.schema import ERROR
from bridge.models.sparse import Location


@torch.no_grad()
def node_values(masked: MaskedModel, kept_f: Tensor, row_b: Tensor) -> dict[Location, Tensor]:
    """value_btn of every node on some of the prompts, no node ablated and the errors under their masks."""
    values: dict[Location, Tensor] = {}
    _, correct = masked.gates(kept_f.expand(len(row_b), -1), row_b)
    masked.sparse.run(masked.question.prompt_bt[row_b], gate=recording_gate(values), correct=correct, last_only=True)
    return values


def active_nodes(masked: MaskedModel) -> Tensor:
    """active_f: the nodes that are not 0 in the model's own run of a prompt, every error kept; no error among them.

    Of several prompts a node is active that is so at any token of any of them.
    """
    question, space, every_f = masked.question, masked.space, torch.ones_like(masked.is_error_f)
    there_bt1 = (torch.arange(masked.n_tokens, device=every_f.device) <= question.last_b[:, None])[..., None]
    active_f = torch.zeros_like(every_f)
    for row_b in torch.arange(len(question)).split(masked.rows):
        values = node_values(masked, every_f, row_b)
        parts = {}
        for at, n in space.sizes.items():
            on_btn = (values[at] != 0) & there_bt1[row_b] if at.kind != ERROR else torch.zeros(1, 1, n, dtype=torch.bool)
            on_tn = on_btn.any(0) if space.n_tokens > 1 else on_btn.any(0).any(0, keepdim=True)
            parts[at] = on_tn.to(every_f.device).expand(space.n_tokens, -1)
        active_f |= space.join(parts)
    return active_f


def matched(masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """matched_cf: for every node of a circuit another active one of its location and position, at random; errors have none.

    Where a place has too few others, as many as there are.
    """
    pool_f = active_nodes(masked) & ~kept_f
    matched_cf = torch.zeros(draws, len(kept_f), dtype=torch.bool, device=kept_f.device)
    # in order of (place, a random number): of each place's pool the first ones are taken
    sizes = torch.tensor([n for n in masked.space.sizes.values() for _ in range(masked.space.n_tokens)])
    group_f = torch.arange(len(sizes)).repeat_interleave(sizes).to(kept_f.device)  # location and position of every node
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
    coupling: CoupledModels, masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """other_cf: as many nodes as a circuit has, those that matter most to other prompts of as many tokens, at their positions.

    The other prompts are cut from the coupling's reference text, and asked why the dense model's own answer follows. None where
    the text has no prompt so long.
    """
    count, text_bt, length = int((kept_f & ~masked.is_error_f).sum()), coupling.reference_bt, masked.n_tokens
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
        score_f = integrated_gradients(
            there, lambda mask_rf, there=there: there.gradient(mask_rf, there.question.difference)[0], ~there.is_error_f
        )
        other_f[score_f.abs().topk(count).indices] = True
    return other_cf


def random_deletions(space: NodeSpace, kept_f: Tensor, on_f: Tensor, generator: torch.Generator, draws: int = 10) -> Tensor:
    """gone_cf, beside the deletion of a circuit: as many of the nodes outside it that are on, at each location as many as it has.

    What a location lacks is drawn from all others. Where there are fewer in all, all of them are the one deletion; none where
    there is nothing to delete.
    """
    pool_f, wanted = on_f & ~kept_f, int(kept_f.sum())
    if not wanted or not pool_f.any():
        return pool_f.new_zeros(0, space.size)
    if int(pool_f.sum()) < wanted:
        return pool_f[None]
    drawn = []
    for _ in range(draws):
        gone_f = torch.zeros_like(pool_f).index_fill_(0, some_like(space, kept_f, pool_f, generator), True)
        lacking = wanted - int(gone_f.sum())
        drawn.append(gone_f.index_fill(0, some((pool_f & ~gone_f).nonzero().flatten(), lacking, generator), True))
    return torch.stack(drawn)


def some_like(space: NodeSpace, like_f: Tensor, pool_f: Tensor, generator: torch.Generator) -> Tensor:
    """node_k of a pool at random: at each location as many as a mask has there, or as there are."""
    like, places = space.split(like_f), space.split(torch.where(pool_f, torch.arange(len(pool_f), device=pool_f.device), -1))
    return torch.cat([some(place_tn[place_tn >= 0], int(like[at].sum()), generator) for at, place_tn in places.items()])


def some(place_n: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Some of the places at random: as many as are wanted, or as there are."""
    return place_n[torch.randperm(len(place_n), generator=generator)[:wanted].to(place_n.device)]

"""Controls that could win: circuits with as many nodes as the given one, which could be expected to do as well.

    matched          for each node of the circuit, another active node of the same location and position (in a task a node covers
                     all positions, so only the location is matched); drawn several times
    another prompt   the nodes that matter most to another prompt, by integrated gradients, as many as the circuit has; the other
                     prompts are texts with the same number of tokens from the coupling's reference corpus

A random circuit drawn from all nodes is not such a control: 60 of 40,000 nodes do nothing, whichever nodes they are.

Shape legend: c circuit, r masked copy of a prompt, b prompt, t token, n nodes of a location, f all nodes in one row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense
from bridge.circuits.masked_model import MaskedModel, effects_on_difference
from bridge.circuits.question import Question
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import NodeSpace


def matched_nodes(masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return matched_cf: for each node of a circuit, a random other active node of its location and position; none for errors.

    If a location and position has too few other active nodes, all of them are taken.
    """
    pool_f = masked.active_f & ~kept_f
    matched_cf = torch.zeros(draws, len(kept_f), dtype=torch.bool, device=kept_f.device)
    # the pool is sorted by (group, random number), and the first nodes of each group are taken
    sizes = torch.tensor([n for n in masked.space.sizes.values() for _ in range(masked.space.n_tokens)])
    group_f = torch.arange(len(sizes)).repeat_interleave(sizes).to(kept_f.device)  # group of each node: its location and position
    wanted_g = torch.bincount(group_f[kept_f & ~masked.is_error_f], minlength=int(group_f.max()) + 1)
    pool_k = (pool_f & (wanted_g > 0)[group_f]).nonzero().flatten()
    group_k = group_f[pool_k]
    first_g = torch.zeros(len(wanted_g) + 1, dtype=torch.long, device=kept_f.device)
    first_g[1:] = torch.bincount(group_k, minlength=len(wanted_g)).cumsum(0)
    for matched_f in matched_cf:
        draw_k = torch.rand(len(pool_k), generator=generator, dtype=torch.float64).to(kept_f.device)
        order_k = (group_k + draw_k).argsort()
        rank_k = torch.arange(len(pool_k), device=kept_f.device) - first_g[group_k]  # the pool is sorted by group
        matched_f[pool_k[order_k[rank_k < wanted_g[group_k]]]] = True
    return matched_cf


def circuits_of_other_prompts(
    coupling: CoupledModels, masked: MaskedModel, kept_f: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """Return other_cf: for each other prompt of the same length, the nodes that matter most to it, as many as the circuit has.

    The other prompts are cut from the coupling's reference text, and the question is why the dense model's own answer follows.
    other_cf has no rows if the text's blocks are shorter than the prompt.
    """
    count, text_bt, length = int((kept_f & ~masked.is_error_f).sum()), coupling.reference_bt, masked.n_tokens
    if text_bt is None or text_bt.shape[1] < length or not count:
        return kept_f.new_zeros(0, len(kept_f))
    other_cf = kept_f.new_zeros(draws, len(kept_f))
    for other_f in other_cf:
        row, start = (int(torch.randint(size, (), generator=generator)) for size in (len(text_bt), text_bt.shape[1] - length + 1))
        tokens_t = text_bt[row, start : start + length].to(kept_f.device)
        followed = follow_dense(coupling, tokens_t[None])
        question = Question.of_prompt(tokens_t, int(followed.dense_bv[0].argmax()))
        there = MaskedModel(masked.sparse, question, masked.means, followed.errors)
        other_f[effects_on_difference(there).abs().topk(count).indices] = True
    return other_cf


def random_deletions(space: NodeSpace, kept_f: Tensor, on_f: Tensor, generator: torch.Generator, draws: int = 10) -> Tensor:
    """Return gone_cf, random control deletions: active nodes outside the circuit, as many at each location as the circuit has.

    If a location has too few, the missing number is drawn from all other locations. If there are too few in total, all of them
    form the only deletion. gone_cf has no rows if there is nothing to delete.
    """
    pool_f, wanted = on_f & ~kept_f, int(kept_f.sum())
    if not wanted or not pool_f.any():
        return pool_f.new_zeros(0, space.size)
    if int(pool_f.sum()) < wanted:
        return pool_f[None]
    drawn = []
    for _ in range(draws):
        gone_f = torch.zeros_like(pool_f).index_fill_(0, sample_by_location(space, kept_f, pool_f, generator), True)
        lacking = wanted - int(gone_f.sum())
        drawn.append(gone_f.index_fill(0, sample_indices((pool_f & ~gone_f).nonzero().flatten(), lacking, generator), True))
    return torch.stack(drawn)


def sample_by_location(space: NodeSpace, like_f: Tensor, pool_f: Tensor, generator: torch.Generator) -> Tensor:
    """Return node_k, drawn at random from a pool: at each location as many as like_f has there, or all if the pool has fewer."""
    like, places = space.split(like_f), space.split(torch.where(pool_f, torch.arange(len(pool_f), device=pool_f.device), -1))
    return torch.cat([sample_indices(place_tn[place_tn >= 0], int(like[at].sum()), generator) for at, place_tn in places.items()])


def sample_indices(place_n: Tensor, wanted: int, generator: torch.Generator) -> Tensor:
    """Return `wanted` of the indices at random, or all if there are fewer."""
    return place_n[torch.randperm(len(place_n), generator=generator)[:wanted].to(place_n.device)]

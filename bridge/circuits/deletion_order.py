"""Order in which nodes can leave a circuit: each step deletes the node whose deletion leaves the circuit's terms smallest.

The terms are those of a descent (`CircuitLoss.descent_terms`): squared misses of the circuit alone and in its supersets, and of
what is left of the span when it is deleted. Deleting node k changes a miss x_r to about x_r - g_rk, where g_rk is the gradient of
x_r with respect to the node's mask, and the changes of several nodes add up. One gradient of every miss therefore predicts each
deletion after those before it, and nodes whose effects cancel in all supersets can leave together. Measuring each node's deletion
alone, in every superset, gives circuits no smaller and takes several times as long.

Shape legend: c mask, u superset, r masked copy (a mask on a prompt, ordered by mask), f all nodes in one row, k some of them by
index, s those of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss, Level, Quantity

_MAX_NODES_ONE_BY_ONE, _STEP_DIVISOR = 1000, 25  # while more nodes remain, a step deletes the excess divided by 25


@torch.no_grad()
def deletion_order(loss: CircuitLoss, superset_uf: Tensor, kept_f: Tensor, node_k: Tensor, level: Level) -> Tensor:
    """Return the circuit's nodes node_k in the order in which they can be deleted, those that are missed least first."""
    count, supersets = len(loss.model_b), len(superset_uf)
    inside_cf = torch.cat([kept_f[None], kept_f | superset_uf])
    off_r, gradient_rk = _values_and_gradients(loss, inside_cf, node_k, lambda x_rv, row_r: loss.prompt_miss(x_rv, row_r, level))
    gradient_rk[count:].masked_fill_(superset_uf[:, node_k].repeat_interleave(count, 0), 0)  # the superset keeps them anyway
    left_r, left_gradient_rk = _values_and_gradients(loss, loss.complement(kept_f)[None], node_k, loss.excess_left)
    off_r, gradient_rk = torch.cat([off_r, left_r]), torch.cat([gradient_rk, -left_gradient_rk])
    least_r = torch.full_like(off_r, -torch.inf if level.faithfulness is not None else 0)
    least_r[len(inside_cf) * count :] = 0  # less than `config.left` is no better
    weight_r = torch.ones_like(off_r)
    weight_r[count : len(inside_cf) * count] = 1 / (supersets * loss.superset_bound(level))
    order, remaining_k = [], torch.arange(len(node_k), device=node_k.device)  # the remaining nodes, as indices into node_k
    while len(remaining_k):
        term_rk = torch.maximum(off_r[:, None] - gradient_rk, least_r[:, None]).square_().mul_(weight_r[:, None])
        size = max(1, (len(remaining_k) - _MAX_NODES_ONE_BY_ONE) // _STEP_DIVISOR)
        deleted_s = term_rk.sum(0).topk(size, largest=False).indices
        off_r = off_r - gradient_rk[:, deleted_s].sum(1)
        order.append(remaining_k[deleted_s])
        stays_k = torch.ones_like(remaining_k, dtype=torch.bool).index_fill_(0, deleted_s, False)
        remaining_k, gradient_rk = remaining_k[stays_k], gradient_rk[:, stays_k]
    return node_k[torch.cat(order)] if order else node_k


def _values_and_gradients(loss: CircuitLoss, kept_cf: Tensor, node_k: Tensor, quantity: Quantity) -> tuple[Tensor, Tensor]:
    """Return (quantity_r, gradient_rk) for every mask on every prompt, with respect to the mask entries of node_k."""
    _, gradients, quantities = zip(*loss.gradients(kept_cf, quantity, node_k), strict=True)
    return torch.cat(quantities), torch.cat(gradients)

"""Nodes that keep up an answer when a circuit for it is deleted: other ways to the answer, which a circuit may lack.

The nodes outside the circuit are ranked by integrated gradients of the span that is left. The first of them are taken: the
smallest number whose deletion together with the circuit leaves no more than the search asks.

Shape legend: r masked copy of a prompt, f all nodes in one row, k some of them by index.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.circuits.loss import CircuitLoss
from bridge.circuits.masked_model import integrated_gradients


def backup_nodes(loss: CircuitLoss, kept_f: Tensor) -> Tensor:
    """Return node_k: the fewest other nodes whose deletion with the circuit leaves at most `config.left`, strongest first.

    With several prompts the mean over them counts. The number is found by search; if none suffices, the whole ranking is
    returned. node_k is empty if the circuit's deletion alone leaves no more than that.
    """
    whole_f, allowed = loss.complement(kept_f), loss.config.left

    def left(order_k: Tensor, sizes: list[int]) -> list[float]:
        return loss.left_after_deletion(torch.stack([kept_f.index_fill(0, order_k[:size], True) for size in sizes])).tolist()

    none_k = torch.zeros(0, dtype=torch.long, device=kept_f.device)
    if left(none_k, [0])[0] <= allowed:
        return none_k
    score_f = integrated_gradients(loss.masked, lambda mask_rf: loss.gradient(mask_rf, loss.fraction_left), whole_f)
    pool_k = whole_f.nonzero().flatten()
    order_k = pool_k[score_f[pool_k].argsort(descending=True, stable=True)]
    low, high = 0, len(order_k)  # low leaves more, high is assumed to suffice
    tried = [size for size in (2**power for power in range(high.bit_length())) if size < high]
    while tried:
        for size, share in zip(tried, left(order_k, tried), strict=True):
            if share <= allowed:
                high = size
                break
            low = size
        few = max(1, high // 25)
        tried = sorted({low + round((high - low) * part / 5) for part in range(1, 5)} - {low, high}) if high - low > few else []
    return order_k[:high]

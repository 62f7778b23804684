"""Replacement and completeness of a prompt's circuit, as attribution graphs define them.

The graph is drawn in the run in which the sparse model follows the dense one exactly: every node and every error is kept. Its
nodes are those of the circuit, every error, the prompt's tokens (a token's embedding entries, with the last one's bigram entry,
are one) and the answer. A_ts is the magnitude of the sum of all weights of edges from s to t (`attribution`), divided by the sum
of these magnitudes over s. With w 1 at the answer and 0 elsewhere,

    influence      w A + w A^2 + ...                                   of every node on the answer, by all paths
    replacement    influence of tokens / influence of tokens and errors
    completeness   sum over t of (influence_t + w_t) (1 - sum over errors s of A_ts) / sum over t of (influence_t + w_t)

Ameisen et al. 2025 ("Circuit tracing", graph pruning and its scores) define them; circuit-tracer computes the same. Both are 0 if
nothing reaches the answer. If a circuit has more than EDGES edges, those with the smallest effects are left out.

Shape legend: f all nodes and errors in one row, u node of the graph, e edge.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.graph.attribution import draw_edges
from bridge.graph.flow import flow_through

EDGES = 500_000
_LONGEST = 1000  # edges of a path, at most; there is no cycle


def replacement_and_completeness(masked: MaskedModel, kept_f: Tensor) -> tuple[float, float]:
    """Return the shares of the answer that flow through nodes, not errors: along whole paths, and of every node's inputs.

    See the module's docstring; both are 1 if no errors are followed.
    """
    edges = draw_edges(flow_through(masked, kept_f | masked.is_error_f, torch.ones_like(kept_f)), EDGES)
    ends, count = edges.ends, edges.ends.n_nodes
    token_e = ends.inputs(edges.source_e)
    source_e = torch.where(token_e >= 0, count + token_e, edges.source_e).cpu()
    target_e = edges.target_e.clamp(max=count + ends.n_tokens).cpu()  # after nodes and tokens only the answer follows
    used_u, place_2e = torch.cat([source_e, target_e]).unique(return_inverse=True)
    from_e, to_e = place_2e.view(2, -1).numpy()
    size = len(used_u)
    weights = csr_matrix((edges.weight_e.double().cpu().numpy(), (to_e, from_e)), shape=(size, size))
    weights.sum_duplicates()
    magnitudes = abs(weights)
    total_u = np.asarray(magnitudes.sum(1)).reshape(-1)
    shares = csr_matrix(diags(1 / np.maximum(total_u, 1e-10)) @ magnitudes)
    is_answer_u = (used_u == count + ends.n_tokens).numpy()
    is_token_u = ((used_u >= count) & (used_u < count + ends.n_tokens)).numpy()
    is_error_u = (masked.is_error_f.cpu()[used_u.clamp(max=count - 1)] & (used_u < count)).numpy()
    influence_u, now_u = np.zeros(size), is_answer_u.astype(float)
    for _ in range(_LONGEST):
        now_u = shares.T @ now_u
        if not now_u.any():
            break
        influence_u += now_u
    tokens, errors = float(influence_u[is_token_u].sum()), float(influence_u[is_error_u].sum())
    if tokens + errors == 0:
        return 0.0, 0.0
    from_nodes_u = 1 - shares @ is_error_u.astype(float)
    reach_u = influence_u + is_answer_u
    return tokens / (tokens + errors), float((from_nodes_u * reach_u).sum() / reach_u.sum())

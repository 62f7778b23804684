"""Train matrices sparse-natively after the anneal: only by their nonzeros, with a mask that continues to change.

    every step          gradient and AdamW at the nonzeros
    every `look_every`  also the dense gradient G of that step's batch; then, in every matrix, the fraction r of the nonzeros
                        with the smallest magnitude is dropped, and as many zeros with the largest |G| are added, starting
                        at 0 and without momentum;  r falls linearly from `move` to 0 at the end of training

(Evci et al. 2020, RigL; Gao et al. 2025, appendix B.) The reference is dense-masked training: a dense gradient updates every
weight at every step, and a projection keeps the largest. `products.is_faster_than_dense` measures which matrices to train so.

Shape legend: p nonzeros, m x n a matrix.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from bridge.kernels.products import Pattern, SparseMatrix
from bridge.kernels.top_k import project_
from bridge.models.sparse import SparseTransformer
from bridge.models.sparse_weights import protected_mask

Moments = Mapping[Tensor, Mapping[str, Tensor]]  # an optimizer's state: by parameter, then exp_avg, exp_avg_sq, step


def pack(sparse: SparseTransformer, name: str, pattern: Pattern | None = None) -> nn.Parameter:
    """Replace a matrix by a new parameter, the values of its nonzeros (or at `pattern`), and return the parameter."""
    module, attribute = _module_and_attribute(sparse, name)
    weight = getattr(module, attribute)
    if pattern is None:
        matrix = SparseMatrix.of(weight)
    else:
        matrix = SparseMatrix(pattern, weight.detach().reshape(-1)[pattern.index_p].clone())
    parameter = nn.Parameter(matrix.value_p)
    matrix.value_p = parameter
    sparse.compact[name] = matrix
    sparse.values[values_key(name)] = parameter
    setattr(module, attribute, None)
    return parameter


def unpack(sparse: SparseTransformer) -> None:
    """Replace the packed values with dense matrices again."""
    for name in packed_names(sparse):
        module, attribute = _module_and_attribute(sparse, name)
        weight = nn.Parameter(sparse.compact.pop(name).dense())
        del sparse.values[values_key(name)]
        setattr(module, attribute, weight)


def packed_names(sparse: SparseTransformer) -> list[str]:
    """Return the names of the matrices that are stored by their nonzeros."""
    return [name.replace("/", ".") for name in sparse.values]


def values_key(name: str) -> str:
    """Return the parameter name of a matrix's values, without dots, which parameter names must not have."""
    return name.replace(".", "/")


def collect_gradients(sparse: SparseTransformer) -> None:
    """Make the next backward pass collect the dense gradient of every matrix that is stored by its nonzeros."""
    for name in packed_names(sparse):
        sparse.compact[name].gradient_mn = torch.zeros(sparse.compact[name].pattern.shape)


@torch.no_grad()
def update_mask(sparse: SparseTransformer, share: float, moments: Moments, *, min_per_neuron: int = 0) -> None:
    """Drop the smallest fraction `share` of every matrix's nonzeros and add as many by the collected gradient, in place.

    Nonzeros that stay keep their moments; new ones start with value and moments 0.
    """
    for name in packed_names(sparse):
        matrix = sparse.compact[name]
        assert matrix.gradient_mn is not None
        gradient_mn, matrix.gradient_mn = matrix.gradient_mn, None
        index_p = matrix.pattern.index_p
        stays_p = _nonzeros_to_keep(name, matrix, share, min_per_neuron)
        n_new = int((~stays_p).sum())
        flat = gradient_mn.view(-1)
        flat[index_p] = 0  # includes nonzeros about to be dropped, which would return at once
        project_([flat], max(1, n_new))
        new_p = flat.nonzero().flatten()[:n_new]
        if len(new_p) < n_new:  # too few zeros have a gradient: keep nonzeros instead
            stays_p[(~stays_p).nonzero().flatten()[: n_new - len(new_p)]] = True
        index_q, order_q = torch.cat([index_p[stays_p], new_p]).sort()
        matrix.pattern = Pattern.at(index_q, matrix.pattern.shape)
        for tensor_p in (matrix.value_p, *moments.get(matrix.value_p, {}).values()):
            if tensor_p.dim():  # all but the step count
                tensor_p.copy_(torch.cat([tensor_p[stays_p], tensor_p.new_zeros(len(new_p))])[order_q])


def _nonzeros_to_keep(name: str, matrix: SparseMatrix, share: float, min_per_neuron: int) -> Tensor:
    magnitude_p = matrix.value_p.detach().abs()
    if min_per_neuron and (kept_mn := protected_mask(name, matrix.dense(), min_per_neuron)) is not None:
        magnitude_p[kept_mn.view(-1)[matrix.pattern.index_p]] = torch.inf
    n_stay = len(magnitude_p) - int(share * len(magnitude_p))
    project_([magnitude_p], max(1, n_stay))
    return magnitude_p != 0


def _module_and_attribute(sparse: SparseTransformer, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return sparse.get_submodule(path), attribute

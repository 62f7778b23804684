"""Which weights of the sparse transformer are nonzero: the L0 projection (Gao et al. 2025, section 2.1 and appendix A), the
fraction kept during training, and matrices stored by their nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridge.kernels.products import SparseMatrix, pays, weight_version
from bridge.kernels.top_k import project_, top_k_mask
from bridge.models.schema import MATRICES, holds_output_side
from bridge.models.sparse_blocks import Linear
from bridge.recipe import RecipeError, Sparsity, kept_fraction, n_kept


@dataclass(frozen=True)
class Fractions:
    """Fractions of each matrix's weights that stay: for the blocks, and for embedding, positions and unembedding."""

    blocks: float
    embed: float

    @staticmethod
    def of(fraction: float | Fractions) -> Fractions:
        """Return fractions for every matrix: those given, or one number for all."""
        return fraction if isinstance(fraction, Fractions) else Fractions(fraction, fraction)

    def at(self, name: str) -> float:
        """Return the fraction of weights kept for a matrix."""
        return self.embed if is_outside_blocks(name) else self.blocks


def is_outside_blocks(name: str) -> bool:
    """Return whether a matrix belongs to no block: the embedding, the positions or the unembedding."""
    return not name.startswith("blocks.")


class SparseWeights(nn.Module):
    """Matrices, by name, of each of which a fraction of the weights stays nonzero."""

    unembedding: Linear
    values: nn.ParameterDict  # nonzeros of matrices that are trained by them, in place of the dense ones
    compact: dict[str, SparseMatrix]  # by the name of the matrix
    _thresholds: dict[str, float | None]  # of the last projection, where the next one looks first

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.unembedding.bias.device

    def packed_matrix(self, name: str, weight: Tensor | None) -> SparseMatrix | None:
        """Return the matrix by its nonzeros, or None if it is used as it is; a dense weight that has changed is packed again."""
        matrix = self.compact.get(name)
        if matrix is None or weight is None:
            return matrix
        if weight.requires_grad or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None  # the dense weight needs a gradient, or no kernel serves its device or dtype
        if matrix.source != weight_version(weight):
            matrix = self.compact[name] = SparseMatrix.of(weight)
        return matrix

    def sparse_weights(self) -> dict[str, nn.Parameter]:
        """Return the dense matrices that are made sparse: all of them but the bigram table."""
        matrices = {name: p for name, p in self.named_parameters() if p.dim() == 2 and p.numel()}
        return {name: p for name, p in matrices.items() if not name.startswith("bigram")}

    def packable(self) -> dict[str, nn.Parameter]:
        """Return the matrices that sparse products can serve: all but the positions on a CPU, none on other devices."""
        on_cpu = self.device.type == "cpu"
        return {name: weight for name, weight in self.sparse_weights().items() if on_cpu and name != "positions"}

    def biases(self) -> dict[str, nn.Parameter]:
        """Return the vectors that may be made sparse: biases of the linear maps, and attention sinks."""
        vectors = {name: p for name, p in self.named_parameters() if p.dim() == 1 and not name.startswith("values.")}
        return {name: p for name, p in vectors.items() if p.numel() and ".gains." not in name}

    def fractions(self, sparsity: Sparsity) -> Fractions:
        """Return the fractions that a recipe keeps; an l0 that is a number counts weights of the matrices that it applies to.

        Raises RecipeError if these have fewer weights.
        """
        apart = sparsity.embed_l0
        counted = sum(count for name, (_, count) in self._sizes().items() if apart is None or not is_outside_blocks(name))
        blocks = kept_fraction(sparsity.l0, counted)
        return Fractions(blocks, blocks if apart is None else apart)

    def project(self, fraction: float | Fractions, *, biases: bool = False, min_per_neuron: int = 0) -> None:
        """Keep, in every matrix, the fraction (up to 1) of its weights that are largest in magnitude, in place.

        With min_per_neuron, that many of the largest weights on the input side and on the output side of every neuron and
        attention channel are kept first, within the same total. Raises RecipeError if the total is too small for them.
        """
        fractions = Fractions.of(fraction)
        if not self.values:
            self.compact.clear()  # they are copies of weights that change here
        weights_by_size: dict[tuple[int, int], dict[str, Tensor]] = {}  # matrices by size and number kept
        for name, weight in self.sparse_weights().items():
            kept = n_kept(fractions.at(name), weight.numel())
            kept_first = protected_mask(name, weight, min_per_neuron)
            if kept_first is None:
                weights_by_size.setdefault((weight.numel(), kept), {})[name] = weight.data
            elif (needed := int(kept_first.sum())) > kept:
                raise RecipeError(
                    "l0",
                    f"leaves {kept} weights of {name}, but min_per_neuron {min_per_neuron} needs {needed}",
                    "raise l0 or lower min_per_neuron",
                )
            else:
                priority = torch.where(kept_first, torch.inf, weight.detach().abs())
                weight.data.masked_fill_(~top_k_mask(priority.reshape(1, -1), kept).view_as(weight), 0)
        for (_, kept), weights in weights_by_size.items():
            thresholds = project_([*weights.values()], kept, [self._thresholds.get(name) for name in weights])
            self._thresholds |= dict(zip(weights, thresholds, strict=True))
        if biases:
            for bias in self.biases().values():
                project_([bias.data], n_kept(fractions.blocks, bias.numel()))

    def achieved_l0(self) -> float:
        """Return the nonzero share of all weights of the matrices that are made sparse."""
        return _nonzero_fraction(self._sizes())

    def achieved_fractions(self) -> Fractions:
        """Return nonzero fractions of the blocks, and of embedding, positions and unembedding (without any, the blocks')."""
        sizes = self._sizes()
        blocks, embed = ({name: size for name, size in sizes.items() if is_outside_blocks(name) == end} for end in (False, True))
        return Fractions(_nonzero_fraction(blocks), _nonzero_fraction(embed or blocks))

    def n_sparse_weights(self) -> int:
        """Return the number of weights, zero or not, of the matrices that are made sparse."""
        return sum(count for _, count in self._sizes().values())

    def n_kept(self, fractions: Fractions) -> int:
        """Return the number of the weights of these matrices that stay at these fractions."""
        return sum(n_kept(fractions.at(name), count) for name, (_, count) in self._sizes().items())

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Return the number of nonzeros and of weights of every matrix that is made sparse, by name."""
        sizes = {name: (weight.detach(), weight.numel()) for name, weight in self.sparse_weights().items()}
        for key, value in self.values.items():
            name = key.replace("/", ".")
            sizes[name] = (value.detach(), self.compact[name].pattern.count)
        return {name: (int(weight.count_nonzero()), count) for name, (weight, count) in sizes.items()}

    def use_products(self) -> None:
        """Use sparse products for each matrix of a frozen model for which they pay; CPU only."""
        if self.values:
            return
        self.compact.clear()
        for name, weight in self.packable().items():
            if pays(weight):
                self.compact[name] = SparseMatrix.of(weight)


def _nonzero_fraction(sizes: dict[str, tuple[int, int]]) -> float:
    return sum(nonzeros for nonzeros, _ in sizes.values()) / max(1, sum(count for _, count in sizes.values()))


def annealed_l0(l0: float, progress: float, anneal: float, start: float = 1.0) -> float:
    """Return the fraction kept at `progress` (0 to 1) of training: from `start` to l0, by equal factors in equal times.

    A linear fall (the paper's) would halve the weights many times in its last few steps if l0 is small. The fraction reaches l0
    at progress = anneal.
    """
    return max(l0, start * (l0 / start) ** min(1.0, progress / anneal))


def protected_mask(name: str, weight: Tensor, minimum: int) -> Tensor | None:
    """Return the mask of the `minimum` largest weights of each neuron or channel in a matrix; None if nothing is protected."""
    matrix = name.removesuffix(".weight").split(".")[-1]
    if not minimum or matrix not in MATRICES:
        return None
    axis = 0 if holds_output_side(matrix) else 1
    largest = weight.detach().abs().topk(min(minimum, weight.shape[axis]), dim=axis).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(axis, largest, True)

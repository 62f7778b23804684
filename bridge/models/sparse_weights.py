"""Which weights of the sparse transformer are nonzero: the L0 projection (Gao et al. 2025, section 2.1 and appendix A), what is
kept as training goes on, and matrices held by their nonzeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bridge.kernels.products import Compact, pays, source_of
from bridge.kernels.top_k import project_, top_k_mask
from bridge.models.schema import MATRICES, output_side
from bridge.models.sparse_blocks import Linear
from bridge.recipe import RecipeError, Sparsity, kept_fraction, n_kept


@dataclass(frozen=True)
class Fractions:
    """Fraction of a matrix's weights that stays: of a block's, and of embedding, positions and unembedding."""

    blocks: float
    embed: float

    @staticmethod
    def of(fraction: float | Fractions) -> Fractions:
        """One fraction for every matrix, where one number is given."""
        return fraction if isinstance(fraction, Fractions) else Fractions(fraction, fraction)

    def at(self, name: str) -> float:
        """Fraction of weights kept for a matrix."""
        return self.embed if embeds(name) else self.blocks


def embeds(name: str) -> bool:
    """Whether a matrix is no block's: the embedding, the positions or the unembedding."""
    return not name.startswith("blocks.")


class SparseWeights(nn.Module):
    """Matrices of which a fraction of the weights stays, by their names."""

    unembedding: Linear
    values: nn.ParameterDict  # of matrices that are trained by their nonzeros, in place of the dense ones
    compact: dict[str, Compact]  # by the name of the matrix
    _thresholds: dict[str, float | None]  # of the last projection: where the next one looks first

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.unembedding.bias.device

    def by_nonzeros(self, name: str, weight: Tensor | None) -> Compact | None:
        """The matrix by its nonzeros, None where it is used as it is; a dense weight that was changed since is packed again."""
        matrix = self.compact.get(name)
        if matrix is None or weight is None:
            return matrix
        if weight.requires_grad or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None  # somebody wants the gradient of the dense one, or it went where there is no kernel
        if matrix.source != source_of(weight):
            matrix = self.compact[name] = Compact.of(weight)
        return matrix

    def sparse_weights(self) -> dict[str, nn.Parameter]:
        """The dense matrices that are made sparse: all of them but the bigram table."""
        matrices = {name: p for name, p in self.named_parameters() if p.dim() == 2 and p.numel()}
        return {name: p for name, p in matrices.items() if not name.startswith("bigram")}

    def packable(self) -> dict[str, nn.Parameter]:
        """Matrices that sparse products can serve: all but the positions, on a CPU; none elsewhere."""
        on_cpu = self.device.type == "cpu"
        return {name: weight for name, weight in self.sparse_weights().items() if on_cpu and name != "positions"}

    def biases(self) -> dict[str, nn.Parameter]:
        """The vectors that may be made sparse: biases of the linear maps, and attention sinks."""
        vectors = {name: p for name, p in self.named_parameters() if p.dim() == 1 and not name.startswith("values.")}
        return {name: p for name, p in vectors.items() if p.numel() and ".gains." not in name}

    def fractions(self, sparsity: Sparsity) -> Fractions:
        """Fractions of every matrix that a recipe's L0 keep; a number of weights is one of the matrices that l0 speaks of.

        Raises RecipeError where there are fewer.
        """
        apart = sparsity.embed_l0
        counted = sum(count for name, (_, count) in self._sizes().items() if apart is None or not embeds(name))
        blocks = kept_fraction(sparsity.l0, counted)
        return Fractions(blocks, blocks if apart is None else apart)

    def project(self, fraction: float | Fractions, *, biases: bool = False, min_per_neuron: int = 0) -> None:
        """Keep of every matrix the fraction (up to 1) of the weights that is largest in magnitude, in place.

        With min_per_neuron, the largest few weights at the input and at the output side of every neuron and attention channel
        are kept first, within the same number. Raises RecipeError where that number is too small for them.
        """
        fractions = Fractions.of(fraction)
        if not self.values:
            self.compact.clear()  # copies of what changes here
        alike: dict[tuple[int, int], dict[str, Tensor]] = {}  # matrices of one size that keep as many weights
        for name, weight in self.sparse_weights().items():
            kept = n_kept(fractions.at(name), weight.numel())
            kept_first = protected(name, weight, min_per_neuron)
            if kept_first is None:
                alike.setdefault((weight.numel(), kept), {})[name] = weight.data
            elif (needed := int(kept_first.sum())) > kept:
                raise RecipeError(
                    "l0",
                    f"leaves {kept} weights of {name}, min_per_neuron {min_per_neuron} needs {needed}",
                    "raise l0 or lower it",
                )
            else:
                priority = torch.where(kept_first, torch.inf, weight.detach().abs())
                weight.data.masked_fill_(~top_k_mask(priority.reshape(1, -1), kept).view_as(weight), 0)
        for (_, kept), weights in alike.items():
            thresholds = project_([*weights.values()], kept, [self._thresholds.get(name) for name in weights])
            self._thresholds |= dict(zip(weights, thresholds, strict=True))
        if biases:
            for bias in self.biases().values():
                project_([bias.data], n_kept(fractions.blocks, bias.numel()))

    def achieved_l0(self) -> float:
        """Share of the weights of the matrices that are made sparse that are nonzero."""
        return _share(self._sizes())

    def achieved_fractions(self) -> Fractions:
        """Nonzero fractions of the blocks' matrices, and of embedding, positions and unembedding (without any, the blocks')."""
        sizes = self._sizes()
        blocks, embed = ({name: size for name, size in sizes.items() if embeds(name) == end} for end in (False, True))
        return Fractions(_share(blocks), _share(embed or blocks))

    def n_sparse_weights(self) -> int:
        """Number of weights, zero or not, of the matrices that are made sparse."""
        return sum(count for _, count in self._sizes().values())

    def n_kept(self, fractions: Fractions) -> int:
        """Number of those weights that stay at these fractions."""
        return sum(n_kept(fractions.at(name), count) for name, (_, count) in self._sizes().items())

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Nonzeros and weights of every matrix that is made sparse, by name."""
        sizes = {name: (weight.detach(), weight.numel()) for name, weight in self.sparse_weights().items()}
        for key, value in self.values.items():
            name = key.replace("/", ".")
            sizes[name] = (value.detach(), self.compact[name].pattern.count)
        return {name: (int(weight.count_nonzero()), count) for name, (weight, count) in sizes.items()}

    def use_products(self) -> None:
        """Run a frozen model through sparse products wherever they pay; CPU only."""
        if self.values:
            return
        self.compact.clear()
        for name, weight in self.packable().items():
            if pays(weight):
                self.compact[name] = Compact.of(weight)


def _share(sizes: dict[str, tuple[int, int]]) -> float:
    return sum(nonzeros for nonzeros, _ in sizes.values()) / max(1, sum(count for _, count in sizes.values()))


def annealed_l0(l0: float, progress: float, anneal: float, start: float = 1.0) -> float:
    """The fraction kept at `progress` (0 to 1) of training: from `start` to the fraction l0, by equal factors in equal times.

    By equal factors, because a linear fall (the paper's) halves the weights many times over in its last few steps when l0 is
    small. Reaches l0 at progress = anneal.
    """
    return max(l0, start * (l0 / start) ** min(1.0, progress / anneal))


def protected(name: str, weight: Tensor, minimum: int) -> Tensor | None:
    """Mask of what min_per_neuron protects in a matrix, the `minimum` largest weights on a neuron's side of it; None: nothing."""
    matrix = name.removesuffix(".weight").split(".")[-1]
    if not minimum or matrix not in MATRICES:
        return None
    axis = 0 if output_side(matrix) else 1
    largest = weight.detach().abs().topk(min(minimum, weight.shape[axis]), dim=axis).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(axis, largest, True)

"""Apply AdamW to a coupling (Gao et al. 2025, appendix A.2).

The gradient is normalised to RMS 1 over the sparse model and over the bridges, separately, before AdamW, whose eps has the same
scale. Each group has its own learning rate, with a short warmup and a linear decay to 0; for sparse weights it is multiplied by
1 / sqrt(L0) ("sharkfin"). If a matrix is trained by its nonzeros, their values replace it, with their moments (`sparse_native`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bridge.kernels.products import Pattern
from bridge.models.bridges import CoupledModels
from bridge.models.sparse_weights import Fractions, is_outside_blocks
from bridge.training import sparse_native as native
from bridge.training.shards import gather_tensor, shard_like


class SharkfinAdamW:
    """AdamW with separate rates for sparse weights, the sparse model's other parameters and the bridges (appendix A.2)."""

    def __init__(self, coupling: CoupledModels) -> None:
        numbers = coupling.recipe.optimizer
        self.numbers = numbers
        assert numbers.rate is not None
        weights = {name: p for name, p in coupling.sparse.sparse_weights().items() if p.requires_grad}
        sparse_weights = list(weights.values())
        blocks, embed = ([p for name, p in weights.items() if is_outside_blocks(name) == end] for end in (False, True))
        rest = [p for p in coupling.sparse.parameters() if p.requires_grad and all(p is not weight for weight in sparse_weights)]
        bridges = [p for p in coupling.bridges.parameters() if p.requires_grad]
        self.normalised_groups = [group for group in (sparse_weights + rest, bridges) if group]
        maps, biases = ([p for p in bridges if p.dim() == dimensions] for dimensions in (2, 1))
        rate, decay = numbers.rate, numbers.weight_decay
        kinds = (
            (blocks, rate, "blocks", decay), (embed, rate, "embed", decay), (rest, rate, None, 0.0),
            (maps, numbers.bridge_rate, None, 0.0), (biases, numbers.bridge_bias_rate, None, 0.0),
        )  # fmt: skip
        groups: list[dict[str, Any]] = [
            {"params": part, "peak": peak, "fin": fin if numbers.sharkfin else None, "weight_decay": decay}
            for part, peak, fin, decay in kinds
            if part
        ]
        self.adam = torch.optim.AdamW(groups, lr=numbers.rate, betas=numbers.betas, eps=numbers.eps, fused=True)
        self.names: dict[Tensor, str] = {p: f"sparse.{name}" for name, p in coupling.sparse.named_parameters()}
        self.names |= {p: f"bridges.{name}" for name, p in coupling.bridges.named_parameters()}

    def step(self, done: float, l0: float | Fractions, caution: float = 1.0) -> bool:
        """Normalise the gradient, update with rates times `caution`, clear the gradient; False and no update if not finite."""
        for group in self.normalised_groups:
            gradients = [p.grad for p in group if p.grad is not None]
            count = sum(gradient.numel() for gradient in gradients)
            norm = gather_tensor(torch.nn.utils.get_total_norm(gradients, foreach=True)) if gradients else torch.zeros(())
            if not bool(torch.isfinite(norm)):
                return False
            torch._foreach_mul_(gradients, float(math.sqrt(count) / norm.clamp_min(1e-12)))  # pyright: ignore[reportPrivateImportUsage]
        fractions = Fractions.of(l0)
        warm = min(1.0, done / self.numbers.warmup) if self.numbers.warmup else 1.0
        for group in self.adam.param_groups:
            fin = 1 / math.sqrt(getattr(fractions, group["fin"])) if group["fin"] else 1.0
            group["lr"] = group["peak"] * max(warm, 1e-3) * (1 - done) * fin * caution
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        return True

    def pack_matrix(self, name: str, coupling: CoupledModels, pattern: Pattern | None = None) -> None:
        """Replace a matrix, and its moments, by the values of its nonzeros (or of `pattern`), here and in the model."""
        old = coupling.sparse.get_parameter(name)
        new = native.pack(coupling.sparse, name, pattern)
        index_p = coupling.sparse.compact[name].pattern.index_p
        for group in (*self.normalised_groups, *(group["params"] for group in self.adam.param_groups)):
            group[:] = [new if p is old else p for p in group]
        for key, value in self.adam.state.pop(old, {}).items():
            self.adam.state[new][key] = value.reshape(-1)[index_p].clone() if value.dim() else value
        del self.names[old]
        self.names[new] = f"sparse.values.{native.values_key(name)}"

    def tensors(self) -> dict[str, Tensor]:
        """Return both moments and the step count of every parameter, by name."""
        state = self.adam.state.items()
        return {f"adam.{key}.{self.names[p]}": gather_tensor(value) for p, moments in state for key, value in moments.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        for p, name in self.names.items():
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            if keys:
                self.adam.state[p] = {key: shard_like(tensors[f"adam.{key}.{name}"].to(p.device), p) for key in keys}

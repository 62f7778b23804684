"""Shard a sparse model too large for one device: its weights, gradients and moments, a shard per process (FSDP2, `fully_shard`).

This is requested in accelerate's configuration file (`distributed_type: FSDP`, `fsdp_version: 2`). The objective is one unit:
its weights are gathered for the passes of a step, its gradients are then averaged and scattered, and between steps each process
stores its rows of every matrix, of its moments and of its gradient. Smaller units would be gathered by some processes and not by
others, because rows enter and leave at random sites. The projection and saving need whole matrices, so they gather them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from bridge.recipe import RecipeError


def shard(objective: nn.Module, accelerator: Accelerator) -> bool:
    """Shard the objective's parameters in place if accelerate's configuration asks for it; return whether it does.

    Each process then keeps only its own shard. Raises RecipeError if the configuration asks for FSDP1.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # set by `accelerate launch`, also on a CPU
    if not fsdp or accelerator.num_processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        rule = "joins matrices into one vector, but bridge selects the largest weights of each matrix"
        raise RecipeError("FSDP version 1", rule, "set fsdp_version: 2 in accelerate's configuration")
    fully_shard(objective, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    return True


def in_shards(module: nn.Module) -> bool:
    """Whether a module's parameters are in shards."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def gather_tensor(tensor: Tensor) -> Tensor:
    """Return the whole tensor; one in shards is gathered from the processes, so every process has to call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, shards: Tensor) -> Tensor:
    """Shard a whole tensor in the same way as `shards`; return it unchanged if that is not in shards."""
    if not isinstance(shards, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor, shards.device_mesh, shards.placements, src_data_rank=None)


@contextmanager
def gathered_weights(module: nn.Module) -> Iterator[None]:
    """Context manager in which a module's parameters are whole; changes to them are written back to their shards."""
    places = gather_parameters(module)
    try:
        yield
    finally:
        for one, name, p in places:
            changed = one._parameters[name]
            assert changed is not None
            with torch.no_grad():
                p.copy_(shard_like(changed.detach(), p))
            one._parameters[name] = p


def gather_parameters(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Make a module's parameters whole, in place; return (module, name, shard) for each parameter that was in shards."""
    places: list[tuple[nn.Module, str, nn.Parameter]] = [
        (one, name, p) for one in module.modules() for name, p in one._parameters.items() if isinstance(p, DTensor)
    ]
    for one, name, p in places:
        one._parameters[name] = nn.Parameter(gather_tensor(p.detach()), requires_grad=p.requires_grad)
    return places

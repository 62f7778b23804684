"""A sparse model that outgrows a device: its weights, gradients and moments in shards, one to a process (FSDP2, `fully_shard`).

Asked for by accelerate's own configuration file (`distributed_type: FSDP`, `fsdp_version: 2`). The objective is one unit: its
weights are gathered for the passes of a step, its gradients averaged and scattered behind them, and between steps each process
holds its rows of every matrix, of its moments and of its gradient. Units within it would be gathered by one process and not by
another, as rows enter and leave where they were drawn to. What needs whole matrices (the projection, saving) gathers them.
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
    """Keep of the objective's parameters this process's shard alone, in place, if accelerate's configuration asks for that.

    Whether it does. Raises RecipeError where it asks for FSDP1's shards.
    """
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # as `accelerate launch` hands it on, also on a CPU
    if not fsdp or accelerator.num_processes == 1:
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        rule = "lays matrices end to end, and bridge keeps the largest weights of each"
        raise RecipeError("FSDP of version 1", rule, "set fsdp_version: 2 in accelerate's configuration")
    fully_shard(objective, mesh=init_device_mesh(accelerator.device.type, (accelerator.num_processes,)))
    return True


def in_shards(module: nn.Module) -> bool:
    """Whether a module's parameters are in shards."""
    return any(isinstance(p, DTensor) for p in module.parameters())


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from the processes where it is in shards: then every process has to ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def alike(tensor: Tensor, shards: Tensor) -> Tensor:
    """A whole tensor in shards as `shards` is; itself where that is in none."""
    if not isinstance(shards, DTensor) or not tensor.dim():
        return tensor
    return distribute_tensor(tensor, shards.device_mesh, shards.placements, src_data_rank=None)


@contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """A context in which a module's parameters are whole; what is then changed in them is kept, in their shards."""
    places = gather(module)
    try:
        yield
    finally:
        for one, name, p in places:
            changed = one._parameters[name]
            assert changed is not None
            with torch.no_grad():
                p.copy_(alike(changed.detach(), p))
            one._parameters[name] = p


def gather(module: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Make a module's parameters whole, in place, and return where those stood that were in shards, and the shards."""
    places: list[tuple[nn.Module, str, nn.Parameter]] = [
        (one, name, p) for one in module.modules() for name, p in one._parameters.items() if isinstance(p, DTensor)
    ]
    for one, name, p in places:
        one._parameters[name] = nn.Parameter(whole(p.detach()), requires_grad=p.requires_grad)
    return places

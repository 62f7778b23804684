"""A model that the caller holds, made ready to run: unwrapped, with its weights checked, as a copy that shares them.

Wrappers (torch.compile, DataParallel and their like) prevent modules from being called one by one, or rename weights; they are
removed. Weights that are not numbers in memory (offloaded, sharded, quantized) are refused, each with its remedy.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from bridge.huggingface.site_discovery import DenseModelError

# class and attribute of what holds a model whole, and only runs it otherwise
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
PLAIN = (nn.Parameter, Tensor)


def unwrapped(model: Any) -> Any:
    """The model inside torch.compile, DataParallel, DistributedDataParallel or an engine; itself where not wrapped."""
    while isinstance(model, nn.Module) and type(model).__name__ in WRAPPERS:
        model = model._modules[WRAPPERS[type(model).__name__]]
    return model


def check_weights(model: nn.Module, who: str, *, spread: bool = False) -> None:
    """Raise DenseModelError for weights that are not all there as numbers, on one device unless it may be `spread`."""
    weights = dict(model.named_parameters())
    flagged = getattr(getattr(model, "config", None), "quantization_config", None) is not None
    if away := [name for name, weight in weights.items() if weight.is_meta]:
        what = f"{len(away)} of its {len(weights)} weights are not in memory ({away[0]}: offloaded, or never loaded)"
        raise DenseModelError(who, f"cannot be read: {what}", "load it whole, without a device_map that offloads")
    for name, value in [*weights.items(), *(model.state_dict().items() if flagged else ())]:
        if type(value).__name__ in ("FlatParameter", "DTensor") or type(value.data).__name__ == "DTensor":
            raise DenseModelError(who, f"cannot be read: {name} is sharded over processes", "give the whole model")
        plain = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() > 1
        if not plain or type(value) not in PLAIN or value.is_quantized:
            kind = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
            raise DenseModelError(who, f"is quantized ({name} is {kind})", "give it as it was before, or model.dequantize()")
    if any(type(module).__module__.startswith(("torch.ao.", "torch.quantiz")) for module in model.modules()):
        raise DenseModelError(who, "is quantized by torch", "give it as it was before")
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1 and not spread:
        what = f"its weights are on several devices ({', '.join(devices)}), and bridge runs a dense model on one"
        raise DenseModelError(who, f"cannot be read: {what}", "load it without device_map, or move it with model.to(...)")


def twin_of(model: nn.Module, *, own_weights: bool = False) -> Any:
    """A copy with hooks, mode and requires_grad of its own, which shares the weights unless it is to have `own_weights`."""
    shared: dict[int, Any] = {}
    if not own_weights:
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    kept = [value for module in model.modules() for value in vars(module).values()]
    while kept:  # torch copies no tensor that has a gradient's history, such as an activation that someone keeps
        value = kept.pop()
        if isinstance(value, Tensor) and not value.is_leaf:
            shared.setdefault(id(value), value.detach())
        elif isinstance(value, (dict, list, tuple)):
            kept += value.values() if isinstance(value, dict) else value
    for module in reversed([*model.modules()]):  # the inner ones first: what was compiled in a place is there as it was
        if (inner := unwrapped(module)) is not module:
            shared[id(module)] = copy.deepcopy(inner, shared)
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        module._compiled_call_impl = None  # of module.compile(), which is the original's
        before = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
        if "_original_forward" in module.__dict__ or getattr(before, "__func__", None) is type(module).forward:
            del module.forward  # of accelerate's mixed precision, and of module.forward = torch.compile(module.forward)
    return twin

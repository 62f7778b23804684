"""Prepare a model that the caller has in memory: unwrap it, check its weights, and make a copy that shares them.

Wrappers (torch.compile, DataParallel and similar ones) rename weights or prevent modules from being called one by one; they are
removed. Weights that are not numbers in memory (offloaded, sharded, quantized) are refused, each with its own remedy.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from bridge.huggingface.site_discovery import DenseModelError

# the class of a wrapper that only changes how a model is run -> its attribute that holds the model
WRAPPERS = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
PLAIN = (nn.Parameter, Tensor)


def unwrap(model: Any) -> Any:
    """Return the model inside torch.compile, DataParallel or DistributedDataParallel; the model itself if it is not wrapped."""
    while isinstance(model, nn.Module) and type(model).__name__ in WRAPPERS:
        model = model._modules[WRAPPERS[type(model).__name__]]
    return model


def check_weights(model: nn.Module, who: str, *, spread: bool = False) -> None:
    """Raise DenseModelError unless all weights are in memory as numbers, and on one device (or the model may be `spread`)."""
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
            remedy = "give the model as it was before, or call model.dequantize()"
            raise DenseModelError(who, f"is quantized ({name} is {kind})", remedy)
    if any(type(module).__module__.startswith(("torch.ao.", "torch.quantiz")) for module in model.modules()):
        raise DenseModelError(who, "is quantized by torch", "give the model as it was before")
    devices = sorted({str(weight.device) for weight in weights.values()})
    if len(devices) > 1 and not spread:
        what = f"its weights are on several devices ({', '.join(devices)}), and bridge runs a dense model on one"
        raise DenseModelError(who, f"cannot be read: {what}", "load it without device_map, or move it with model.to(...)")


def copy_model(model: nn.Module, *, own_weights: bool = False) -> Any:
    """Return a copy with its own hooks, mode and requires_grad, which shares the weights unless it gets `own_weights`."""
    shared: dict[int, Any] = {}
    if not own_weights:
        shared |= {id(buffer): buffer for buffer in model.buffers()}
        shared |= {id(weight): nn.Parameter(weight.detach(), requires_grad=False) for weight in model.parameters()}
    kept = [value for module in model.modules() for value in vars(module).values()]
    while kept:  # deepcopy refuses a tensor with a gradient history, such as a stored activation
        value = kept.pop()
        if isinstance(value, Tensor) and not value.is_leaf:
            shared.setdefault(id(value), value.detach())
        elif isinstance(value, (dict, list, tuple)):
            kept += value.values() if isinstance(value, dict) else value
    for module in reversed([*model.modules()]):  # innermost first: the copy has the original of a compiled module
        if (inner := unwrap(module)) is not module:
            shared[id(module)] = copy.deepcopy(inner, shared)
    twin = copy.deepcopy(model, shared)
    for module in twin.modules():
        module._compiled_call_impl = None  # set by module.compile(), and bound to the original
        before = getattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable", None)
        if "_original_forward" in module.__dict__ or getattr(before, "__func__", None) is type(module).forward:
            del module.forward  # set by accelerate's mixed precision, or by module.forward = torch.compile(module.forward)
    return twin

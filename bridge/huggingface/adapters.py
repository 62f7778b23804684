"""Merge a PEFT adapter exactly into the weights of its model, or refuse it.

The reference is the output of PEFT's own forward pass on probe tokens, with the adapters in the state in which they were given
(several may be active, or one switched off). Each layer of an adapter is then replaced by a plain layer whose weights include the
change, and the plain model must give the same logits and the same embedding of every token. If an adapter changes a weight that
several modules share (tied embeddings, replicated layers), each of these modules first gets a copy of its own, because a change
merged into the shared weight would reach all of them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bridge.errors import first_line, reraise_as
from bridge.huggingface.site_discovery import PARITY_FP32, DenseModelError, context_of, forward, largest_magnitude, probe_tokens

if TYPE_CHECKING:
    from peft import PeftConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZER = "tokenizer_config.json"
_OTHER_KIND = "give an adapter that only changes weights, such as a plain LoRA"


def has_adapter(model: nn.Module) -> bool:
    """Return whether a live model has PEFT adapters: a PeftModel, or a transformers model to which one was added."""
    return hasattr(model, "peft_config")


def inner_model(model: nn.Module) -> Any:
    """Return the transformers model inside a model with adapters, which may be the model itself."""
    from transformers import PreTrainedModel

    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


def adapter_folder(adapter: str) -> Path:
    """Return the folder with an adapter's files, downloaded if `adapter` is a hub id. Raises DenseModelError."""
    folder, who = Path(adapter), f"adapter {adapter!r}"
    if folder.is_file():
        raise DenseModelError(who, "is a file", "give the folder that PEFT's save_pretrained wrote")
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            wanted = [CONFIG, WEIGHTS, "tokenizer*", "*token*.json", "vocab*", "merges.txt", "chat_template*"]
            folder = Path(snapshot_download(adapter, allow_patterns=wanted))
        except Exception as error:
            rule = f"is neither a folder here nor an adapter on the Hugging Face hub or in its cache ({first_line(error)})"
            raise DenseModelError(who, rule, "give the folder of an adapter") from error
    if not (folder / CONFIG).is_file():
        within = sorted(str(path.parent) for path in folder.glob(f"*/{CONFIG}"))  # PEFT saves a named one there
        remedy = f"give {within[0]!r}, which has one" if within else "give the folder that PEFT's save_pretrained wrote"
        raise DenseModelError(who, f"has no {CONFIG}", remedy)
    if not (folder / WEIGHTS).is_file():
        raise DenseModelError(who, f"has no {WEIGHTS} (other weight files can run code)", "save it with PEFT's save_pretrained")
    return folder


def with_adapter(model: Any, folder: Path, adapter: str, name: str) -> Any:
    """Return the model with an adapter from `adapter_folder` merged into its weights; `model` is changed in place.

    If the adapter has weights for more tokens than the model, the model gets these tokens. Raises DenseModelError if the adapter
    does not fit, or cannot be merged exactly.
    """
    from peft import get_peft_model

    who, remedy = f"adapter {adapter!r}", "give the model that it was trained on"
    config = _read_config(folder, who)
    n_added = _add_tokens(model, folder, config)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # PEFT fills an adapter at random before it loads it
        warnings.simplefilter("ignore")  # the loading report is checked below
        with reraise_as(DenseModelError, who, f"does not fit model {name!r}", remedy):
            peft_model = get_peft_model(model, config)
            report = peft_model.load_adapter(str(folder), "default", torch_device="cpu")
    weights, missing = dict(peft_model.named_parameters(remove_duplicate=False)), report.missing_keys
    filled = {id(weight) for key, weight in weights.items() if key not in missing}  # a shared weight counts by all its names
    unused, unfilled = report.unexpected_keys, [key for key in missing if id(weights.get(key)) not in filled]
    problems = "has weights that the model has no place for", "lacks weights for modules that it changes"
    for keys, problem in zip((unused, unfilled), problems, strict=True):
        if keys:
            rule = f"does not fit model {name!r}: it {problem}, such as {min(keys)} ({len(keys)} in all)"
            raise DenseModelError(who, rule, remedy)
    return merge_adapters(peft_model, who, name, n_added)


def merge_adapters(model: Any, who: str, name: str, n_added: int = 0) -> Any:
    """Return a plain transformers model that computes the same as a model with PEFT adapters; `model` is changed in place.

    `who` names the adapters in errors; those that are switched off are left out. The last `n_added` tokens must have weights from
    the adapter. Raises DenseModelError if the plain model gives other logits or embeddings.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    plain = inner_model(model)
    kinds = ", ".join(sorted({_adapter_kind(config) for config in model.peft_config.values()}))
    problem = f"{who} ({kinds}) cannot be merged into the weights of model {name!r}"
    layer_types = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    model.eval()
    tokens_bt = probe_tokens(plain, f"model {name!r}", context_of(plain))
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast(tokens_bt.device.type, enabled=False):
        warnings.simplefilter("ignore")
        with reraise_as(DenseModelError, problem, "", _OTHER_KIND):
            wanted_btv, wanted_vd = forward(model, tokens_bt), _embeddings(model)
            for rows, what in ((wanted_vd, "embeddings"), (wanted_btv[0, 0, :, None], "output weights")) if n_added else ():
                if lost := int(rows[-n_added:].isnan().any(-1).sum()):
                    rule = f"has no {what} for {lost} of the {n_added} tokens that it adds"
                    raise DenseModelError(who, rule, "give a model into which the adapter was merged")
            for layer in model.modules():
                if isinstance(layer, layer_types) and layer.disable_adapters:
                    if isinstance(layer, BaseTunerLayer) and layer.merged:
                        layer.unmerge()
                    layer.set_adapter([])
            _untie(model, layer_types)
            for path, layer in [*model.named_modules()]:
                if isinstance(layer, AuxiliaryTrainingWrapper):
                    model.set_submodule(path, layer.unload_and_optionally_merge_module(True, False, None))
            for path, layer in reversed([*model.named_modules()]):  # innermost first: one may wrap another
                if isinstance(layer, BaseTunerLayer):
                    layer.merge()
                    model.set_submodule(path, layer.get_base_layer())
            _forget(plain)
            got_btv, got_vd = forward(plain, tokens_bt), _embeddings(plain)
    for wanted, got, what in ((wanted_btv, got_btv, "logits"), (wanted_vd, got_vd, "embeddings")):
        if wanted.shape != got.shape:
            raise DenseModelError(f"{problem}: the {what}", "would have another shape", _OTHER_KIND)
        error, tolerance = (
            largest_magnitude(got - wanted),
            max(PARITY_FP32, 8 * torch.finfo(got.dtype).eps) * max(1.0, largest_magnitude(wanted)),
        )
        if not error <= tolerance < torch.inf:
            rule = f"would differ by {error:.2g} (tolerance {tolerance:.2g})"
            raise DenseModelError(f"{problem}: the {what}", rule, _OTHER_KIND)
    return plain


def _adapter_kind(config: PeftConfig) -> str:
    """Return PEFT's name for the kind of an adapter."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def _read_config(folder: Path, who: str) -> PeftConfig:
    """Return an adapter's configuration. Raises DenseModelError if it cannot be merged into a causal language model."""
    from peft import PeftConfig

    unreadable = f"has an {CONFIG} that cannot be read"
    with warnings.catch_warnings(), reraise_as(DenseModelError, who, unreadable, "save it again with PEFT"):
        warnings.simplefilter("ignore")
        given = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config = PeftConfig.from_pretrained(str(folder))
    # PEFT silently drops settings that it does not know, such as those of later versions
    known = {*dir(config), "peft_version", "runtime_config"}
    if unknown := sorted(key for key, value in given.items() if value and key not in known):
        rule = f"has a setting that this version of PEFT does not know, {unknown[0]!r}"
        raise DenseModelError(who, rule, "install a later version of PEFT")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise DenseModelError(who, f"is for the task {config.task_type}", "give an adapter that was trained as a CAUSAL_LM")
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        rule = f"is {_adapter_kind(config)}, which changes no weights and cannot be merged into them"
        raise DenseModelError(who, rule, _OTHER_KIND)
    return config


def _add_tokens(model: Any, folder: Path, config: PeftConfig) -> int:
    """Add to the model the tokens that only the adapter has, with nan weights for it to replace; return how many were added."""
    from safetensors import safe_open

    tables = [table for table in (model.get_input_embeddings(), model.get_output_embeddings()) if table is not None]
    n_now, width = tables[0].weight.shape
    paths = [f".{path}." for path, module in model.named_modules() if module in tables]
    trained = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
    numbers = [number + 1 for group in (trained.values() if isinstance(trained, dict) else [trained]) for number in group]
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = [file.get_slice(key).get_shape() for key in [*file.keys()] if any(path in key for path in paths)]
    except Exception:  # PEFT reports the problem when it loads the file
        return 0
    n_tokens = max([*numbers, *(shape[0] for shape in shapes if shape[1:] == [width])], default=0)
    if n_tokens <= n_now:
        return 0
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            if table is not None:
                table.weight[n_now:] = torch.nan
    return n_tokens - n_now


def _embeddings(model: Any) -> Tensor:
    """Return the embedding of every token."""
    table = model.get_input_embeddings()
    return table(torch.arange(table.weight.shape[0], device=table.weight.device))


def _untie(model: nn.Module, layer_types: tuple[type, ...]) -> None:
    """Give each module that shares a weight with a module under an adapter its own copy of the weight."""
    changed = {id(weight) for layer in model.modules() if isinstance(layer, layer_types) for weight in layer.parameters()}
    owned: set[int] = set()
    for module in model.modules():
        for key, weight in module.named_parameters(recurse=False):
            if id(weight) in changed & owned:
                setattr(module, key, nn.Parameter(weight.detach().clone(), requires_grad=False))
            owned.add(id(weight))


def _forget(plain: Any) -> None:
    """Remove all mention of adapters from a model whose layers are plain, and of tied embeddings if these are tied no longer."""
    if has_adapter(plain):
        del plain.peft_config
    plain._hf_peft_config_loaded = False
    embedding, unembedding = plain.get_input_embeddings(), plain.get_output_embeddings()
    if unembedding is not None and unembedding.weight is not embedding.weight:
        for config in (plain.config, plain.config.get_text_config()):
            config.tie_word_embeddings = False

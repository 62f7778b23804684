"""Models in GGUF, the format of llama.cpp: one file with weights, configuration and tokenizer, read by transformers.

transformers converts such a file into one of its own models, and the quantized weights into floats. It does not report what it
drops: tensors that have no place in its model, such as Llama 3's rotary factors, and settings for which it uses its own default.
Both are therefore compared with the file, and a file that was not read completely is refused.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from importlib.util import find_spec
from math import isclose
from pathlib import Path
from typing import Any

from bridge.huggingface.identity import settings_of
from bridge.huggingface.site_discovery import DenseModelError

# settings of a file that affect the model's function, without the architecture's name -> their names in transformers
EPSILON = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
SETTINGS = {
    "attention.layer_norm_rms_epsilon": EPSILON,
    "attention.layer_norm_epsilon": EPSILON,
    "attention.sliding_window": ("sliding_window",),
    "attention.scale": ("attention_multiplier",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logit_scale", "logits_scaling"),
    "rope.freq_base": ("rope_theta",),
    "rope.scaling.factor": ("factor",),
}


def find_gguf(name: str) -> tuple[str, str] | None:
    """Return (folder or hub id, file in it) of the GGUF that a model's name refers to; None if it refers to none.

    The name is that of the file (on the hub owner/model/file.gguf), or of a folder that has one such file and no safetensors.
    Raises DenseModelError if the file is missing, split or one of several, or the package that reads it is not installed.
    """
    path, who = Path(name), f"model {name!r}"
    if name.endswith(".gguf") and not path.is_dir():
        parts = name.split("/")
        on_hub = not path.exists() and len(parts) > 2 and parts[0] not in ("", ".", "..", "~") and not Path(parts[0]).is_dir()
        found = ("/".join(parts[:2]), "/".join(parts[2:])) if on_hub else (str(path.parent), path.name)
        if not on_hub and not path.is_file():
            raise DenseModelError(who, "does not exist", "give a .gguf file, or a folder that has one")
    else:
        files = [] if not path.is_dir() or any(path.glob("*.safetensors")) else sorted(path.glob("*.gguf"))
        if not files:
            return None
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
            raise DenseModelError(who, f"has {len(files)} GGUF files ({names})", "choose one with ‹gguf›")
        found = name, files[0].name
    if re.search(r"-\d{5}-of-\d{5}\.gguf$", found[1]):
        raise DenseModelError(who, f"is one part of several ({found[1]})", "join them with llama-gguf-split")
    if find_spec("gguf") is None:
        rule = "is in GGUF, and the package that reads GGUF is not installed"
        raise DenseModelError(who, rule, "run pip install 'bridge[gguf]'")
    return found


def named_gguf(model: str | None, file: str) -> str:
    """Return the full name of a GGUF file, given as a model (folder, hub id or None) and a file in it, or as a path."""
    if not file.endswith(".gguf"):
        raise DenseModelError(f"‹gguf› {file!r}", "is not a .gguf file", "give the name of one")
    if model is None or (Path(file).is_file() and not (Path(model) / file).is_file()):
        return file
    return str(Path(model) / file) if Path(model).is_dir() else f"{model}/{file}"


def loading_options(file: str) -> dict[str, Any]:
    """Return the arguments with which `from_pretrained` reads a GGUF file and dequantizes its weights."""
    import transformers

    quantization = getattr(transformers, "GgufConfig", None)  # earlier versions always dequantize
    return {"gguf_file": file} | ({"quantization_config": quantization(dequantize=True)} if quantization else {})


def as_plain_model(model: Any, who: str, where: str, file: str, revision: str | None) -> Any:
    """Return a plain instance with a GGUF model's weights: transformers takes the original for quantized, and cannot save it.

    Raises DenseModelError if the file has weights or settings that the model lacks.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    path = Path(where) / file
    if not path.is_file():
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(where, file, revision=revision))
    _check_whole(model, config.get_text_config(), who, path)
    plain = type(model).from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
    plain.config._name_or_path = f"{where}/{file}"
    return plain


def _check_whole(model: Any, config: Any, who: str, path: Path) -> None:
    from gguf import GGUFReader  # pyright: ignore[reportMissingImports]

    reader = GGUFReader(str(path))
    stored = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    taken = [weight.numel() for weight in model.parameters()]
    if sum(stored.values()) != sum(taken):
        left = Counter(stored.values()) - Counter(taken)
        odd = next((name for name, size in stored.items() if size in left), next(iter(stored), "nothing"))
        rule = f"has {sum(stored.values()):,} weights, but the model that transformers makes from it has {sum(taken):,}"
        raise DenseModelError(who, f"{rule} ({odd} has no place in that model)", "give the model in safetensors")
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = f"{fields['general.architecture']}."
    given = {name.removeprefix(architecture): value for name, value in fields.items() if name.startswith(architecture)}
    has: dict[str, list[Any]] = {}
    for key, value in settings_of(config).items():
        has.setdefault(key.rpartition(".")[2], []).append(value)
    expected = {setting: [value for name in names for value in has.get(name, ())] for setting, names in SETTINGS.items()}
    head, parts = has.get("head_dim") or [config.hidden_size // config.num_attention_heads], has.get("partial_rotary_factor")
    expected["rope.dimension_count"] = [each * part for each in head if each for part in parts or [1.0]]
    for setting, values in expected.items():
        value, numbers = given.get(setting), [each for each in values if isinstance(each, (int, float))]
        if isinstance(value, (int, float)) and value and not any(isclose(value, each, rel_tol=1e-5) for each in numbers):
            found = ", ".join(map(str, values)) or "no such setting"
            rule = f"sets {architecture}{setting} to {value:g}, but the model that transformers makes from it has {found}"
            raise DenseModelError(who, rule, "give the model in safetensors")

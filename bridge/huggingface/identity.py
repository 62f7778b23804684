"""The identity of a dense model: its weights, the configuration that decides its function, and its answers to a few fixed tokens.

Weights alone do not identify a model: another rotary base, activation or epsilon in config.json gives another function. A
fingerprint is therefore a digest of both. It is computed from memory at each call: hashing is fast enough that nothing is cached,
and nothing can be stale. It distinguishes models, but is no signature.

- Weights count as float32 values by name, so that a file and a model loaded from it in a higher precision are the same.
- Settings of the configuration count if they differ from their class's defaults and can change a logit (see INERT). If a later
  version of transformers adds a setting, the fingerprint of a model stays the same.
- Answers are log-probabilities. They reveal changes that neither shows (an activation exchanged in a live model, a default that
  changed between versions). They are compared within a tolerance and never hashed, because other machines round differently.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from bridge.huggingface.site_discovery import PROBE_ROWS, PROBE_TOKENS, forward

# settings that no logit in eval mode depends on: names, precision, training, caches, labels, which tokens are special
INERT = re.compile(
    r"_|(torch_)?dtype$|transformers_version|architectures|auto_map|quantization_config|.*token_ids?$|.*(dropout|pdrop|layerdrop)"
    r"|initializer|init_std|use_cache|cache_implementation|return_dict|output_(attentions|hidden_states|router_logits)|id2label"
    r"|label2id|problem_type|summary_|task_specific_params|gradient_checkpointing|pretraining_tp|chunk_size_feed_forward"
    r"|.*(aux_loss|z_loss)_coef"
)
SAME_ANSWERS = 0.1  # nats; TF32 changes a log-probability by up to about .05, another function by far more
DEFAULT = "its default"


@dataclass(frozen=True)
class Identity:
    """A digest of the weights, the non-default configuration by dotted key, the precision, and log-probabilities."""

    weights: str
    configuration: Mapping[str, Any]
    dtype: str
    answers: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the identity as stored with a coupling; `read` is the inverse."""
        return {"fingerprint": _digest(self.weights, self.configuration), **asdict(self), "answers": list(self.answers)}

    @staticmethod
    def read(facts: Mapping[str, Any]) -> Identity:
        """Return the identity from stored facts. Raises KeyError, TypeError or ValueError if a fact is missing or wrong."""
        weights, configuration, dtype = facts["weights"], facts["configuration"], facts["dtype"]
        if not (isinstance(weights, str) and isinstance(configuration, dict) and isinstance(dtype, str)):
            raise TypeError("the identity of its dense model has values of wrong types")
        if facts["fingerprint"] != _digest(weights, configuration):
            raise ValueError("the fingerprint of its dense model does not match the stored weights and configuration")
        return Identity(weights, configuration, dtype, tuple(map(float, facts["answers"])))

    def difference(self, now: Identity) -> str | None:
        """Return how another model differs, in a few words: settings by key, weights, or answers; None if it does not."""
        keys = sorted({*self.configuration, *now.configuration})
        was, found = ({key: one.configuration.get(key, DEFAULT) for key in keys} for one in (self, now))
        changed = [f"{key} is {found[key]}, was {was[key]}" for key in keys if found[key] != was[key]]
        if changed:
            more = f" and {len(changed) - 3} more settings" if len(changed) > 3 else ""
            return f"its configuration differs: {', '.join(changed[:3])}{more}"
        if self.weights != now.weights:
            return "its weights differ"
        if len(self.answers) != len(now.answers):
            return f"it gives {len(now.answers)} log-probabilities for comparison, and {len(self.answers)} are stored"
        off = max((abs(a - b) for a, b in zip(self.answers, now.answers, strict=True)), default=0.0)
        eps = max(torch.finfo(getattr(torch, one.dtype, torch.bfloat16)).eps for one in (self, now))
        if not off <= max(SAME_ANSWERS, 8 * eps * max(map(abs, self.answers), default=0.0)):
            return f"its weights and configuration are the same, but its log-probabilities differ by {off:.2g}: its code differs"
        return None


def fingerprint_of(model: Any) -> str:
    """Return 64 hex digits that distinguish the model, as it is now, from one with other weights or another configuration."""
    return _digest(digest_weights(xxhash.xxh3_128(), model.state_dict()), configuration_of(model))


@torch.no_grad()
def identity_of(model: Any, context: int | None) -> Identity:
    """Return the identity of a model as it is now; `context` is the largest number of tokens that it takes (None: no limit)."""
    weight = next(model.parameters())
    vocabulary = model.config.get_text_config().vocab_size
    length = min(PROBE_TOKENS, context or PROBE_TOKENS)
    tokens_bt = (torch.arange(PROBE_ROWS * length).reshape(PROBE_ROWS, length) * 7919 + 1) % vocabulary
    with torch.autocast(weight.device.type, enabled=False):
        log_p_btv = forward(model, tokens_bt.to(weight.device)).float().log_softmax(-1).cpu()
    answers_bt = log_p_btv.gather(-1, tokens_bt.roll(-1, 1)[..., None])[..., 0]
    answers = answers_bt.nan_to_num(neginf=-1e4).clamp(min=-1e4).flatten().tolist()
    dtype = str(weight.dtype).removeprefix("torch.")
    weights = digest_weights(xxhash.xxh3_128(), model.state_dict())
    return Identity(weights, configuration_of(model), dtype, tuple(round(answer, 5) for answer in answers))


def configuration_of(model: Any) -> dict[str, Any]:
    """Return the settings that affect the model's function and are not its class's defaults, by dotted key."""
    from transformers.utils import logging

    config = model.config.get_text_config()
    settings, verbosity = settings_of(config), logging.get_verbosity()
    logging.set_verbosity_error()  # some classes warn about their own defaults
    try:
        defaults = settings_of(type(config)())
    except Exception:  # a class that needs settings has no defaults
        defaults = {}
    finally:
        logging.set_verbosity(verbosity)
    kept = {key: value for key, value in settings.items() if value != defaults.get(key)}
    kept |= {key: None for key, value in defaults.items() if value is not None and settings.get(key) is None}
    return {"model_type": config.model_type, **kept}


def settings_of(config: Any) -> dict[str, Any]:
    """Return every setting of a configuration that a logit may depend on, by dotted key, as a JSON value."""
    return _flat(config.to_dict())


def _flat(value: Any, key: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        parts = {f"{key}.{name}" if key else str(name): each for name, each in value.items()}
        parts = {name: each for name, each in parts.items() if key or not INERT.match(name)}
        return {name: leaf for part, each in parts.items() for name, leaf in _flat(each, part).items()}
    return {key: json.loads(json.dumps(value, default=str), parse_float=_number, parse_constant=str)}


def _number(text: str) -> int | float:
    """Return a whole number as an int, because people write 10000 or 10000.0, and any other as a float."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _digest(weights: str, configuration: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps([weights, configuration], sort_keys=True).encode()).hexdigest()


def digest_weights(digest: Any, weights: Mapping[str, Tensor]) -> str:
    """Return the hex digest of the names, shapes and fp32 values of weights; `digest` is a new hash of hashlib or xxhash."""
    for name, weight in sorted(weights.items()):
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

"""Tiny random models of every family that must be read, made here, with every parameter perturbed."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY, WIDTH, LAYERS = 80, 32, 3
SEQUENTIAL, PARALLEL = ("attn", "mlp") * LAYERS, ("parallel",) * LAYERS
LLAMA_LIKE = {"num_key_value_heads": 2}
GEMMA_LIKE = {"num_key_value_heads": 2, "head_dim": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"]}

# family: (architecture, settings beyond the common ones, expected sublayers)
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "gpt2": ("GPT2", {}, SEQUENTIAL),
    "openai-gpt": ("OpenAIGPT", {"afn": "gelu"}, SEQUENTIAL),  # its blocks, and their parts, return lists
    "gpt-neo": ("GPTNeo", {"attention_types": [[["global", "local", "global"], 1]], "window_size": 4}, SEQUENTIAL),
    "gpt-neox-parallel": ("GPTNeoX", {}, PARALLEL),
    "gpt-neox-sequential": ("GPTNeoX", {"use_parallel_residual": False}, SEQUENTIAL),
    "gpt-j": ("GPTJ", {"rotary_dim": 4}, PARALLEL),
    "opt": ("OPT", {"ffn_dim": 48}, SEQUENTIAL),
    "opt-post-norm": ("OPT", {"ffn_dim": 48, "do_layer_norm_before": False}, SEQUENTIAL),
    "bloom": ("Bloom", {}, SEQUENTIAL),
    "bloom-post-norm": ("Bloom", {"apply_residual_connection_post_layernorm": True}, SEQUENTIAL),
    "llama": ("Llama", LLAMA_LIKE, SEQUENTIAL),
    "mistral": ("Mistral", {**LLAMA_LIKE, "sliding_window": 4}, SEQUENTIAL),
    "mixtral": ("Mixtral", {**LLAMA_LIKE, "num_local_experts": 4}, SEQUENTIAL),
    "qwen2": ("Qwen2", LLAMA_LIKE, SEQUENTIAL),
    "qwen3": ("Qwen3", {**LLAMA_LIKE, "head_dim": 8}, SEQUENTIAL),
    "gemma2": ("Gemma2", GEMMA_LIKE, SEQUENTIAL),
    "gemma3": ("Gemma3", GEMMA_LIKE, SEQUENTIAL),
    "phi": ("Phi", {}, PARALLEL),
    "phi3": ("Phi3", LLAMA_LIKE, SEQUENTIAL),
    "olmo2": ("Olmo2", LLAMA_LIKE, SEQUENTIAL),
    "falcon-7b": ("Falcon", {}, PARALLEL),
    "falcon-40b": ("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, PARALLEL),
    "falcon-sequential": ("Falcon", {"parallel_attn": False, "alibi": True, "multi_query": False, "bias": True}, SEQUENTIAL),
    "stablelm": ("StableLm", LLAMA_LIKE, SEQUENTIAL),
    "stablelm-parallel": ("StableLm", {**LLAMA_LIKE, "use_parallel_residual": True}, PARALLEL),
    "starcoder2": ("Starcoder2", LLAMA_LIKE, SEQUENTIAL),
    "cohere": ("Cohere", {**LLAMA_LIKE, "logit_scale": 1.0}, PARALLEL),
    "granite": ("Granite", {**LLAMA_LIKE, "residual_multiplier": 0.22}, SEQUENTIAL),
    "smollm3": ("SmolLM3", LLAMA_LIKE, SEQUENTIAL),
}


def tiny(family: str = "gpt2", **others: Any) -> Any:
    """A random model of a family, every parameter perturbed, so that none is a zero or a one that hides an error."""
    architecture, settings, _ = FAMILIES[family]
    common = dict(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_attention_heads=4, intermediate_size=48, max_position_embeddings=16
    )
    special = dict(num_hidden_layers=LAYERS, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    suffix = "TextConfig" if architecture == "Gemma3" else "Config"
    head = "LMHeadModel" if architecture in ("GPT2", "OpenAIGPT") else "ForCausalLM"
    config = getattr(hf, architecture + suffix)(**common, **special, **{**settings, **others})
    torch.manual_seed(0)
    return perturbed(getattr(hf, architecture + head)(config))


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.15)
    return model.eval()


def some_tokens(rows: int = 4, length: int = 10, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))

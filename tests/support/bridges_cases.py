"""What tests share: bridges_cases."""

from __future__ import annotations

from pathlib import Path

from support.models import tiny_gpt2


def lora_folder(path: Path) -> str:
    """A random LoRA adapter of the tiny GPT-2, saved."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(tiny_gpt2(), LoraConfig(r=2, target_modules=["c_fc"], fan_in_fan_out=True, init_lora_weights=False))
    adapted.save_pretrained(str(path))
    return str(path)

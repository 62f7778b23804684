"""What tests share: a base coupling on disk, and what a fine-tune may be."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import peft
import torch
from support.models import tiny_gpt2, tiny_tokenizer, untrained

from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense

PROMPT = "w5 w9 w12 w7 w30"


def base_folder(folder: Path) -> Path:
    """A dense model and an untrained coupling to it, saved: FOLDER/dense and FOLDER/base, 6,400 tokens in its log."""
    tiny_gpt2().save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    base = untrained(load_dense(folder / "dense"), data={"rows": 4, "source": str(text_of(folder)), "context": 16})
    base.sparse.project(0.25)
    generator = torch.Generator().manual_seed(3)
    reference_bt = torch.randint(2, base.dense.vocabulary, (8, 16), generator=generator)
    replace(base, reference_bt=reference_bt).save_pretrained(folder / "base")
    (folder / "base" / "log.jsonl").write_text('{"step": 50, "tokens": 3200}\n{"step": 100, "tokens": 6400}\n')
    return folder / "base"


def text_of(folder: Path) -> Path:
    """A file of text of the tiny tokenizer's words."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(2, 40, (200, 60), generator=generator).tolist()
    file = folder / "text.txt"
    file.write_text("\n".join(" ".join(f"w{token}" for token in row) for row in ids))
    return file


def adapter_folder(folder: Path, scale: float = 0.0, name: str = "adapter", base: Path | None = None) -> Path:
    """A LoRA of the dense model in a folder, its second factor 0 times a scale, saved."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base or folder / "dense")
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT
        tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for key, weight in tuned.named_parameters():
            if "lora_B" in key:
                weight.copy_(scale * torch.randn_like(weight))
    tuned.save_pretrained(str(folder / name))
    return folder / name


def gone_on(base: CoupledModels) -> CoupledModels:
    """A copy of a coupling, weights of its own, that says it goes on from it."""
    shape = base.recipe.sparse.model_copy(update={"start": base.path})
    recipe = base.recipe.model_copy(update={"adapts": True, "sparse": shape})
    return replace(base, sparse=copy.deepcopy(base.sparse), bridges=copy.deepcopy(base.bridges), recipe=recipe)

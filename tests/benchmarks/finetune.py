"""Adapt a coupling to a known fine-tune and compare: a LoRA that writes `this` for `self`, trained here in a few minutes.

    python tests/benchmarks/finetune.py [--bridge checkpoints/python-bridge-32] [--out runs/finetune] [--count 16]

The text is the coupling's own corpus with every word `self` replaced by `this` (` self` and ` this` are one token each). PEFT
trains the LoRA on it, and `bridge adapt` continues from the base coupling with a twentieth of its tokens. Three couplings are
evaluated: the base on its own model and text, the base with the fine-tuned model, and the adapted one. `bridge diff` compares
held-out prompts where the rule applies (the text continues with ` this`) and where it does not (no `this` in or after them).
Results that are in --out are not made again. The script prints tables and one line of JSON; seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from prompts import SHIPPED

import bridge
from bridge.cli.console import held_out_text
from bridge.data.blocks import load_blocks
from bridge.data.corpora import documents
from bridge.finetunes.grafts import KINDS
from bridge.finetunes.result import render_diff
from bridge.models.bridges import CoupledModels
from bridge.models.dense import load_dense
from bridge.models.store import write_json
from bridge.training.evaluate import evaluate
from bridge.training.loop import Progress

WORD, NEW = "self", "this"
CHARACTERS = 12_000_000  # of text; one document in 50 is held out
ROWS, RATE, RANK = 16, 2e-3, 8  # of the LoRA
EVALUATED_ROWS = 96
PROMPT_ROWS = 120  # of held-out text that prompts are drawn from
LENGTHS = 12, 24  # tokens of a prompt


def stored(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the JSON in a file; if it is not there, make and save it first."""
    if not file.is_file():
        file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def corpus(file: Path, source: str, seed: int, word: str) -> Path:
    """Write the text with `self` replaced by a word, one document per line of JSON; return the file."""
    if not file.is_file():
        size, lines = 0, []
        for text in documents(source, seed):
            lines.append(json.dumps({"text": re.sub(rf"\b{WORD}\b", word, text)}))
            if (size := size + len(text)) > CHARACTERS:
                break
        file.write_text("\n".join(lines) + "\n")
    return file


def trained_adapter(folder: Path, base: CoupledModels, text: Path, minutes: float) -> dict[str, float]:
    """Train a LoRA for some processor minutes and save it; return its cost."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    blocks = load_blocks(str(text), base.dense.prompts, base.context, seed=base.recipe.seed)
    print(f"LoRA on {blocks.description}", flush=True)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(base.dense.name)
    targets = ["c_attn", "c_proj", "c_fc"]
    peft_model: Any = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM")
    )
    weights = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    started, step, done = time.process_time(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, step / 20) * (1 - done)
        tokens_bt = blocks.batch(step, ROWS, 1)
        loss = peft_model(tokens_bt, labels=tokens_bt).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step, done = step + 1, (time.process_time() - started) / (60 * minutes)
        if step % 100 == 0:
            print(f"LoRA step {step}, loss {float(loss):.3f}", flush=True)
    peft_model.save_pretrained(str(folder))
    return {"seconds": round(time.process_time() - started, 1), "steps": step, "tokens": step * tokens_bt.numel()}


def rule_prompts(base: Any, rows_bt: torch.Tensor, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Return held-out prompts after which the text continues with the new word, and prompts unrelated to it."""
    tokenizer, draw = base.dense.tokenizer, random.Random(seed)
    word, parts = tokenizer.convert_tokens_to_ids("Ġ" + NEW), {tokenizer.convert_tokens_to_ids(t) for t in ("th", "Ġ" + NEW)}
    applies, other = list[str](), list[str]()
    places = [(row, at) for row in range(len(rows_bt)) for at in range(LENGTHS[1], rows_bt.shape[1])]
    draw.shuffle(places)
    for row, at in places:
        length = draw.randint(*LENGTHS)
        ids, following = rows_bt[row, at - length : at].tolist(), int(rows_bt[row, at])
        into = applies if following == word else other if parts.isdisjoint([*ids, following]) else None
        if into is None or len(into) >= count:
            continue
        text = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if 0 not in ids and text.strip() and tokenizer(text)["input_ids"] == ids:
            into.append(text)
        if len(applies) >= count and len(other) >= count:
            break
    return applies, other


def adapted(out: Path, options: argparse.Namespace, text: Path) -> dict[str, float]:
    """Adapt the coupling into OUT/adapted with a twentieth of its tokens; return the cost."""
    started, last = time.process_time(), 0

    def watch(progress: Progress) -> None:
        nonlocal last
        last = progress.tokens

    bridge.adapt(options.bridge, adapter=out / "adapter", data=str(text), out=out / "adapted", resume=True, on_progress=watch)
    return {"seconds": round(time.process_time() - started, 1), "tokens": last}


def print_evaluations(found: dict[str, dict[str, Any]]) -> None:
    """Print CE recovered in both directions, at every site and over all sites."""
    print("\nCE recovered       " + "".join(f"{site['site']:>7}" for site in found["base"]["sites"]) + "    all     KL")
    for name, each in found.items():
        for way in ("in", "out"):
            sites = "".join(f"{site[f'recovered_{way}']:>7.3f}" for site in each["sites"])
            kl = f"{each['kl_sparse']:>7.3f}" if way == "in" else ""
            print(f"{name if way == 'in' else '':<10} {way:<8}{sites}{each[f'recovered_{way}']:>7.3f}{kl}")


def compared(file: Path, base: CoupledModels, tuned: CoupledModels, prompts: list[str], seed: int) -> dict[str, Any]:
    """Diff two couplings over some prompts, print and save it; return a summary."""
    started = time.process_time()
    found = bridge.diff(base, tuned, prompts, seed=seed)
    print(f"\n{render_diff(found, 120)}", flush=True)
    write_json(file, found.to_json())
    measure, changed = found.transplant, found.changed
    makes = [each.transplant for each in changed if each.transplant is not None]
    return {
        "prompts": len(prompts), "changed": len(changed), "verdict": found.verdict, "share": measure.value,
        "interval": measure.interval, "matched": measure.control and measure.control.mean,
        "matched_largest": measure.control and measure.control.bar, "all_nodes": measure.ceiling, "note": measure.note,
        "nodes": median(each.changed for each in changed) if changed else None,
        "through": {kind: median(each.through[kind] for each in changed) for kind in KINDS} if changed else None,
        "change": median(each.change for each in changed) if changed else None,
        "largest_change": max(abs(each.change) for each in found.prompts),
        "displaced": sum(sum(each.displaced) / len(each.displaced) for each in makes) / len(makes) if makes else None,
        "new_word": sum(each.answer.text.strip() == NEW for each in found.prompts),
        "channels": [[each.name, each.prompts, round(each.share, 4)] for each in found.channels[:8]],
        "seconds": round((time.process_time() - started) / len(prompts), 1),
    }  # fmt: skip


def main() -> None:
    """Make what is missing, then print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default=str(SHIPPED))
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--minutes", type=float, default=3, help="of the processor, for the LoRA")
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out: Path = options.out
    out.mkdir(parents=True, exist_ok=True)
    base = bridge.load(options.bridge)
    recipe = base.recipe
    own, text = (corpus(out / f"{word}.jsonl", recipe.data.source, recipe.seed, word) for word in (WORD, NEW))
    own_bt, held_bt = (held_out_text(base, options.bridge, str(file), PROMPT_ROWS) for file in (own, text))
    lora = stored(out / "adapter" / "trained.json", lambda: trained_adapter(out / "adapter", base, text, options.minutes))
    tuned = load_dense(base.dense.name, adapter=out / "adapter")
    found = {
        "base": stored(out / "base.json", lambda: evaluate(base, own_bt[:EVALUATED_ROWS]).to_json()),
        "before": stored(out / "before.json", lambda: evaluate(replace(base, dense=tuned), held_bt[:EVALUATED_ROWS]).to_json()),
    }
    took = stored(out / "adapted.json", lambda: adapted(out, options, text))
    after = bridge.load(out / "adapted")
    found["after"] = stored(out / "after.json", lambda: evaluate(after, held_bt[:EVALUATED_ROWS]).to_json())
    print_evaluations(found)
    applies, other = rule_prompts(base, held_bt, options.count, options.seed)
    kept = {"applies": applies, "other": other}
    diffs = {name: compared(out / f"diff-{name}.json", base, after, some, options.seed) for name, some in kept.items()}
    short = {
        name: {key: each[key] for key in ("ce_dense", "kl_sparse", "recovered_in", "recovered_out")}
        for name, each in found.items()
    }
    print(json.dumps({"lora": lora, "adapt": took, "evaluations": short, "diffs": diffs}))


if __name__ == "__main__":
    main()

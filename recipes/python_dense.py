"""Train checkpoints/python-dense, a GPT-2 with its own byte-level BPE tokenizer, on Python source.

    python recipes/python_dense.py --out checkpoints/python-dense --minutes 40

The corpus is the standard library of this machine and the installed packages. The training state is saved in OUT.state
(safetensors and JSON) every two minutes. A run continues from it, so training may be divided into stretches of any length; a
stretch ends after --stretch minutes. The folder OUT is written in plain Hugging Face format when the whole budget is spent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridge.data.blocks import load_blocks
from bridge.data.corpora import documents

VOCABULARY = 2048  # the paper's vocabulary for Python; a larger one would spend the small model on its embedding
CONTEXT = 128  # about 10 lines of code, enough for every task of the suite
LAYERS, WIDTH, HEADS = 4, 128, 4  # about a million weights, which two CPU cores can train well within an hour
ROWS = 32  # 4096 tokens a step; smaller batches learn more per token, larger ones exceed the caches
LEARNING_RATE, WARMUP = 3e-3, 200  # the largest rate that was stable at this width
CORPUS = "stdlib+packages"
END = "<|endoftext|>"


def make_tokenizer(out: Path, seed: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of VOCABULARY tokens on the first 8 MB of the corpus, save it in `out` and return it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)

    def sample():
        size = 0
        for text in documents(CORPUS, seed):
            yield text
            size += len(text)
            if size > 8_000_000:
                return

    tokenizer.train_from_iterator(sample(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT)
    fast.save_pretrained(out)
    return fast


def main() -> None:
    """Train for --minutes in total, in stretches of --stretch minutes, and write the model when the budget is spent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("checkpoints/python-dense"))
    parser.add_argument("--minutes", type=float, default=40, help="total training time")
    parser.add_argument("--stretch", type=float, default=math.inf, help="stop (resumably) after this many minutes")
    parser.add_argument("--tokens", type=int, default=60_000_000, help="maximum number of tokens read from the corpus")
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_flush_denormal(True)
    state = arguments.out.with_name(arguments.out.name + ".state")
    state.mkdir(parents=True, exist_ok=True)
    if (state / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(state)
    else:
        tokenizer = make_tokenizer(state, arguments.seed)
    blocks = load_blocks(CORPUS, tokenizer, CONTEXT, max_tokens=arguments.tokens, seed=arguments.seed)
    print(blocks.description, flush=True)

    torch.manual_seed(arguments.seed)
    end = int(tokenizer.convert_tokens_to_ids(END))  # pyright: ignore[reportArgumentType]
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=end, eos_token_id=end,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    model.to(device)  # pyright: ignore[reportArgumentType]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    step, spent = 0, 0.0
    if (state / "progress.json").exists():
        progress = json.loads((state / "progress.json").read_text())
        step, spent = progress["step"], progress["minutes"]
        saved = load_file(state / f"step-{step}.safetensors", device=device)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])
                optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": saved[f"{name}.exp_avg"],
                    "exp_avg_sq": saved[f"{name}.exp_avg_sq"],
                }

    def save() -> None:
        tensors = {}
        for name, parameter in model.named_parameters():
            tensors[name] = parameter.detach()
            tensors[f"{name}.exp_avg"] = optimizer.state[parameter]["exp_avg"]
            tensors[f"{name}.exp_avg_sq"] = optimizer.state[parameter]["exp_avg_sq"]
        old = list(state.glob("step-*.safetensors"))
        target = state / f"step-{step}.safetensors"
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, target)
        temporary = state / "progress.json.tmp"
        temporary.write_text(json.dumps({"step": step, "minutes": spent}))
        temporary.replace(state / "progress.json")
        for file in old:
            if file != target:
                file.unlink()

    def heldout_loss() -> float:
        heldout_bt = blocks.heldout(256)
        with torch.no_grad():
            return sum(loss(part_bt).item() * len(part_bt) for part_bt in heldout_bt.split(32)) / len(heldout_bt)

    def loss(tokens_bt: torch.Tensor) -> torch.Tensor:
        tokens_bt = tokens_bt.to(device)
        with torch.autocast(device, torch.bfloat16):
            logits_btv = model(tokens_bt, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits_btv[:, :-1].float().flatten(0, 1), tokens_bt[:, 1:].flatten())

    began, last_save, stretch_start = time.monotonic(), time.monotonic(), spent
    while spent < arguments.minutes:
        done = spent / arguments.minutes  # the rate follows the clock, so it ends at zero at any speed
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (1 - done)
        for group in optimizer.param_groups:
            group["lr"] = rate
        value = loss(blocks.batch(step, arguments.rows, arguments.seed))
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        spent = stretch_start + (time.monotonic() - began) / 60
        if step % 100 == 0:
            tokens = step * arguments.rows * CONTEXT
            print(f"step {step}  {tokens / 1e6:.1f} M tokens  {spent:.1f} min  ce {value.item():.3f}", flush=True)
        if time.monotonic() - last_save > 120:
            save()
            last_save = time.monotonic()
        if spent - stretch_start > arguments.stretch:
            save()
            print(f"stretch over at {spent:.1f} of {arguments.minutes} minutes; run the same command to continue")
            return
    save()
    model.eval()
    print(f"held-out cross-entropy {heldout_loss():.4f} nats per token")
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()

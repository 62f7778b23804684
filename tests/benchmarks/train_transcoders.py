"""Train per-layer transcoders of a model's MLPs with EleutherAI's sparsify, unmodified; run in an environment of its own.

    python -m venv runs/peers && runs/peers/bin/pip install torch==2.13.0 eai-sparsify==1.3.3
    runs/peers/bin/python tests/benchmarks/train_transcoders.py MODEL TOKENS.bin OUT [--k 32] [--expansion 8] [--optimizer adam]

TOKENS.bin has uint16 tokens, context after context. OUT gets a folder for each MLP, and cost.json. sparsify's own command needs
a GPU; its Trainer does not. `alternatives.py` runs this script.
"""

from __future__ import annotations

import argparse
import json
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Train, and write the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out", type=Path)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--expansion", type=int, default=8)
    parser.add_argument("--optimizer", default="adam")
    parser.add_argument("--rate", type=float, default=1e-2)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--rows", type=int, help="rows of the text to train on; by default all")
    options = parser.parse_args()
    sparsify, data = import_module("sparsify"), import_module("sparsify.data")
    torch.set_num_threads(1)
    began = time.process_time()
    model = AutoModelForCausalLM.from_pretrained(options.model)
    dataset = data.MemmapDataset(options.tokens, options.context, options.rows)
    coder = sparsify.SparseCoderConfig(expansion_factor=options.expansion, k=options.k, transcode=True)
    settings = {
        "hookpoints": ["h.*.mlp"], "batch_size": options.batch, "optimizer": options.optimizer, "lr": options.rate,
        "lr_warmup_steps": len(dataset) // options.batch // 20, "save_every": 10**9, "log_to_wandb": False,
        "run_name": options.out.name, "save_dir": str(options.out.parent),
    }  # fmt: skip
    sparsify.Trainer(sparsify.TrainConfig(coder, **settings), dataset, model).fit()
    cost = {
        "library": f"sparsify {version('eai-sparsify')}", "cpu_minutes": (time.process_time() - began) / 60,
        "tokens": len(dataset) * options.context, "k": options.k, "expansion": options.expansion,
        "optimizer": options.optimizer, "rate": options.rate, "batch": options.batch,
    }  # fmt: skip
    (options.out / "cost.json").write_text(json.dumps(cost) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Train three steps of a coupling to a GPT-2-small-shaped model (12 blocks of width 768, 50,257 tokens): time and peak memory.

    python tests/benchmarks/gpt2_small.py [--width 1536] [--rows 4] [--context 128]

The random model and the text (random token ids) are made in a temporary folder; `bridge fit` runs as a user would run it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel


def main() -> int:
    """Fit, print time and memory, and return the exit status of `bridge fit`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model, text = Path(folder) / "gpt2-small-shaped", Path(folder) / "ids.jsonl"
        torch.manual_seed(0)
        GPT2LMHeadModel(GPT2Config()).save_pretrained(model)
        rows = torch.randint(0, 50257, (200, arguments.context)).tolist()
        text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
        steps = 3 * arguments.rows * arguments.context
        command = [
            *(sys.executable, "-m", "bridge.cli.main", "fit", str(model), "--l0", "0.01", "--data", str(text)),
            *("--tokens", str(steps), "--width", str(arguments.width), "--out", str(Path(folder) / "run")),
            *("--set", f"data.rows={arguments.rows}", "--set", f"data.context={arguments.context}"),
        ]
        start = time.monotonic()
        status = subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}).returncode
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # kilobytes on Linux
        print(f"exit status {status}, {time.monotonic() - start:.0f} s in all, peak memory {peak:.1f} GB")
    return status


if __name__ == "__main__":
    sys.exit(main())

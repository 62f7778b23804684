"""Measure the cost of a fit and of an explanation on random models, by depth, width and vocabulary, and fit a law to it.

    python tests/benchmarks/scale.py [--most 130] [--rows 2] [--context 64] [--explain 16]

Random GPT-2 models of up to --most million parameters are coupled to sparse models of their own width (L0 1/4). On one thread:

    step       processor seconds of a training step (every term, one splice per row; forward, backward, AdamW, projection), the
               median of 3; and its floating-point operations as counted by torch, as a multiple of those of a dense forward pass
    copy       processor seconds of one masked copy of a prompt, forward and backward; a search consists of these
    memory     peak bytes of the process, and the prediction of `bridge fit` (`memory_needed`)

Step and copy are fitted with non-negative coefficients:

    step = (a L d^2 + b V d + c L d + e V) tokens + f L       products of blocks and unembedding, cost per value, and per call
    copy = a L d^2 tokens + b V d + c L                            the answer's logits alone, and a call per layer

with L layers of width d and a vocabulary of V. The script prints the law, its largest and median error, and its predictions for
GPT-2, Llama-1B and Llama-8B; for a GPU they use the counted operations. Every size runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from statistics import median

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from scipy.optimize import nnls
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config, GPT2LMHeadModel

from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.kernels.cpu import reuse_memory
from bridge.models.bridges import new_coupling
from bridge.models.dense import load_dense
from bridge.models.sparse import SparseTransformer
from bridge.recipe import resolve
from bridge.training.objective import Objective, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import complete_recipe, memory_needed

SIZES = (  # width, layers, vocabulary
    (64, 4, 2048), (128, 4, 2048), (128, 8, 2048), (128, 4, 16384), (256, 4, 2048), (256, 8, 8192), (256, 4, 32768),
    (512, 4, 8192), (512, 8, 32768), (768, 12, 50257), (1024, 24, 50257), (1536, 32, 50257),
)  # fmt: skip
NAMED = {"GPT-2": (768, 12, 50257, 124e6), "Llama-1B": (2048, 16, 128256, 1.24e9), "Llama-8B": (4096, 32, 128256, 8.0e9)}
L0, STEPS, COPIES = 0.25, 3, 3
GPU_FLOPS, GPU_SHARE = 989e12, 0.3  # dense bfloat16 peak of an H100 or H200; share that training reaches
FIT_TOKENS = 100e6
SEARCH_COPIES = 420  # of a prompt: 60 steps of 3, scores, additions and deletions


@dataclass(frozen=True)
class Cost:
    """Measured cost of one size."""

    width: int
    layers: int
    vocabulary: int
    parameters: int
    step_seconds: float
    step_passes: float
    copy_seconds: float
    memory: int
    foreseen: int

    @property
    def blocks(self) -> float:
        """L d^2."""
        return self.layers * self.width**2

    @property
    def table(self) -> float:
        """V d."""
        return self.vocabulary * self.width


def measured(width: int, layers: int, vocabulary: int, options: argparse.Namespace) -> Cost:
    """Measure the cost of one size in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    reuse_memory()
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=options.context, n_embd=width, n_layer=layers, n_head=max(1, width // 64),
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    parameters = sum(each.numel() for each in model.parameters())
    dense = load_dense(model)
    values = {
        "dense": "random", "sparse": {"width": width, "keep": 1.0}, "sparsity": {"l0": L0},
        "data": {"rows": options.rows, "context": options.context},
    }  # fmt: skip
    recipe = complete_recipe(dense, resolve(values))
    coupling = new_coupling(dense, recipe)
    tokens_bt = torch.randint(vocabulary, (options.rows, options.context))
    objective, optimizer = Objective(dense, coupling.sparse, coupling.bridges, recipe.losses), SharkfinAdamW(coupling)
    generator = torch.Generator().manual_seed(0)

    def step() -> float:
        began = time.process_time()
        objective(tokens_bt, draw_splice(options.rows, coupling.n_sites, recipe.losses, generator))["total"].backward()
        optimizer.step(0.5, L0)
        coupling.sparse.project(L0)
        return time.process_time() - began

    step()
    seconds = median(step() for _ in range(STEPS))
    memory = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with FlopCounterMode(display=False) as counted:
        objective(tokens_bt, draw_splice(options.rows, coupling.n_sites, recipe.losses, generator))["total"].backward()
    passes = counted.get_total_flops() / (2 * (12 * layers * width**2 + vocabulary * width) * tokens_bt.numel())
    return Cost(
        width, layers, vocabulary, parameters, seconds, passes, copied(coupling.sparse, options.explain), memory,
        memory_needed(dense, recipe),
    )  # fmt: skip


def copied(sparse: SparseTransformer, tokens: int) -> float:
    """Return the processor seconds of one masked copy of a prompt, forward and backward, in a batch of three."""
    sparse.requires_grad_(False)
    means = {at: torch.zeros(size) for at, size in sparse.locations().items()}
    masked = MaskedModel(sparse, Question.of_prompt(torch.arange(tokens), 1), means, by_position=True)
    kept_rf = torch.rand(3, masked.space.size) < 0.5
    taken = []
    for _ in range(COPIES + 1):
        began = time.process_time()
        masked.gradient(kept_rf, masked.question.difference)
        taken.append((time.process_time() - began) / len(kept_rf))
    return median(taken[1:])


def law(costs: list[Cost], columns: np.ndarray, seconds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative coefficients that fit relative errors best, and the relative errors."""
    coefficients, _ = nnls(columns / seconds[:, None], np.ones(len(costs)))
    return coefficients, columns @ coefficients / seconds - 1


def main() -> None:
    """Print a row per size, the laws, and their predictions for well-known models."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--most", type=float, default=130, help="million parameters")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--explain", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--one", type=int, nargs=3)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(asdict(measured(options.one[0], options.one[1], options.one[2], options))))
        return
    print("width layers vocabulary  million    step s  passes    copy ms   memory GB  foreseen")
    costs = []
    for width, layers, vocabulary in SIZES:
        if 12 * layers * width**2 + vocabulary * width > 1e6 * options.most:
            continue
        given = [sys.executable, __file__, *sys.argv[1:], "--one", str(width), str(layers), str(vocabulary)]
        cost = Cost(**json.loads(subprocess.run(given, check=True, capture_output=True, text=True).stdout.splitlines()[-1]))
        costs.append(cost)
        print(
            f"{width:5}{layers:7}{vocabulary:11,}{cost.parameters / 1e6:9.1f}{cost.step_seconds:10.3f}{cost.step_passes:8.1f}"
            f"{1e3 * cost.copy_seconds:11.2f}{cost.memory / 1e9:12.2f}{cost.foreseen / 1e9:10.2f}",
            flush=True,
        )
    tokens = options.rows * options.context
    names = "blocks", "table", "layers", "width", "vocabulary"
    blocks, table, layers, width, vocabulary = (np.array([getattr(each, name) for each in costs]) for name in names)
    step_c, step_off = law(
        costs,
        np.stack([*(tokens * each for each in (blocks, table, layers * width, vocabulary)), layers], 1),
        np.array([each.step_seconds for each in costs]),
    )
    copy_c, copy_off = law(
        costs, np.stack([blocks * options.explain, table, layers], 1), np.array([each.copy_seconds for each in costs])
    )
    for name, coefficients, off in (("step", step_c, step_off), ("copy", copy_c, copy_off)):
        print(f"{name} = {' + '.join(f'{each:.3g} {unit}' for each, unit in zip(coefficients, _UNITS[name], strict=True))}"
              f"    off by {np.median(np.abs(off)):.0%} in the median, {np.abs(off).max():.0%} at most")  # fmt: skip
    passes = median(each.step_passes for each in costs)
    print(f"a step's operations are {passes:.1f} dense forward passes; {FIT_TOKENS / 1e6:.0f} million tokens of text:")
    for name, (width, depth, vocabulary, parameters) in NAMED.items():
        blocks, table = depth * width**2, vocabulary * width
        cpu = FIT_TOKENS * float(step_c @ [blocks, table, depth * width, vocabulary, depth / tokens])
        gpu = FIT_TOKENS * passes * 2 * parameters / (GPU_FLOPS * GPU_SHARE)
        copy = copy_c[0] * blocks * options.explain + copy_c[1] * table + copy_c[2] * depth
        print(
            f"  {name:<9} {cpu / 86400:8.1f} days of one core; {gpu / 3600:7.2f} hours of one GPU, {gpu / 8 / 3600:6.2f} of "
            f"eight; {18 * parameters / 1e9:5.0f} GB and activations; an explanation {SEARCH_COPIES * copy:6.0f} s of one core"
        )
    print(json.dumps([asdict(each) for each in costs]))


_UNITS = {"step": ("L d^2 tokens", "V d tokens", "L d tokens", "V tokens", "L"), "copy": ("L d^2 tokens", "V d", "L")}


if __name__ == "__main__":
    main()

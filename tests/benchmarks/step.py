"""Time of one coupled step over the time of one step of the same sparse model trained alone, at several depths.

    python tests/benchmarks/step.py [--width 256] [--dense-width 128] [--layers 2 4 8 12] [--rounds 5]

All contenders of a depth take turns in one process, each a whole step: forward, backward, normalisation, AdamW, projection.
Beside the sampled objective stands the literal sum over sites, in which every site costs a hybrid pass each way.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from bridge.bridges import new_coupling
from bridge.dense import load_dense
from bridge.objective import Objective, draw_splice
from bridge.recipe import Losses, resolve
from bridge.training import SharkfinAdamW, resolve_for


def stepper(layers: int, arguments: argparse.Namespace, losses: Losses) -> Callable[[], None]:
    """A function that takes one training step of an untrained coupling."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=128, n_embd=arguments.dense_width, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0
    )
    dense = load_dense(GPT2LMHeadModel(config).eval())
    values = {
        "dense": "random",
        "sparse": {"width": arguments.width},
        "sparsity": {"l0": 1 / 16},
        "data": {"rows": arguments.rows, "context": 128},
        "losses": losses.model_dump(),
    }
    coupling = new_coupling(dense, resolve_for(dense, resolve(values)))
    coupling.bridges.requires_grad_(losses.coupled)
    objective = Objective(dense, coupling.sparse, coupling.bridges, losses)
    optimizer = SharkfinAdamW(coupling)
    tokens_bt = torch.randint(0, 2048, (arguments.rows, 128))
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        sampled = losses.coupled and losses.splice == "sampled"
        splice = draw_splice(arguments.rows, coupling.n_sites, losses, generator) if sampled else None
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            total = objective(tokens_bt, splice)["total"]
        total.backward()
        optimizer.step(0.5, 1 / 16)
        coupling.sparse.project(1 / 16)

    return step


def main() -> None:
    """Print a row per depth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dense-width", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true")
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    print(f"sparse width {arguments.width}, dense width {arguments.dense_width}, {arguments.rows} rows of 128 tokens, "
          f"{torch.get_num_threads()} threads, median of {arguments.rounds}; seconds a step")  # fmt: skip
    print("layers   alone  sampled  literal   sampled/alone  literal/alone")
    for layers in arguments.layers:
        contenders = {
            "alone": stepper(layers, arguments, Losses().uncoupled()),
            "sampled": stepper(layers, arguments, Losses()),
            "literal": stepper(layers, arguments, Losses(splice="literal")),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(arguments.rounds + 1):
            for name, step in contenders.items():
                if name == "literal" and turn > 2:
                    continue  # it takes several times as long, and its ratio needs no precision
                start = time.perf_counter()
                step()
                if turn:
                    times[name].append(time.perf_counter() - start)
        alone, sampled, literal = (median(times[name]) for name in contenders)
        print(
            f"{layers:>6} {alone:7.3f} {sampled:8.3f} {literal:8.3f} {sampled / alone:15.2f} {literal / alone:14.2f}", flush=True
        )


if __name__ == "__main__":
    main()

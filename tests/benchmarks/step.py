"""Time one coupled step against the sparse model alone, sparse-native training, and the usual implementation.

    python tests/benchmarks/step.py [--width 256] [--dense-width 128] [--layers 2 4 8 12] [--l0 0.0625] [--rounds 5] [--bfloat16]
                                    [--contenders alone sampled native literal today]

All contenders of a depth run in turns in one process, each a whole step: forward, backward, normalisation, AdamW, projection.
    alone      the sparse model on text, dense-masked, without a dense model
    sampled    the coupled step, one splice per row, dense-masked
    native     sampled, trained by the nonzeros; includes a share of the dense gradient and mask update of every 20th step
    literal    the sum over sites, in which every site costs a hybrid pass in each direction
    today      literal, with torch.topk and a scatter for AbsTopK, torch.topk for the projection, attention with an additive mask
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from statistics import median
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from kernel_times import by_topk, project_by_topk
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from bridge.kernels.cpu import reuse_memory
from bridge.models.bridges import new_coupling
from bridge.models.dense import load_dense
from bridge.recipe import Losses, resolve
from bridge.training import sparse_native as native
from bridge.training.objective import Objective, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import complete_recipe

LOOK_EVERY = 20


def masked_attention(q_btn: Tensor, k_btn: Tensor, v_btn: Tensor, channels: int, sink_h: Tensor | None = None) -> Tensor:
    """Attention with a sink as a first key of zeros and an additive mask."""
    assert sink_h is not None
    q, k, v = (x.float().unflatten(-1, (-1, channels)).transpose(1, 2) for x in (q_btn, k_btn, v_btn))
    k, v = F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0))
    length = q.shape[2]
    mask = torch.full((length, length), -math.inf).triu(1).expand(len(sink_h), -1, -1)
    mask = torch.cat([sink_h.view(-1, 1, 1).expand(-1, length, 1), mask], -1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None]).transpose(1, 2).flatten(2)


def stepper(layers: int, arguments: argparse.Namespace, losses: Losses, *, by_nonzeros: bool = False) -> Callable[[bool], None]:
    """Return a function that takes one training step of an untrained coupling; with True it also updates the mask."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=2048, n_positions=128, n_embd=arguments.dense_width, n_layer=layers, n_head=4, bos_token_id=0, eos_token_id=0
    )
    dense = load_dense(GPT2LMHeadModel(config).eval())
    values = {
        "dense": "random",
        "sparse": {"width": arguments.width},
        "sparsity": {"l0": arguments.l0},
        "data": {"rows": arguments.rows, "context": 128},
        "losses": losses.model_dump(),
    }
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    coupling.bridges.requires_grad_(losses.coupled)
    objective = Objective(dense, coupling.sparse, coupling.bridges, losses)
    optimizer = SharkfinAdamW(coupling)
    tokens_bt = torch.randint(0, 2048, (arguments.rows, 128))
    generator = torch.Generator().manual_seed(0)
    coupling.sparse.project(arguments.l0)
    if by_nonzeros:
        for name in list(coupling.sparse.packable()):
            optimizer.pack_matrix(name, coupling)

    def step(look: bool = False) -> None:
        if look:
            native.collect_gradients(coupling.sparse)
        sampled = losses.coupled and losses.splice == "sampled"
        splice = draw_splice(arguments.rows, coupling.n_sites, losses, generator) if sampled else None
        with torch.autocast("cpu", torch.bfloat16, enabled=arguments.bfloat16):
            total = objective(tokens_bt, splice)["total"]
        total.backward()
        optimizer.step(0.5, arguments.l0)
        if look:
            native.update_mask(coupling.sparse, 0.05, optimizer.adam.state)
        coupling.sparse.project(arguments.l0)

    return step


def main() -> None:
    """Print a row for each depth."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--dense-width", type=int, default=128)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8, 12])
    parser.add_argument("--l0", type=float, default=1 / 16)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bfloat16", action="store_true")
    names = ("alone", "sampled", "native", "literal", "today")
    parser.add_argument("--contenders", nargs="+", choices=names, default=["alone", "sampled", "literal"])
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    reuse_memory()
    print(f"sparse width {arguments.width}, dense width {arguments.dense_width}, L0 {arguments.l0:.4g}, {arguments.rows} rows of "
          f"128 tokens, {torch.get_num_threads()} threads, {'bfloat16' if arguments.bfloat16 else 'float32'}, "
          f"median of {arguments.rounds}; seconds a step, and over the first contender's")  # fmt: skip
    print("layers " + "".join(f"{name:>16}" for name in arguments.contenders))
    for layers in arguments.layers:
        losses = {"alone": Losses().uncoupled(), "literal": Losses(splice="literal"), "today": Losses(splice="literal")}
        steps = {
            name: stepper(layers, arguments, losses.get(name, Losses()), by_nonzeros=name == "native")
            for name in arguments.contenders
        }
        times: dict[str, list[float]] = {name: [] for name in steps}
        looks: list[float] = []
        for turn in range(arguments.rounds + 1):
            for name, step in steps.items():
                if (name == "literal" and turn > 2) or (name == "today" and turn != 1):
                    continue  # it takes many times as long, and its ratio needs little precision
                start = time.perf_counter()
                if name == "today":
                    with (
                        patch("bridge.models.sparse.abs_top_k", by_topk),
        patch("bridge.models.bridges.abs_top_k", by_topk),
                        patch("bridge.models.sparse_weights.project_", project_by_topk),
        patch("bridge.models.sparse_blocks.attend", masked_attention),
                    ):  # fmt: skip
                        step(False)
                else:
                    step(False)
                if turn:
                    times[name].append(time.perf_counter() - start)
                if name == "native" and turn in (0, 1, 2):
                    start = time.perf_counter()
                    step(True)
                    looks.append(time.perf_counter() - start)
        medians = {name: median(each) for name, each in times.items()}
        if looks:
            medians["native"] += (median(looks) - medians["native"]) / LOOK_EVERY
        first = medians[arguments.contenders[0]]
        print(f"{layers:>6} " + "".join(f"{value:>9.3f} {value / first:>6.2f}" for value in medians.values()), flush=True)


if __name__ == "__main__":
    main()

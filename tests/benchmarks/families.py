"""Measure, for every family of the parity list, how close a start is to its dense model, and whether a short fit lowers the KL.

    python tests/benchmarks/families.py [--steps 200] [--only llama gemma2] [--add MODEL]

The models are tiny and random (`tests/support/tiny_families.py`); the text of each is sampled from itself. Columns: sublayers
copied; KL of the sparse model from the dense one in nats a token, at L0 = 1 and keep = 1; the KL at the recipe's defaults
(twice the width); the KL of that start projected to L0 1/16; the KL after a fit to L0 1/16; the dense model's entropy, for scale.
--add names real models (folders, hub ids, .gguf), for which only the start is measured.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.tiny_families import FAMILIES, tiny

from bridge.models.bridges import CoupledModels, new_coupling
from bridge.models.circuit import kl
from bridge.models.dense import DenseModel, load_dense
from bridge.models.sparse_weights import annealed_l0
from bridge.recipe import resolve
from bridge.training.initialize import Initialization, start_from_dense
from bridge.training.objective import Objective, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import complete_recipe

ROWS, HELD, TOKENS, L0 = 16, 32, 16, 1 / 16


@torch.no_grad()
def text(dense: DenseModel, rows: int) -> Tensor:
    """Return tokens_bt sampled from the dense model, each row from a random first token."""
    generator = torch.Generator().manual_seed(0)
    tokens_bt = torch.randint(3, min(dense.vocabulary, 10_000), (rows, 1), generator=generator)
    for _ in range(TOKENS - 1):
        probability_bv = dense.run(tokens_bt).logits_btv[:, -1].softmax(-1)
        tokens_bt = torch.cat([tokens_bt, torch.multinomial(probability_bv, 1, generator=generator)], 1)
    return tokens_bt


@torch.no_grad()
def divergence(coupling: CoupledModels, tokens_bt: Tensor) -> tuple[float, float]:
    """Return (KL, entropy of the dense answers), means over tokens."""
    dense_btv = coupling.dense.run(tokens_bt).logits_btv
    entropy_bt = torch.distributions.Categorical(logits=dense_btv).entropy()
    return float(kl(dense_btv, coupling.sparse(tokens_bt)).mean()), float(entropy_bt.mean())


def started(dense: DenseModel, l0: float, tokens_bt: Tensor, **shape: float) -> tuple[CoupledModels, Initialization]:
    """Return a coupling that starts as its dense model, and what was copied."""
    values = {"dense": dense.name, "sparse": shape, "sparsity": {"l0": l0}, "data": {"context": tokens_bt.shape[1]}}
    coupling = new_coupling(dense, complete_recipe(dense, resolve(values)))
    return coupling, start_from_dense(coupling, tokens_bt)


def fall(dense: DenseModel, steps: int, text_bt: Tensor) -> tuple[float, float, float]:
    """Return the KL of the start, of the start projected to L0, and after a fit in whose first half L0 is annealed."""
    held_bt, text_bt = text_bt[:HELD], text_bt[HELD:]
    (coupling, _), (projected, _) = (started(dense, L0, text_bt[:ROWS]) for _ in range(2))
    projected.sparse.project(L0)
    losses = coupling.recipe.losses
    objective, optimizer = Objective(dense, coupling.sparse, coupling.bridges, losses), SharkfinAdamW(coupling)
    before = divergence(coupling, held_bt)[0], divergence(projected, held_bt)[0]
    for step in range(steps):
        done = step / steps
        splice = draw_splice(ROWS, coupling.n_sites, losses, torch.Generator().manual_seed(step))
        rows_b = torch.arange(step * ROWS, (step + 1) * ROWS) % len(text_bt)
        objective(text_bt[rows_b], splice)["total"].backward()
        l0 = annealed_l0(L0, done, 0.5)
        assert optimizer.step(done, l0), "a gradient is not finite"
        coupling.sparse.project(annealed_l0(L0, (step + 1) / steps, 0.5))
    return *before, divergence(coupling, held_bt)[0]


def main() -> None:
    """Print the table as markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--only", nargs="*", default=list(FAMILIES))
    parser.add_argument("--add", nargs="*", default=[])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    print("| family | copied | KL of the start | of the defaults | projected to L0 1/16 | fitted to it | falls | entropy |")
    print("|---|---|---|---|---|---|---|---|")
    for name in (*chosen.only, *chosen.add):
        real = name in chosen.add
        dense = load_dense(name if real else tiny(name))
        text_bt = text(dense, HELD if real else HELD + 100 * ROWS)
        tokens_bt = text_bt[:ROWS]
        exact, what = started(dense, 1.0, tokens_bt, keep=1.0, **({"width": dense.width} if real else {}))
        start, entropy = divergence(exact, text_bt[-HELD:])
        copied = f"{sum(share is not None for share in what.sublayers)} of {len(what.sublayers)}"
        row = [Path(name).name, copied, f"{start:.1e}"]
        if real:
            row += ["", "", "", "", f"{entropy:.2f}"]
        else:
            before, projected, after = fall(dense, chosen.steps, text_bt)
            row += [f"{before:.1e}", f"{projected:.3f}", f"{after:.3f}", "yes" if after < projected else "no", f"{entropy:.2f}"]
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

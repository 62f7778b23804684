"""Compare the sampled objective with the literal sum over sites at equal time, by the hybrid KLs on held-out text.

    python tests/benchmarks/splice.py [--minutes 4] [--width 128] [--png curve.png]

Two couplings to the shipped dense model, with the same start, train in turns of a few seconds in one process; only a contender's
own training counts as its time. Both follow the same schedule of learning rate and L0 over their minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from bridge.data.blocks import load_blocks
from bridge.models.bridges import new_coupling
from bridge.models.dense import load_dense
from bridge.models.sparse_weights import annealed_l0
from bridge.recipe import recipe_values, resolve
from bridge.training.evaluate import evaluate
from bridge.training.objective import Objective, draw_splice
from bridge.training.optimizer import SharkfinAdamW
from bridge.training.prepare import complete_recipe

ROOT = Path(__file__).resolve().parents[2]
TURN_SECONDS = 5.0


class Contender:
    """A coupling that trains on one of the two objectives, with a clock of its own."""

    def __init__(self, splice: str, arguments: argparse.Namespace) -> None:
        dense = load_dense(ROOT / "checkpoints" / "python-dense")
        values = recipe_values(
            recipe=ROOT / "recipes" / "python-bridge-32.toml",
            data="stdlib",
            width=arguments.width,
            minutes=arguments.minutes,
            settings={"losses.splice": splice},
        )
        self.recipe = complete_recipe(dense, resolve({**values, "dense": "python-dense"}))
        self.coupling = new_coupling(dense, self.recipe)
        self.objective = Objective(dense, self.coupling.sparse, self.coupling.bridges, self.recipe.losses)
        self.optimizer = SharkfinAdamW(self.coupling)
        self.seconds, self.step = 0.0, 0

    def learn(self, blocks, seconds: float, total: float) -> None:
        """Take training steps for some seconds."""
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            done = min(0.999, (self.seconds + time.perf_counter() - start) / total)
            rows = self.recipe.data.rows
            assert rows is not None
            splice = None
            if self.recipe.losses.splice == "sampled":
                generator = torch.Generator().manual_seed(self.step)
                splice = draw_splice(rows, self.coupling.n_sites, self.recipe.losses, generator)
            self.objective(blocks.batch(self.step, rows, 0), splice)["total"].backward()
            fraction = annealed_l0(self.recipe.sparsity.l0, done, self.recipe.sparsity.anneal)
            self.optimizer.step(done, fraction)
            self.coupling.sparse.project(fraction)
            self.step += 1
        self.seconds += time.perf_counter() - start


def main() -> None:
    """Print the curve as a table, and plot it if a file is given."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4, help="of training for each contender")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--points", type=int, default=6)
    parser.add_argument("--png", type=Path)
    arguments = parser.parse_args()
    torch.set_flush_denormal(True)
    contenders = {splice: Contender(splice, arguments) for splice in ("sampled", "literal")}
    tokenizer = contenders["sampled"].coupling.dense.tokenizer
    blocks = load_blocks("stdlib", tokenizer, 128, max_tokens=3_000_000)
    total = 60 * arguments.minutes
    for contender in contenders.values():
        residuals = contender.coupling.dense.run(blocks.batch(0, 32, 0)).residuals
        contender.coupling.bridges.calibrate(residuals)
    curves: dict[str, list[tuple[float, float, float, float]]] = {name: [] for name in contenders}
    print("minutes   objective  steps  KL sparse  hybrid in  hybrid out")
    for point in range(1, arguments.points + 1):
        while contenders["literal"].seconds < total * point / arguments.points:
            for contender in contenders.values():
                contender.learn(blocks, TURN_SECONDS, total)
        for name, contender in contenders.items():
            result = evaluate(contender.coupling, blocks.heldout(32))
            into = sum(site.kl_in for site in result.sites) / len(result.sites)
            out = sum(site.kl_out for site in result.sites) / len(result.sites)
            curves[name].append((contender.seconds / 60, result.kl_sparse, into, out))
            minutes = contender.seconds / 60
            print(f"{minutes:7.2f} {name:>11} {contender.step:6} {result.kl_sparse:10.3f} {into:10.3f} {out:11.3f}", flush=True)
    if arguments.png:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, panels = plt.subplots(1, 3, figsize=(12, 3.6), sharey=True)
        for panel, column, title in zip(panels, (1, 2, 3), ("KL(y_d, y_s)", "hybrid in", "hybrid out"), strict=True):
            for name, curve in curves.items():
                panel.plot([point[0] for point in curve], [point[column] for point in curve], marker="o", label=name)
            panel.set(title=title, xlabel="minutes of training")
        panels[0].set_ylabel("nats per token, held out")
        panels[0].legend()
        figure.tight_layout()
        figure.savefig(arguments.png, dpi=120)


if __name__ == "__main__":
    main()

"""Compare sparse-native with dense-masked training: held-out losses at equal steps, and the seconds that each took.

    python tests/benchmarks/native.py [--steps 400] [--width 512] [--l0 0.015625] [--points 4]

Couplings to the shipped dense model, with the same start and text, train in turns of a few seconds in one process; only own
training counts as a contender's time. "slow" anneals over half of the training, as in the paper, "fast" over 15 %.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bridge.recipe import recipe_values
from bridge.training.evaluate import evaluate
from bridge.training.loop import train
from bridge.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[2]
CONTENDERS = {
    "dense-masked, slow": {"sparsity.native": "never", "sparsity.anneal": 0.5},
    "dense-masked, fast": {"sparsity.native": "never", "sparsity.anneal": 0.15},
    "native, slow": {"sparsity.native": "always", "sparsity.anneal": 0.5},
    "native, fast": {"sparsity.native": "always", "sparsity.anneal": 0.15},
}


def main() -> None:
    """Print a line for each contender and point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--l0", type=float, default=1 / 64)
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--contenders", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--set", nargs="*", default=[], help="numbers of the recipe, such as optimizer.rate=0.003")
    arguments = parser.parse_args()
    others = {name: float(value) for name, _, value in (each.partition("=") for each in arguments.set)}
    chosen = {name: CONTENDERS[name] for name in (list(CONTENDERS)[i] for i in arguments.contenders)}
    runs, learning = {}, {}
    for name, settings in chosen.items():
        values = recipe_values(
            recipe=ROOT / "recipes" / "python-bridge-32.toml", data="stdlib", width=arguments.width, l0=arguments.l0,
            tokens=arguments.steps * 1024, settings={**settings, **others},
        )  # fmt: skip
        runs[name] = prepare(ROOT / "checkpoints" / "python-dense", values, device="cpu")
        learning[name] = train(runs[name])
    text_bt = next(iter(runs.values())).blocks.heldout(32)
    seconds, shown = dict.fromkeys(runs, 0.0), dict.fromkeys(runs, 0)
    print(f"width {arguments.width}, L0 {arguments.l0:.4g}, {arguments.steps} steps of 1024 tokens; KL in nats per token")
    print(f"{'contender':<20} {'step':>5} {'seconds':>8} {'CE':>6} {'KL':>6} {'in':>6} {'out':>6}  nonzero")
    while learning:
        for name in list(learning):
            began = time.perf_counter()
            progress = next(learning[name], None)
            seconds[name] += time.perf_counter() - began
            if progress is None:
                del learning[name]
                continue
            if progress.fraction * arguments.points >= shown[name] + 1:
                shown[name] = int(progress.fraction * arguments.points)
                found = evaluate(runs[name].coupling, text_bt)
                kl_in, kl_out = (sum(getattr(s, k) for s in found.sites) / len(found.sites) for k in ("kl_in", "kl_out"))
                print(
                    f"{name:<20} {progress.step:>5} {seconds[name]:>8.1f} {found.ce_sparse:>6.3f} {found.kl_sparse:>6.3f} "
                    f"{kl_in:>6.3f} {kl_out:>6.3f}  1/{1 / progress.l0:.1f}", flush=True,
                )  # fmt: skip


if __name__ == "__main__":
    main()

"""How long an explanation takes, by phase, and how large its circuit is, for a few prompts.

    python tests/benchmarks/explain.py --runs 3

The first run of a process also loads compiled kernels and takes the means over the reference text, which the coupling keeps; it
is a line of its own. "answer", "circuit" and "whole" are the seconds until what `explain` hands over first, second and last.
Wall seconds are what a user waits; seconds of the processor are what they would be, on one core, were nobody else on it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the commands do, before torch is there

import torch

import bridge
from bridge.explanation import Answered, Drawn, Explanation

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "python-bridge"
PROMPTS = (
    "def read(self):\n    while True",
    'x = {"a": 1, "b": 2',
    "for i in range(10",
    "class Foo:\n    def __init__(self, a, b=None",
    'import os\n\ndef main(path):\n    with open(path, "rb") as',
    "if x is not None and y is",
)


class Watch:
    """Wall and processor seconds of every phase that it is told of, and until each stage."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.stages: dict[str, tuple[float, float]] = {}
        self.started = self.last = self.now()
        self.phase = "tokens"

    @staticmethod
    def now() -> tuple[float, float]:
        """Wall and processor seconds."""
        return time.perf_counter(), time.process_time()

    def progress(self, text: str) -> None:
        """A phase begins."""
        now = self.now()
        self.phases[self.phase] = self.phases.get(self.phase, 0.0) + now[1] - self.last[1]
        self.phase, self.last = text.partition(":")[0], now

    def stage(self, known: Answered | Drawn | Explanation) -> None:
        """A stage is there."""
        wall, processor = self.now()
        name = {Answered: "answer", Drawn: "circuit", Explanation: "whole"}[type(known)]
        self.stages[name] = (wall - self.started[0], processor - self.started[1])


def explained(coupling: bridge.Coupling, prompt: str) -> tuple[Watch, Explanation]:
    """An explanation, and how long it took."""
    watch = Watch()
    explanation = bridge.explain(coupling, prompt, progress=watch.progress, stage=watch.stage)
    watch.progress("end")
    watch.stage(explanation)
    return watch, explanation


def of_seconds(watches: list[Watch], stage: str, clock: int) -> str:
    """Least and median seconds until a stage."""
    seconds = [watch.stages[stage][clock] for watch in watches]
    return f"{min(seconds):.2f} {statistics.median(seconds):.2f}"


def main() -> None:
    """Explain the prompts some times over, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bridge", default=str(SHIPPED))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    arguments = parser.parse_args()
    began = time.perf_counter()
    coupling = bridge.load(arguments.bridge)
    print(f"{torch.get_num_threads()} threads; loaded in {time.perf_counter() - began:.1f} s")
    first, _ = explained(coupling, arguments.prompts[0])
    print(f"first run of the process: {first.stages['whole'][0]:.2f} s")
    print("\ntokens  active   nodes   levels                      wall, s: least and median      processor, s")
    print("                                                     circuit        whole           circuit        whole")
    phases: dict[str, list[float]] = {}
    for prompt in arguments.prompts:
        watches, explanation = [], None
        for _ in range(arguments.runs):
            watch, explanation = explained(coupling, prompt)
            watches.append(watch)
        assert explanation is not None
        for watch in watches:
            for phase, seconds in watch.phases.items():
                phases.setdefault(phase, []).append(seconds)
        levels = " ".join(f"{level.nodes:,}" for level in explanation.levels)
        columns = "   ".join(f"{of_seconds(watches, stage, clock):<12}" for clock in (0, 1) for stage in ("circuit", "whole"))
        print(
            f"{len(explanation.tokens):>6}  {explanation.searched.active:>6,}  {explanation.counts.nodes:>6,}   {levels:<26}  "
            f"{columns}   {prompt[-16:]!r}",
            flush=True,
        )
    print("\nprocessor seconds by phase, median over runs and prompts")
    for phase, seconds in phases.items():
        print(f"  {phase:<16} {statistics.median(seconds):.2f}")


if __name__ == "__main__":
    main()

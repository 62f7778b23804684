"""A fit that is ready, run to its end on the terminal: what `bridge fit` and `bridge adapt` do once they have prepared it."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from bridge.cli.console import Phases, Watcher, flag, print_run

if TYPE_CHECKING:
    from bridge.training.prepare import Run


def train_to_end(run: Run, folder: Path, stretch: float | None, then: str) -> None:
    """Print what a fit will take, train it, write the coupling, and print what to do then; one asked to stop ends the command."""
    from bridge.training.loop import FitStopped, finish, train
    from bridge.training.prepare import memory_needed, seconds_a_step

    main = run.accelerator.is_main_process
    if main:
        print_run(run, memory_needed(run.coupling.dense, run.coupling.recipe), seconds_a_step(run))
    watch = Watcher(quiet=not main)
    started = time.monotonic()
    try:
        for progress in train(run, stretch_minutes=stretch):
            watch(progress)
    except FitStopped as stopped:
        watch.end()
        print(f"bridge: {stopped.line(flag)}", file=sys.stderr)
        raise typer.Exit(0 if stopped.planned else 130) from None
    watch.end()
    refitting = Phases()
    finish(run, refitting if main else lambda _: None)
    refitting.clear()
    if main:
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) / 1e6
        print(f"wrote {folder} ({size:.1f} MB) after {(time.monotonic() - started) / 60:.1f} minutes\nnext: {then}")

"""Kill a fit at random moments, resume it each time, and compare its final weights with those of an uninterrupted fit.

    python tests/benchmarks/kill_resume.py --kills 20

A tiny dense model and a corpus are made in a temporary folder. Each trial runs `bridge fit` in a process of its own, which is
killed with SIGKILL at a random moment (anywhere from its imports to its last write) and then resumed until it is done. Every step
is saved, so kills also hit writes. The digests of all finished couplings must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# The command itself, except that it saves a state and writes a log line at each step.
DRIVER = """
import sys
from bridge.training import loop as training
from bridge.cli.main import main
training.REPORT_SECONDS = training.SAVE_SECONDS = 0.0
sys.argv = ["bridge", *sys.argv[1:]]
main()
"""
STEPS, ROWS, CONTEXT = 120, 4, 16


@dataclass(frozen=True)
class Trial:
    """A killed fit: after how many seconds, the step saved by then, the final digest, and whether the folder is clean."""

    seconds: float
    saved: str
    digest: str
    clean: bool


def make_inputs(folder: Path) -> tuple[Path, Path]:
    """Make a random GPT-2 with a word-level tokenizer and a corpus of its words; return both folders."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.models import tiny_gpt2, tiny_tokenizer

    tiny_gpt2(width=32).save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    draw = random.Random(0)
    lines = [" ".join(f"w{draw.randrange(2, 40)}" for _ in range(50)) for _ in range(200)]
    (folder / "text").mkdir()
    for number, line in enumerate(lines):
        (folder / "text" / f"{number:03}.txt").write_text(line)
    return folder / "dense", folder / "text"


def start(folder: Path, dense: Path, text: Path, out: Path) -> subprocess.Popen[str]:
    """Start the fit, or its continuation, in a process of its own."""
    driver = folder / "driver.py"
    driver.write_text(DRIVER)
    command = [
        sys.executable, str(driver), "fit", str(dense), "--l0", "0.1", "--data", str(text), "--device", "cpu", "--resume",
        "--tokens", str(STEPS * ROWS * CONTEXT), "--set", f"data.rows={ROWS}", "--set", "sparse.width=64",
        "--set", "sparsity.native=always", "--out", str(out),
    ]  # fmt: skip
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for a fit that is not killed. Raises RuntimeError if it fails."""
    _, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a fit failed: {errors}")


def outcome(out: Path) -> tuple[str, bool]:
    """Return the digest of the coupling's tensors, and whether the folder holds only the files of an uninterrupted fit."""
    files = list(out.glob("coupling-*.safetensors"))
    names = {path.name for path in out.iterdir()}
    clean = len(files) == 1 and names == {"coupling.json", "README.md", "log.jsonl", files[0].name}
    return hashlib.sha256(files[0].read_bytes()).hexdigest()[:16], clean


def saved(out: Path) -> str:
    """Return what a killed fit had saved: its step, "none", or "all"."""
    if (out / "coupling.json").exists():
        return "all"
    file = out / "training.json"
    return str(json.loads(file.read_text())["step"]) if file.exists() else "none"


def first_save(out: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a fit saves for the first time, or ends."""
    while process.poll() is None and not (out / "training.json").exists():
        time.sleep(0.01)


def kill_and_resume(kills: int, seed: int = 0, on_trial: Callable[[Trial], None] = lambda _: None) -> tuple[str, list[Trial]]:
    """Return the digest of an uninterrupted fit and one trial per kill; call on_trial after each trial."""
    draw = random.Random(seed)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dense, text = make_inputs(folder)
        whole = folder / "whole"
        began = time.monotonic()
        process = start(folder, dense, text, whole)
        first_save(whole, process)
        until_saving = time.monotonic() - began
        finish(process)
        while_saving = time.monotonic() - began - until_saving
        expected, _ = outcome(whole)
        while len(trials) < kills:
            out = Path(tempfile.mkdtemp(dir=folder)) / "run"
            began = time.monotonic()
            process = start(folder, dense, text, out)
            if len(trials) % 5:
                first_save(out, process)
                time.sleep(draw.uniform(0, while_saving))
            else:  # one in five is killed before it first saves, imports included
                time.sleep(draw.uniform(0, until_saving))
            process.send_signal(signal.SIGKILL)
            process.communicate()
            if process.returncode != -signal.SIGKILL:
                continue  # it ended before the kill
            seconds, step = time.monotonic() - began, saved(out)
            if step != "all":
                finish(start(folder, dense, text, out))
            trials.append(Trial(seconds, step, *outcome(out)))
            on_trial(trials[-1])
    return expected, trials


def show(trial: Trial) -> None:
    """Print a row of the table."""
    print(f"{trial.seconds:10.2f} s  {trial.saved:>10}  {trial.digest}  {'yes' if trial.clean else 'NO':>5}", flush=True)


def main() -> None:
    """Print a table; the exit code is 1 if a digest differs or a folder is not clean."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print("killed after  saved step  ended with        clean")
    expected, trials = kill_and_resume(arguments.kills, arguments.seed, on_trial=show)
    print(f"\nleft alone: {STEPS} steps, {expected}")
    good = sum(trial.digest == expected and trial.clean for trial in trials)
    print(f"{good} of {len(trials)} ended with the same weights, bit for bit, and a clean folder")
    sys.exit(0 if good == len(trials) else 1)


if __name__ == "__main__":
    main()

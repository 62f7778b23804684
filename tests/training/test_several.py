"""Runs that several processes share, and go on with: streamed text from a saved place, and a sparse model in shards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import CONTEXT

import bridge
from bridge.data import stream as streams
from bridge.models.bridges import CoupledModels
from bridge.training import loop as training
from bridge.training.loop import finish, train
from bridge.training.prepare import prepare

ROWS, STEPS, CUT = 4, 8, 4
POOL = 256
DRIVER = f"""
import json
import shutil
import sys
from bridge.data import stream as streams
from bridge.training import loop as training
from bridge.training.loop import finish, train
from bridge.training.prepare import prepare
training.REPORT_SECONDS = training.SAVE_SECONDS = 0.0
streams.POOL_TOKENS = {POOL}
values, out, copy = json.loads(sys.argv[1])
run = prepare(values["dense"], values, out=out, resume=True, device="cpu")
assert run.accelerator.num_processes == 2 and run.resume
for progress in train(run):
    if progress.step == {CUT} + 3 and run.accelerator.is_main_process:
        shutil.copytree(out, copy)
finish(run)
"""
CONFIGURATION = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: NO_WRAP
mixed_precision: 'no'
num_machines: 1
num_processes: 2
use_cpu: false
"""
ALONE = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(autouse=True)
def _every_step_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(streams, "POOL_TOKENS", POOL)


def fitted(values: dict[str, Any], out: Path, cut: int | None = None) -> None:
    """A fit by this process, or what is left of one: to its end, or until a step is reported."""
    run = prepare(values["dense"], values, out=out, resume=out.exists(), device="cpu")
    steps = train(run)
    for progress in steps:
        if progress.step == cut:
            steps.close()
            return
    finish(run)


def compared(one: Path, other: Path) -> None:
    """Both runs logged the same losses, and ended with the same weights and held-out text, but for the order of sums."""
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (one, other)]
    for lines in zip(*logs, strict=True):
        here, there = map(json.loads, lines)
        for term, value in here.items():
            assert term == "tokens_per_second" or there[term] == pytest.approx(value, rel=1e-4, abs=1e-6), (here["step"], term)
    couplings: list[CoupledModels] = [bridge.load(folder) for folder in (one, other)]
    parameters = ([*coupling.sparse.named_parameters(), *coupling.bridges.named_parameters()] for coupling in couplings)
    for (name, weight), (_, there_weight) in zip(*parameters, strict=True):
        torch.testing.assert_close(weight, there_weight, rtol=1e-3, atol=1e-5, msg=name)
    text_bt, other_bt = (coupling.reference_bt for coupling in couplings)
    assert text_bt is not None and other_bt is not None and torch.equal(text_bt, other_bt)


@pytest.mark.parametrize("way", [pytest.param("pieces of a stream", marks=pytest.mark.slow), "in shards"])
def test_two_processes_go_on_with_a_run_of_one_and_one_with_theirs(
    way: str, dense_folder: Path, text_file: Path, tmp_path: Path
) -> None:
    """One begins, two go on and end it; and, from what they saved on their way, one alone: all as one that is never cut."""
    text: dict[str, Any] = {"source": str(text_file), "rows": ROWS}
    values = {
        "dense": str(dense_folder), "sparse": {"width": 32, "head_channels": 8}, "sparsity": {"l0": 0.1},
        "budget": {"tokens": ROWS * CONTEXT * STEPS}, "optimizer": {"eps": 1e-3},
        "data": text | ({} if way == "in shards" else {"stream": True, "micro_rows": 1}),
    }  # fmt: skip
    fitted({**values, "data": {**values["data"], "micro_rows": None}}, tmp_path / "whole")
    fitted(values, tmp_path / "two", CUT)
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "accelerate.yaml").write_text(CONFIGURATION)
    # `accelerate launch --cpu` would start one process, whatever number it is given
    with_shards = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    given = json.dumps([values, str(tmp_path / "two"), str(tmp_path / "one")])
    command = [sys.executable, *(with_shards if way == "in shards" else ALONE), str(tmp_path / "driver.py"), given]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    compared(tmp_path / "whole", tmp_path / "two")
    assert json.loads((tmp_path / "one" / "training.json").read_text())["step"] == CUT + 2
    fitted(values, tmp_path / "one")
    compared(tmp_path / "whole", tmp_path / "one")

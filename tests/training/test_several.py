"""Fits by two processes: what one would do, undivided, with text that is streamed, after a cut."""

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
from bridge.training import loop as training
from bridge.training.loop import finish, train
from bridge.training.prepare import prepare

ROWS, STEPS, CUT = 4, 8, 5
SETTINGS: dict[str, Any] = {"width": 32, "head_channels": 8}
FITS: dict[str, dict[str, Any]] = {
    "pieces": {"data": {"micro_rows": 1}},
    "stream": {"data": {"stream": True}},
    "cut stream": {"data": {"stream": True, "micro_rows": 2}},
}
DRIVER = """
import json
import sys
from pathlib import Path
from bridge.data import stream as streams
from bridge.training import loop as training
from bridge.training.loop import finish, train
from bridge.training.prepare import prepare
training.REPORT_SECONDS = training.SAVE_SECONDS = 0.0
streams.POOL_TOKENS = 256
for name, values, cuts in json.loads(Path(sys.argv[1]).read_text()):
    out = Path(sys.argv[1]).parent / name
    for cut in cuts:
        run = prepare(values["dense"], values, out=out, resume=out.exists(), device="cpu")
        assert run.accelerator.num_processes == 2
        steps = train(run)
        for progress in steps:
            if progress.step == cut:
                steps.close()
                break
        else:
            finish(run)
"""


def values(dense_folder: Path, text_file: Path, name: str) -> dict[str, Any]:
    text = {"source": str(text_file), "rows": ROWS, **FITS[name]["data"]}
    budget, optimizer = {"tokens": ROWS * CONTEXT * STEPS}, {"eps": 1e-3}
    return {
        "dense": str(dense_folder), "sparse": SETTINGS, "sparsity": {"l0": 0.1}, "data": text, "budget": budget,
        "optimizer": optimizer,
    }  # fmt: skip


@pytest.fixture(scope="module")
def by_two(dense_folder: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of all fits by two processes, the last of them cut in the middle and gone on with."""
    folder = tmp_path_factory.mktemp("two")
    fits = [(name, values(dense_folder, text_file, name), [CUT, 0] if "cut" in name else [0]) for name in FITS]
    (folder / "fits.json").write_text(json.dumps(fits))
    (folder / "driver.py").write_text(DRIVER)
    command = [  # `accelerate launch --cpu` would start one process, whatever number it is given
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(folder / "driver.py"),
        str(folder / "fits.json"),
    ]  # fmt: skip
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", FITS)
def test_two_processes_fit_what_one_does_undivided(
    name: str, by_two: Path, dense_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(streams, "POOL_TOKENS", 256)
    whole = values(dense_folder, text_file, name)
    whole["data"].pop("micro_rows", None)
    run = prepare(dense_folder, whole, out=tmp_path / "one", device="cpu")
    list(train(run))
    finish(run)
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (tmp_path / "one", by_two / name)]
    for lines in zip(*logs, strict=True):
        one, two = map(json.loads, lines)
        for term, value in one.items():
            assert term == "tokens_per_second" or two[term] == pytest.approx(value, rel=1e-4, abs=1e-6), (one["step"], term)
    one, two = bridge.load(tmp_path / "one"), bridge.load(by_two / name)
    for (key, weight), (_, other) in zip(one.sparse.named_parameters(), two.sparse.named_parameters(), strict=True):
        torch.testing.assert_close(weight, other, rtol=1e-3, atol=1e-5, msg=key)
    assert one.reference_bt is not None and two.reference_bt is not None and torch.equal(one.reference_bt, two.reference_bt)

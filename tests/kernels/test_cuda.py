"""The Triton kernels against the reference: on a GPU, and in Triton's interpreter where it is installed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from bridge.kernels import cuda
from bridge.kernels.top_k import abs_top_k, project_, top_k_mask

CHECK = """
import torch
from bridge.kernels.top_k import top_k_mask
from bridge.kernels.cuda import abs_top_k, project_
device = "cuda" if torch.cuda.is_available() else "cpu"
for dtype in (torch.float32, torch.bfloat16):
    for width in (1, 5, 64, 100):
        x = torch.randn(6, width, device=device).to(dtype)
        x[0], x[1, ::2] = x[0].round(), 0
        if width > 4:
            x[2, 1], x[2, 3] = float("nan"), float("inf")
        for k in {1, max(1, width // 4), width}:
            kept, mask = abs_top_k(x, k)
            assert torch.equal(mask, top_k_mask(x, k)), (dtype, width, k)
            assert torch.equal(kept.nan_to_num(3), torch.where(mask, x, 0).nan_to_num(3)), (dtype, width, k)
weights = [torch.randn(70, 130, device=device), torch.randn(70, 130, device=device).round(), torch.randn(91, 100, device=device)]
for k in (1, 100, 9000):
    found = [each.clone() for each in weights]
    project_(found, k)
    for each, kept in zip(weights, found):
        assert torch.equal(kept, torch.where(top_k_mask(each.view(1, -1), k).view_as(each), each, 0)), k
"""


def test_without_a_gpu_nothing_is_served() -> None:
    assert not cuda.serves(torch.ones(2, 3))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_keep_the_references_set_in_the_interpreter() -> None:
    subprocess.run([sys.executable, "-c", CHECK], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True, timeout=300)


@pytest.mark.gpu
def test_the_kernels_keep_the_references_set_on_a_gpu() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True, timeout=300)
    x = torch.randn(64, 1024, device="cuda", requires_grad=True)
    kept = abs_top_k(x, 256)
    (gradient,) = torch.autograd.grad(kept.sum(), x)
    mask = top_k_mask(x, 256)
    assert torch.equal(kept, torch.where(mask, x, 0)) and torch.equal(gradient, mask.float())
    weight = torch.randn(2048, 1024, device="cuda")
    before = weight.clone()
    project_([weight], 30_000)
    assert torch.equal(weight, torch.where(top_k_mask(before.view(1, -1), 30_000).view_as(before), before, 0))

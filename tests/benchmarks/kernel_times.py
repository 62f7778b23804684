"""Time the kernels against torch: AbsTopK, the magnitude projection, and sparse products with both gradients.

    python tests/benchmarks/kernel_times.py [--rounds 5] [--threads 1] [--device cpu]

Contenders run in turns in one process; the tables have medians in milliseconds, and ratios. "peak" is the rate of torch.matmul
in float32 at the same sizes, close to the machine's multiply-add rate. On a GPU only AbsTopK and the projection have kernels.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor

from bridge.kernels.cpu import reuse_memory
from bridge.kernels.products import SparseMatrix, sparse_linear, tokens_innermost
from bridge.kernels.top_k import abs_top_k, project_

TOKENS = 2048


def times(contenders: dict[str, Callable[[], object]], rounds: int, cuda: bool) -> dict[str, float]:
    """Return each contender's median milliseconds, run in turns; the first turn is not counted."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - began))
    return {name: median(each) for name, each in taken.items()}


def by_topk(x: Tensor, k: int) -> Tensor:
    """AbsTopK in its usual form."""
    index = x.abs().topk(k, dim=-1).indices
    return torch.zeros_like(x).scatter(-1, index, x.gather(-1, index))


def project_by_topk(weights: Sequence[Tensor], k: int, hints: object = None) -> list[None]:
    """Projection in its usual form, which has no use for hints."""
    for weight in weights:
        flat = weight.view(-1)
        keep = torch.zeros_like(flat, dtype=torch.bool)
        keep[flat.abs().topk(k).indices] = True
        flat.mul_(keep)
    return [None] * len(weights)


def both_ways(top_k: Callable[[Tensor, int], Tensor], x: Tensor, k: int, given: Tensor) -> None:
    """Run forward and backward."""
    torch.autograd.grad(top_k(x, k), x, given)


def main() -> None:
    """Print three tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    reuse_memory()
    warnings.filterwarnings("ignore", message="Sparse CSR")
    cuda, rounds, device = arguments.device == "cuda", arguments.rounds, torch.device(arguments.device)
    print(f"{arguments.device}, {arguments.threads} threads, medians of {rounds}, ms")

    print("\nAbsTopK of 4096 rows, k a quarter of the width: forward and backward")
    print(f"{'width':>6} {'type':>9} {'topk':>8} {'ours':>7} {'inside':>7} {'copy':>6}   topk/ours  ours/copy (forward alone)")
    for width in (256, 1024, 4096):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(4096, width, device=device).to(dtype).requires_grad_()
            inside = tokens_innermost(x.detach().view(32, 128, width)).to(dtype).requires_grad_()
            given, given_inside = torch.randn_like(x), torch.randn_like(inside)
            still, k = x.detach(), width // 4
            found = times(
                {
                    "topk": partial(both_ways, by_topk, x, k, given),
                    "ours": partial(both_ways, abs_top_k, x, k, given),
                    "inside": partial(both_ways, abs_top_k, inside, k, given_inside),
                    "copy": still.clone,
                    "forward": partial(abs_top_k, still, k),
                },
                rounds,
                cuda,
            )
            print(
                f"{width:>6} {str(dtype)[6:]:>9} {found['topk']:>8.1f} {found['ours']:>7.2f} {found['inside']:>7.2f} "
                f"{found['copy']:>6.2f} {found['topk'] / found['ours']:>11.1f} {found['forward'] / found['copy']:>10.1f}",
                flush=True,
            )

    print("\nProjection of a 2048 x 8192 matrix to 1/64 (warm: the last step's threshold is known; weights have moved by 1e-3)")
    weight_mn = torch.randn(2048, 8192, device=device)
    moved_mn, k = weight_mn + 1e-3 * torch.randn_like(weight_mn), weight_mn.numel() // 64
    scratch_mn = torch.empty_like(weight_mn)
    (hint,) = project_([weight_mn.clone()], k)

    def ours(hint: float | None) -> None:
        project_([scratch_mn.copy_(moved_mn)], k, [hint])

    found = times(
        {
            "topk": lambda: project_by_topk([scratch_mn.copy_(moved_mn)], k),
            "cold": lambda: ours(None),
            "warm": lambda: ours(hint),
            "copy": lambda: scratch_mn.copy_(moved_mn),
        },
        rounds,
        cuda,
    )
    topk, cold, warm = (found[name] - found["copy"] for name in ("topk", "cold", "warm"))
    print(f"topk {topk:.1f}, cold {cold:.1f}, warm {warm:.1f}: {topk / cold:.1f} and {topk / warm:.1f} times as fast")
    if cuda:
        return

    print(f"\nSparse products of {TOKENS} tokens: forward, input gradient and weight gradient at the nonzeros")
    print(
        f"{'shape':>11} {'density':>7} {'dense':>7} {'bf16':>7} {'CSR':>7} {'ours':>7}   dense/ours bf16/ours CSR/ours  of peak"
    )
    for n, m in ((512, 512), (1024, 1024), (1024, 4096), (4096, 1024), (2048, 8192)):
        for density in (16, 64, 256):
            weight_mn = torch.where(torch.rand(m, n) < 1 / density, torch.randn(m, n), 0)
            matrix = SparseMatrix.of(weight_mn)
            matrix.value_p.requires_grad_()
            csr, csr_t = weight_mn.to_sparse_csr(), weight_mn.T.contiguous().to_sparse_csr()
            x_btn = torch.randn(TOKENS // 128, 128, n)
            inside_btn = tokens_innermost(x_btn).requires_grad_()
            given_btm = torch.randn(TOKENS // 128, 128, m)
            given_inside_btm = tokens_innermost(given_btm)
            x_nt, dy_mt = x_btn.reshape(-1, n).T.contiguous(), given_btm.reshape(-1, m).T.contiguous()
            halves = [x.bfloat16() for x in (weight_mn, x_nt, dy_mt)]

            def dense(weight_mn: Tensor, x_nt: Tensor, dy_mt: Tensor) -> None:
                torch.matmul(weight_mn, x_nt)
                torch.matmul(weight_mn.T, dy_mt)
                torch.matmul(dy_mt, x_nt.T)

            def by_csr(csr=csr, csr_t=csr_t, x_nt=x_nt, dy_mt=dy_mt) -> None:  # torch has no weight gradient at the nonzeros
                torch.matmul(csr, x_nt)
                torch.matmul(csr_t, dy_mt)
                torch.matmul(dy_mt, x_nt.T)

            def sparse(inside_btn=inside_btn, matrix=matrix, given=given_inside_btm) -> None:
                torch.autograd.grad(sparse_linear(inside_btn, matrix), (inside_btn, matrix.value_p), given)

            found = times(
                {
                    "dense": lambda w=weight_mn, x=x_nt, dy=dy_mt: dense(w, x, dy),
                    "bf16": lambda h=halves: dense(*h),
                    "CSR": by_csr,
                    "ours": sparse,
                },
                max(3, rounds - 2),
                cuda,
            )
            share = len(matrix.value_p) / (m * n) * found["dense"] / found["ours"]
            print(
                f"{n:>5}>{m:<5} {'1/' + str(density):>7} {found['dense']:>7.1f} {found['bf16']:>7.1f} {found['CSR']:>7.1f} "
                f"{found['ours']:>7.2f} {found['dense'] / found['ours']:>11.1f} {found['bf16'] / found['ours']:>8.1f} "
                f"{found['CSR'] / found['ours']:>8.1f} {share:>8.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

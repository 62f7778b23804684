"""The descent of masks, over nodes or over edges: which of many parts of a model are needed for a bound on a loss.

With tau_f a number per part and C = {tau > 0}, the steps make small                   (Gao et al. 2025, appendix A.5)

    loss(C) + lambda |C|,          Heaviside forward, sigmoid's derivative backward

by AdamW on some prompts at a time, tau clamped to [-1, 1], the rate falling to 0. What is different from the paper:

start     tau ~ N(.2, .07), ten steps from 0. The paper's N(.1, .01) takes everything away within a few steps, before any part
          has a gradient.
lambda    is steered: it rises while the loss of the last steps is below what is aimed at and falls while it is above, so one
          descent visits the size weights that several would, and ends at the one that the bound asks for. Where it can fall no
          further and the loss is still above, every tau is raised a little: lambda alone cannot bring back what it took.
aim       Other prompts cost more than those that are learnt from. So every ten steps, where it is worth it, they are asked: the
          aim rises where they find the mask's loss within the bound, and falls where they do not though the aim is met.

Of all the masks on the way, the smallest that is within the bound on those other prompts is the answer. Where the last mask is
smaller, and not within it, it is filled up by tau: half-way to the size of that answer, and so on by bisection.

Shape legend: f all parts in one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

RATE, BETAS = 2e-2, (0.9, 0.98)
TAU, TAU_DEVIATION = 0.2, 0.07
LAMBDA, LAMBDA_RISE, LAMBDA_FALL, LAMBDA_BOUNDS = 1e-4, 1.1, 0.92, (3e-5, 1.0)
RAISED = 0.25  # of the rate, by which tau is raised where lambda can fall no further
AIMS, AIM_FALL, AIM_RISE = (0.2, 0.85), 0.85, 1.05  # as a share of the bound
CHECKED = 10  # steps between questions to the other prompts
WORTH_ASKING = 1.5  # times the bound
FILLED = 6  # sizes between the last mask's and the smallest one's within the bound


class Lessons(Protocol):
    """What masks are learnt from: the loss at a mask on some prompts drawn at random, and its slope at every part."""

    def slopes_at(self, kept_f: Tensor, generator: torch.Generator) -> tuple[float, Tensor]:
        """(loss, slope_f), whether a part is in the mask or not."""
        ...


@dataclass(frozen=True, eq=False)
class Descended:
    """tau_f of the smallest mask within the bound on other prompts, else of the last; and whether there was one."""

    tau_f: Tensor
    met: bool


def descend(
    lessons: Lessons,
    held: Callable[[Tensor], float],
    candidates_f: Tensor,
    bound: float,
    steps: int,
    *,
    seed: int = 0,
    watch: Callable[[int, Tensor, float], None] | None = None,
) -> Descended:
    """Masks over the candidates by the descent that the module describes; held(kept_f) is the loss on other prompts.

    `watch` is told the step, tau_f and the loss of late.
    """
    generator = torch.Generator().manual_seed(seed)
    tau_f = (TAU + TAU_DEVIATION * torch.randn(len(candidates_f), generator=generator)).to(candidates_f.device)
    tau_f = torch.where(candidates_f, tau_f, -1).requires_grad_()
    optimizer = torch.optim.AdamW([tau_f], lr=RATE, betas=BETAS, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    size_weight, late, aim, best_f, fewest = LAMBDA, 0.0, AIMS[1] * bound, None, len(candidates_f) + 1
    for step in range(1, steps + 1):
        value, slope_f = lessons.slopes_at(tau_f.detach() > 0, generator)
        sigmoid_f = torch.sigmoid(tau_f.detach())
        tau_f.grad = torch.where(candidates_f, (slope_f + size_weight) * sigmoid_f * (1 - sigmoid_f), 0)
        rate = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        late = value if step == 1 else 0.8 * late + 0.2 * value
        with torch.no_grad():
            if size_weight == LAMBDA_BOUNDS[0] and late > aim:
                tau_f += RAISED * rate
            tau_f.clamp_(-1, 1)
            tau_f[~candidates_f] = -1
        kept_f = tau_f.detach() > 0
        if watch:
            watch(step, tau_f.detach(), late)
        if (step % CHECKED == 0 or step == steps) and late <= WORTH_ASKING * bound:
            met = held(kept_f) <= bound
            if met or late <= aim:
                aim = min(max(aim * (AIM_RISE if met else AIM_FALL), AIMS[0] * bound), AIMS[1] * bound)
            if met and int(kept_f.sum()) < fewest:
                best_f, fewest = tau_f.detach().clone(), int(kept_f.sum())
        size_weight *= LAMBDA_RISE if late < 0.9 * aim else LAMBDA_FALL
        size_weight = min(max(size_weight, LAMBDA_BOUNDS[0]), LAMBDA_BOUNDS[1])
    if best_f is None:
        return Descended(tau_f.detach(), False)
    return Descended(_filled(held, tau_f.detach(), best_f, bound), True)


def _filled(held: Callable[[Tensor], float], last_f: Tensor, best_f: Tensor, bound: float) -> Tensor:
    """The last tau_f, raised until no more parts are above 0 than the bound asks for; best_f where they are not fewer there."""
    low, high = int((last_f > 0).sum()), int((best_f > 0).sum())
    for _ in range(FILLED):
        middle = (low + high) // 2
        if not low < middle < high:
            break
        raised_f = last_f - last_f.kthvalue(len(last_f) - middle).values
        if held(raised_f > 0) <= bound:
            best_f, high = raised_f, middle
        else:
            low = middle
    return best_f

"""Record the linear maps that a dense model calls; find those that read the residual, at which site, and those that write to it.

Shape legend: as in `anatomy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bridge.huggingface.site_discovery import first_tensor, output_tensor
from bridge.models.dense import DenseModel
from bridge.models.dense_run import lock_runs
from bridge.models.sparse_blocks import norm_scale

PROBE_ROWS, PROBE_TOKENS = 6, 29  # size of the probe; 29 is unlikely to be a width, so token axes can be recognised
MAX_UNEXPLAINED = 1e-3  # two tensors count as the same, up to constants, below this unexplained fraction of the variance
EPSILONS = (0.0, 1e-12, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3)
MASKED_SCORE = -1e4  # scores up to this value are masked


@dataclass(frozen=True, eq=False)
class Affine:
    """The map x @ weight_oi.T + bias_o."""

    weight_oi: Tensor
    bias_o: Tensor

    def rows(self, index_o: Tensor, factor_o: Tensor | float = 1.0) -> Affine:
        """Return the map to the selected outputs, each times a factor."""
        factor_o = torch.as_tensor(factor_o, device=self.bias_o.device).expand(len(index_o))
        return Affine(self.weight_oi[index_o] * factor_o[:, None], self.bias_o[index_o] * factor_o)

    def __mul__(self, factor: float) -> Affine:
        return Affine(self.weight_oi * factor, self.bias_o * factor)

    def __call__(self, x_xi: Tensor) -> Tensor:
        """Return y_xo."""
        return x_xi @ self.weight_oi.T + self.bias_o


@dataclass(frozen=True, eq=False)
class OutputMap:
    """The last map of a sublayer, and the gain and eps of the norm on its output (gain_d None: no norm)."""

    map: Affine
    gain_d: Tensor | None = None
    eps: float = 0.0


@dataclass(frozen=True, eq=False)
class CalledMap:
    """A linear map with the input and output of its call, and the block it is in (-1: outside the blocks)."""

    affine: Affine
    input_xi: Tensor
    output_xo: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class Reading:
    """A map that reads the residual at a site: `affine` applies to z, or to h if raw."""

    map: CalledMap
    affine: Affine
    site: int
    raw: bool
    unexplained: float


@dataclass(eq=False)
class RecordedAttention:
    """Queries and keys multiplied in a block, and the scores that went into the softmax."""

    q_bhtc: Tensor | None = None
    k_bhtc: Tensor | None = None
    score_bhtt: Tensor | None = None


@dataclass(frozen=True, eq=False)
class RecordedRun:
    """Maps, attention, residuals and logits recorded in a run."""

    maps: list[CalledMap]
    blocks: list[RecordedAttention]
    residuals: list[Tensor]  # h_xd of every site
    logits_xv: Tensor


class ScoreWatcher(TorchFunctionMode):
    """Calls `multiplied` with the queries and keys multiplied in each block, and `softened` with the scores for the softmax."""

    def __init__(
        self, tokens: int, multiplied: Callable[[int, Tensor, Tensor], None], softened: Callable[[int, Tensor], None]
    ) -> None:
        super().__init__()
        self.tokens, self.multiplied, self.softened = tokens, multiplied, softened
        self.block = -1  # index of the running block; -1 before the first

    def _enter(self, block: int, *_: Any) -> None:
        self.block = block

    @contextmanager
    def watching(self, dense: DenseModel) -> Iterator[None]:
        """Context manager in which the runs of the model are watched."""
        with lock_runs(), ExitStack() as hooks, self:
            for index, block in enumerate(dense.blocks):
                hooks.enter_context(block.module.register_forward_pre_hook(partial(self._enter, index)))
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name, square = func(*args, **kwargs), getattr(func, "__name__", ""), (self.tokens, self.tokens)
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        if self.block < 0:
            return out
        if name == "scaled_dot_product_attention" and given[0].shape[-2] == self.tokens == given[1].shape[-2]:
            with torch._C.DisableTorchFunction():
                q, k = given[0], given[1]
                self.multiplied(self.block, q, k)
                self.softened(self.block, _attention_scores(q, k, given[3] if len(given) > 3 else None, kwargs.get("scale")))
        elif name == "softmax" and tuple(given[0].shape[-2:]) == square:
            self.softened(self.block, given[0])
        elif isinstance(out, Tensor) and tuple(out.shape[-2:]) == square:
            pairs = [(q, k) for q in given for k in given if q is not k and q.dim() > 2 and q.shape[-1:] == k.shape[-2:-1]]
            for q, k in pairs:
                if q.shape[-2] == k.shape[-1] == self.tokens != q.shape[-1]:
                    self.multiplied(self.block, q, k.transpose(-1, -2))
        return out


def _attention_scores(q_bhtc: Tensor, k_bgtc: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Return the scores that scaled_dot_product_attention computes; without a mask, the mask is causal."""
    k_bhtc = k_bgtc.repeat_interleave(q_bhtc.shape[1] // k_bgtc.shape[1], 1)
    score_bhtt = q_bhtc.float() @ k_bhtc.float().transpose(-1, -2) * (scale or 1 / math.sqrt(q_bhtc.shape[-1]))
    if mask is None:
        mask = torch.ones(score_bhtt.shape[-2:], dtype=torch.bool, device=score_bhtt.device).tril()
    return score_bhtt.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else score_bhtt + mask


def draw_probe_rows(dense: DenseModel, rows: int = PROBE_ROWS, tokens: int = PROBE_TOKENS) -> Tensor:
    """Return random tokens_bt, at most as long as the model's context."""
    length = min(tokens, dense.context or tokens)
    generator = torch.Generator().manual_seed(0)
    table: Any = dense.model.get_input_embeddings()
    known = min(len(table.weight), dense.vocabulary)
    return torch.randint(known, (rows, length), generator=generator).to(dense.device)


def record_run(dense: DenseModel, tokens_bt: Tensor) -> RecordedRun:
    """Run the model on the tokens and record its maps, attention, residuals and logits."""
    blocks, maps = [RecordedAttention() for _ in dense.blocks], dict[nn.Module, CalledMap]()
    block_of = {module: index for index, block in enumerate(dense.blocks) for module in block.module.modules()}

    def plain(x: Tensor) -> Tensor:
        return x.to(dense.device, torch.float32)

    def see(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        x, y, weight, bias = first_tensor(args, kwargs), output_tensor(output), module.weight, getattr(module, "bias", None)
        assert isinstance(weight, Tensor)
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor) and x.is_floating_point() and weight.is_floating_point()
        if module in maps or not tensors or x.numel() // x.shape[-1] != tokens_bt.numel():
            return
        x_xi, y_xo, weight = plain(x.reshape(-1, x.shape[-1])), plain(y.reshape(-1, y.shape[-1])), plain(weight)
        bias_o = torch.zeros_like(y_xo[0]) if bias is None else plain(bias)
        for weight_oi in (weight, weight.T):  # transformers' Conv1D stores weights as (inputs, outputs)
            fits = weight_oi.shape == (y_xo.shape[1], x_xi.shape[1])
            if fits and unexplained(torch.addmm(bias_o, x_xi, weight_oi.T), y_xo) < 10 * MAX_UNEXPLAINED:
                maps[module] = CalledMap(Affine(weight_oi, bias_o), x_xi.clone(), y_xo.clone(), block_of.get(module, -1))
                return

    def by_row(x: Tensor) -> Tensor:
        return plain(x).reshape(len(tokens_bt), -1, *x.shape[-2:]).clone()

    def multiplied(block: int, q: Tensor, k: Tensor) -> None:
        if not any(x.shape[:-2].numel() % len(tokens_bt) for x in (q, k)):  # otherwise it is no attention but a mask being built
            blocks[block].q_bhtc, blocks[block].k_bhtc = by_row(q), by_row(k)

    def softened(block: int, score: Tensor) -> None:
        blocks[block].score_bhtt = by_row(score)

    with ScoreWatcher(tokens_bt.shape[1], multiplied, softened).watching(dense), ExitStack() as hooks:
        for module in dense.model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() == 2:
                hooks.enter_context(module.register_forward_hook(see, with_kwargs=True))
        trace = dense.run(tokens_bt)
    residuals = [h_btd.flatten(0, 1).float() for h_btd in trace.residuals]
    return RecordedRun(list(maps.values()), blocks, residuals, trace.logits_btv.flatten(0, 1).float())


# --- maps that read and write


def sites_of(dense: DenseModel) -> dict[int, list[int]]:
    """Return the sites that each block reads, and for key -1 the last site, after all blocks."""
    sites: dict[int, list[int]] = {-1: [len(dense.sublayers)]}
    for site, kind in enumerate(dense.sublayers):
        if kind == "mlp":
            sites[max(sites)].append(site)
        else:
            sites[len(sites) - 1] = [site]
    return sites


def find_readings(seen: RecordedRun, sites: Mapping[int, Sequence[int]], centred: bool, eps: float) -> list[Reading]:
    """Return the maps that read the residual, each with the site of its block that explains its input best."""
    found: list[Reading] = []
    known: list[tuple[Tensor, tuple[float, int, bool, Tensor, Tensor]]] = []  # several maps may have the same input
    for one in seen.maps:
        if one.input_xi.shape != seen.residuals[0].shape:
            continue
        best = next((fit for input_xd, fit in known if torch.equal(input_xd, one.input_xi)), None)
        if best is None:
            fits = [_fit_read(one.input_xi, seen.residuals[site], site, centred, eps) for site in sites[one.block]]
            best = min(fits, key=lambda fit: fit[0])
            known.append((one.input_xi, best))
        left, site, raw, gain_d, bias_d = best
        if left < MAX_UNEXPLAINED:
            weight_od, bias_o = one.affine.weight_oi, one.affine.bias_o
            found.append(Reading(one, Affine(weight_od * gain_d, weight_od @ bias_d + bias_o), site, raw, left))
    return found


def _fit_read(
    input_xd: Tensor, h_xd: Tensor, site: int, centred: bool, eps: float
) -> tuple[float, int, bool, Tensor, Tensor]:  # fmt: skip
    """Fit an input as g z + b, or as h, whichever is better; return (unexplained, site, raw, gain_d, bias_d)."""
    gain_d, bias_d, left = fit_gain(normalise(h_xd, centred, eps), input_xd, biased=centred)
    raw = unexplained(h_xd, input_xd)
    if raw < left:
        return raw, site, True, torch.ones_like(gain_d), torch.zeros_like(gain_d)
    return left, site, False, gain_d, bias_d


def normalise(h_xd: Tensor, centred: bool, eps: float) -> Tensor:
    """Return z_xd of a residual."""
    h_xd = h_xd - h_xd.mean(-1, keepdim=True) if centred else h_xd
    return h_xd * norm_scale(h_xd, max(eps, 1e-20))


def fit_gain(z_xd: Tensor, y_xd: Tensor, *, biased: bool) -> tuple[Tensor, Tensor, float]:
    """Fit y = gain z + bias for each channel (bias 0 unless biased); return (gain_d, bias_d, unexplained)."""
    mean_d, offset_d = (z_xd.mean(0), y_xd.mean(0)) if biased else (torch.zeros_like(z_xd[0]), torch.zeros_like(z_xd[0]))
    z0_xd = z_xd - mean_d
    gain_d = (z0_xd * (y_xd - offset_d)).sum(0) / z0_xd.square().sum(0).clamp_min(1e-12)
    bias_d = offset_d - gain_d * mean_d
    return gain_d, bias_d, unexplained(gain_d * z_xd + bias_d, y_xd)


def fit_factor(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Fit y = c x; return (c, unexplained)."""
    factor = ((x * y).sum() / x.square().sum().clamp_min(1e-20)).item()
    return factor, unexplained(factor * x, y)


def fit_output(one: CalledMap, write_xd: Tensor) -> OutputMap | None:
    """Return the steps from a map's output to its sublayer's write: a factor, or a norm with a gain; None if neither fits."""
    factor, left = fit_factor(one.output_xo, write_xd)
    if left < MAX_UNEXPLAINED:
        return OutputMap(one.affine * factor)
    fits = [(fit_gain(normalise(one.output_xo, False, eps), write_xd, biased=False), eps) for eps in EPSILONS]
    (gain_d, _, left), eps = min(fits, key=lambda fit: fit[0][2])
    return OutputMap(one.affine, gain_d, eps) if left < MAX_UNEXPLAINED else None


def unexplained(guess_xy: Tensor, target_xy: Tensor) -> float:
    """Fraction of the target's variance over tokens that a guess leaves unexplained; infinite if it is not a number."""
    total = (target_xy - target_xy.mean(0)).square().sum()
    return ((guess_xy - target_xy).square().sum() / total.clamp_min(1e-20)).nan_to_num(torch.inf).item()

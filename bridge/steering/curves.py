"""The dense model's answers and text under `interventions`, against their strength (the paper's figure 9).

Each curve has controls: random directions with the norm of the change at each site and position (a draw serves all strengths),
and two ceilings: every node at its counterfactual value, and the dense model on the counterfactual itself.

Shape legend: t token, d dense width, v vocabulary, r draw, k strength, 2 target and contrast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bridge.explanations.build import prompt_tokens, token_of, top_answers
from bridge.explanations.parts import Answer, Token
from bridge.huggingface.prompts import Prompts
from bridge.models.bridges import CoupledModels
from bridge.models.residual import Trace
from bridge.models.store import as_json
from bridge.steering.interventions import (
    Intervention,
    SteeredNode,
    Steerer,
    SteerError,
    intervene_on_every_node,
    parse_intervention,
    run_patched,
)

STRENGTHS = tuple(place / 10 for place in range(11))
MOST_DRAWS = 1000
DRAWS = 20  # random directions
TOKENS = 16  # tokens to generate
_BATCH_TOKENS = 4096  # tokens of the rows that are run at once


@dataclass(frozen=True)
class Steered:
    """The dense model at a strength: its likeliest next tokens, two probabilities, and, on request, its continuation."""

    strength: float
    dense: tuple[Answer, ...]
    probability_target: float
    probability_contrast: float
    text: str | None = None


@dataclass(frozen=True)
class Spread:
    """A probability over random directions: mean, lowest and highest."""

    mean: float
    low: float
    high: float

    @staticmethod
    def of(value_r: Tensor) -> Spread:
        """Return the spread of a probability's values, one for each direction."""
        return Spread(float(value_r.mean()), float(value_r.min()), float(value_r.max()))


@dataclass(frozen=True)
class StrengthControls:
    """The controls at a strength: random directions of equal norm, and every node at its counterfactual value.

    every_* are None without a counterfactual, and if the chosen nodes are all nodes.
    """

    strength: float
    random_target: Spread
    random_contrast: Spread
    every_target: float | None
    every_contrast: float | None


@dataclass(frozen=True)
class Steering:
    """The dense model's answers against the strength with which some nodes were changed.

    target is by default its answer on the prompt, contrast its answer on the counterfactual (without one, its second answer).
    A change was added at each of `sites`; norms are its norms as a share of the residual's, averaged over the positions with a
    change. at_once: all was added at one named site, instead of each sublayer's change at its own site. counterfactual_* are
    the dense model's probabilities on the counterfactual itself.
    """

    prompt: str
    counterfactual: str | None
    tokens: tuple[Token, ...]
    target: Token
    contrast: Token
    n_changed: int
    changed: tuple[SteeredNode, ...]
    sites: tuple[int, ...]
    norms: tuple[float, ...]
    at_once: bool
    curve: tuple[Steered, ...]
    beside: tuple[StrengthControls, ...]
    draws: int
    seed: int
    counterfactual_target: float | None
    counterfactual_contrast: float | None

    def to_json(self) -> dict[str, Any]:
        """Return the values as plain JSON."""
        return as_json(self)


def random_directions(change_td: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Return change_rtd in random directions, with the norm of change_td at every position."""
    drawn_rtd = torch.randn(draws, *change_td.shape, generator=generator).to(change_td.device, change_td.dtype)
    return drawn_rtd / drawn_rtd.norm(dim=-1, keepdim=True) * change_td.norm(dim=-1, keepdim=True)


@torch.no_grad()
def steered_logits(
    coupling: CoupledModels, tokens_t: Tensor, plain: Trace, changes: Mapping[int, Tensor], strengths: Sequence[float]
) -> Tensor:
    """Return logits_rkv at a prompt's last position, for each draw of change_rtd (given by site): plain, and at each strength."""
    draws = len(next(iter(changes.values())))
    plain_r1v = plain.logits_btv[:, -1:].float().expand(draws, -1, -1)
    if not strengths:
        return plain_r1v
    strength_k = torch.tensor(strengths, device=tokens_t.device)
    rows = max(1, _BATCH_TOKENS // len(tokens_t))
    place_b = torch.arange(draws * len(strengths), device=tokens_t.device)
    found = []
    for some_b in place_b.split(rows):
        draw_b, scale_b = some_b // len(strengths), strength_k[some_b % len(strengths)]
        added = {site: change_rtd[draw_b] * scale_b[:, None, None] for site, change_rtd in changes.items()}
        trace = run_patched(coupling, tokens_t.expand(len(some_b), -1), plain, added)
        found.append(trace.logits_btv[:, -1].float())
    return torch.cat([plain_r1v, torch.cat(found).unflatten(0, (draws, len(strengths)))], 1)


def check_strengths(strengths: Sequence[float]) -> tuple[float, ...]:
    """Return 0 and the strengths, ascending, without duplicates. Raises SteerError for a strength that is not from 0 to 1."""
    for strength in strengths:
        if not 0 <= strength <= 1:
            raise SteerError(
                f"strength {strength:g}", "is not between 0 and 1", "give 0 for the dense model itself, 1 for the whole change"
            )
    return tuple(sorted({0.0, *strengths}))


@torch.no_grad()
def steer(
    coupling: CoupledModels,
    prompt: str,
    interventions: Sequence[Intervention | str] | None = None,
    *,
    counterfactual: str | None = None,
    target: str | int | None = None,
    contrast: str | int | None = None,
    strengths: Sequence[float] = STRENGTHS,
    site: int | None = None,
    tokens: int = TOKENS,
    draws: int = DRAWS,
    seed: int = 0,
) -> Steering:
    """Return the dense model's answers with some nodes changed, against the strength, with random directions of equal norm.

    An intervention is an Intervention, or text such as "1.mlp_act[37]@4=2.5"; None sets every node to its counterfactual value.
    Target and contrast are texts of tokens, #id, or ids. At strength 0 and at the largest, `tokens` tokens are generated.
    Raises SteerError, NodeError or PromptError.
    """
    strengths = check_strengths(strengths)
    if not 1 <= draws <= MOST_DRAWS:
        why = "no control" if draws < 1 else "more than the limit"
        raise SteerError(f"{draws:,} random directions", f"are {why}", f"give 1 to {MOST_DRAWS:,}")
    dense, prompts, sizes = coupling.dense, coupling.dense.prompts, coupling.sparse.locations()
    tokens_t = prompt_tokens(coupling, prompt)
    other_t = None if counterfactual is None else prompt_tokens(coupling, counterfactual)
    if other_t is not None and torch.equal(other_t, tokens_t):
        raise SteerError("the counterfactual", "is the prompt itself", "change what decides the answer")
    whole = interventions is None
    if interventions is None:
        if other_t is None:
            raise SteerError("the intervention", "is missing", "name nodes, a circuit, an explanation or a counterfactual prompt")
        interventions = intervene_on_every_node(sizes)
    chosen = [parse_intervention(each, sizes) if isinstance(each, str) else each for each in interventions]
    steerer = Steerer(coupling, tokens_t, chosen, other_t, site=site)

    plain = dense.run(tokens_t[None])
    plain_v = plain.logits_btv[0, -1].float()
    counterfactual_v = None if other_t is None else dense.run(other_t[None]).logits_btv[0, -1].float()
    target_id, contrast_id = _sides(prompts, prompt, plain_v, counterfactual_v, target, contrast)
    pair = torch.tensor([target_id, contrast_id], device=plain_v.device)

    changes = steerer.residual_changes(tokens_t[None])
    above = strengths[1:]
    generator = torch.Generator().manual_seed(seed)
    random = {site: random_directions(change_1td[0], draws, generator) for site, change_1td in changes.items()}
    logits_kv = steered_logits(coupling, tokens_t, plain, changes, above)[0]
    random_rk2 = _pair_of(steered_logits(coupling, tokens_t, plain, random, above), pair)
    every_k2 = None
    if other_t is not None and not whole:
        every_steerer = Steerer(coupling, tokens_t, intervene_on_every_node(sizes), other_t, site=site)
        every = every_steerer.residual_changes(tokens_t[None])
        every_k2 = _pair_of(steered_logits(coupling, tokens_t, plain, every, above)[0], pair)

    probability_k2 = _pair_of(logits_kv, pair)
    on_counterfactual = None if counterfactual_v is None else _pair_of(counterfactual_v, pair).tolist()
    curve, beside = [], []
    for k, strength in enumerate(strengths):
        text = None
        if tokens > 0 and strength in (strengths[0], strengths[-1]):
            text = prompts.continued(tokens_t.tolist(), steerer.generate(strength, tokens).tolist())
        of_target, of_contrast = probability_k2[k].tolist()
        curve.append(Steered(strength, top_answers(prompts, logits_kv[k]), of_target, of_contrast, text))
        every_target, every_contrast = (None, None) if every_k2 is None else every_k2[k].tolist()
        by_chance = Spread.of(random_rk2[:, k, 0]), Spread.of(random_rk2[:, k, 1])
        beside.append(StrengthControls(strength, *by_chance, every_target, every_contrast))
    n_changed, changed = steerer.changed_nodes()
    return Steering(
        prompt=prompt,
        counterfactual=counterfactual,
        tokens=tuple(token_of(prompts, token) for token in tokens_t.tolist()),
        target=token_of(prompts, target_id),
        contrast=token_of(prompts, contrast_id),
        n_changed=n_changed,
        changed=changed,
        sites=steerer.sites,
        norms=tuple(_mean_relative_norm(change_1td[0], plain.residuals[at][0]) for at, change_1td in changes.items()),
        at_once=site is not None,
        curve=tuple(curve),
        beside=tuple(beside),
        draws=draws,
        seed=seed,
        counterfactual_target=None if on_counterfactual is None else on_counterfactual[0],
        counterfactual_contrast=None if on_counterfactual is None else on_counterfactual[1],
    )


def _sides(
    prompts: Prompts,
    prompt: str,
    plain_v: Tensor,
    counterfactual_v: Tensor | None,
    target: str | int | None,
    contrast: str | int | None,
) -> tuple[int, int]:
    """Return the ids of target and contrast: by default the dense model's answers to the prompt and to the counterfactual."""
    first = int(plain_v.argmax()) if target is None else prompts.target(target, prompt)
    if contrast is not None:
        second = prompts.target(contrast, prompt, "contrast")
    else:
        ranked = (plain_v if counterfactual_v is None else counterfactual_v).topk(2).indices.tolist()
        second = ranked[1] if ranked[0] == first else ranked[0]
    if first == second:
        raise SteerError("target and contrast", "are the same token", "name two different ones")
    return first, second


def _pair_of(logits_v: Tensor, pair: Tensor) -> Tensor:
    return logits_v.softmax(-1)[..., pair]


def _mean_relative_norm(change_td: Tensor, residual_td: Tensor) -> float:
    """Return the norm of a change relative to the residual's, averaged over the positions where the change is not zero."""
    norm_t = change_td.norm(dim=-1)
    there_t = norm_t > 0
    return float((norm_t / residual_td.norm(dim=-1))[there_t].mean()) if bool(there_t.any()) else 0.0

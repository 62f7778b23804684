"""Null couplings, which must fail every test that a coupling passes: uncoupled, with shuffled bridges, with permuted weights.

    uncoupled   a sparse model of the same shape from a random start, with at least 1/16 of its weights nonzero. It is trained on
                text and on the dense model's answers, but on nothing inside the dense model; its bridges are fitted afterwards by
                ridge regression on the coupling's reference text. Its extra weights, and learning from answers, make it harder
    bridges     the coupling, with the sparse channels of each bridge in a random order, which differs by site (residual streams
                share their channels over sites, so exchanging bridges between sites would change little)
    weights     the coupling, with the entries of each matrix of the sparse model permuted; ridge bridges

The first encoder and the last decoder of a span are part of its sparse model. The uncoupled null trains them with the model. The
other nulls keep the coupling's. Only the other bridge maps are fitted or shuffled.

Shape legend: b row, t token, d dense width, s sparse width, n token of all rows, i and j sides of a regression.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.errors import UserError
from bridge.models.bridges import Bridges, CoupledModels
from bridge.models.sparse import SparseTransformer
from bridge.recipe import Losses
from bridge.training.loop import Progress, fit
from bridge.training.refit import refit_decoders

NullName = Literal["uncoupled", "bridges", "weights"]
NULL_NAMES: tuple[NullName, ...] = get_args(NullName)
MINUTES = 20.0
ANNEAL = 0.3  # minimum fraction of the fit, because it starts with all weights
RATE = 1e-2  # learning rate: the coupling's own may suit a start from the dense model, but this start is random
L0 = 1 / 16  # minimum: from a random start, a model as sparse as some couplings learns no task in hours
MOST_TOKENS, TOKENS_A_MINUTE = 20_000_000, 500_000  # text that is read: more than two cores can train on
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1)  # penalties relative to the mean variance; the best on held-out tokens is used


class NullError(UserError):
    """A null that cannot be made or read. The message is one line that says what to change."""


def null_coupling(
    coupling: CoupledModels,
    name: NullName,
    *,
    against: Path | None = None,
    minutes: float = MINUTES,
    seed: int = 0,
    progress: OnProgress = ignore_progress,
) -> CoupledModels:
    """Return the null of a name; the uncoupled model is loaded from the folder `against`, or trained there.

    Raises NullError if the coupling has no reference text to fit bridges on, or the uncoupled model has no folder.
    """
    if (reference_bt := coupling.reference_bt) is None:
        raise NullError("the coupling", "has no reference text, on which a null's bridges are fitted", "fit it again")
    coupling = replace(coupling, path=None)  # the null has no folder; files in the coupling's do not describe it
    if name == "bridges":
        return replace(coupling, bridges=shuffled_bridges(coupling, seed))
    if name == "weights":
        return with_ridge_bridges(replace(coupling, sparse=permuted_weights(coupling.sparse, seed)), reference_bt)
    if against is None:
        raise NullError("the uncoupled null", "needs a folder to be trained in or loaded from", "name one with ‹against›")
    other = load_or_fit_uncoupled(coupling, against, minutes, seed, progress)
    return with_ridge_bridges(replace(coupling, sparse=other.sparse, bridges=other.bridges), reference_bt)


def with_ridge_bridges(coupling: CoupledModels, reference_bt: Tensor) -> CoupledModels:
    """Return the coupling with ridge bridges, whose decoders are refitted to small changes like the coupling's own."""
    fitted = replace(coupling, bridges=ridge_bridges(coupling, reference_bt))
    refit_decoders(fitted, reference_bt, reference_bt, coupling.recipe.refit.slopes)  # a null has no other text
    return fitted


def load_or_fit_uncoupled(
    coupling: CoupledModels, folder: Path, minutes: float, seed: int, progress: OnProgress
) -> CoupledModels:
    """Return a sparse model of the coupling's shape trained without bridges: loaded from a folder, or fitted there, resumably.

    Raises NullError if the folder holds a model of another shape, or one that was coupled.
    """
    if not (folder / "coupling.json").is_file():
        progress(Phase(f"uncoupled: training without bridges for {minutes:g} minutes"))
        recipe = coupling.recipe
        values = recipe.model_dump(include={"sparse", "sparsity", "data"}, exclude_none=True)
        settings = {f"{part}.{key}": value for part, some in values.items() for key, value in some.items()}
        settings |= {"sparse.start": "random", "optimizer.rate": RATE}  # no weights of a coupling
        settings["sparsity.anneal"] = max(ANNEAL, recipe.sparsity.anneal)  # short in a coupling that started at its L0
        losses = Losses().without_bridges().model_dump(exclude={"splice"})
        settings |= {f"losses.{term}": weight for term, weight in losses.items()}
        if coupling.sparse.fractions(recipe.sparsity).blocks < L0:
            settings["sparsity.l0"] = L0
        tokens = min(recipe.budget.tokens or MOST_TOKENS, max(TOKENS_A_MINUTE, int(minutes * TOKENS_A_MINUTE)))

        def watch(state: Progress) -> None:
            ce = state.losses.get("ce", float("nan"))
            progress(Phase("uncoupled", state.fraction, 1, f"CE {ce:.2f}"))

        fit(
            coupling.dense.model, tokenizer=coupling.dense.tokenizer, tokens=tokens, minutes=minutes,
            settings=settings, seed=seed + 1, out=folder, resume=folder.exists(),
            device=str(coupling.dense.device), on_progress=watch,
        )  # fmt: skip
    other = CoupledModels.from_pretrained(folder, dense=coupling.dense)
    if other.recipe.losses.coupled:
        raise NullError(f"{str(folder)!r}", "was coupled to the dense model", "name a folder that was fitted with ‹uncoupled›")
    if other.sparse.locations() != coupling.sparse.locations():
        raise NullError(
            f"{str(folder)!r}", "has a sparse model of another shape", "fit one with the coupling's recipe and ‹uncoupled›"
        )
    return other


@torch.no_grad()
def ridge_bridges(coupling: CoupledModels, tokens_bt: Tensor) -> Bridges:
    """Fit bridges between the two fixed models by ridge regression on text; the last quarter of the text chooses the penalty."""
    sparse, dense = coupling.sparse, coupling.dense
    bridges = Bridges(coupling.n_sites, dense.width, sparse.width, sparse.keep).to(dense.device).requires_grad_(False)
    rows = tokens_bt.to(dense.device)
    traces = [(dense.run(some).residuals, sparse.run(some, last_only=True).residuals) for some in rows.split(16)]
    bridges.calibrate([torch.cat([h[site] for h, _ in traces]) for site in range(coupling.n_sites)])
    for site in range(coupling.n_sites):
        h_nd = torch.cat([h[site].flatten(0, 1) for h, _ in traces]).double()
        x_ns = torch.cat([x[site].flatten(0, 1) for _, x in traces]).double()
        bridge = bridges[site]
        if site in dict(coupling.ends):
            bridge.load_state_dict(coupling.bridges[site].state_dict())
        scaled_nd = (h_nd - bridge.mean_d.double()) / bridge.scale.double()
        for name, source, target in (("encoder", scaled_nd, x_ns), ("decoder", x_ns, scaled_nd)):
            if (site, name) not in coupling.ends:
                weight, bias = fit_ridge(source, target)
                bridge.get_submodule(name).load_state_dict({"weight": weight, "bias": bias})
    return bridges


def fit_ridge(source_ni: Tensor, target_nj: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight_ji, bias_j of the ridge regression of target on source, float64, with the penalty best on held-out rows."""
    n = len(source_ni) * 3 // 4 if len(source_ni) >= 8 else len(source_ni)
    mean_i, mean_j = source_ni[:n].mean(0), target_nj[:n].mean(0)
    centred_ni, centred_nj = source_ni - mean_i, target_nj - mean_j
    gram_ii, cross_ij = centred_ni[:n].T @ centred_ni[:n] / n, centred_ni[:n].T @ centred_nj[:n] / n
    strength = gram_ii.diagonal().mean().clamp(min=1e-12)
    eye_ii = torch.eye(len(gram_ii), dtype=gram_ii.dtype, device=gram_ii.device)
    weights = [torch.linalg.solve(gram_ii + penalty * strength * eye_ii, cross_ij) for penalty in RIDGES]
    late = slice(n, None) if n < len(source_ni) else slice(None)
    best_ij = min(weights, key=lambda w_ij: float((centred_nj[late] - centred_ni[late] @ w_ij).square().sum()))
    return best_ij.T, mean_j - mean_i @ best_ij


@torch.no_grad()
def shuffled_bridges(coupling: CoupledModels, seed: int) -> Bridges:
    """Return the coupling's bridges with their sparse channels in a random order, which differs by site."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = copy.deepcopy(coupling.bridges).requires_grad_(False)
    for site in range(coupling.n_sites):
        order_s = torch.randperm(coupling.sparse.width, generator=generator).to(coupling.dense.device)
        encoder, decoder = shuffled[site].encoder, shuffled[site].decoder
        if (site, "encoder") not in coupling.ends:
            encoder.load_state_dict({"weight": encoder.weight[order_s], "bias": encoder.bias[order_s]})
        if (site, "decoder") not in coupling.ends:
            decoder.weight.copy_(decoder.weight[:, order_s])
    return shuffled


def permuted_weights(sparse: SparseTransformer, seed: int) -> SparseTransformer:
    """Return the model with the entries of each matrix in a random order, so the nonzeros are the same but elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(sparse)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.dim() == 2:
                order = torch.randperm(parameter.numel(), generator=generator).to(parameter.device)
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
    return other

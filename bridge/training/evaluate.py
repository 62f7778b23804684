"""Measure the faithfulness of a coupling on held-out text, per site and overall.

    EV of f_i   = 1 - sum |f_i(h_d) - h_s|^2 / sum |h_s - mean h_s|^2       for decoders g_i, h_d and h_s are exchanged
    CE recovered at i = (CE_mean - CE_hybrid) / (CE_mean - CE_dense)

over all tokens. CE_mean is the dense model's cross-entropy with the residual at site i replaced by its corpus mean. Explained
variance is given with and without the first position, where a few outliers dominate in GPT-2-like models. A first pass over the
text computes the means, a second pass everything else; only sums are kept.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.display import html as display
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.models.bridges import CoupledModels
from bridge.models.residual import Enter
from bridge.models.sparse import Location

ROWS = 16


@dataclass(frozen=True)
class SiteEvaluation:
    """One site's explained variances (later: no first position) and hybrids (in: dense to sparse, out: sparse to dense)."""

    site: int
    read_by: str
    ev_encoder: float
    ev_encoder_later: float
    ev_decoder: float
    ev_decoder_later: float
    kl_in: float
    kl_out: float
    ce_in: float
    ce_out: float
    ce_mean: float
    recovered_in: float
    recovered_out: float


@dataclass(frozen=True)
class Evaluation:
    """Measures of a coupling on held-out text; KL from the dense model's answers and CE on the text, both in nats per token."""

    sites: tuple[SiteEvaluation, ...]
    tokens: int
    ce_dense: float
    ce_sparse: float
    kl_sparse: float
    top1_sparse: float
    top1_in: float
    top1_out: float
    recovered_in: float
    recovered_out: float
    ev_encoder: float
    ev_decoder: float
    l0: float
    l0_blocks: float
    l0_embed: float
    dead_neurons: int
    neurons: int

    def to_json(self) -> dict[str, Any]:
        """Return the evaluation as plain JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        head = ("site", "read by", "KL in", "out", "CE recovered in", "out", "explained variance encoder", "decoder")
        numbers = ("kl_in", "kl_out", "recovered_in", "recovered_out", "ev_encoder", "ev_decoder")
        rows = [(str(s.site), s.read_by, *(f"{getattr(s, name):.3f}" for name in numbers)) for s in self.sites]
        summary = (
            f"KL of sparse to dense {self.kl_sparse:.3f}; cross-entropy dense {self.ce_dense:.3f}, sparse {self.ce_sparse:.3f}"
        )
        return display.card(f"{self.tokens:,} held-out tokens; nats per token", display.text(summary), display.table(head, rows))


@torch.no_grad()
def evaluate(coupling: CoupledModels, tokens_bt: Tensor, *, on_progress: OnProgress | None = None) -> Evaluation:
    """Evaluate a coupling on held-out tokens_bt. Raises ValueError if there is no row."""
    if not len(tokens_bt):
        raise ValueError("there is no held-out text to evaluate on; give more text")
    progress = on_progress or ignore_progress
    parts = tokens_bt.to(coupling.dense.device).split(ROWS)
    means = _mean_residuals(coupling, parts, progress)
    alive = {at: torch.zeros(n, dtype=torch.bool) for at, n in coupling.sparse.locations().items() if at.kind == "mlp_act"}
    sums: Sums = defaultdict(float)
    for number, part_bt in enumerate(parts):
        _add_sums(coupling, part_bt, means, sums, alive)
        progress(Phase("evaluation", 0.2 + 0.8 * (number + 1) / len(parts), 1))
    return _evaluation(coupling, sums, alive, tokens_bt.shape)


POSITIONS = {"": 0, "_later": 1}  # suffix of a sum and the first position that it includes
Means = Mapping[tuple[str, str, int], Tensor]  # mean residuals, by model (dense or sparse), suffix and site
Sums = defaultdict[tuple[str, int | None], float]  # sums over the text, by name and site (None: of the whole model)


def _mean_residuals(coupling: CoupledModels, parts: Sequence[Tensor], progress: OnProgress) -> Means:
    rows = sum(map(len, parts))
    means: dict[tuple[str, str, int], Tensor] = {}
    for number, part_bt in enumerate(parts):
        for model, trace in (("dense", coupling.dense.run(part_bt)), ("sparse", coupling.sparse.run(part_bt))):
            for site, x_btd in enumerate(trace.residuals):
                for suffix, start in POSITIONS.items():
                    mean_d = len(part_bt) / rows * x_btd[:, start:].float().mean((0, 1))
                    means[model, suffix, site] = means.get((model, suffix, site), 0) + mean_d
        progress(Phase("evaluation", 0.2 * (number + 1) / len(parts), 1))
    return means


def _add_sums(coupling: CoupledModels, part_bt: Tensor, means: Means, sums: Sums, alive: dict[Location, Tensor]) -> None:
    """Add the sums over some rows of text, and mark which neurons were active."""
    dense, bridges = coupling.dense, coupling.bridges

    def watch(location: Location, x_btn: Tensor) -> Tensor:
        if location in alive:
            alive[location] |= (x_btn != 0).any(0).any(0).cpu()
        return x_btn

    truth, plain = dense.run(part_bt), coupling.sparse.run(part_bt, gate=watch)
    log_p_btv = truth.logits_btv.float().log_softmax(-1)

    def add(name: str, site: int | None, value: Tensor) -> None:
        sums[name, site] += float(value.double().sum())

    def compare(name: str, site: int | None, logits_btv: Tensor) -> None:
        """Add the cross-entropy of answers on the text, and their KL to and top-1 agreement with the dense model's answers."""
        log_q_btv = logits_btv.float().log_softmax(-1)
        add(f"ce_{name}", site, F.nll_loss(log_q_btv[:, :-1].flatten(0, 1), part_bt[:, 1:].flatten(), reduction="sum"))
        add(f"kl_{name}", site, F.kl_div(log_q_btv, log_p_btv, reduction="sum", log_target=True))
        add(f"top1_{name}", site, logits_btv.argmax(-1) == truth.logits_btv.argmax(-1))

    compare("dense", None, truth.logits_btv)
    compare("sparse", None, plain.logits_btv)
    for site in range(coupling.n_sites):
        h_btd, x_bts = truth.residuals[site], plain.residuals[site]
        compare("in", site, coupling.dense_to_sparse(part_bt, truth.residuals, site))
        compare("out", site, coupling.sparse_to_dense(part_bt, plain.residuals, site))
        mean_btd = means["dense", "", site].to(h_btd.dtype).expand_as(h_btd)
        compare("mean", site, dense.run(part_bt, Enter.at(site, mean_btd)).logits_btv)
        for name, guess, target, model in (
            ("encoder", bridges[site].encode(h_btd), x_bts, "sparse"),
            ("decoder", bridges[site].decode(x_bts), h_btd, "dense"),
        ):
            for suffix, start in POSITIONS.items():
                add(f"error_{name}{suffix}", site, (guess - target)[:, start:].square())
                add(f"variance_{name}{suffix}", site, (target - means[model, suffix, site])[:, start:].square())


def _evaluation(coupling: CoupledModels, sums: Sums, alive: Mapping[Location, Tensor], shape: torch.Size) -> Evaluation:
    """Compute the evaluation from the sums over a text of the given shape."""
    rows, tokens = shape[0], shape.numel()
    sites = range(coupling.n_sites)

    def ce(name: str, site: int | None = None) -> float:
        return sums[f"ce_{name}", site] / (tokens - rows)  # the last token of a row has no next one

    def explained(name: str, site: int) -> float:
        return 1 - sums[f"error_{name}", site] / max(1e-12, sums[f"variance_{name}", site])

    def recovered(name: str, site: int) -> float:
        return (ce("mean", site) - ce(name, site)) / (ce("mean", site) - ce("dense"))

    by_site = tuple(
        SiteEvaluation(
            site=site,
            read_by=coupling.dense.readers[site],
            ev_encoder=explained("encoder", site),
            ev_encoder_later=explained("encoder_later", site),
            ev_decoder=explained("decoder", site),
            ev_decoder_later=explained("decoder_later", site),
            kl_in=sums["kl_in", site] / tokens,
            kl_out=sums["kl_out", site] / tokens,
            ce_in=ce("in", site),
            ce_out=ce("out", site),
            ce_mean=ce("mean", site),
            recovered_in=recovered("in", site),
            recovered_out=recovered("out", site),
        )
        for site in sites
    )

    def over_sites(name: str) -> float:
        return sum(getattr(row, name) for row in by_site) / len(by_site)

    def top1(name: str, over: Sequence[int | None]) -> float:
        return sum(sums[f"top1_{name}", site] for site in over) / (tokens * len(over))

    fractions = coupling.sparse.achieved_fractions()
    return Evaluation(
        sites=by_site,
        tokens=tokens,
        ce_dense=ce("dense"),
        ce_sparse=ce("sparse"),
        kl_sparse=sums["kl_sparse", None] / tokens,
        top1_sparse=top1("sparse", [None]),
        top1_in=top1("in", sites),
        top1_out=top1("out", sites),
        recovered_in=over_sites("recovered_in"),
        recovered_out=over_sites("recovered_out"),
        ev_encoder=over_sites("ev_encoder"),
        ev_decoder=over_sites("ev_decoder"),
        l0=coupling.sparse.achieved_l0(),
        l0_blocks=fractions.blocks,
        l0_embed=fractions.embed if coupling.blocks is None else 0.0,
        dead_neurons=sum(int((~seen_n).sum()) for seen_n in alive.values()),
        neurons=sum(map(len, alive.values())),
    )

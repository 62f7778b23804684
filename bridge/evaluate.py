"""How faithful a coupling is, on held-out text: per site and overall.

    EV of f_i   = 1 - sum |f_i(h_d) - h_s|^2 / sum |h_s - mean h_s|^2       decoders likewise, with h_d and h_s changing places
    CE recovered at i = (CE_mean - CE_hybrid) / (CE_mean - CE_dense)

over all tokens; CE_mean is the dense model's cross-entropy with the residual at site i replaced by its corpus mean. Explained
variance is given with and without the first position, where a few outliers dominate in GPT-2-like models. A first pass over the
text takes the means, a second everything else; only sums are kept.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge import display
from bridge.bridges import Coupling
from bridge.residual import Enter
from bridge.sparse import Location

ROWS = 16


@dataclass(frozen=True)
class SiteEvaluation:
    """One site: explained variances (later: without the first position), hybrids (in: dense to sparse, out: sparse to dense)."""

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
    """A coupling on held-out text; KL in nats per token towards the dense model, CE in nats per token on the text."""

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
        """The evaluation as plain JSON values."""
        return asdict(self)

    def _repr_html_(self) -> str:
        head = ("site", "read by", "KL in", "out", "CE recovered in", "out", "explained variance encoder", "decoder")
        numbers = ("kl_in", "kl_out", "recovered_in", "recovered_out", "ev_encoder", "ev_decoder")
        rows = [(str(s.site), s.read_by, *(f"{getattr(s, name):.3f}" for name in numbers)) for s in self.sites]
        told = f"KL of sparse to dense {self.kl_sparse:.3f}; cross-entropy dense {self.ce_dense:.3f}, sparse {self.ce_sparse:.3f}"
        return display.card(f"{self.tokens:,} held-out tokens; nats per token", display.text(told), display.table(head, rows))


@torch.no_grad()
def evaluate(coupling: Coupling, tokens_bt: Tensor, *, on_progress: Callable[[float], None] | None = None) -> Evaluation:
    """Evaluate a coupling on held-out tokens_bt. Raises ValueError where there is no row."""
    if not len(tokens_bt):
        raise ValueError("there is no held-out text to evaluate on; give --data with more text")
    dense, sparse, bridges = coupling.dense, coupling.sparse, coupling.bridges
    sites = range(coupling.n_sites)
    parts = tokens_bt.to(dense.device).split(ROWS)
    sums: dict[Any, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64, device=dense.device))

    def progress(done: float) -> None:
        if on_progress is not None:
            on_progress(done)

    mean_dense, mean_sparse = [torch.zeros(dense.width)] * len(sites), [torch.zeros(sparse.width)] * len(sites)
    for number, part_bt in enumerate(parts):
        residuals = dense.run(part_bt).residuals, sparse.run(part_bt).residuals
        share = part_bt.shape[0] / len(tokens_bt)
        for site in sites:
            mean_dense[site] = mean_dense[site].to(dense.device) + share * residuals[0][site].float().mean((0, 1))
            mean_sparse[site] = mean_sparse[site].to(dense.device) + share * residuals[1][site].mean((0, 1))
        progress(0.2 * (number + 1) / len(parts))

    alive = {
        location: torch.zeros(size, dtype=torch.bool, device=dense.device)
        for location, size in sparse.locations().items()
        if location.kind == "mlp_act"
    }

    def watch(location: Location, x_btn: Tensor) -> Tensor:
        if location in alive:
            alive[location] |= (x_btn != 0).any(0).any(0)
        return x_btn

    def add(name: str, site: int | None, value: Tensor) -> None:
        sums[name, site] += value.double().sum()

    for number, part_bt in enumerate(parts):
        truth = dense.run(part_bt)
        plain = sparse.gated(watch).run(part_bt)
        answer_bt = truth.logits_btv.argmax(-1)
        log_p_btv = truth.logits_btv.float().log_softmax(-1)

        def compare(
            name: str, site: int | None, logits_btv: Tensor, part_bt: Tensor = part_bt, log_p_btv: Tensor = log_p_btv,
            answer_bt: Tensor = answer_bt,
        ) -> None:  # fmt: skip
            log_q_btv = logits_btv.float().log_softmax(-1)
            add(f"ce_{name}", site, F.nll_loss(log_q_btv[:, :-1].flatten(0, 1), part_bt[:, 1:].flatten(), reduction="sum"))
            add(f"kl_{name}", site, F.kl_div(log_q_btv, log_p_btv, reduction="sum", log_target=True))
            add(f"top1_{name}", site, logits_btv.argmax(-1) == answer_bt)

        compare("dense", None, truth.logits_btv)
        compare("sparse", None, plain.logits_btv)
        for site in sites:
            h_btd, x_bts = truth.residuals[site], plain.residuals[site]
            compare("in", site, coupling.dense_to_sparse(part_bt, truth.residuals, site))
            compare("out", site, coupling.sparse_to_dense(part_bt, plain.residuals, site))
            ablated = dense.run(part_bt, Enter.at(site, mean_dense[site].to(h_btd.dtype).expand_as(h_btd)))
            compare("mean", site, ablated.logits_btv)
            for name, guess, target, mean in (
                ("encoder", bridges[site].encode(h_btd), x_bts, mean_sparse[site]),
                ("decoder", bridges[site].decode(x_bts), h_btd, mean_dense[site]),
            ):
                for suffix, start in (("", 0), ("_later", 1)):
                    add(f"error_{name}{suffix}", site, (guess - target)[:, start:].square())
                    add(f"variance_{name}{suffix}", site, (target - mean)[:, start:].square())
        progress(0.2 + 0.8 * (number + 1) / len(parts))

    tokens = tokens_bt.numel()
    predicted = tokens - len(tokens_bt)  # the last token of a row has no next one

    def ce(name: str, site: int | None = None) -> float:
        return float(sums[f"ce_{name}", site]) / predicted

    def explained(name: str, site: int) -> float:
        return 1 - float(sums[f"error_{name}", site]) / max(1e-12, float(sums[f"variance_{name}", site]))

    def recovered(name: str, site: int) -> float:
        return (ce("mean", site) - ce(name, site)) / (ce("mean", site) - ce("dense"))

    readers = (*dense.sublayers, "unembed")
    rows = tuple(
        SiteEvaluation(
            site=site,
            read_by=readers[site],
            ev_encoder=explained("encoder", site),
            ev_encoder_later=explained("encoder_later", site),
            ev_decoder=explained("decoder", site),
            ev_decoder_later=explained("decoder_later", site),
            kl_in=float(sums["kl_in", site]) / tokens,
            kl_out=float(sums["kl_out", site]) / tokens,
            ce_in=ce("in", site),
            ce_out=ce("out", site),
            ce_mean=ce("mean", site),
            recovered_in=recovered("in", site),
            recovered_out=recovered("out", site),
        )
        for site in sites
    )

    def over_sites(name: str) -> float:
        return sum(getattr(row, name) for row in rows) / len(rows)

    def top1(name: str, over: list[int | None]) -> float:
        return sum(float(sums[f"top1_{name}", site]) for site in over) / (tokens * len(over))

    fractions = sparse.achieved_fractions()
    return Evaluation(
        sites=rows,
        tokens=tokens,
        ce_dense=ce("dense"),
        ce_sparse=ce("sparse"),
        kl_sparse=float(sums["kl_sparse", None]) / tokens,
        top1_sparse=top1("sparse", [None]),
        top1_in=top1("in", list(sites)),
        top1_out=top1("out", list(sites)),
        recovered_in=over_sites("recovered_in"),
        recovered_out=over_sites("recovered_out"),
        ev_encoder=over_sites("ev_encoder"),
        ev_decoder=over_sites("ev_decoder"),
        l0=sparse.achieved_l0(),
        l0_blocks=fractions.blocks,
        l0_embed=fractions.embed,
        dead_neurons=sum(int((~seen).sum()) for seen in alive.values()),
        neurons=sum(len(seen) for seen in alive.values()),
    )

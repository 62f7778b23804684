"""What a coupling is trained on (Gao et al. 2025, section 2.3), by a splice sampled per row, or literally.

    CE(y_s, text), KL(y_d, y_s)                                  the sparse model on its own
    NMSE(f_i(h_d), stop(h_s)), NMSE(g_i(h_s), h_d)               every bridge, mean over sites
    KL(y_d, y of: dense until i, f_i, sparse to the end)         hybrid in, mean over sites
    KL(y_d, y of: sparse until i, g_i, dense to the end)         hybrid out, mean over sites

Literally the hybrid sums cost a partial pass of each model per site. Sampled, every row of the batch draws its own splice. Half
of the rows begin at the sparse embedding: they carry CE, KL and NMSE, and each leaves for the dense model at a site of its own.
The other half enter the sparse model at sites of their own, and leave again at a later one (`hybrid_both`, mixtures of two
transitions, which the paper leaves out). So one sparse pass, in which rows are computed only from where they enter, one dense
pass that makes the targets and one that the leaving rows enter carry all terms, at any depth. Each term is a mean over the rows
that carry it; sites are drawn uniformly, so its expectation is the literal term (`hybrid_both` has no literal counterpart).

NMSE of a token is its squared error over the squared deviation of its target from the mean of its row, the target detached. The
mean is the row's, not the batch's, so that every term is a mean over rows: the sampled estimate stays unbiased, and several
processes compute what one would.

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.bridges import Bridges
from bridge.dense import DenseModel
from bridge.recipe import Losses
from bridge.residual import EMBEDDING, Enter
from bridge.sparse import SparseTransformer

STAYS = -1  # the leaving "site" of a row that runs to the sparse model's end


@dataclass(frozen=True)
class Splice:
    """Where each row enters the sparse model (EMBEDDING: at its tokens) and leaves it for the dense one (STAYS: nowhere)."""

    enter: tuple[int, ...]
    leave: tuple[int, ...]

    def rows(self, start: int, stop: int) -> Splice:
        """The splice of some of the rows."""
        return Splice(self.enter[start:stop], self.leave[start:stop])

    def counts(self) -> tuple[int, int, int, int]:
        """How many rows start from tokens, start there and leave, enter, enter and leave."""
        kinds = [(enter != EMBEDDING, leave != STAYS) for enter, leave in zip(self.enter, self.leave, strict=True)]
        return (
            sum(not entered for entered, _ in kinds),
            kinds.count((False, True)),
            sum(entered for entered, _ in kinds),
            kinds.count((True, True)),
        )


def draw_splice(rows: int, n_sites: int, losses: Losses, generator: torch.Generator) -> Splice:
    """Draw a splice for a whole batch: which half begins at the embedding, and sites, uniform for each row and evenly spread."""
    entering = rows // 2 if losses.hybrid_in or losses.hybrid_both else 0
    enter = torch.full((rows,), EMBEDDING)
    leave = torch.full((rows,), STAYS)
    row_b = torch.randperm(rows, generator=generator)
    from_tokens_b, entering_b = row_b[entering:], row_b[:entering]
    enter[entering_b] = _spread(entering, n_sites, generator)
    if losses.hybrid_out:
        leave[from_tokens_b] = _spread(len(from_tokens_b), n_sites, generator)
    if losses.hybrid_both:
        for row in entering_b.tolist():
            later = n_sites - 1 - int(enter[row])
            if later:
                leave[row] = enter[row] + 1 + torch.randint(later, (), generator=generator)
    return Splice(tuple(enter.tolist()), tuple(leave.tolist()))


class Objective(nn.Module):
    """The weighted sum of a batch's losses, with the trainable parts as submodules."""

    def __init__(self, dense: DenseModel, sparse: SparseTransformer, bridges: Bridges, losses: Losses) -> None:
        super().__init__()
        self.dense = dense  # frozen, and no nn.Module: not part of what is trained
        self.sparse = sparse
        self.bridges = bridges
        self.losses = losses

    def forward(self, tokens_bt: Tensor, splice: Splice | None, counts: Sequence[float] | None = None) -> dict[str, Tensor]:
        """Every term by name, unweighted, and their weighted sum as "total", each a scalar.

        `splice` is that of these rows; None means the literal objective. `counts` (as of `Splice.counts`) is what the terms are
        divided by; with several processes each passes the whole batch's counts over the number of processes, so that the mean
        over processes is the mean over the batch.
        """
        losses = self.losses
        if not losses.coupled and not losses.kl:
            logits_btv = self.sparse(tokens_bt)
            terms = {"ce": _cross_entropy(logits_btv, tokens_bt).mean()}
        elif splice is None:
            terms = self._literal(tokens_bt)
        else:
            terms = self._sampled(tokens_bt, splice, counts or splice.counts())
        terms = {name: term for name, term in terms.items() if getattr(losses, name)}
        return {"total": sum((getattr(losses, name) * term for name, term in terms.items()), torch.zeros(())), **terms}

    def _sampled(self, tokens_bt: Tensor, splice: Splice, counts: Sequence[float]) -> dict[str, Tensor]:
        losses, sites = self.losses, range(self.dense.n_sites)
        n_plain, n_out, n_in, n_both = (max(count, 1e-9) for count in counts)  # 0 rows: an empty sum over a little
        # Rows in the order in which they enter: those from tokens are the first `plain`, those entering at a site are a slice.
        order = sorted(range(len(splice.enter)), key=lambda row: splice.enter[row])
        enter, leave = [splice.enter[row] for row in order], [splice.leave[row] for row in order]
        plain = enter.count(EMBEDDING)
        tokens_bt = tokens_bt[torch.tensor(order, device=tokens_bt.device)]

        with torch.no_grad():
            dense = self.dense.run(tokens_bt)
            target = _Target(dense.logits_btv)

        # Encode: what enters, and what NMSE compares.
        with_nmse = plain if losses.nmse_encoder else 0
        encoded: list[Tensor] = []
        entering: list[Tensor] = []
        for site in sites:
            start = plain + sum(EMBEDDING < other < site for other in enter)
            stop = start + enter.count(site)
            if with_nmse or stop > start:
                h_btd = dense.residuals[site]
                x_bts = self.bridges[site].encode(torch.cat([h_btd[:with_nmse], h_btd[start:stop]]))
                encoded.append(x_bts[:with_nmse])
                entering.append(x_bts[with_nmse:])
        x_bts = torch.cat([torch.zeros_like(dense.residuals[0][:plain, :, :1]).expand(-1, -1, self.sparse.width), *entering])

        sparse = self.sparse.run(tokens_bt, Enter(torch.tensor(enter), x_bts))
        kl_b = target.divergence(sparse.logits_btv)
        terms = {
            "ce": _cross_entropy(sparse.logits_btv[:plain], tokens_bt[:plain]).sum() / n_plain,
            "kl": kl_b[:plain].sum() / n_plain,
            "hybrid_in": kl_b[plain:].sum() / n_in,
        }

        # Decode: what leaves, and what NMSE compares.
        with_nmse = plain if losses.nmse_decoder else 0
        nmse_encoder, nmse_decoder = [], []
        leaving_rows: list[int] = []
        leaving: list[Tensor] = []
        for site in sites:
            x_bts = sparse.residuals[site]
            if losses.nmse_encoder:
                nmse_encoder.append(_nmse(encoded[site], x_bts[:plain].detach()).sum())
            rows = [row for row, other in enumerate(leave) if other == site]
            before = [row for row in rows if row < with_nmse]  # these are decoded for NMSE already
            after = torch.tensor([row for row in rows if row >= with_nmse], dtype=torch.long, device=x_bts.device)
            if with_nmse or len(after):
                h_btd = self.bridges[site].decode(torch.cat([x_bts[:with_nmse], x_bts[after]]))
                leaving_rows += [*before, *after.tolist()]
                leaving += [h_btd[before], h_btd[with_nmse:]]
                if with_nmse:
                    nmse_decoder.append(_nmse(h_btd[:with_nmse], dense.residuals[site][:plain]).sum())
        if nmse_encoder:
            terms["nmse_encoder"] = torch.stack(nmse_encoder).mean() / n_plain
        if nmse_decoder:
            terms["nmse_decoder"] = torch.stack(nmse_decoder).mean() / n_plain

        if leaving_rows:
            row_b = torch.tensor(leaving_rows, device=tokens_bt.device)
            site_b = torch.tensor([leave[row] for row in leaving_rows])
            hybrid = self.dense.run(tokens_bt[row_b], Enter(site_b, torch.cat(leaving)))
            kl_b = target.divergence(hybrid.logits_btv, row_b)
            from_tokens_b = row_b < plain
            terms["hybrid_out"] = (kl_b * from_tokens_b).sum() / n_out
            terms["hybrid_both"] = (kl_b * ~from_tokens_b).sum() / n_both
        return terms

    def _literal(self, tokens_bt: Tensor) -> dict[str, Tensor]:
        sites = range(self.dense.n_sites)
        with torch.no_grad():
            dense = self.dense.run(tokens_bt)
            target = _Target(dense.logits_btv)
        sparse = self.sparse.run(tokens_bt)
        encoded = [self.bridges[site].encode(dense.residuals[site]) for site in sites]
        decoded = [self.bridges[site].decode(sparse.residuals[site]) for site in sites]

        def mean(per_site: list[Tensor]) -> Tensor:
            return torch.stack(per_site).mean()

        return {
            "ce": _cross_entropy(sparse.logits_btv, tokens_bt).mean(),
            "kl": target.divergence(sparse.logits_btv).mean(),
            "nmse_encoder": mean([_nmse(encoded[site], sparse.residuals[site].detach()) for site in sites]),
            "nmse_decoder": mean([_nmse(decoded[site], dense.residuals[site]) for site in sites]),
            "hybrid_in": mean(
                [target.divergence(self.sparse.run(tokens_bt, Enter.at(site, encoded[site])).logits_btv) for site in sites]
            ),
            "hybrid_out": mean(
                [target.divergence(self.dense.run(tokens_bt, Enter.at(site, decoded[site])).logits_btv) for site in sites]
            ),
        }


class _Target:
    """The dense model's next-token distribution, against which every KL is taken."""

    def __init__(self, logits_btv: Tensor) -> None:
        log_p_btv = logits_btv.float().log_softmax(-1)
        self.p_btv = log_p_btv.exp()
        self.entropy_bt = -(self.p_btv * log_p_btv).sum(-1)

    def divergence(self, logits_btv: Tensor, row_b: Tensor | None = None) -> Tensor:
        """KL(y_d, softmax of logits) of each row, mean over its tokens, in nats."""
        p_btv, entropy_bt = (self.p_btv, self.entropy_bt) if row_b is None else (self.p_btv[row_b], self.entropy_bt[row_b])
        cross_bt = F.cross_entropy(logits_btv.float().flatten(0, 1), p_btv.flatten(0, 1), reduction="none")
        return (cross_bt.view_as(entropy_bt) - entropy_bt).mean(-1)


def _cross_entropy(logits_btv: Tensor, tokens_bt: Tensor) -> Tensor:
    """Next-token cross-entropy of each row, mean over its tokens."""
    loss_bt = F.cross_entropy(logits_btv[:, :-1].float().flatten(0, 1), tokens_bt[:, 1:].flatten(), reduction="none")
    return loss_bt.view(tokens_bt.shape[0], -1).mean(-1)


def _nmse(predicted_btx: Tensor, target_btx: Tensor) -> Tensor:
    """NMSE of each row, mean over its tokens."""
    deviation_bt = (target_btx - target_btx.mean(1, keepdim=True)).square().sum(-1)
    # a token at the mean, or a row of one token again and again, would count without bound
    floor_b1 = 1e-3 * target_btx.square().sum(-1).mean(-1, keepdim=True) + 1e-12
    error_bt = (predicted_btx - target_btx).square().sum(-1)
    return (error_bt / deviation_bt.maximum(floor_b1)).mean(-1)


def _spread(rows: int, n_sites: int, generator: torch.Generator) -> Tensor:
    """A site per row: each site equally likely for each row, and each as often as any other to within one."""
    if not rows:
        return torch.zeros(0, dtype=torch.long)
    offset = torch.randint(n_sites, (), generator=generator)
    return ((torch.arange(rows) + offset) % n_sites)[torch.randperm(rows, generator=generator)]

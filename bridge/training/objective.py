"""Compute the objective of a coupling (Gao et al. 2025, section 2.3), with a splice sampled per row or literally.

    CE(y_s, text), KL(y_d, y_s)                                  the sparse model on its own
    NMSE(f_i(h_d), stop(h_s)), NMSE(g_i(h_s), h_d)               every bridge, mean over sites
    KL(y_d, y of: dense until i, f_i, sparse to the end)         hybrid in, mean over sites
    KL(y_d, y of: sparse until i, g_i, dense to the end)         hybrid out, mean over sites
    KL(y_d, y of: dense, h_i(other) + lin g_i (h_s - h_s(other)), dense to the end)              carried, off unless asked for
    KL(y_d, y_s with random nodes at their means)                                                ablated, off unless asked for

The literal hybrid sums cost a partial pass of each model per site. In the sampled form, every row of the batch draws its own
splice. Half of the rows begin at the sparse embedding: they have CE, KL and NMSE, and each row leaves for the dense model at a
random site. The other half enter the sparse model at random sites and leave it again at a later site (`hybrid_both`, mixtures of
two transitions, which the paper leaves out). All terms, at any depth, then cost one sparse pass, in which a row is computed only
from its entry on, one dense pass for the targets, and one dense pass for the leaving rows. Each term is a mean over the rows that
have it. Sites are drawn uniformly, so its expectation is the literal term (`hybrid_both` has no literal counterpart).

`carried` (not in the paper) trains decoders for steering and counterfactual transport: the dense residual of another row of the
batch, changed by the decoded difference of the two sparse residuals, should give this row's answers. Hybrid passes do not train
this: a norm hides that g_i(h_s) is too short, but a decoded change that is too short transports too little.

`ablated` (not in the paper) makes circuits smaller. A circuit has to hold whatever else is ablated, and what random ablation of
other nodes changes in an answer takes more nodes to hold. So every row that starts from tokens runs once more, with a share of
its nodes (drawn for the row), each at each token by itself, at the mean over these rows. At least half of the nodes stay by
default: a coupling trained with most of them at their means learnt to give its answers without any, and half of the span, which
a circuit has to account for, was lost.

Hybrid terms and `carried` may use a temperature T, times T^2 (Hinton et al. 2015): KL(softmax(y_d / T), softmax(y / T)). At T 1,
as in the paper, a confident answer hardly depends on how large its logits are; with larger T, the logits must be right too.

NMSE of a token is its squared error over the squared deviation of its target from the mean of its row, the target detached. The
mean is the row's, not the batch's, so every term is a mean over rows: the sampled estimate is unbiased, and a batch divided over
processes or pieces gives the same result as the whole batch (except `carried` and `ablated`, which take the other row and the
means from the same part).

Shape legend: b batch row, t token, d dense width, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.kernels.top_k import choose
from bridge.models.bridges import Bridges
from bridge.models.dense import DenseModel
from bridge.models.residual import EMBEDDING, Enter, Trace
from bridge.models.sparse import Gate, Location, SparseTransformer
from bridge.recipe import Losses

NMSE_LINEAR_LIMIT = 32.0  # NMSE of a token above which it grows only logarithmically
PIECE = 1 << 22  # number of logits converted to float32 at a time on a CPU
GPU_PIECE = 1 << 26  # the same on other devices, where few large calls are faster
STAYS = -1  # leaving "site" of a row that stays in the sparse model to its end


@dataclass(frozen=True)
class Splice:
    """Sites at which each row enters the sparse model (EMBEDDING: from tokens) and leaves for the dense one (STAYS: never).

    ablation holds a seed for each row, of the nodes that `ablated` sets to their means; it is empty without that loss.
    """

    enter: tuple[int, ...]
    leave: tuple[int, ...]
    ablation: tuple[int, ...] = ()

    def rows(self, start: int, stop: int) -> Splice:
        """Return the splice of rows start to stop."""
        return Splice(self.enter[start:stop], self.leave[start:stop], self.ablation[start:stop])

    def counts(self) -> tuple[int, int, int, int]:
        """Numbers of rows that start from tokens, start from tokens and leave, enter at a site, enter at a site and leave."""
        kinds = [(enter != EMBEDDING, leave != STAYS) for enter, leave in zip(self.enter, self.leave, strict=True)]
        return (
            sum(not entered for entered, _ in kinds),
            kinds.count((False, True)),
            sum(entered for entered, _ in kinds),
            kinds.count((True, True)),
        )


def draw_splice(rows: int, n_sites: int, losses: Losses, generator: torch.Generator) -> Splice:
    """Draw a splice for a batch: the half of the rows that begin at the embedding, and sites as `_draw_sites` draws them."""
    entering = rows // 2 if losses.hybrid_in or losses.hybrid_both else 0
    enter = torch.full((rows,), EMBEDDING)
    leave = torch.full((rows,), STAYS)
    row_b = torch.randperm(rows, generator=generator)
    from_tokens_b, entering_b = row_b[entering:], row_b[:entering]
    enter[entering_b] = _draw_sites(entering, n_sites, generator)
    if losses.hybrid_out or losses.carried:
        leave[from_tokens_b] = _draw_sites(len(from_tokens_b), n_sites, generator)
    if losses.hybrid_both:
        for row in entering_b.tolist():
            later = n_sites - 1 - int(enter[row])
            if later:
                leave[row] = enter[row] + 1 + torch.randint(later, (), generator=generator)
    ablation_b = torch.randint(2**31, (rows if losses.ablated else 0,), generator=generator)
    return Splice(tuple(enter.tolist()), tuple(leave.tolist()), tuple(ablation_b.tolist()))


class Objective(nn.Module):
    """Weighted sum of a batch's losses; the trainable parts are submodules."""

    def __init__(self, dense: DenseModel, sparse: SparseTransformer, bridges: Bridges, losses: Losses) -> None:
        super().__init__()
        self.dense = dense  # frozen, and no nn.Module, so it has no trainable parameters here
        self.sparse = sparse
        self.bridges = bridges
        self.losses = losses
        self.in_shards = False  # if true, each process needs a gradient of every parameter, even a zero one

    def forward(self, tokens_bt: Tensor, splice: Splice | None, counts: Sequence[float] | None = None) -> dict[str, Tensor]:
        """Return every term by name, unweighted, and their weighted sum as "total", each a scalar.

        `splice` has one entry per row; None means the literal objective. The terms are divided by `counts` (default:
        `splice.counts()`). If a batch is divided into parts of equal length, over processes and pieces, pass the whole batch's
        counts over the number of parts, so that the mean over parts is the mean over the batch.
        """
        losses = self.losses
        if not losses.coupled:
            terms = self._uncoupled(tokens_bt)
        elif splice is None:
            terms = self._literal(tokens_bt)
        else:
            terms = self._sampled(tokens_bt, splice, counts or splice.counts())
        terms = {name: term for name, term in terms.items() if getattr(losses, name)}
        total = sum((getattr(losses, name) * term for name, term in terms.items()), torch.zeros(()))
        if self.in_shards:
            total = total + sum(0 * p.sum() for p in self.parameters() if p.requires_grad)
        return {"total": total, **terms}

    def _uncoupled(self, tokens_bt: Tensor) -> dict[str, Tensor]:
        """Return the terms that need no bridge: cross-entropy on text, and KL to the dense model's answers if it has a weight."""
        logits_btv = self.sparse(tokens_bt)
        if not self.losses.kl:
            loss_n = F.cross_entropy(logits_btv[:, :-1].float().flatten(0, 1), tokens_bt[:, 1:].flatten(), reduction="none")
            return {"ce": loss_n.view(len(tokens_bt), -1).mean(-1).mean()}
        with torch.no_grad():
            target = _Target(self.dense.run(tokens_bt).logits_btv)
        kl_b, ce_b = target.losses(logits_btv, tokens_bt)
        return {"ce": ce_b.mean(), "kl": kl_b.mean()}

    def _sampled(self, tokens_bt: Tensor, splice: Splice, counts: Sequence[float]) -> dict[str, Tensor]:
        losses, sites = self.losses, range(self.dense.n_sites)
        n_plain, n_out, n_in, n_both = (max(count, 1e-9) for count in counts)  # a term without rows is 0, not 0 / 0
        # rows in the order in which they enter: the first `n_from_tokens` start from tokens, those entering at a site are a slice
        order = sorted(range(len(splice.enter)), key=lambda row: splice.enter[row])
        enter, leave = [splice.enter[row] for row in order], [splice.leave[row] for row in order]
        n_from_tokens = enter.count(EMBEDDING)
        tokens_bt = tokens_bt[torch.tensor(order, device=tokens_bt.device)]

        dense, target, warm = self._targets(tokens_bt)

        # Encode the residuals of the rows that enter, and those that NMSE compares.
        with_nmse = n_from_tokens if losses.nmse_encoder else 0
        encoded: list[Tensor] = []
        entering: list[Tensor] = []
        stop = n_from_tokens
        for site in sites:
            start, stop = stop, stop + enter.count(site)
            if with_nmse or stop > start:
                h_btd = dense.residuals[site]
                x_bts = self.bridges[site].encode(torch.cat([h_btd[:with_nmse], h_btd[start:stop]]))
                entering.append(x_bts[with_nmse:])
                if with_nmse:
                    encoded.append(x_bts[:with_nmse])
        x_bts = torch.cat(
            [torch.zeros_like(dense.residuals[0][:n_from_tokens, :, :1]).expand(-1, -1, self.sparse.width), *entering]
        )

        sparse = self.sparse.run(tokens_bt, Enter(torch.tensor(enter), x_bts))
        kl_b, ce_b = target.losses(sparse.logits_btv, tokens_bt)
        entered_b = kl_b[n_from_tokens:]
        if warm is not target:
            place_b = torch.arange(n_from_tokens, len(tokens_bt), device=tokens_bt.device)
            entered_b = warm.divergence(sparse.logits_btv[n_from_tokens:], place_b)
        terms = {
            "ce": ce_b[:n_from_tokens].sum() / n_plain,
            "kl": kl_b[:n_from_tokens].sum() / n_plain,
            "hybrid_in": entered_b.sum() / n_in,
        }
        ablated = max(n_from_tokens, int(self.in_shards))  # a sharded model needs all processes in every pass
        if losses.ablated and ablated:
            gate = random_ablation([splice.ablation[row] for row in order[:ablated]], losses.ablated_most)
            logits_btv = self.sparse.run(tokens_bt[:ablated], gate=gate).logits_btv
            kl_b = target.divergence(logits_btv, torch.arange(ablated, device=tokens_bt.device))
            terms["ablated"] = kl_b[:n_from_tokens].sum() / n_plain

        # Decode the rows that leave, those that NMSE compares, and changes to add to other rows from the embedding.
        with_nmse = n_from_tokens if losses.nmse_decoder else 0
        nmse_encoder, nmse_decoder = [], []
        leaving_rows: list[int] = []
        leaving: list[Tensor] = []
        transported_rows: list[int] = []
        transported: list[Tensor] = []
        for site in sites:
            x_bts = sparse.residuals[site]
            if encoded:  # empty if every row of this process enters at a site
                nmse_encoder.append(_nmse(encoded[site], x_bts[:n_from_tokens].detach()).sum())
            rows = [row for row, other in enumerate(leave) if other == site]
            decoded = [*range(with_nmse), *(row for row in rows if row >= with_nmse)]
            if decoded:
                h_btd = self.bridges[site].decode(x_bts[decoded])
                leaving_rows += rows
                leaving.append(h_btd[[decoded.index(row) for row in rows]])
                if with_nmse:
                    nmse_decoder.append(_nmse(h_btd[:with_nmse], dense.residuals[site][:n_from_tokens]).sum())
            if losses.carried and (here := [row for row in rows if row < n_from_tokens]):
                other_b = torch.tensor([(row + 1) % n_from_tokens for row in here], device=x_bts.device)
                change_bts = x_bts[here] - x_bts[other_b]
                transported_rows += here
                transported.append(dense.residuals[site][other_b] + self.bridges[site].decode_change(change_bts))
        if nmse_encoder:
            terms["nmse_encoder"] = torch.stack(nmse_encoder).mean() / n_plain
        if nmse_decoder:
            terms["nmse_decoder"] = torch.stack(nmse_decoder).mean() / n_plain

        if leaving_rows:
            rows = leaving_rows + transported_rows
            row_b = torch.tensor(rows, device=tokens_bt.device)
            site_b = torch.tensor([leave[row] for row in rows])
            hybrid = self.dense.run(tokens_bt[row_b], Enter(site_b, torch.cat([*leaving, *transported])))
            kl_b, transported_b = warm.divergence(hybrid.logits_btv, row_b).split([len(leaving_rows), len(transported_rows)])
            from_tokens_b = row_b[: len(leaving_rows)] < n_from_tokens
            terms["hybrid_out"] = (kl_b * from_tokens_b).sum() / n_out
            terms["hybrid_both"] = (kl_b * ~from_tokens_b).sum() / n_both
            if losses.carried:
                terms["carried"] = transported_b.sum() / n_out
        return terms

    @torch.no_grad()
    def _targets(self, tokens_bt: Tensor) -> tuple[Trace, _Target, _Target]:
        """Run the dense model; return the run and its answers as targets, at temperature 1 and at the recipe's temperature."""
        dense, temperature = self.dense.run(tokens_bt), self.losses.temperature
        target = _Target(dense.logits_btv)
        return dense, target, target if temperature == 1 else _Target(dense.logits_btv, temperature)

    def _literal(self, tokens_bt: Tensor) -> dict[str, Tensor]:
        sites = range(self.dense.n_sites)
        dense, target, warm = self._targets(tokens_bt)
        sparse = self.sparse.run(tokens_bt)
        encoded = [self.bridges[site].encode(dense.residuals[site]) for site in sites]
        decoded = [self.bridges[site].decode(sparse.residuals[site]) for site in sites]

        def mean(per_site: list[Tensor]) -> Tensor:
            return torch.stack(per_site).mean()

        kl_b, ce_b = target.losses(sparse.logits_btv, tokens_bt)
        return {
            "ce": ce_b.mean(),
            "kl": kl_b.mean(),
            "nmse_encoder": mean([_nmse(encoded[site], sparse.residuals[site].detach()) for site in sites]),
            "nmse_decoder": mean([_nmse(decoded[site], dense.residuals[site]) for site in sites]),
            "hybrid_in": mean(
                [warm.divergence(self.sparse.run(tokens_bt, Enter.at(site, encoded[site])).logits_btv) for site in sites]
            ),
            "hybrid_out": mean(
                [warm.divergence(self.dense.run(tokens_bt, Enter.at(site, decoded[site])).logits_btv) for site in sites]
            ),
        }


def random_ablation(seeds: Sequence[int], most: float) -> Gate:
    """Return a gate that sets random nodes of each row, by its seed, to their mean over the batch; at most that share of them."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    kept_shares = [1 - most * float(torch.rand((), generator=generator)) for generator in generators]

    def gate(_: Location, x_btn: Tensor) -> Tensor:
        rows = zip(kept_shares, generators, strict=True)
        kept_btn = torch.stack(
            [torch.empty(x_btn.shape[1:], dtype=torch.bool).bernoulli_(share, generator=generator) for share, generator in rows]
        )
        return choose(kept_btn.to(x_btn.device), x_btn, x_btn.detach().mean((0, 1)))

    return gate


class _Target:
    """The dense model's next-token distribution at a temperature: the reference of every KL."""

    def __init__(self, logits_btv: Tensor, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self.logits_btv = logits_btv = logits_btv if temperature == 1 else logits_btv / temperature
        self.log_sum_bt = torch.empty(logits_btv.shape[:2], device=logits_btv.device)
        for rows, tokens in _pieces(logits_btv):
            self.log_sum_bt[rows, tokens] = logits_btv[rows, tokens].float().logsumexp(-1)

    def divergence(self, logits_btv: Tensor, row_b: Tensor | None = None) -> Tensor:
        """Return KL(y_d, softmax of logits) per row, mean over its tokens, in nats, times the squared temperature."""
        temperature = self.temperature
        logits_btv = logits_btv if temperature == 1 else logits_btv / temperature
        kl_bt, _ = _TokenLosses.apply(logits_btv, self, row_b, None)  # pyright: ignore[reportGeneralTypeIssues]
        return kl_bt.mean(-1) * temperature**2

    def losses(self, logits_btv: Tensor, tokens_bt: Tensor) -> tuple[Tensor, Tensor]:
        """Return KL and next-token cross-entropy of each row, means over its tokens; for temperature 1 only."""
        kl_bt, ce_bt = _TokenLosses.apply(logits_btv, self, None, tokens_bt)  # pyright: ignore[reportGeneralTypeIssues]
        return kl_bt.mean(-1), ce_bt[:, :-1].mean(-1)


class _TokenLosses(torch.autograd.Function):
    """KL to a target and cross-entropy of every token, in float32 pieces, so that backward keeps no other tensor of logits' size.

    KL = sum_v p (log p - log q), CE = - log q_next; d KL / d logits = q - p, d CE / d logits = q - onehot(next).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_btv: Tensor, target: _Target, row_b: Tensor | None, tokens_bt: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        kl_bt = torch.empty(logits_btv.shape[:2], device=logits_btv.device)
        log_sum_bt, ce_bt = torch.empty_like(kl_bt), torch.zeros_like(kl_bt)
        next_bt = None if tokens_bt is None else tokens_bt.roll(-1, 1)  # the last token has no next one: its CE is left out later
        for at in _pieces(logits_btv):
            log_q_btv, log_p_btv, p_btv = _piece_log_probs(logits_btv, target, row_b, at)
            log_sum_bt[at] = log_q_btv.logsumexp(-1)
            log_q_btv -= log_sum_bt[at][..., None]
            kl_bt[at] = (p_btv * (log_p_btv - log_q_btv)).sum(-1)
            if next_bt is not None:
                ce_bt[at] = -log_q_btv.gather(-1, next_bt[at][..., None]).squeeze(-1)
        ctx.save_for_backward(logits_btv, row_b, log_sum_bt, next_bt)
        ctx.target = target
        return kl_bt, ce_bt

    @staticmethod
    def backward(ctx: Any, dkl_bt: Tensor, dce_bt: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        logits_btv, row_b, log_sum_bt, next_bt = ctx.saved_tensors
        dlogits_btv = torch.empty_like(logits_btv)
        for at in _pieces(logits_btv):
            q_btv, _, p_btv = _piece_log_probs(logits_btv, ctx.target, row_b, at)
            q_btv.sub_(log_sum_bt[at][..., None]).exp_()
            dkl_bt1, dce_bt1 = dkl_bt[at][..., None], dce_bt[at][..., None]
            d_btv = q_btv.mul_(dkl_bt1 + dce_bt1 if next_bt is not None else dkl_bt1).sub_(p_btv.mul_(dkl_bt1))
            if next_bt is not None:
                d_btv.scatter_add_(-1, next_bt[at][..., None], -dce_bt1)
            dlogits_btv[at] = d_btv.to(dlogits_btv.dtype)
        return dlogits_btv, None, None, None


def _piece_log_probs(
    logits_btv: Tensor, target: _Target, row_b: Tensor | None, at: tuple[slice, slice]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logits of one piece as a float32 copy, and log p and p of the target, whose rows are row_b if given."""
    of = at if row_b is None else (row_b[at[0]], at[1])
    log_p_btv = target.logits_btv[of].float() - target.log_sum_bt[of][..., None]
    logits_copy_btv = torch.empty_like(log_p_btv, memory_format=torch.contiguous_format).copy_(logits_btv[at])
    return logits_copy_btv, log_p_btv, log_p_btv.exp()


def _pieces(logits_btv: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield row and token slices: on a CPU up to 4M logits of one row, for its caches; elsewhere up to 64M, of several rows."""
    rows, length, vocabulary = logits_btv.shape
    on_cpu = logits_btv.device.type == "cpu"
    most = PIECE if on_cpu else GPU_PIECE
    together = 1 if on_cpu else max(1, most // (length * vocabulary))
    step = max(1, most // vocabulary)
    for row in range(0, rows, together):
        for start in range(0, length, step):
            yield slice(row, row + together), slice(start, start + step)


def _nmse(predicted_btx: Tensor, target_btx: Tensor) -> Tensor:
    """Return the NMSE of each row, mean over its tokens."""
    deviation_bt = (target_btx - target_btx.mean(1, keepdim=True)).square().sum(-1)
    # without a floor, a token at the mean, or a row that repeats one token, would have an unbounded NMSE
    floor_b1 = 1e-3 * target_btx.square().sum(-1).mean(-1, keepdim=True) + 1e-12
    error_bt = (predicted_btx - target_btx).square().sum(-1)
    ratio_bt = error_bt / deviation_bt.maximum(floor_b1)
    # otherwise one token with a residual a hundred times the others' (an attention sink) would dominate the mean
    return torch.where(
        ratio_bt < NMSE_LINEAR_LIMIT, ratio_bt, NMSE_LINEAR_LIMIT * (1 + (ratio_bt / NMSE_LINEAR_LIMIT).clamp_min(1).log())
    ).mean(-1)


def _draw_sites(rows: int, n_sites: int, generator: torch.Generator) -> Tensor:
    """Draw a site for each row: uniform for each row; over all rows the counts of sites differ by at most one."""
    if not rows:
        return torch.zeros(0, dtype=torch.long)
    offset = torch.randint(n_sites, (), generator=generator)
    return ((torch.arange(rows) + offset) % n_sites)[torch.randperm(rows, generator=generator)]

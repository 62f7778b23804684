"""The run of a prompt's circuit: values, their changes from the means, and gradients of the answer.

Everything is taken from S_C, the sparse model with every node and every error outside the circuit C at its mean (`masked_model`).
With d the question's log-odds, a_i and m_i a node's value in S_C and its mean, r_v = dd / d logits there,

    change      a_i - m_i;  for the embedding E - mean E;  for a kept error e - mean e, a vector for each site and token
    gradient    dd / d the node's value before AbsTopK (for MLP neurons, or gates, before their nonlinearity); 0 if AbsTopK
                makes it 0
    passed      factor by which a matrix's output reaches a node: the scale of the norm that it goes through, which is held; for
                gated neurons, the gate
    scale       1 / rms of the residual stream, per token, at every site (1 if it is read without a norm)
    answer_ts   what one unit of the last residual adds to d: read_v through the unembedding and a soft cap's derivative, times
                the scale there, at the last token alone; for a span, the gradient through the rest of the dense model, everywhere
    read_v      r_v; against one other token it is 1 for the answer, -1 for the contrast, exactly and everywhere; against all
                others it is 1 for the answer, minus each other token's share of the others' probability, and first order

Shape legend: t token, n nodes of a location, f all nodes and errors in one row, s sparse width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bridge.circuits.masked_model import MaskedModel
from bridge.models.circuit import EMBEDDING, check_means
from bridge.models.schema import GATE, activated_kind
from bridge.models.span import SparseSpan
from bridge.models.sparse import Location, SparseTransformer


@dataclass(frozen=True, eq=False)
class Flow:
    """Values and gradients of a circuit of one prompt, without the batch axis; see the module's docstring.

    kept are the circuit's masks per location, kept_t1 for errors; change includes the embedding and the errors (change_ts, 0 if
    an error is not kept; change_1v on the logits); embedded_ts marks channels that the prompt's tokens write; difference is d.
    """

    masked: MaskedModel
    kept_f: Tensor
    kept: Mapping[Location, Tensor]
    value: Mapping[Location, Tensor]
    change: Mapping[Location, Tensor]
    gradient: Mapping[Location, Tensor]
    scale: tuple[Tensor, ...]
    logits_v: Tensor
    read_v: Tensor
    embedded_ts: Tensor
    answer_ts: Tensor
    difference: float

    @property
    def sparse(self) -> SparseTransformer:
        """The sparse model."""
        return self.masked.sparse

    @property
    def tokens_t(self) -> Tensor:
        """The prompt."""
        return self.masked.question.tokens_t

    @property
    def answer(self) -> Location:
        """Location of the answer, as the end of edges."""
        return Location(len(self.sparse.blocks), "answer")

    def weight(self, layer: int, name: str) -> Tensor:
        """Return weight_ji of a block's matrix."""
        return self.sparse.get_parameter(f"blocks.{layer}.{name}.weight")

    def matrix_input(self, layer: int, name: str) -> Tensor:
        """Return x_ti that a block's matrix reads: its nodes' values; for o, what the heads gather of the values everywhere."""
        if name != "o":
            return self.value[Location(layer, self.sparse.matrices[name][0])]
        q, k, v = (self.value[Location(layer, kind)][None] for kind in ("q", "k", "v"))
        v_bhtc = self.sparse.repeat_shared_heads(self.sparse.split_heads(layer, v, rotate=False))
        return (self.sparse.pattern(layer, q, k) @ v_bhtc).transpose(1, 2).flatten(2)[0]

    def matrix_output(self, layer: int, name: str) -> Tensor:
        """Return y_tj, the output of a block's matrix, its bias included."""
        bias_j = self.sparse.get_parameter(f"blocks.{layer}.{name}.bias")
        return F.linear(self.matrix_input(layer, name), self.weight(layer, name), bias_j)

    def output_factor(self, target: Location) -> Tensor | None:
        """Return passed_tj, the factor of a matrix's output at each token on its way to each node; None if it is 1."""
        if target.kind == "mlp_act" and self.sparse.form.gated:
            return self.value[Location(target.layer, GATE)]
        if not self.sparse.has_write_norm(target.layer, target.kind):
            return None
        name = next(name for name, (_, to) in self.sparse.matrices.items() if to == target.kind)
        return self.sparse.write_norm_scale(target.layer, target.kind, self.matrix_output(target.layer, name))

    def output_gradient(self, target: Location) -> Tensor:
        """Return dd / d the output of the matrix into the nodes of a location."""
        passed_tj = self.output_factor(target)
        return self.gradient[target] if passed_tj is None else self.gradient[target] * passed_tj

    def locations(self, *kinds: str) -> list[Location]:
        """Return the locations of some kinds that have a kept node."""
        return [at for at, kept_tn in self.kept.items() if at.kind in kinds and bool(kept_tn.any())]


@torch.no_grad()
def flow_through(masked: MaskedModel, kept_f: Tensor, run_f: Tensor | None = None) -> Flow:
    """Return the flow of a circuit in its own run; or, with run_f, in the run that keeps the nodes and errors of that mask.

    Raises ValueError if there are several prompts, or if the means lack that of the embedding (`corpus_means` gives it).
    """
    sparse, question = masked.sparse, masked.question
    check_means([EMBEDDING], masked.means)
    tokens_1t = question.tokens_t[None]
    gate, correct = masked.gates((kept_f if run_f is None else run_f)[None])
    value: dict[Location, Tensor] = {}
    probe: dict[Location, Tensor] = {}

    def probing(location: Location, x_1tn: Tensor) -> Tensor:
        probe[location] = torch.zeros_like(x_1tn).requires_grad_()  # adds nothing, and receives dd / d node
        value[location] = gate(location, x_1tn) + probe[location]
        return value[location]

    with torch.enable_grad():
        trace = sparse.run(tokens_1t, gate=probing, correct=correct, last_only=True)
        logits_1v = trace.logits_btv[:, -1]
        d_1 = question.difference(logits_1v)
        x_1ts = trace.residuals[-1]
        read_1v, into_1ts, *gradients = torch.autograd.grad(d_1.sum(), [logits_1v, x_1ts, *probe.values()])
    value = {at: value_1tn[0].detach() for at, value_1tn in value.items()}
    gradient = {at: gradient_1tn[0] * (value[at] != 0) for at, gradient_1tn in zip(probe, gradients, strict=True)}
    for at in gradient:
        if at.kind == activated_kind(sparse.form.gated):
            gradient[at] = gradient[at] * _derivative(sparse, at, value[Location(at.layer, "mlp_in")])
    kept = masked.space.split(kept_f)
    change = {at: value_tn - masked.means[at] for at, value_tn in value.items()}
    embedded_ts = sparse.embed(tokens_1t)[0]
    change[EMBEDDING] = embedded_ts - masked.means[EMBEDDING]
    for at, error_bts in (masked.errors or {}).items():
        kept_t1 = kept[at] if at.layer < sparse.n_sites else kept[at][-1:]
        change[at] = (error_bts[0] - masked.means[at]) * kept_t1
    scale = tuple(sparse.read_scale(site, x_1ts.detach())[0, :, 0] for site, x_1ts in enumerate(trace.residuals))
    logits_v = logits_1v[0].detach()
    answer_ts = into_1ts[0] if isinstance(sparse, SparseSpan) else _answer_read(sparse, x_1ts[0].detach(), read_1v[0], scale[-1])
    written_ts = embedded_ts != 0 if isinstance(sparse, SparseSpan) else sparse.embedding[question.tokens_t] != 0
    return Flow(masked, kept_f, kept, value, change, gradient, scale, logits_v, read_1v[0], written_ts, answer_ts, float(d_1))


def _answer_read(sparse: SparseTransformer, x_ts: Tensor, read_v: Tensor, scale_t: Tensor) -> Tensor:
    """Return answer_ts of a model that unembeds the last residual itself."""
    cap, answer_ts = sparse.form.logit_cap, torch.zeros_like(x_ts)
    derivative_v = 1.0 if cap is None else 1 - (sparse.uncapped(x_ts[None, -1:])[0, 0] / cap).tanh().square()
    answer_ts[-1] = (read_v * derivative_v) @ sparse.unembedding.weight * scale_t[-1]
    return answer_ts


def _derivative(sparse: SparseTransformer, at: Location, read_tn: Tensor) -> Tensor:
    """Return the derivative of the nonlinearity that makes the nodes of a location."""
    name = f"blocks.{at.layer}.{'gate' if at.kind == GATE else 'up'}"
    with torch.enable_grad():
        before_tn = F.linear(read_tn, sparse.get_parameter(f"{name}.weight"), sparse.get_parameter(f"{name}.bias"))
        before_tn = before_tn.detach().requires_grad_()
        return torch.autograd.grad(sparse.activation(before_tn).sum(), before_tn)[0]

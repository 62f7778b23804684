"""The weight-sparse transformer: its nodes and its gates (Gao et al. 2025, sections 2.1 and 2.2, appendix A).

    x = E[token] (+ P[position])                                       embedding; the residual stream stays dense
    attention:  r = K(norm x);  q, k, v = K(W r + b);  x += K(W_o attend(q, k, v) + b)
    MLP:        r = K(norm x);  a = K(gelu(W_up r + b));   x += K(W_down a + b)
    logits = U norm(x) + b + B[token]                                  bigram table B, dense

K is AbsTopK, which keeps a quarter of the values by default; `norm` is RMSNorm without a gain (the weights would absorb a gain).
This is the plain block. If the dense model's blocks have more (`recipe.BlockShape`, found by `anatomy`), these have it too:
gated MLPs, g = K(act(W_gate r + b)), a = K(g (W_up r + b)); heads that share keys and values; rotary positions at any frequency,
windows, ALiBi; soft caps; norms with gains on q and k, or on each sublayer's write; sublayers that read without a norm.
`attend` has a sink per head (`sparse_blocks`). If the dense model's blocks are parallel, so are these: both halves read the same
x. The projection decides which weights are nonzero (`sparse_weights`).

A matrix may be stored by its nonzeros (`products.SparseMatrix`): beside its dense form, for a frozen model (`use_products`),
or in its place, while it is trained sparsely (`training/sparse_native`). The function computed is the same.

Every K is a *node location*, and after it the model calls one explicit `gate(location, x) -> x`. Recording, mean ablation, masks
and steering are gates; with the identity gate the model is unchanged.

Shape legend: b batch row, t token, s residual width, n nodes of a location, h heads, c channels of a head, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bridge.kernels.products import SparseMatrix, sparse_embedding, tokens_innermost
from bridge.kernels.top_k import abs_top_k
from bridge.models.residual import Enter, Trace, run
from bridge.models.schema import ATTENTION_KINDS, ERROR, GATE, HEAD_KINDS, KEY_KINDS, MATRICES, matrices, mlp_kinds
from bridge.models.sparse_blocks import ACTIVATIONS, Block, Heads, Linear, norm, norm_scale
from bridge.models.sparse_weights import SparseWeights
from bridge.recipe import BlockShape, SparseShape


@dataclass(frozen=True, order=True)
class Location:
    """A place in the model where nodes live: a block and a kind of `schema`."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


Gate = Callable[[Location, Tensor], Tensor]


def identity_gate(location: Location, x_btn: Tensor) -> Tensor:
    """The gate that changes nothing."""
    return x_btn


class SparseTransformer(Heads, SparseWeights):
    """A residual model whose weights become sparse; `sublayer_kinds` are those of the dense model it is coupled to."""

    def __init__(
        self, shape: SparseShape, sublayer_kinds: tuple[str, ...], vocabulary: int, context: int, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.form = form = shape.block or BlockShape()
        self.channels = channels = shape.head_channels or 16
        if shape.width is None or (form.heads is None and shape.width % channels):
            raise ValueError(f"a sparse width of {shape.width} is not a multiple of {channels} head channels")
        self.shape = shape
        self.sublayer_kinds = sublayer_kinds
        self.context = context
        self.vocabulary = vocabulary
        self.width = width = shape.width
        n_blocks = sum(kind != "mlp" for kind in sublayer_kinds)
        self.neurons = form.neurons or (shape.mlp_ratio or 4) * width
        self.heads_of_queries = form.heads or width // channels
        self.heads_of_keys = form.kv_heads or self.heads_of_queries
        self.group = self.heads_of_queries // self.heads_of_keys  # query heads per key and value head
        entries = vocabulary if shape.blocks is None else 0  # a span (`span`) begins and ends with the dense model
        self.embedding = nn.Parameter(torch.empty(entries, width))
        self.positions = nn.Parameter(torch.empty(context, width)) if shape.positions == "learned" else None
        sizes = (width, channels * self.heads_of_queries, channels * self.heads_of_keys, self.neurons)
        self.blocks = nn.ModuleList(Block(form, *sizes, channels) for _ in range(n_blocks))
        self.unembedding = Linear(width, entries)
        self.bigram: nn.ParameterList = nn.ParameterList()
        if shape.bigram == "full" and entries:
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, vocabulary)))
        elif shape.bigram == "low-rank" and entries:
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, shape.bigram_rank)))
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, shape.bigram_rank)))
        self.values = nn.ParameterDict()
        self.compact: dict[str, SparseMatrix] = {}
        self._thresholds: dict[str, float | None] = {}
        if not self.embedding.is_meta:  # the meta device has only shapes
            self._initialise(seed)

    def _initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        depth = len(self.sublayer_kinds)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.dim() < 2:
                    parameter.fill_(float(".gains." in name))
                    continue
                deviation = 1 / math.sqrt(parameter.shape[1])
                if name.endswith(("o.weight", "down.weight")):
                    deviation /= math.sqrt(depth)  # the residual stream sums one write per sublayer
                if name in ("embedding", "positions"):
                    deviation = 0.5
                parameter.normal_(0, deviation, generator=generator)
            if self.bigram:
                self.bigram[0].zero_()  # the table starts at zero; at low rank the other factor gives this one a gradient

    @property
    def n_sites(self) -> int:
        """Number of sites: sublayers + 1."""
        return len(self.sublayer_kinds) + 1

    @property
    def keep(self) -> float:
        """Share of the values that AbsTopK keeps at every node location."""
        return self.shape.keep or 0.25

    def locations(self) -> dict[Location, int]:
        """Return every node location in the order of the computation, with its number of nodes."""
        kinds = {"attn": ATTENTION_KINDS, "mlp": mlp_kinds(self.form.gated)}
        kinds["parallel"] = kinds["attn"] + kinds["mlp"]
        return {Location(layer, kind): self._size(kind) for layer, _, part in self._parts() for kind in kinds[part]}

    def _size(self, kind: str) -> int:
        if kind in HEAD_KINDS:
            return self.channels * (self.heads_of_queries if kind == "q" else self.heads_of_keys)
        return self.neurons if kind in ("mlp_act", GATE) else self.width

    @property
    def matrices(self) -> dict[str, tuple[str, str]]:
        """Node kinds that each of a block's matrices reads and writes, by the matrix's name."""
        return matrices(self.form.gated)

    def site(self, location: Location) -> int:
        """Return the site at which the location's sublayer reads; what it writes arrives at the next site."""
        parts = ("attn" if location.kind in ATTENTION_KINDS else "mlp", "parallel")
        return next(site for layer, site, part in self._parts() if layer == location.layer and part in parts)

    def run(
        self,
        tokens_bt: Tensor,
        enter: Enter | None = None,
        gate: Gate = identity_gate,
        *,
        correct: Gate | None = None,
        last_only: bool = False,
        narrow: bool = False,
    ) -> Trace:
        """Run a batch, each row from where it enters, every node through `gate`; see `residual.run` for the contract.

        `correct(Location(site, "error"), x_bts)` returns the residual stream that replaces x_bts on arrival at a site, and also
        the logits, whose site is the number of sites; a row that enters at a site is not corrected there.

        With last_only the logits are those of the last position only (b1v), which saves a search the vocabulary's products. With
        narrow, in addition, all that follows the last keys and values is computed at that position only: the gate sees only that
        position, and from site `narrow_from` on residuals, entering ones too, have only that position. Raises ValueError if rows
        are longer than the context of learned positions.
        """
        if self.positions is not None and tokens_bt.shape[1] > self.context:
            raise ValueError(f"{tokens_bt.shape[1]} tokens are more than the sparse model's context of {self.context}")
        sublayers = [self.sublayer(site, gate) for site in range(len(self.sublayer_kinds))]
        last_only = last_only or narrow
        if narrow and self.narrow_from < self.n_sites:
            sublayers[self.narrow_from - 1] = self.sublayer(self.narrow_from - 1, gate, last_only=True)
        if self.compact and enter is not None:
            enter = Enter(enter.site_b, tokens_innermost(enter.x_btd))
        unembed = partial(self._unembed, last_only=last_only)
        if correct is None:
            return run(self.embed, sublayers, unembed, tokens_bt, enter)

        def corrected(site: int, part: Callable[..., Tensor], *given: Tensor) -> Tensor:
            return correct(Location(site, ERROR), part(*given))

        embed, unembed = partial(corrected, 0, self.embed), partial(corrected, self.n_sites, unembed)
        sublayers = [partial(corrected, site, sublayer) for site, sublayer in enumerate(sublayers, 1)]
        return run(embed, sublayers, unembed, tokens_bt, enter)

    @property
    def narrow_from(self) -> int:
        """First site from which on only the last position can change the last logits: the site after the last attention."""
        return 1 + max(site for site, kind in enumerate(self.sublayer_kinds) if kind != "mlp")

    def sublayer(self, site: int, gate: Gate = identity_gate, *, last_only: bool = False) -> Callable[[Tensor], Tensor]:
        """Return the sublayer that reads at `site`: x_bts -> x_bts plus its write; with last_only, x_b1s of the last token."""
        layer, part = next((layer, part) for layer, other, part in self._parts() if other == site)
        return partial(self._sublayer, layer, part, gate, last_only)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """Return logits_btv of a plain run."""
        return self.run(tokens_bt).logits_btv

    def column_nodes(self, name: str) -> Tensor:
        """Return node_i that each column of a block's matrix reads; several columns of "o" read one value if heads share it."""
        source = self.matrices[name][0]
        column_i = torch.arange(self._size("q" if name == "o" else source), device=self.device)
        if name != "o":
            return column_i
        return column_i // (self.group * self.channels) * self.channels + column_i % self.channels

    # -- the computation, in its order ----------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[int, int, str]]:
        """Yield (block, site, kind) of every sublayer."""
        layer = -1
        for site, kind in enumerate(self.sublayer_kinds):
            layer += kind != "mlp"
            yield layer, site, kind

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """Return x_bts of the tokens, with learned positions added if there are any."""
        matrix = self.packed_matrix("embedding", self.embedding)
        x_bts = F.embedding(tokens_bt, self.embedding) if matrix is None else sparse_embedding(tokens_bt, matrix)
        return x_bts if self.positions is None else x_bts + self.positions[: tokens_bt.shape[1]]

    def _node(self, layer: int, kind: str, gate: Gate, x_btn: Tensor) -> Tensor:
        kept = max(1, round(self.keep * x_btn.shape[-1]))
        return gate(Location(layer, kind), abs_top_k(x_btn, kept))

    def _map(self, name: str, linear: Linear, x_btn: Tensor) -> Tensor:
        linear.matrix = self.packed_matrix(f"{name}.weight", linear.weight)
        return linear(x_btn)

    def _mapped(self, layer: int, name: str, x_btn: Tensor) -> Tensor:
        return self._map(f"blocks.{layer}.{name}", getattr(self._block(layer), name), x_btn)

    def write_nodes(self, layer: int, name: str, gate: Gate, x_btn: Tensor) -> Tensor:
        """Return the nodes that a matrix writes, after a norm with a gain if their kind has one."""
        kind, y_btn = MATRICES[name][1], self._mapped(layer, name, x_btn)
        y_btn = y_btn * self.write_norm_scale(layer, kind, y_btn) if self.has_write_norm(layer, kind) else y_btn
        return self._node(layer, kind, gate, y_btn)

    def _attention_write(self, layer: int, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        r_bts = self._node(layer, "attn_in", gate, self._read(x_bts))
        q_btn = self.write_nodes(layer, "q", gate, r_bts[:, -1:] if last_only else r_bts)
        k_btn, v_btn = (self.write_nodes(layer, name, gate, r_bts) for name in KEY_KINDS)
        return self.write_nodes(layer, "o", gate, self._attend(layer, q_btn, k_btn, v_btn))

    def has_write_norm(self, layer: int, kind: str) -> bool:
        """Return whether there is a norm with a gain between a linear map and the nodes of a kind that it writes."""
        return kind in self._block(layer).gains

    def write_norm_scale(self, layer: int, kind: str, y_btn: Tensor) -> Tensor:
        """Return scale_btn, by which the norm with a gain before nodes of a kind multiplies each channel of y_btn."""
        gain_n, y_btn = self._block(layer).gains[kind], y_btn if y_btn.dtype == torch.float64 else y_btn.float()
        if kind in HEAD_KINDS and self.form.qk_norm == "head":
            y_bthc = y_btn.unflatten(-1, (-1, self.channels))
            return (norm_scale(y_bthc, self.form.eps) * gain_n.view(-1, self.channels)).flatten(-2)
        return norm_scale(y_btn, self.form.eps) * gain_n

    def _mlp_write(self, layer: int, gate: Gate, x_bts: Tensor) -> Tensor:
        r_bts = self._node(layer, "mlp_in", gate, self._read(x_bts))
        up_btn = self._mapped(layer, "up", r_bts)
        if self.form.gated:
            a_btn = self._node(layer, GATE, gate, self.activation(self._mapped(layer, "gate", r_bts))) * up_btn
        else:
            a_btn = self.activation(up_btn)
        return self.write_nodes(layer, "down", gate, self._node(layer, "mlp_act", gate, a_btn))

    def activation(self, x_btn: Tensor) -> Tensor:
        """Apply the MLP's nonlinearity."""
        return ACTIVATIONS[self.form.activation](x_btn)

    def read_scale(self, site: int, x_bts: Tensor) -> Tensor:
        """Return scale_bt1, the factor on the input of a site's sublayer (or the unembedding): the norm's, or 1 without one."""
        normed_here = self.form.reads_normed or site == self.n_sites - 1
        return norm_scale(x_bts, self.form.eps) if normed_here else torch.ones_like(x_bts[..., :1])

    def _read(self, x_bts: Tensor) -> Tensor:
        return norm(x_bts, self.form.eps) if self.form.reads_normed else x_bts

    def _sublayer(self, layer: int, part: str, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        here_bts = after_bts = x_bts[:, -1:] if last_only else x_bts
        if part != "mlp":
            after_bts = after_bts + self._attention_write(layer, gate, last_only, x_bts)
        if part != "attn":
            after_bts = after_bts + self._mlp_write(layer, gate, here_bts)
        return after_bts

    def _unembed(self, x_bts: Tensor, tokens_bt: Tensor, *, last_only: bool) -> Tensor:
        if last_only:
            x_bts, tokens_bt = x_bts[:, -1:], tokens_bt[:, -1:]
        logits_btv, entry_btv = self.capped(self.uncapped(x_bts)), self.bigram_entries(tokens_bt)
        return logits_btv if entry_btv is None else logits_btv + entry_btv

    def bigram_entries(self, tokens_bt: Tensor) -> Tensor | None:
        """Return entry_btv of the bigram table, which is added to the logits; None if there is no table."""
        if self.shape.bigram == "full":
            return F.embedding(tokens_bt, self.bigram[0])
        if self.shape.bigram == "low-rank":
            return F.linear(F.embedding(tokens_bt, self.bigram[1]), self.bigram[0])
        return None

    def uncapped(self, x_bts: Tensor) -> Tensor:
        """Return logits_btv of the last residual, before a soft cap and without the bigram table."""
        return self._map("unembedding", self.unembedding, norm(x_bts, self.form.eps))

    def capped(self, logits: Tensor) -> Tensor:
        """Return logits after the soft cap, if there is one."""
        cap = self.form.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

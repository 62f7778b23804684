"""The weight-sparse transformer: its nodes, its gates, and the L0 projection (Gao et al. 2025, sections 2.1 and 2.2, appendix A).

    x = E[token] (+ P[position])                                       embedding; the residual stream stays dense
    attention:  r = K(norm x);  q, k, v = K(W r + b);  x += K(W_o attend(q, k, v) + b)
    MLP:        r = K(norm x);  a = K(gelu(W_up r + b));   x += K(W_down a + b)
    logits = U norm(x) + b + B[token]                                  bigram table B, dense

K is AbsTopK, which keeps a quarter of the values; `norm` is RMSNorm without a gain (a gain would be absorbed by the weights).
That is the plain block. What the dense model's blocks have beyond it (`recipe.BlockShape`, found by `anatomy`) these have too:
gated MLPs, g = K(act(W_gate r + b)), a = K(g (W_up r + b)); heads that share keys and values; rotary positions at any frequency,
windows, ALiBi; soft caps; norms with gains of q and k, or of what is written; reads without a norm.
`attend` has a sink per head: a learnt logit in the softmax denominator. On a CPU that is a kernel of our own
(`kernels/attention`); elsewhere a dummy first position and one extra query/key channel stand for it, so that the fused causal
kernels still apply. Where the dense model's blocks are parallel, so are these: both halves read the same x.

A matrix may be held by its nonzeros (`products.Compact`): beside its dense form, for a frozen model (`use_products`), or in its
place, while it is trained sparsely (`training/sparse_native`). The function computed is the same.

Every K is a *node location*, and after it the model calls one explicit `gate(location, x) -> x`. `sparse.gated(gate)` is the same
weights seen through a gate; recording, mean ablation, masks and steering are gates, and the identity gate is the model itself.

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

from bridge.kernels.attention import NEVER, attend
from bridge.kernels.cpu import tokens_contiguous
from bridge.kernels.products import Compact, source_of, sparse_embedding, sparse_linear, tokens_inside, worth_it
from bridge.kernels.top_k import abs_top_k, gelu, normed, project_, top_k_mask
from bridge.models.residual import Enter, Trace, run
from bridge.models.schema import ATTENTION_KINDS, ERROR, GATE, HEAD_KINDS, MATRICES, matrices, mlp_kinds, output_side
from bridge.recipe import AttentionShape, BlockShape, RecipeError, SparseShape, Sparsity, kept_fraction, n_kept


@dataclass(frozen=True, order=True)
class Location:
    """A place in the model where nodes live: a block and a kind of `schema`."""

    layer: int
    kind: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.kind}"


@dataclass(frozen=True)
class Fractions:
    """Fraction of a matrix's weights that stays: of a block's, and of embedding, positions and unembedding."""

    blocks: float
    embed: float

    @staticmethod
    def of(fraction: float | Fractions) -> Fractions:
        """One fraction for every matrix, where one number is given."""
        return fraction if isinstance(fraction, Fractions) else Fractions(fraction, fraction)

    def at(self, name: str) -> float:
        """Fraction of weights kept for a matrix."""
        return self.embed if embeds(name) else self.blocks


def embeds(name: str) -> bool:
    """Whether a matrix is no block's: the embedding, the positions or the unembedding."""
    return not name.startswith("blocks.")


Gate = Callable[[Location, Tensor], Tensor]


def identity_gate(location: Location, x_btn: Tensor) -> Tensor:
    """The gate that changes nothing."""
    return x_btn


class SparseTransformer(nn.Module):
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
        self.group = self.heads_of_queries // self.heads_of_keys  # query heads that share keys and values
        entries = vocabulary if shape.blocks is None else 0  # a span (`span`) begins and ends with the dense model
        self.embedding = nn.Parameter(torch.empty(entries, width))
        self.positions = nn.Parameter(torch.empty(context, width)) if shape.positions == "learned" else None
        sizes = (width, channels * self.heads_of_queries, channels * self.heads_of_keys, self.neurons)
        self.blocks = nn.ModuleList(_Block(form, *sizes, channels) for _ in range(n_blocks))
        self.unembedding = _Linear(width, entries)
        self.bigram: nn.ParameterList = nn.ParameterList()
        if shape.bigram == "full" and entries:
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, vocabulary)))
        elif shape.bigram == "low-rank" and entries:
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, shape.bigram_rank)))
            self.bigram.append(nn.Parameter(torch.empty(vocabulary, shape.bigram_rank)))
        self.values = nn.ParameterDict()  # of matrices that are trained by their nonzeros, in place of the dense ones
        self.compact: dict[str, Compact] = {}  # by the name of the matrix
        self._thresholds: dict[str, float | None] = {}  # of the last projection: where the next one looks first
        if not self.embedding.is_meta:  # on the meta device there are shapes alone
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
                self.bigram[0].zero_()  # the table starts at nothing; with a low rank the other factor gives it gradient

    @property
    def n_sites(self) -> int:
        """Number of sites: sublayers + 1."""
        return len(self.sublayer_kinds) + 1

    @property
    def keep(self) -> float:
        """Share of the values that AbsTopK keeps at every node location."""
        return self.shape.keep or 0.25

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.unembedding.bias.device

    def locations(self) -> dict[Location, int]:
        """Every node location in the order of the computation, with its number of nodes."""
        sizes: dict[Location, int] = {}
        for layer, _, part in self._parts():
            kinds = (ATTENTION_KINDS if part != "mlp" else ()) + (mlp_kinds(self.form.gated) if part != "attn" else ())
            for kind in kinds:
                sizes[Location(layer, kind)] = self._size(kind)
        return sizes

    def _size(self, kind: str) -> int:
        if kind in HEAD_KINDS:
            return self.channels * (self.heads_of_queries if kind == "q" else self.heads_of_keys)
        return self.neurons if kind in ("mlp_act", GATE) else self.width

    @property
    def matrices(self) -> dict[str, tuple[str, str]]:
        """Kinds of node that a block's matrices read and write, by name."""
        return matrices(self.form.gated)

    def site(self, location: Location) -> int:
        """The site that the location's sublayer reads; its writes arrive at the next one."""
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

        `correct((site, error), x_bts)` is what becomes of the stream where it arrives at a site, and of the logits, whose site is
        the number of sites; a row that enters at a site is not corrected there.

        With last_only the logits are those of the last position alone (b1v), which spares a search the vocabulary's products.
        With narrow, also, whatever comes after the last keys and values is computed at that position alone: so are the nodes
        that the gate sees there, and the residuals of the sites from `narrow_from` on, at which rows then enter alike. Raises
        ValueError where the rows are longer than the context of learned positions.
        """
        if self.positions is not None and tokens_bt.shape[1] > self.context:
            raise ValueError(f"{tokens_bt.shape[1]} tokens are more than the sparse model's context of {self.context}")
        sublayers = [self.sublayer(site, gate) for site in range(len(self.sublayer_kinds))]
        if narrow:
            last_only = True
        if narrow and self.narrow_from < self.n_sites:
            sublayers[self.narrow_from - 1] = self.sublayer(self.narrow_from - 1, gate, last_only=True)
        if self.compact and enter is not None:
            enter = Enter(enter.site_b, tokens_inside(enter.x_btd))
        unembed = self._unembed_last if last_only else self._unembed
        if correct is None:
            return run(self.embed, sublayers, unembed, tokens_bt, enter)

        def corrected(site: int, part: Callable[..., Tensor], *given: Tensor) -> Tensor:
            return correct(Location(site, ERROR), part(*given))

        embed, unembed = partial(corrected, 0, self.embed), partial(corrected, self.n_sites, unembed)
        sublayers = [partial(corrected, site, sublayer) for site, sublayer in enumerate(sublayers, 1)]
        return run(embed, sublayers, unembed, tokens_bt, enter)

    @property
    def narrow_from(self) -> int:
        """The first site from which on only the last position can change what follows it: behind the last attention."""
        return 1 + max(site for site, kind in enumerate(self.sublayer_kinds) if kind != "mlp")

    def sublayer(self, site: int, gate: Gate = identity_gate, *, last_only: bool = False) -> Callable[[Tensor], Tensor]:
        """The sublayer that reads `site`: x_bts -> x_bts with what it writes added; with last_only, x_b1s of the last token."""
        halves = {"attn": self._attention, "mlp": self._mlp, "parallel": self._parallel}
        layer, part = next((layer, part) for layer, other, part in self._parts() if other == site)
        return partial(halves[part], layer, gate, last_only)

    def forward(self, tokens_bt: Tensor) -> Tensor:
        """logits_btv of a plain run."""
        return self.run(tokens_bt).logits_btv

    @torch.no_grad()
    def generate(self, tokens_bt: Tensor, count: int, *, temperature: float = 0.0, seed: int = 0) -> Tensor:
        """tokens_bt with `count` more: the likeliest ones, or drawn at a temperature; beyond its context it sees the last tokens.

        Raises ValueError for rows without a token, which leave nothing to go on from.
        """
        if not tokens_bt.shape[1]:
            raise ValueError("there is no token to go on from; give rows of at least one")
        generator = torch.Generator(tokens_bt.device).manual_seed(seed)
        for _ in range(count):
            logits_bv = self.run(tokens_bt[:, -self.context :], last_only=True).logits_btv[:, -1].float()
            if temperature > 0:
                next_b1 = torch.multinomial((logits_bv / temperature).softmax(-1), 1, generator=generator)
            else:
                next_b1 = logits_bv.argmax(-1, keepdim=True)
            tokens_bt = torch.cat([tokens_bt, next_b1], 1)
        return tokens_bt

    def gated(self, gate: Gate) -> Gated:
        """These weights seen through `gate`, again a residual model."""
        return Gated(self, gate)

    def pattern(self, layer: int, q_btn: Tensor, k_btn: Tensor) -> Tensor:
        """Attention pattern_bhtt of a block from its q and k nodes: rows sum to at most 1, the rest goes to the sink."""
        score_bhtt = self.scores(layer, q_btn, k_btn)
        place_t = torch.arange(score_bhtt.shape[-1], device=score_bhtt.device)
        distance_tt = place_t[:, None] - place_t
        score_bhtt = score_bhtt.masked_fill((distance_tt < 0) | (distance_tt >= self._window(layer, len(place_t))), -torch.inf)
        if not self.shape.sinks:
            return score_bhtt.softmax(-1)
        sink_bht1 = self._block(layer).sinks.view(1, -1, 1, 1).expand(*score_bhtt.shape[:3], 1)
        return torch.cat([sink_bht1, score_bhtt], -1).softmax(-1)[..., 1:]

    def scores(self, layer: int, q_btn: Tensor, k_btn: Tensor) -> Tensor:
        """score_bhtt of a block's q and k nodes, also of what no query sees."""
        q_bhtc, k_bgtc = (self.heads(layer, x, rotate=True) for x in (q_btn, k_btn))
        score_bhtt = q_bhtc @ self.shared(k_bgtc).transpose(-1, -2) / math.sqrt(self.channels)
        if alibi_h := self._attention_shape(layer).slopes:
            place_t = torch.arange(score_bhtt.shape[-1], device=score_bhtt.device)
            score_bhtt = score_bhtt + score_bhtt.new_tensor(alibi_h)[:, None, None] * (place_t - place_t[:, None])
        cap = self.form.score_cap
        return score_bhtt if cap is None else cap * (score_bhtt / cap).tanh()

    def score_gradient(self, score: Tensor) -> Tensor:
        """D score / d (q . k / root of the channels), of scores as they are: 1 but for a soft cap."""
        cap = self.form.score_cap
        return torch.ones_like(score) if cap is None else 1 - (score / cap).square()

    def column_nodes(self, name: str) -> Tensor:
        """node_i that each column of a block's matrix reads: of "o" several read the same value, where heads share them."""
        source = self.matrices[name][0]
        column_i = torch.arange(self._size("q" if name == "o" else source), device=self.device)
        if name != "o":
            return column_i
        return column_i // (self.group * self.channels) * self.channels + column_i % self.channels

    def shared(self, x_bgtc: Tensor) -> Tensor:
        """x_bhtc for every query head, of what `heads` gave of keys or values."""
        return x_bgtc if self.group == 1 else x_bgtc.repeat_interleave(self.group, 1)

    def _attention_shape(self, layer: int) -> AttentionShape:
        shapes = self.form.attention
        return shapes[layer % len(shapes)] if shapes else AttentionShape()

    def _window(self, layer: int, tokens: int) -> int:
        return self._attention_shape(layer).window or tokens

    # -- the computation, in its order ----------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[int, int, str]]:
        """(block, site, kind) of every sublayer."""
        layer = -1
        for site, kind in enumerate(self.sublayer_kinds):
            layer += kind != "mlp"
            yield layer, site, kind

    def _block(self, layer: int) -> _Block:
        block = self.blocks[layer]
        assert isinstance(block, _Block)
        return block

    def embed(self, tokens_bt: Tensor) -> Tensor:
        """x_bts of the tokens, with their positions."""
        matrix = self._matrix("embedding", self.embedding)
        x_bts = F.embedding(tokens_bt, self.embedding) if matrix is None else sparse_embedding(tokens_bt, matrix)
        return x_bts if self.positions is None else x_bts + self.positions[: tokens_bt.shape[1]]

    def _node(self, layer: int, kind: str, gate: Gate, x_btn: Tensor) -> Tensor:
        kept = max(1, round(self.keep * x_btn.shape[-1]))
        return gate(Location(layer, kind), abs_top_k(x_btn, kept))

    def by_nonzeros(self, name: str) -> Compact | None:
        """The matrix of that name by its nonzeros; None where it is used as it is."""
        return self._matrix(name, self.get_parameter(name))

    def _matrix(self, name: str, weight: Tensor | None) -> Compact | None:
        """The matrix by its nonzeros, if it is to be used so; a dense weight that was changed since is packed again."""
        matrix = self.compact.get(name)
        if matrix is None or weight is None:
            return matrix
        if weight.requires_grad or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return None  # somebody wants the gradient of the dense one, or it went where there is no kernel
        if matrix.source != source_of(weight):
            matrix = self.compact[name] = Compact.of(weight)
        return matrix

    def _map(self, name: str, linear: _Linear, x_btn: Tensor) -> Tensor:
        linear.matrix = self._matrix(f"{name}.weight", linear.weight)
        return linear(x_btn)

    def _attention_write(self, layer: int, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        block = self._block(layer)
        r_bts = self._node(layer, "attn_in", gate, self._read(x_bts))
        reads = (("q", block.q, r_bts[:, -1:] if last_only else r_bts), ("k", block.k, r_bts), ("v", block.v, r_bts))
        q_btn, k_btn, v_btn = (
            self._node(layer, kind, gate, self.after(layer, kind, self._map(f"blocks.{layer}.{kind}", linear, read_bts)))
            for kind, linear, read_bts in reads
        )
        return self.attended(layer, self._attend(layer, q_btn, k_btn, v_btn), gate)

    def attended(self, layer: int, z_btn: Tensor, gate: Gate = identity_gate) -> Tensor:
        """attn_out nodes of what the heads moved."""
        write_bts = self._map(f"blocks.{layer}.o", self._block(layer).o, z_btn)
        return self._node(layer, "attn_out", gate, self.after(layer, "attn_out", write_bts))

    def after(self, layer: int, kind: str, y_btn: Tensor) -> Tensor:
        """Output of a linear map on its way to nodes of a kind: through a norm with a gain, where the kind has one."""
        return y_btn * self.after_scale(layer, kind, y_btn) if self.has_norm(layer, kind) else y_btn

    def has_norm(self, layer: int, kind: str) -> bool:
        """Whether what linear maps give goes through a norm with a gain on its way to nodes of a kind."""
        return kind in self._block(layer).gains

    def after_scale(self, layer: int, kind: str, y_btn: Tensor) -> Tensor:
        """scale_btn by which that norm multiplies each channel."""
        gain_n, y_btn = self._block(layer).gains[kind], y_btn if y_btn.dtype == torch.float64 else y_btn.float()
        if kind in HEAD_KINDS and self.form.qk_norm == "head":
            y_bthc = y_btn.unflatten(-1, (-1, self.channels))
            return (norm_scale(y_bthc, self.form.eps) * gain_n.view(-1, self.channels)).flatten(-2)
        return norm_scale(y_btn, self.form.eps) * gain_n

    def _mlp_write(self, layer: int, gate: Gate, x_bts: Tensor) -> Tensor:
        block = self._block(layer)
        r_bts = self._node(layer, "mlp_in", gate, self._read(x_bts))
        up_btn = self._map(f"blocks.{layer}.up", block.up, r_bts)
        if block.gate is None:
            a_btn = self.activation(up_btn)
        else:
            a_btn = self._node(layer, GATE, gate, self.activation(self._map(f"blocks.{layer}.gate", block.gate, r_bts))) * up_btn
        a_btn = self._node(layer, "mlp_act", gate, a_btn)
        write_bts = self._map(f"blocks.{layer}.down", block.down, a_btn)
        return self._node(layer, "mlp_out", gate, self.after(layer, "mlp_out", write_bts))

    def activation(self, x_btn: Tensor) -> Tensor:
        """The MLP's nonlinearity."""
        return ACTIVATIONS[self.form.activation](x_btn)

    def read_scale(self, site: int, x_bts: Tensor) -> Tensor:
        """scale_bt1 by which what a site's sublayer (or the unembedding) reads is multiplied: the norm's, or 1 without one."""
        normed_here = self.form.reads_normed or site == self.n_sites - 1
        return norm_scale(x_bts, self.form.eps) if normed_here else torch.ones_like(x_bts[..., :1])

    def _read(self, x_bts: Tensor) -> Tensor:
        return _norm(x_bts, self.form.eps) if self.form.reads_normed else x_bts

    def _attention(self, layer: int, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        write_bts = self._attention_write(layer, gate, last_only, x_bts)
        return (x_bts[:, -1:] if last_only else x_bts) + write_bts

    def _mlp(self, layer: int, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        x_bts = x_bts[:, -1:] if last_only else x_bts
        return x_bts + self._mlp_write(layer, gate, x_bts)

    def _parallel(self, layer: int, gate: Gate, last_only: bool, x_bts: Tensor) -> Tensor:
        x_bts, write_bts = x_bts[:, -1:] if last_only else x_bts, self._attention_write(layer, gate, last_only, x_bts)
        return x_bts + write_bts + self._mlp_write(layer, gate, x_bts)

    def _unembed(self, x_bts: Tensor, tokens_bt: Tensor) -> Tensor:
        logits_btv, entry_btv = self.capped(self.uncapped(x_bts)), self.bigram_entries(tokens_bt)
        return logits_btv if entry_btv is None else logits_btv + entry_btv

    def bigram_entries(self, tokens_bt: Tensor) -> Tensor | None:
        """entry_btv of the bigram table, which the logits have added; None where there is no table."""
        if self.shape.bigram == "full":
            return F.embedding(tokens_bt, self.bigram[0])
        if self.shape.bigram == "low-rank":
            return F.linear(F.embedding(tokens_bt, self.bigram[1]), self.bigram[0])
        return None

    def sinks(self, layer: int) -> Tensor:
        """sink_h of a block's heads; of a model without sinks logits that take nothing."""
        sink_h = self._block(layer).sinks
        return sink_h if self.shape.sinks else torch.full_like(sink_h, NEVER)

    def uncapped(self, x_bts: Tensor) -> Tensor:
        """logits_btv of the last residual, before a soft cap and without the bigram table."""
        return self._map("unembedding", self.unembedding, _norm(x_bts, self.form.eps))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits through the soft cap, where there is one."""
        cap = self.form.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    def heads(self, layer: int, x_btn: Tensor, *, rotate: bool) -> Tensor:
        """x_bhtc of q nodes, or x_bgtc of k or v nodes; with rotate, rotated by position where positions are rotary."""
        x_bhtc = x_btn.unflatten(-1, (-1, self.channels)).transpose(1, 2)
        return self._rotated(layer, x_bhtc, 1) if rotate else x_bhtc

    def nodes(self, layer: int, x_bhtc: Tensor, *, rotated: bool) -> Tensor:
        """x_btn of what `heads` gave: its inverse, which also takes gradients of heads to gradients of nodes."""
        return (self._rotated(layer, x_bhtc, -1) if rotated else x_bhtc).transpose(1, 2).flatten(-2)

    def frequencies(self, layer: int) -> tuple[float, ...]:
        """Radians a token by which channel i of a head turns with channel i + their number; the other channels stay."""
        if self.shape.positions != "rotary":
            return ()
        if self.form.attention:
            return self._attention_shape(layer).frequencies
        half = self.channels // 2
        return tuple((10_000 ** (-torch.arange(half) / half)).tolist())

    def _rotated(self, layer: int, x_bhtc: Tensor, sign: int) -> Tensor:
        frequencies = self.frequencies(layer)
        if not frequencies:
            return x_bhtc
        half = len(frequencies)
        angle_tc = sign * torch.arange(x_bhtc.shape[2], device=x_bhtc.device)[:, None] * x_bhtc.new_tensor(frequencies).float()
        cosine_tc, sine_tc = angle_tc.cos().to(x_bhtc.dtype), angle_tc.sin().to(x_bhtc.dtype)
        first, second, rest = x_bhtc[..., :half], x_bhtc[..., half : 2 * half], x_bhtc[..., 2 * half :]
        return torch.cat([first * cosine_tc - second * sine_tc, first * sine_tc + second * cosine_tc, rest], -1)

    def _unembed_last(self, x_bts: Tensor, tokens_bt: Tensor) -> Tensor:
        return self._unembed(x_bts[:, -1:], tokens_bt[:, -1:])

    def _attend(self, layer: int, q_btn: Tensor, k_btn: Tensor, v_btn: Tensor) -> Tensor:
        channels, sink_h = self.channels, self._block(layer).sinks if self.shape.sinks else None
        earlier, turns = k_btn.shape[1] - q_btn.shape[1], bool(self.frequencies(layer))
        shape, tokens = self._attention_shape(layer), k_btn.shape[1]
        plain = self.form.score_cap is None and not shape.slopes and self._window(layer, tokens) >= tokens
        fused = plain and q_btn.device.type == "cpu" and q_btn.dtype in (torch.float32, torch.bfloat16)
        if earlier and (turns or not fused):
            q_btn = F.pad(q_btn, (0, 0, earlier, 0))  # whose queries are not used
            return self._attend(layer, q_btn, k_btn, v_btn)[:, earlier:]
        if not plain:  # no fused kernel has these scores
            pattern_bhtt = self.pattern(layer, q_btn, k_btn).to(v_btn.dtype)
            return (pattern_bhtt @ self.shared(self.heads(layer, v_btn, rotate=False))).transpose(1, 2).flatten(2)
        if turns:
            q_btn, k_btn = (self.heads(layer, x, rotate=True).transpose(1, 2).flatten(2) for x in (q_btn, k_btn))
        if self.group > 1:
            k_btn, v_btn = (x.unflatten(-1, (-1, channels)).repeat_interleave(self.group, 2).flatten(2) for x in (k_btn, v_btn))
        if fused:
            return attend(q_btn, k_btn, v_btn, channels, sink_h).to(q_btn.dtype)
        q_bhtc, k_bhtc, v_bhtc = (self.heads(layer, x, rotate=False) for x in (q_btn, k_btn, v_btn))
        scale = 1 / math.sqrt(channels)
        if sink_h is None:
            z_bhtc = F.scaled_dot_product_attention(q_bhtc, k_bhtc, v_bhtc, is_causal=True, scale=scale)
            return z_bhtc.transpose(1, 2).flatten(2)
        # A dummy token in front, seen by everyone: value 0, and a key whose only nonzero is the sink logit in an extra channel,
        # where every query has 1. Eight extra channels, because the fused kernels want head widths that are multiples of 8.
        q_bhtc, k_bhtc, v_bhtc = (F.pad(x, (0, 8, 1, 0)) for x in (q_bhtc, k_bhtc, v_bhtc))
        extra_c = torch.zeros(channels + 8, dtype=q_bhtc.dtype, device=q_bhtc.device)
        extra_c[channels] = 1
        sink_htc = (sink_h[:, None] / scale).to(k_bhtc.dtype)[:, :, None] * extra_c
        sink_htc = F.pad(sink_htc, (0, 0, 0, k_bhtc.shape[2] - 1))
        z_bhtc = F.scaled_dot_product_attention(q_bhtc + extra_c, k_bhtc + sink_htc, v_bhtc, is_causal=True, scale=scale)
        return z_bhtc[:, :, 1:, :channels].transpose(1, 2).flatten(2)

    # -- sparsity -------------------------------------------------------------------------------------------------------

    def sparse_weights(self) -> dict[str, nn.Parameter]:
        """The dense matrices that are made sparse: all of them but the bigram table."""
        matrices = {name: p for name, p in self.named_parameters() if p.dim() == 2 and p.numel()}
        return {name: p for name, p in matrices.items() if not name.startswith("bigram")}

    def packable(self) -> dict[str, nn.Parameter]:
        """Matrices that sparse products can serve: all but the positions, on a CPU; none elsewhere."""
        on_cpu = self.device.type == "cpu"
        return {name: weight for name, weight in self.sparse_weights().items() if on_cpu and name != "positions"}

    def biases(self) -> dict[str, nn.Parameter]:
        """The vectors that may be made sparse: biases of the linear maps, and attention sinks."""
        vectors = {name: p for name, p in self.named_parameters() if p.dim() == 1 and not name.startswith("values.")}
        return {name: p for name, p in vectors.items() if p.numel() and ".gains." not in name}

    def fractions(self, sparsity: Sparsity) -> Fractions:
        """Fractions of every matrix that a recipe's L0 keep; a number of weights is one of the matrices that l0 speaks of.

        Raises RecipeError where there are fewer.
        """
        apart = sparsity.embed_l0
        counted = sum(count for name, (_, count) in self._sizes().items() if apart is None or not embeds(name))
        blocks = kept_fraction(sparsity.l0, counted)
        return Fractions(blocks, blocks if apart is None else apart)

    def project(self, fraction: float | Fractions, *, biases: bool = False, min_per_neuron: int = 0) -> None:
        """Keep of every matrix the fraction (up to 1) of the weights that is largest in magnitude, in place.

        With min_per_neuron, the largest few weights at the input and at the output side of every neuron and attention channel
        are kept first, within the same number. Raises RecipeError where that number is too small for them.
        """
        fractions = Fractions.of(fraction)
        if not self.values:
            self.compact.clear()  # copies of what changes here
        alike: dict[tuple[int, int], dict[str, Tensor]] = {}  # matrices of one size that keep as many weights
        for name, weight in self.sparse_weights().items():
            kept = n_kept(fractions.at(name), weight.numel())
            kept_first = protected(name, weight, min_per_neuron)
            if kept_first is None:
                alike.setdefault((weight.numel(), kept), {})[name] = weight.data
            elif (needed := int(kept_first.sum())) > kept:
                raise RecipeError(
                    f"l0 leaves {kept} weights of {name}, min_per_neuron {min_per_neuron} needs {needed}; raise l0 or lower it"
                )
            else:
                priority = torch.where(kept_first, torch.inf, weight.detach().abs())
                weight.data.masked_fill_(~top_k_mask(priority.reshape(1, -1), kept).view_as(weight), 0)
        for (_, kept), weights in alike.items():
            thresholds = project_([*weights.values()], kept, [self._thresholds.get(name) for name in weights])
            self._thresholds |= dict(zip(weights, thresholds, strict=True))
        if biases:
            for bias in self.biases().values():
                project_([bias.data], n_kept(fractions.blocks, bias.numel()))

    def achieved_l0(self) -> float:
        """Share of the weights of the matrices that are made sparse that are nonzero."""
        return _share(self._sizes())

    def achieved_fractions(self) -> Fractions:
        """Nonzero fractions of the blocks' matrices, and of embedding, positions and unembedding."""
        sizes = self._sizes()
        blocks, embed = ({name: size for name, size in sizes.items() if embeds(name) == end} for end in (False, True))
        return Fractions(_share(blocks), _share(embed))

    def n_sparse_weights(self) -> int:
        """Number of weights, zero or not, of the matrices that are made sparse."""
        return sum(count for _, count in self._sizes().values())

    def n_kept(self, kept: float | Fractions) -> int:
        """Number of those weights that stay at these fractions."""
        fractions = Fractions.of(kept)
        return sum(n_kept(fractions.at(name), count) for name, (_, count) in self._sizes().items())

    def _sizes(self) -> dict[str, tuple[int, int]]:
        """Nonzeros and weights of every matrix that is made sparse, by name."""
        sizes = {name: (weight.detach(), weight.numel()) for name, weight in self.sparse_weights().items()}
        for key, value in self.values.items():
            name = key.replace("/", ".")
            sizes[name] = (value.detach(), self.compact[name].pattern.count)
        return {name: (int(weight.count_nonzero()), count) for name, (weight, count) in sizes.items()}

    def use_products(self, tokens: int = 256, dtype: torch.dtype = torch.float32) -> None:
        """Run a frozen model through sparse products wherever they are measured faster for this many tokens; CPU only."""
        if self.values:
            return
        self.compact.clear()
        for name, weight in self.packable().items():
            density = int(weight.count_nonzero()) / weight.numel()
            if worth_it(*weight.shape, round(density, 3), tokens, dtype):
                self.compact[name] = Compact.of(weight)


@dataclass(frozen=True)
class Gated:
    """A sparse model seen through a gate: a residual model with the same weights."""

    model: SparseTransformer
    gate: Gate

    @property
    def n_sites(self) -> int:
        """Number of sites: sublayers + 1."""
        return self.model.n_sites

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.model.width

    @property
    def vocabulary(self) -> int:
        """Number of logits."""
        return self.model.vocabulary

    def run(self, tokens_bt: Tensor, enter: Enter | None = None) -> Trace:
        """Run a batch with every node through the gate."""
        return self.model.run(tokens_bt, enter, self.gate)


def _share(sizes: dict[str, tuple[int, int]]) -> float:
    return sum(nonzeros for nonzeros, _ in sizes.values()) / max(1, sum(count for _, count in sizes.values()))


def annealed_l0(l0: float, progress: float, anneal: float, start: float = 1.0) -> float:
    """The fraction kept at `progress` (0 to 1) of training: from `start` to the fraction l0, by equal factors in equal times.

    By equal factors, because a linear fall (the paper's) halves the weights many times over in its last few steps when l0 is
    small. Reaches l0 at progress = anneal.
    """
    return max(l0, start * (l0 / start) ** min(1.0, progress / anneal))


class _Linear(nn.Linear):
    """A linear map, through its nonzeros where it is given them; a module either way, so that hooks see what it reads."""

    matrix: Compact | None = None

    def reset_parameters(self) -> None:
        """Fill a map that has any outputs, before the model gives it weights."""
        if self.out_features:
            super().reset_parameters()

    def forward(self, x_btn: Tensor) -> Tensor:
        """y_btm."""
        return super().forward(x_btn) if self.matrix is None else sparse_linear(x_btn, self.matrix, self.bias)


class _Block(nn.Module):
    def __init__(self, form: BlockShape, width: int, queries: int, keys: int, neurons: int, channels: int) -> None:
        super().__init__()
        self.q = _Linear(width, queries)
        self.k = _Linear(width, keys)
        self.v = _Linear(width, keys)
        self.o = _Linear(queries, width)
        self.sinks = nn.Parameter(torch.empty(queries // channels))
        self.up = _Linear(width, neurons)
        self.down = _Linear(neurons, width)
        self.gate = _Linear(width, neurons) if form.gated else None
        gains = {"q": queries, "k": keys} if form.qk_norm else {}
        gains |= {"attn_out": width, "mlp_out": width} if form.writes_normed else {}
        self.gains = nn.ParameterDict({kind: nn.Parameter(torch.empty(size)) for kind, size in gains.items()})


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": gelu, "gelu": F.gelu, "silu": F.silu, "relu": F.relu, "quick_gelu": lambda x: x * (1.702 * x).sigmoid(),
    "relu2": lambda x: F.relu(x).square(),
}  # fmt: skip


def norm_scale(x_bts: Tensor, eps: float = 1e-6) -> Tensor:
    """scale_bt1, by which RMSNorm multiplies a residual."""
    return torch.rsqrt(x_bts.square().mean(-1, keepdim=True) + eps)


def _norm(x_bts: Tensor, eps: float) -> Tensor:
    """RMSNorm without a gain, in float32; under autocast its result is handed on in the type that dense products compute in."""
    r_bts = normed(x_bts, partial(norm_scale, eps=eps))
    device = x_bts.device.type
    wanted = torch.is_autocast_enabled(device) and not tokens_contiguous(x_bts)
    return r_bts.to(torch.get_autocast_dtype(device)) if wanted else r_bts


def protected(name: str, weight: Tensor, minimum: int) -> Tensor | None:
    """Mask of what min_per_neuron protects in a matrix, the `minimum` largest weights on a neuron's side of it; None: nothing."""
    matrix = name.removesuffix(".weight").split(".")[-1]
    if not minimum or matrix not in MATRICES:
        return None
    axis = 0 if output_side(matrix) else 1
    largest = weight.detach().abs().topk(min(minimum, weight.shape[axis]), dim=axis).indices
    return torch.zeros_like(weight, dtype=torch.bool).scatter_(axis, largest, True)

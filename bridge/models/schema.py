"""Parts of a sparse block: one table that the model, every search, every edge, page and export read.

A *node kind* is a place where AbsTopK is applied. A matrix leads from the nodes of one kind to those of another:

    attn_in --q--> q,  --k--> k,  --v--> v;      v --o--> attn_out, through the attention pattern that q and k make
    mlp_in --up--> mlp_act --down--> mlp_out                                            a plain MLP
    mlp_in --gate--> mlp_gate,  mlp_in --up--> mlp_act --down--> mlp_out                a gated one: mlp_act = mlp_gate (up + b)

Imports nothing, so that whoever writes or reads a result can know the kinds.
"""

from __future__ import annotations

ATTENTION_KINDS = ("attn_in", "q", "k", "v", "attn_out")
MLP_KINDS = ("mlp_in", "mlp_gate", "mlp_act", "mlp_out")  # in the order of the computation
GATE = "mlp_gate"  # only in gated MLPs
KINDS = (*ATTENTION_KINDS, "mlp_in", "mlp_act", "mlp_out", GATE)  # in an order that numbers them; what came later is at the end
ERROR = "error"  # the kind of what is added to the stream at a site, where the dense model is followed (`circuits/error_nodes`)

MATRICES = {
    "q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("v", "attn_out"),
    GATE.removeprefix("mlp_"): ("mlp_in", GATE), "up": ("mlp_in", "mlp_act"), "down": ("mlp_act", "mlp_out"),
}  # fmt: skip
READ_KINDS, WRITE_KINDS = ("attn_in", "mlp_in"), ("attn_out", "mlp_out")  # of the residual stream
KEY_KINDS = ("k", "v")  # as many heads as there are keys and values
HEAD_KINDS = ("q", *KEY_KINDS)  # whose nodes are channels of heads


def mlp_kinds(gated: bool) -> tuple[str, ...]:
    """The node kinds of an MLP."""
    return tuple(kind for kind in MLP_KINDS if gated or kind != GATE)


def matrices(gated: bool) -> dict[str, tuple[str, str]]:
    """Kinds of node that a block's matrices read and write, by name."""
    return {name: ends for name, ends in MATRICES.items() if gated or GATE not in ends}


def activated(gated: bool) -> str:
    """The kind of node that the MLP's nonlinearity gives."""
    return GATE if gated else "mlp_act"


def output_side(name: str) -> bool:
    """Whether a matrix holds the output side of channels or neurons (columns of o and down), and not their input side (rows)."""
    return MATRICES[name][1] in WRITE_KINDS

"""Parts of a sparse block: one table that the model, every search, every edge, page and export read.

A *node kind* is a place where AbsTopK is applied. A matrix maps the nodes of one kind to those of another:

    attn_in --q--> q,  --k--> k,  --v--> v;      v --o--> attn_out, through the attention pattern of q and k
    mlp_in --up--> mlp_act --down--> mlp_out                                            a plain MLP
    mlp_in --gate--> mlp_gate,  mlp_in --up--> mlp_act --down--> mlp_out                a gated one: mlp_act = mlp_gate (up + b)

This module imports nothing, so that all code that writes or reads results can use it.
"""

from __future__ import annotations

ATTENTION_KINDS = ("attn_in", "q", "k", "v", "attn_out")
MLP_KINDS = ("mlp_in", "mlp_gate", "mlp_act", "mlp_out")  # in the order of the computation
GATE = "mlp_gate"  # only in gated MLPs
NODE_KINDS = (*ATTENTION_KINDS, "mlp_in", "mlp_act", "mlp_out", GATE)  # the order numbers the kinds: later ones come last
ERROR = "error"  # error nodes, added to the residual stream at a site so that it follows the dense model (`circuits/error_nodes`)

MATRICES = {
    "q": ("attn_in", "q"), "k": ("attn_in", "k"), "v": ("attn_in", "v"), "o": ("v", "attn_out"),
    GATE.removeprefix("mlp_"): ("mlp_in", GATE), "up": ("mlp_in", "mlp_act"), "down": ("mlp_act", "mlp_out"),
}  # fmt: skip
READ_KINDS, WRITE_KINDS = ("attn_in", "mlp_in"), ("attn_out", "mlp_out")  # kinds that read or write the residual stream
KEY_KINDS = ("k", "v")  # kinds with the heads of keys and values, which may be fewer than query heads
HEAD_KINDS = ("q", *KEY_KINDS)  # kinds whose nodes are channels of heads


def mlp_kinds(gated: bool) -> tuple[str, ...]:
    """Return the node kinds of an MLP."""
    return tuple(kind for kind in MLP_KINDS if gated or kind != GATE)


def matrices(gated: bool) -> dict[str, tuple[str, str]]:
    """Return the node kinds that each of a block's matrices reads and writes, by the matrix's name."""
    return {name: ends for name, ends in MATRICES.items() if gated or GATE not in ends}


def activated_kind(gated: bool) -> str:
    """Return the node kind that the MLP's nonlinearity produces."""
    return GATE if gated else "mlp_act"


def holds_output_side(name: str) -> bool:
    """Return whether a matrix holds the output side of channels or neurons (columns of o, down), not their input side (rows)."""
    return MATRICES[name][1] in WRITE_KINDS

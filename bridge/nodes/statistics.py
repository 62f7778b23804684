"""Statistics of every node of the sparse model on text, collected in one pass over the text.

A node has an activation a_p, after AbsTopK, at each of the P positions p of the text (row by row). The statistics are

    mean, second    sum a_p / P, sum a_p^2 / P
    active          fraction of positions with a_p != 0
    high, low       the KEPT positions with the largest a_p > 0, and with the smallest a_p < 0; among equals, the earlier ones
    sample          SAMPLED positions with a_p != 0, the first in one seeded shuffle of all positions: every set of positions is
                    equally likely to be the sample, however the pass is divided

Their size does not depend on the length of the text. Contexts and samples are stored as 64-bit keys that can be sorted. The bits
of a float32 above 0 sort like the float, so that keys (bits of a_p, -p) are ordered by activation, then by position, and keys
(-place of p in the shuffle, bits of a_p) by the shuffle. A key below 0 is an empty entry.

The pass takes some rows at a time. If a folder is given, the state is saved there at intervals, as `nodes.json` and a safetensors
file. A pass that was killed resumes from the last saved state and ends with the same bits; one that was complete is read back. A
saved state is used only if the weights of the sparse model (their SHA-256), the text and the seed are the same.

Shape legend: b row of text, t token, p position in the text (b t), n nodes of a location, k entries of a list.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bridge.display.progress import OnProgress, Phase
from bridge.errors import UserError
from bridge.huggingface.identity import digest_weights
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node
from bridge.models.sparse import Location, SparseTransformer
from bridge.models.store import CheckpointError, read_folder, refuse_unreadable, write_folder

FORMAT = 1
KEPT = 8
SAMPLED = 16
QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
_STRETCH_TOKENS = 2048
_CHANNELS = 256  # processed together
_LAST = 2**31 - 1
_PARTS = ("sum", "square", "active", "high", "low", "sample")


class NodeError(UserError):
    """Error for a node, or a text for nodes, that does not exist or cannot be used: one line that says what to change."""


@dataclass(frozen=True)
class Context:
    """A node's value at a position of the text, and its quantile among the node's nonzero values (None: an extreme)."""

    value: float
    row: int
    position: int
    quantile: float | None = None


@dataclass(frozen=True, eq=False)
class NodeFacts:
    """Statistics of every node on the text tokens_bt, of which the first `rows_done` rows have been processed.

    `fingerprint` is that of the sparse weights, order_p the shuffle of positions. `parts` has, for each location, the running
    sum_n, square_n and active_n, and the keys high_nk, low_nk and sample_nk (see the module's docstring).
    """

    fingerprint: str
    seed: int
    tokens_bt: Tensor
    order_p: Tensor
    rows_done: int
    parts: Mapping[Location, Mapping[str, Tensor]]

    @property
    def complete(self) -> bool:
        """Whether the whole text has been processed."""
        return self.rows_done == len(self.tokens_bt)

    @property
    def n_tokens(self) -> int:
        """Number of tokens processed."""
        return self.rows_done * self.tokens_bt.shape[1]

    def mean(self, location: Location) -> Tensor:
        """Return mean_n over the text, in float64."""
        return self.parts[location]["sum"] / self.n_tokens

    def second_moment(self, location: Location) -> Tensor:
        """Return the mean square of each node over the text, second_n in float64."""
        return self.parts[location]["square"] / self.n_tokens

    def active(self, location: Location) -> Tensor:
        """Return active_n, the fraction of positions with a value other than 0 for each node."""
        return self.parts[location]["active"] / self.n_tokens

    def extremes(self, node: Node, side: Literal["high", "low"]) -> tuple[Context, ...]:
        """Return the contexts of the node's largest positive (high) or negative (low) values, strongest first."""
        key_k = self.parts[node.location][side][node.index]
        key_k = key_k[key_k >= 0]
        value_k = _float(key_k >> 32) * (1 if side == "high" else -1)
        return tuple(map(self._context, value_k.tolist(), (_LAST - (key_k & _LAST)).tolist()))

    def quantiles(self, node: Node) -> tuple[Context, ...]:
        """Return a context at each of QUANTILES of the node's nonzero values in the sample; fewer if the sample has fewer."""
        key_k = self.parts[node.location]["sample"][node.index]
        key_k = key_k[key_k >= 0]
        value_k, rank_k = _float(key_k & 0xFFFFFFFF).sort(stable=True)
        place_k = self.order_p[(_LAST - (key_k >> 32))[rank_k]].tolist()
        chosen = {round(quantile * (len(place_k) - 1)): quantile for quantile in QUANTILES} if place_k else {}
        return tuple(self._context(float(value_k[k]), place_k[k], quantile) for k, quantile in chosen.items())

    def _context(self, value: float, place: int, quantile: float | None = None) -> Context:
        return Context(value, *divmod(place, self.tokens_bt.shape[1]), quantile)

    def save(self, folder: str | Path) -> None:
        """Write `nodes.json` and its tensors. Raises CheckpointError if that fails; nothing is left half-written."""
        tensors = {f"{part}.{at}": tensor for at, parts in self.parts.items() for part, tensor in parts.items()}
        tokens_bt = self.tokens_bt.to(torch.int32)
        tensors |= {"tokens": tokens_bt, "order": self.order_p.to(torch.int32)}
        facts = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "text": hashlib.sha256(f"{tuple(tokens_bt.shape)}".encode() + tokens_bt.numpy().tobytes()).hexdigest(),
            "seed": self.seed,
            "rows": len(self.tokens_bt),
            "rows_done": self.rows_done,
            "locations": [str(at) for at in self.parts],
        }
        write_folder(folder, "nodes", tensors, facts)

    @staticmethod
    def load(folder: str | Path) -> NodeFacts:
        """Return the facts that `save` wrote. Raises CheckpointError if they are missing, damaged or of another version."""
        tensors, facts = read_folder(folder, "nodes")
        file = repr(str(Path(folder) / "nodes.json"))
        with refuse_unreadable(file, "file of nodes", "delete it and run `bridge nodes` again"):
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']!r}")
            parts = {}
            for name in facts["locations"]:
                layer, kind = name.split(".", 1)
                parts[Location(int(layer), kind)] = {part: tensors[f"{part}.{name}"] for part in _PARTS}
            tokens_bt, order_p = tensors["tokens"].long(), tensors["order"].long()
            return NodeFacts(facts["fingerprint"], facts["seed"], tokens_bt, order_p, facts["rows_done"], parts)


@torch.no_grad()
def collect_nodes(
    coupling: CoupledModels,
    tokens_bt: Tensor | None = None,
    *,
    folder: str | Path | None = None,
    seed: int = 0,
    save_seconds: float = 10.0,
    progress: OnProgress | None = None,
) -> NodeFacts:
    """Return the statistics of every node on tokens_bt, by default the coupling's own reference text.

    If a folder is given, the facts are saved there about every save_seconds and at the end, and facts already there are reused.
    Raises NodeError if there is no text or its rows are longer than the context, and CheckpointError if writing fails.
    """
    sparse = coupling.sparse
    tokens_bt = coupling.reference_bt if tokens_bt is None else tokens_bt
    if tokens_bt is None or not tokens_bt.numel():
        raise NodeError("the coupling", "holds no reference text, and none was given", "give text, such as ‹data› stdlib")
    if tokens_bt.shape[1] > sparse.context:
        raise NodeError(
            f"rows of {tokens_bt.shape[1]} tokens", f"are longer than the context of {sparse.context}", "shorten them"
        )
    tokens_bt = tokens_bt.cpu()
    facts, locations = _load_stored_facts(sparse, folder), list(sparse.locations())
    if facts is None or facts.seed != seed or list(facts.parts) != locations or not torch.equal(facts.tokens_bt, tokens_bt):
        facts = _empty_facts(sparse, tokens_bt, seed)
    saved, step = time.monotonic(), max(1, _STRETCH_TOKENS // tokens_bt.shape[1])
    while not facts.complete:
        facts = _extend_facts(sparse, facts, step)
        if folder is not None and (facts.complete or time.monotonic() - saved >= save_seconds):
            facts.save(folder)
            saved = time.monotonic()
        if progress is not None:
            progress(Phase("nodes: rows", facts.rows_done, len(tokens_bt)))
    return replace(facts, parts={at: {part: x.cpu() for part, x in its.items()} for at, its in facts.parts.items()})


def stored_facts(coupling: CoupledModels, folder: str | Path | None = None, fingerprint: str | None = None) -> NodeFacts | None:
    """Return the complete facts beside a coupling (or in another folder); None if there are none for its weights.

    `fingerprint` is that of its sparse weights, if known already.
    """
    facts = _load_stored_facts(coupling.sparse, coupling.path if folder is None else folder, fingerprint)
    return facts if facts is not None and facts.complete else None


def sparse_fingerprint(sparse: SparseTransformer) -> str:
    """Return the SHA-256 of the names, shapes and fp32 values of the sparse weights."""
    return digest_weights(hashlib.sha256(), dict(sparse.named_parameters()))


def parse_node(text: str, sizes: Mapping[Location, int]) -> Node:
    """Return the node that a text such as 1.mlp_act[37] or L1.mlp_act[37] names. Raises NodeError if there is none."""
    match = re.fullmatch(r"L?(\d{1,6})\.(\w+)\[(\d{1,9})\]", text.strip())
    if match is None:
        raise NodeError(f"{text!r}", "names no node", "write layer, kind and channel as in 1.mlp_act[37]")
    location, index = Location(int(match[1]), match[2]), int(match[3])
    if location not in sizes:
        layers, kinds = max(at.layer for at in sizes), dict.fromkeys(at.kind for at in sizes)
        raise NodeError(
            f"there is no location {location}", remedy=f"give a layer from 0 to {layers} and a kind of {', '.join(kinds)}"
        )
    if index >= sizes[location]:
        raise NodeError(f"{location}", f"has no channel {index}", f"give one from 0 to {sizes[location] - 1}")
    return Node(location, index)


def render_summary(facts: NodeFacts) -> str:
    """Return a summary of the statistics, one line per location."""
    lines = [f"{facts.n_tokens:,} tokens of text", "", "location       nodes  never active  active, median  deviation, median"]
    for at in facts.parts:
        active_n, mean_n = facts.active(at), facts.mean(at)
        deviation_n = (facts.second_moment(at) - mean_n.square()).clamp_min(0).sqrt()
        never = int((active_n == 0).sum())
        middle = f"{float(active_n.median()):>14.1%}  {float(deviation_n.median()):>17.3g}"
        lines.append(f"{f'L{at.layer}.{at.kind}':<13} {len(active_n):>6} {never:>13}  {middle}")
    return "\n".join(lines)


# -- the pass ---------------------------------------------------------------------------------------------------------------


def _empty_facts(sparse: SparseTransformer, tokens_bt: Tensor, seed: int) -> NodeFacts:
    parts = {}
    for at, n in sparse.locations().items():
        zero_n, double_n = torch.zeros(n, dtype=torch.long), torch.zeros(n, dtype=torch.float64)
        lists = {part: torch.full((n, k), -1) for part, k in (("high", KEPT), ("low", KEPT), ("sample", SAMPLED))}
        parts[at] = {"sum": double_n, "square": double_n, "active": zero_n, **lists}
    order_p = torch.randperm(tokens_bt.numel(), generator=torch.Generator().manual_seed(seed))
    return NodeFacts(sparse_fingerprint(sparse), seed, tokens_bt, order_p, 0, parts)


def _load_stored_facts(sparse: SparseTransformer, folder: str | Path | None, fingerprint: str | None = None) -> NodeFacts | None:
    """Return the facts in a folder, complete or not; None if they are of other weights or damaged, to be collected again."""
    if folder is None or not (Path(folder) / "nodes.json").is_file():
        return None
    try:
        facts = NodeFacts.load(folder)
    except CheckpointError:
        return None
    return facts if facts.fingerprint == (fingerprint or sparse_fingerprint(sparse)) else None


def _extend_facts(sparse: SparseTransformer, facts: NodeFacts, rows: int) -> NodeFacts:
    """Return the facts after the next rows of the text."""
    first, length = facts.rows_done, facts.tokens_bt.shape[1]
    tokens_bt = facts.tokens_bt[first : first + rows].to(sparse.device)
    place_p = torch.arange(first * length, first * length + tokens_bt.numel(), device=sparse.device)
    rank_p = torch.empty_like(facts.order_p)
    rank_p[facts.order_p] = torch.arange(len(rank_p))
    rank_p = rank_p.to(sparse.device)[place_p]
    # results are allocated first: allocated between large temporaries, they would fragment the memory
    parts = {at: {part: x.to(sparse.device, copy=True) for part, x in had.items()} for at, had in facts.parts.items()}

    def see(location: Location, x_btn: Tensor) -> Tensor:
        x_np = x_btn.detach().flatten(0, 1).float().t().contiguous()
        for first_n in range(0, len(x_np), _CHANNELS):
            some = slice(first_n, first_n + _CHANNELS)
            a_np, had = x_np[some], {part: had[some] for part, had in parts[location].items()}
            bits_np = a_np.view(torch.int32).long()
            had["sum"].add_(a_np.double().sum(1))
            had["square"].add_(a_np.double().square().sum(1))
            had["active"].add_((a_np != 0).sum(1))
            _best(had["high"], torch.where(a_np > 0, bits_np << 32 | (_LAST - place_p), -1))
            _best(had["low"], torch.where(a_np < 0, (bits_np & _LAST) << 32 | (_LAST - place_p), -1))
            _best(had["sample"], torch.where(a_np != 0, (_LAST - rank_p) << 32 | (bits_np & 0xFFFFFFFF), -1))
        return x_btn

    sparse.run(tokens_bt, gate=see, last_only=True)
    return replace(facts, rows_done=first + len(tokens_bt), parts=parts)


def _best(had_nk: Tensor, key_np: Tensor) -> None:
    """Keep in had_nk the largest of its own and the new keys."""
    k = had_nk.shape[1]
    had_nk.copy_(torch.cat([had_nk, key_np.topk(min(k, key_np.shape[1])).values], 1).topk(k).values)


def _float(bits_k: Tensor) -> Tensor:
    """Return the float32 values whose bits are the lower halves of 64-bit numbers."""
    return bits_k.to(torch.int32).view(torch.float32)

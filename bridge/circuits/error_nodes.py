"""Error nodes: the errors with which the sparse model follows the dense one exactly on a prompt.

With h_i the dense residual and f_i the encoder at site i, S_i the sparse sublayer there (with the stream added), E and U the
sparse embedding and unembedding, N the last site and y the dense logits, the errors are

    e_0 = f_0(h_0) - E(tokens)        e_(i+1) = f_(i+1)(h_(i+1)) - S_i(f_i(h_i))        e_(N+1) = y - U(f_N(h_N))

one vector per site and token, and one on the logits after the prompt. Each is a node like any other: a kept error is added to the
stream as it is, any other is replaced by its mean over a reference corpus. With every node and every error kept, the sparse model
gives the dense logits; with all errors at their means, only its own nodes depend on the prompt.

Attribution graphs have the same nodes (Ameisen et al. 2025, circuit-tracer). See also method, section 6.

Means are computed once over a coupling's reference text, not at every start: `means.json` in its folder names the tensors, by
location, and the digest of all that they depend on: both models, bridges, settings and text. Means with another digest are never
used, and are overwritten. Nothing is stored if the coupling has no folder that can be written to; unreadable files count as none.

Shape legend: b prompt (row), t token, s sparse width, d dense width, v vocabulary, e site, the logits being the last.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bridge.models.bridges import CoupledModels
from bridge.models.circuit import corpus_means
from bridge.models.residual import Enter, Trace
from bridge.models.schema import ERROR
from bridge.models.sparse import Location
from bridge.models.store import CheckpointError, read_folder, write_folder

MEANS = "means"  # name of the file
REFERENCE_TOKENS = 4096  # tokens of reference text that means are taken over; this takes a second
_ROWS = 8  # rows of the reference corpus in a batch


@dataclass(frozen=True, eq=False)
class Followed:
    """A dense run, and the errors with which the sparse model follows it.

    errors maps (site, error) to error_bts, and (number of sites, error) to error_b1v of the logits after each prompt.
    """

    dense: Trace
    dense_bv: Tensor
    errors: Mapping[Location, Tensor]


def error_locations(n_sites: int) -> Iterator[Location]:
    """Return the locations of error nodes, in the order of the computation; the last is that of the logits."""
    return (Location(site, ERROR) for site in range(n_sites + 1))


@torch.no_grad()
def follow_dense(coupling: CoupledModels, prompt_bt: Tensor, last_b: Tensor | None = None) -> Followed:
    """Return the dense run and the errors on some prompts, each of which ends at position last_b (None: the last one)."""
    last_b = torch.full_like(prompt_bt[:, 0], prompt_bt.shape[1] - 1) if last_b is None else last_b
    dense, errors = _errors(coupling, prompt_bt)
    row_b, logits_at = torch.arange(len(prompt_bt), device=prompt_bt.device), Location(coupling.n_sites, ERROR)
    errors[logits_at] = errors[logits_at][row_b, last_b][:, None]
    return Followed(dense, dense.logits_btv[row_b, last_b].float(), errors)


@torch.no_grad()
def error_means(coupling: CoupledModels, corpus_bt: Tensor) -> dict[Location, Tensor]:
    """Return mean_s of each error over a reference corpus, mean_v of that on the logits. Raises ValueError without tokens."""
    if not corpus_bt.numel():
        raise ValueError("means of errors need reference tokens, and there are none; give at least one block")
    totals: dict[Location, Tensor] = {}
    for rows_bt in corpus_bt.to(coupling.sparse.device).split(_ROWS):
        for at, error_bts in _errors(coupling, rows_bt)[1].items():
            totals[at] = totals.get(at, 0) + error_bts.sum((0, 1))
    return {at: total / corpus_bt.numel() for at, total in totals.items()}


def reference_rows(coupling: CoupledModels, reference_bt: Tensor) -> Tensor:
    """Return the first rows of the reference text: as many as means are taken over."""
    return reference_bt[: max(1, REFERENCE_TOKENS // reference_bt.shape[1])].to(coupling.sparse.device)


def reference_means(coupling: CoupledModels, reference_bt: Tensor) -> dict[Location, Tensor]:
    """Return the means of every node and every error over the text's first rows, stored with the coupling and in its folder."""
    used_bt = reference_rows(coupling, reference_bt)

    def compute() -> dict[Location, Tensor]:
        return {**corpus_means(coupling.sparse, used_bt), **error_means(coupling, used_bt)}

    def kept() -> dict[Location, Tensor]:
        if coupling.path is None or not (Path(coupling.path) / "coupling.json").is_file():
            return compute()
        digest = _digest(coupling, used_bt)
        with suppress(CheckpointError):
            tensors, facts = read_folder(coupling.path, MEANS)
            if facts.get("of") == digest:
                places = [(name, *name.split(".")) for name in tensors]
                return {Location(int(layer), kind): tensors[name].to(coupling.sparse.device) for name, layer, kind in places}
        means = compute()
        with suppress(CheckpointError):
            write_folder(coupling.path, MEANS, {str(at): mean for at, mean in means.items()}, {"of": digest})
        return means

    return coupling.once("means of nodes and errors", used_bt, kept)


def _digest(coupling: CoupledModels, tokens_bt: Tensor) -> str:
    """Return the SHA-256 of all that the means over a text depend on; how the models were trained is no part of it."""
    shape = coupling.recipe.model_dump(include={"sparse", "dense_dtype"})
    digest = hashlib.sha256(json.dumps([1, coupling.dense.fingerprint(), shape], default=str).encode())
    tensors = {**coupling.sparse.state_dict(), **coupling.bridges.state_dict(prefix="bridges."), "text": tokens_bt}
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _errors(coupling: CoupledModels, tokens_bt: Tensor) -> tuple[Trace, dict[Location, Tensor]]:
    """Return the dense run of some text, and every error at every token, including the error on the logits."""
    sparse, last = coupling.sparse, coupling.n_sites - 1
    dense = coupling.dense.run(tokens_bt)
    targets = [coupling.bridges[site].encode(h_btd.float()) for site, h_btd in enumerate(dense.residuals)]
    reached = [sparse.embed(tokens_bt), *(sparse.sublayer(site)(x_bts) for site, x_bts in enumerate(targets[:-1]))]
    targets.append(dense.logits_btv.float())
    reached.append(sparse.run(tokens_bt, Enter.at(last, targets[last])).logits_btv)
    pairs = zip(error_locations(coupling.n_sites), targets, reached, strict=True)
    return dense, {at: target_bts - reached_bts for at, target_bts, reached_bts in pairs}

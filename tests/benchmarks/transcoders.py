"""Run a dense model through per-layer transcoders of another library, with masks over its nodes and errors.

With x_l the input of block l's MLP (after its norm), T_l its transcoder and a_l the latents that it keeps (the k largest),

    T_l(x) = W_l^dec a_l + b_l,    a_l = topk(relu(W_l^enc x + c_l))        [sparsify's `SparseCoder` with `transcode`]
    MLP_l  <-  T_l(x_l) + e_l,     e_l = MLP_l(x_l) - T_l(x_l) on the unchanged prompt, then constant

With every node and every error kept, the model is exactly the dense one on this prompt. Nodes are the latents at each position
and, if attention is searched as well, the channels of attention as `dense_nodes` finds them. Inputs and outputs of an MLP are not
nodes, because latents read and write the stream themselves.

Shape legend: b prompt (row), r masked copy, t token, d width, n latents, f all nodes in one row, v vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from bridge.circuits.dense_nodes import DenseSubject
from bridge.circuits.masked_model import Masked
from bridge.circuits.question import Question
from bridge.models.schema import ERROR
from bridge.models.sparse import Gate, Location

LATENT = "latent"
_ROWS = 8  # of text at a time


@dataclass(frozen=True, eq=False)
class Transcoder:
    """Weights of a transcoder: encoder_nd and bias_n, decoder_nd and bias_d, and k, the number of latents kept at a token."""

    encoder_nd: Tensor
    bias_n: Tensor
    decoder_nd: Tensor
    bias_d: Tensor
    k: int

    @staticmethod
    def load(folder: Path) -> Transcoder:
        """Load a transcoder from a folder that sparsify saved. Raises ValueError for a kind that is not computed here."""
        config = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
        if not config["transcode"] or config["skip_connection"] or config["activation"] != "topk":
            raise ValueError(f"{str(folder)!r} is no plain top-k transcoder; train one without a skip connection")
        weights = load_file(folder / "sae.safetensors")
        names = {"encoder_nd": "encoder.weight", "bias_n": "encoder.bias", "decoder_nd": "W_dec", "bias_d": "b_dec"}
        return Transcoder(**{part: weights[name].float() for part, name in names.items()}, k=config["k"])

    def latents(self, x_btd: Tensor) -> Tensor:
        """Return a_btn, in which all but the k largest are 0."""
        before_btn = torch.nn.functional.linear(x_btd, self.encoder_nd, self.bias_n).relu()
        values_btk, index_btk = before_btn.topk(self.k, sorted=False)
        return torch.zeros_like(before_btn).scatter(-1, index_btk, values_btk)

    def decode(self, a_btn: Tensor) -> Tensor:
        """Return the MLP output that the latents decode to."""
        return a_btn @ self.decoder_nd + self.bias_d


def load_transcoders(folder: Path, layers: int) -> tuple[Transcoder, ...]:
    """Load the transcoders of all blocks."""
    return tuple(Transcoder.load(folder / f"h.{layer}.mlp") for layer in range(layers))


class Transcoded:
    """Dense model with transcoders in place of its MLPs, and the means of all nodes and errors over a reference corpus."""

    def __init__(self, subject: DenseSubject, transcoders: Sequence[Transcoder], corpus_bt: Tensor, *, attention: bool) -> None:
        """Take the means; if `attention` is set, its channels are nodes, otherwise attention runs unmasked."""
        self.subject, self.transcoders = subject, tuple(transcoders)
        kept = [at for at in subject.space.sizes if attention and not at.kind.startswith("mlp")]
        self.sizes = {at: subject.space.sizes[at] for at in kept}
        self.means: dict[Location, Tensor] = {at: subject.means[at] for at in kept}
        layers = range(len(self.transcoders))
        self.sizes |= {Location(layer, LATENT): len(self.transcoders[layer].bias_n) for layer in layers}
        self.sizes |= {Location(layer, ERROR): 1 for layer in layers}
        totals: dict[Location, Tensor] = {}
        for rows_bt in corpus_bt.split(_ROWS):
            for at, x_btn in self.recorded(rows_bt).items():
                totals[at] = totals.get(at, 0) + x_btn.sum((0, 1))
        self.means |= {at: total / corpus_bt.numel() for at, total in totals.items()}

    @torch.no_grad()
    def recorded(self, tokens_bt: Tensor) -> dict[Location, Tensor]:
        """Return the latents and errors of every block in the dense model's own run on a text."""
        read: dict[int, Tensor] = {}
        found: dict[Location, Tensor] = {}

        def record(at: Location, x_btn: Tensor) -> Tensor:
            if at.kind == "mlp_in":
                read[at.layer] = x_btn
            elif at.kind == "mlp_out":
                transcoder = self.transcoders[at.layer]
                found[Location(at.layer, LATENT)] = transcoder.latents(read[at.layer])
                found[Location(at.layer, ERROR)] = x_btn - transcoder.decode(found[Location(at.layer, LATENT)])
            return x_btn

        self.subject.run(tokens_bt, record)
        return found

    def run(self, tokens_bt: Tensor, gate: Gate, correct: Gate) -> Tensor:
        """Return logits_btv with the transcoders in place of the MLPs; nodes pass the gate, decoded outputs pass `correct`."""
        read: dict[int, Tensor] = {}

        def replaced(at: Location, x_btn: Tensor) -> Tensor:
            if at.kind == "mlp_in":
                read[at.layer] = x_btn
            if at.kind == "mlp_out":
                latent, transcoder = Location(at.layer, LATENT), self.transcoders[at.layer]
                return correct(Location(at.layer, ERROR), transcoder.decode(gate(latent, transcoder.latents(read[at.layer]))))
            return gate(at, x_btn) if at in self.sizes else x_btn

        return self.subject.run(tokens_bt, replaced)

    @torch.no_grad()
    def dense_without(self, question: Question, parts: Mapping[Location, Tensor]) -> Tensor:
        """Return logits_1v of the dense model itself, with its own MLPs and the nodes and errors of a circuit at their means.

        For a latent, W^dec (a - m) is subtracted from the MLP's output, a being its value in this run; likewise for errors.
        """
        read: dict[int, Tensor] = {}

        def ablate(at: Location, x_btn: Tensor) -> Tensor:
            if at.kind == "mlp_in":
                read[at.layer] = x_btn
            if at.kind == "mlp_out":
                latent, error, transcoder = Location(at.layer, LATENT), Location(at.layer, ERROR), self.transcoders[at.layer]
                a_btn = transcoder.latents(read[at.layer])
                change_btd = ((a_btn - self.means[latent]) * parts[latent]) @ transcoder.decoder_nd
                return x_btn - change_btd - (x_btn - transcoder.decode(a_btn) - self.means[error]) * parts[error]
            return torch.where(parts[at], self.means[at], x_btn) if at in self.sizes else x_btn

        return self.subject.run(question.prompt_bt, ablate)[:, -1]


class MaskedTranscoded(Masked):
    """Dense model through transcoders on one prompt, with masks over latents, channels of attention, and errors."""

    def __init__(self, model: Transcoded, question: Question) -> None:
        recorded = model.recorded(question.prompt_bt)
        errors = {at: x_btd for at, x_btd in recorded.items() if at.kind == ERROR}
        super().__init__(question, model.sizes, model.means, errors, by_position=True)
        self.model = model

    def _last_logits(self, row_r: Tensor, gate: Gate, correct: Gate) -> Tensor:
        return self.model.run(self.question.prompt_bt[row_r], gate, correct)[:, -1].float()

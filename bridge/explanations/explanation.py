"""The value Explanation and its JSON: the dense model's answer, nested circuits that give the same answer, and the evidence.

An Explanation cannot be made without its Report. The dense model's own answer is always explained: errors make the sparse
model follow it on the prompt, and the share of the answer that flows through errors is reported (`circuits/error_nodes`).

d is the question's log-odds in nats: of the answer against all other tokens, or against one other token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from bridge.errors import UserError
from bridge.explanations.parts import Explained
from bridge.explanations.text import render_html, render_text
from bridge.models.bridges import CoupledModels
from bridge.models.schema import ERROR, NODE_KINDS
from bridge.models.store import CheckpointError, as_json, read_json, refuse_unreadable
from bridge.nodes.statistics import sparse_fingerprint

FORMAT = 3  # of the JSON (docs/explanation-json.md); increased if a field is removed or changes its meaning, not if one is added


class ExplainError(UserError):
    """A prompt, answer or coupling that cannot be explained. The message is one line that says what to change."""


@dataclass(frozen=True)
class Explanation(Explained):
    """Explanation of the dense model's answer by nested circuits of the sparse model, with the evidence."""

    def to_json(self) -> dict[str, Any]:
        """Return the explanation and its verdict as plain JSON values, as docs/explanation-json.md specifies."""
        values = as_json(self)
        values["report"] |= {"verdict": self.report.verdict, "reasons": list(self.report.reasons)}
        for measure, written in zip(self.report.measures, values["report"]["measures"], strict=True):
            written["passed"] = measure.passed
        return {"format": FORMAT, **values, "agree": self.agree, "span": self.span}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Explanation:
        """Return the explanation that `to_json` wrote. Raises ExplainError for anything else."""
        with refuse_unreadable("this", "explanation", "explain again", ExplainError):
            if values.get("format") != FORMAT:
                raise ValueError(f"format {values.get('format')!r}, not {FORMAT}")
            json.dumps(values, allow_nan=False)  # Python's reader accepts NaN, which is not JSON
            return _check_consistency(_READER.validate_python(values))

    def __str__(self) -> str:
        return render_text(self)

    def _repr_html_(self) -> str:
        return render_html(self)


_READER = TypeAdapter(Explanation)


def _check_consistency(explanation: Explanation) -> Explanation:
    """Return an explanation that was read. Raises ValueError if its parts do not fit each other."""
    for name in ("tokens", "dense", "sparse"):
        if not getattr(explanation, name):
            raise ValueError(f"{name} is empty")
    length = len(explanation.tokens)
    for node in explanation.nodes:
        if not 0 <= node.position < length:
            raise ValueError(f"node {node.id!r} is at token {node.position} of {length}")
        if node.kind not in (kinds := (*NODE_KINDS, ERROR)):
            raise ValueError(f"node {node.id!r} is of kind {node.kind!r}, not one of {', '.join(kinds)}")
        if node.group is not None and not 0 <= node.group < len(explanation.groups):
            raise ValueError(f"node {node.id!r} is of group {node.group} of {len(explanation.groups)}")
    if not 0 <= explanation.opening < len(explanation.nested):
        raise ValueError(f"it opens at circuit {explanation.opening} of {len(explanation.nested)}")
    for head in explanation.attention:
        if not all(0 <= position < length for position in (head.query, *(read.position for read in head.reads))):
            raise ValueError(f"head {head.head} of layer {head.layer} reads beyond the {length} tokens")
    return explanation


def read_explanation(path: str | Path) -> Explanation:
    """Return the explanation in a JSON file. Raises ExplainError if there is none."""
    if not Path(path).is_file():
        raise ExplainError(f"there is no file {str(path)!r}", remedy="name one that `bridge explain` wrote")
    try:
        return Explanation.from_json(read_json(Path(path)))
    except ExplainError as error:
        raise ExplainError(f"{str(path)!r}: {error.what}", error.rule, error.remedy) from None
    except CheckpointError as error:
        raise ExplainError(
            f"{str(path)!r}", f"holds no explanation ({error.rule})", "name a file that `bridge explain` wrote"
        ) from None


@dataclass(frozen=True)
class Fingerprints:
    """Digests of a coupling's dense and sparse model; computing them reads every weight."""

    dense: str
    sparse: str

    @staticmethod
    def of(coupling: CoupledModels) -> Fingerprints:
        """Compute the digests of a coupling's current weights."""
        return Fingerprints(coupling.dense.fingerprint(), sparse_fingerprint(coupling.sparse))


def check_coupling(explanation: Explanation, coupling: CoupledModels, known: Fingerprints | None = None) -> None:
    """Raise ExplainError if an explanation is not of this coupling, but of another dense model or other sparse weights.

    `known` are the coupling's fingerprints, if the caller has them and the coupling does not change.
    """
    made, where = explanation.provenance, coupling.path or "this coupling"
    known = Fingerprints.of(coupling) if known is None else known
    if known.dense != made.dense_fingerprint:
        raise ExplainError(
            "the explanation",
            f"was made with another dense model than {coupling.dense.name!r}, which {where!r} is coupled to",
            "name the coupling that it was made with",
        )
    if made.coupling_fingerprint not in (None, known.sparse):
        raise ExplainError(
            "the explanation",
            f"was made with other weights (of {made.coupling!r}) than those of {where!r}",
            "name the coupling that it was made with, or explain again",
        )

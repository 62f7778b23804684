"""Interventions on nodes of the sparse model, and the changes that they make to the residual of the dense model.

    targets    every chosen node gets its own target: a given value, its value on the prompt plus an amount, or its value on a
               counterfactual prompt of the same number of tokens
    changed    the sparse model is run with all chosen nodes clamped at their targets at once
    patched    the change of the sparse residual is decoded and added to the dense one, times a strength s (`models/transport`)

Nodes of several sublayers can be patched in two ways. By default every sublayer i adds, at the site after it, only the change
that comes from clamping its own nodes, given all earlier changes:

    h_(i+1)  <-  h_(i+1) + s (g(x'_(i+1)) - g(F_i(x'_i)))       x' the changed run, F_i the sublayer with its nodes not clamped

The dense model then computes all consequences itself. Adding each sublayer's whole change would count consequences twice: as
computed by the dense model and by the sparse model. If one site is named, the whole difference of the changed run at that site is
added there at once; nodes after the site then have no effect, and consequences before it are computed by the sparse model. Both
ways are exact if the dense model equals the sparse model, and they agree for nodes of one sublayer with the site after it named.
The default is stricter: at a late site the sparse model has computed the answer, and the dense model only reads it off.

Steering persists over generated text: at every step both sparse runs are repeated on the whole text, so a change at the prompt
also reaches later tokens through the sparse model's attention. A node without a position that is set to a value, or changed by an
amount, is clamped at generated tokens too; counterfactual values exist for the prompt only. The model is causal, so no step
alters the input of an earlier step. Generation is greedy and ends at the context length.

Shape legend: b row, t token, n nodes of a location, m interventions, s sparse width, d dense width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from bridge.errors import UserError
from bridge.explanations.explanation import check_coupling, read_explanation
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node, recording_gate
from bridge.models.residual import Trace
from bridge.models.schema import ERROR
from bridge.models.sparse import Gate, Location
from bridge.models.transport import change_between, decode_changes, run_with_changes
from bridge.nodes.statistics import parse_node, sparse_fingerprint
from bridge.studies.result import TaskResult

MAX_LISTED_NODES = 1000  # nodes that a result lists
MOST_VALUE = 1e6  # largest value that a node may be set to, or changed by
_INTERVENTION = re.compile(r"(?P<node>[^@=+\-\]]*\[\d+\])(@(?P<position>\d{1,6}))?((?P<how>[=+\-])(?P<amount>.+))?")
Way = Literal["value", "amount", "counterfactual"]


class SteerError(UserError):
    """A node, strength or pair of prompts cannot be steered; the error is one line that says what to change."""


@dataclass(frozen=True)
class Intervention:
    """An intervention on a node: set it to a value, add an amount, or, with neither, set it to its counterfactual value.

    A node without a position is changed at every position. Raises SteerError if both are given.
    """

    node: Node
    value: float | None = None
    amount: float | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.amount is not None:
            raise SteerError(f"{self.node}", "cannot be both set and changed by an amount", "give a value or an amount")

    @property
    def way(self) -> Way:
        """The kind of intervention."""
        return "value" if self.value is not None else "amount" if self.amount is not None else "counterfactual"


@dataclass(frozen=True)
class SteeredNode:
    """A changed node: where it is, its value on the prompt, and its new value."""

    node: str
    position: int
    before: float
    after: float


def parse_intervention(text: str, sizes: Mapping[Location, int]) -> Intervention:
    """Parse an intervention: 1.mlp_act[37], optionally @4, optionally =2.5, +1 or -1. Raises SteerError or NodeError."""
    match = _INTERVENTION.fullmatch(text.strip())
    if match is None:
        raise SteerError(
            f"{text!r}", "is not an intervention", "write a node such as 1.mlp_act[37], optionally with @4, =2.5 or +1 after it"
        )
    node = parse_node(match["node"], sizes)
    if match["position"] is not None:
        node = Node(node.location, node.index, int(match["position"]))
    if match["how"] is None:
        return Intervention(node)
    try:
        amount = float(match["amount"])
        if not abs(amount) <= MOST_VALUE:
            raise ValueError
    except ValueError:
        raise SteerError(f"{match['amount']!r} in {text!r}", "is not a number from -1e6 to 1e6", "write =2.5, +1 or -1") from None
    if match["how"] == "=":
        return Intervention(node, value=amount)
    return Intervention(node, amount=-amount if match["how"] == "-" else amount)


def circuit_interventions(path: str | Path, coupling: CoupledModels) -> list[Intervention]:
    """Return interventions that set every node of a circuit that `bridge circuit` wrote to its counterfactual value.

    Raises UserError if there is no circuit, or if it belongs to other sparse weights than the coupling's.
    """
    result, sizes = TaskResult.load(path), coupling.sparse.locations()
    if result.facts.provenance.get("sparse_fingerprint") not in (None, sparse_fingerprint(coupling.sparse)):
        raise SteerError(
            f"the circuit in {str(path)!r}",
            f"was found in {result.facts.provenance.get('coupling')!r}, whose weights are not those of "
            f"{coupling.path or 'this coupling'!r}",
            "name the coupling that it was found in, or search again",
        )
    return [Intervention(parse_node(node.name, sizes)) for node in result.circuit.nodes]


def collect_interventions(
    coupling: CoupledModels, prompt: str | None, nodes: Sequence[str], circuit: Path | None, explanation: Path | None
) -> tuple[str, list[Intervention] | None]:
    """Return a prompt (by default the explanation's) and the interventions from all sources, None if no source is given.

    The nodes of the circuit, and of the explanation's opening circuit, are set to their counterfactual values; `nodes` take
    precedence over both. Raises UserError if a source does not exist or belongs to another coupling, or there is no prompt.
    """
    sizes, interventions = coupling.sparse.locations(), list[Intervention]()
    if circuit is not None:
        interventions += circuit_interventions(circuit, coupling)
    if explanation is not None:
        read = read_explanation(explanation)
        check_coupling(read, coupling)
        interventions += [parse_intervention(node.id, sizes) for node in read.opening_nodes if node.kind != ERROR]
        prompt = read.prompt if prompt is None else prompt
    if prompt is None:
        raise SteerError("the prompt", "is missing", "give ‹prompt›, or an ‹explanation› that has one")
    interventions += [parse_intervention(text, sizes) for text in nodes]
    return prompt, None if not (nodes or circuit or explanation) else interventions


def intervene_on_every_node(sizes: Mapping[Location, int]) -> list[Intervention]:
    """Return interventions that set every node at every position to its counterfactual value."""
    return [Intervention(Node(location, index)) for location, size in sizes.items() for index in range(size)]


@dataclass(frozen=True, eq=False)
class _Clamp:
    """The interventions at a location: where the mask is set, a node becomes keep * its value + amount.

    The last of the t + 1 rows is for tokens after the prompt.
    """

    mask_tn: Tensor
    keep_tn: Tensor
    amount_tn: Tensor

    def apply(self, x_btn: Tensor, plain_btn: Tensor) -> Tensor:
        """Return x_btn with clamped nodes at values computed from plain_btn, at the prompt and any number of tokens after it."""
        row_t = torch.arange(x_btn.shape[1], device=x_btn.device).clamp(max=len(self.mask_tn) - 1)
        return torch.where(self.mask_tn[row_t], self.keep_tn[row_t] * plain_btn + self.amount_tn[row_t], x_btn)


class Steerer:
    """Interventions on a prompt, and the changes that they make to the dense residual of any text that begins with the prompt.

    A later intervention on a node replaces an earlier one; one at a position overrides one at every position. Raises SteerError
    if a position or site does not exist, a counterfactual is missing or of another length, or no node is chosen before the site.
    """

    def __init__(
        self,
        coupling: CoupledModels,
        tokens_t: Tensor,
        interventions: Sequence[Intervention],
        counterfactual_t: Tensor | None = None,
        *,
        site: int | None = None,
    ) -> None:
        self.coupling, self.tokens_t = coupling, tokens_t
        sparse, length = coupling.sparse, len(tokens_t)
        if not interventions:
            raise SteerError("no node", "is chosen", "name at least one")
        if counterfactual_t is not None and len(counterfactual_t) != length:
            raise SteerError(
                "the prompt", f"is {length} tokens long and the counterfactual {len(counterfactual_t)}", "make them equally long"
            )
        if site is not None and not 0 <= site < coupling.n_sites:
            raise SteerError(f"site {site}", "does not exist", f"give a site from 0 to {coupling.n_sites - 1}")
        values, sizes = None if counterfactual_t is None else self._values(counterfactual_t), sparse.locations()
        self.clamps = {
            location: _clamp(its, length, sizes[location], None if values is None else values[location][0], sparse.device)
            for location, its in _group_by_location(interventions).items()
        }
        touched = sorted({sparse.site(location) for location in self.clamps})
        if site is not None and touched[0] >= site:
            raise SteerError("no chosen node", f"is before site {site}", f"give site {touched[0] + 1} or a later one")
        self.clamped_sites, self.site = tuple(touched), site

    @property
    def sites(self) -> tuple[int, ...]:
        """The sites at which a change is added to the dense residual."""
        return tuple(site + 1 for site in self.clamped_sites) if self.site is None else (self.site,)

    def changed_nodes(self) -> tuple[int, tuple[SteeredNode, ...]]:
        """Return the number of nodes clamped at another value than on the prompt, and the MAX_LISTED_NODES that change most."""
        values, found = self._values(self.tokens_t), []
        for location, clamp in self.clamps.items():
            before_tn = values[location][0]
            after_tn = clamp.apply(before_tn[None], before_tn[None])[0]
            for position, index in (before_tn != after_tn).nonzero().tolist():
                where = Node(location, index).name, position
                found.append(SteeredNode(*where, float(before_tn[position, index]), float(after_tn[position, index])))
        most = sorted(found, key=lambda each: -abs(each.after - each.before))[:MAX_LISTED_NODES]
        return len(found), tuple(most)

    @torch.no_grad()
    def residual_changes(self, tokens_bt: Tensor) -> dict[int, Tensor]:
        """Return change_btd of the dense residual by site, at strength 1, for texts that begin with the prompt."""
        sparse = self.coupling.sparse
        values: dict[Location, Tensor] = {}
        plain = sparse.run(tokens_bt, gate=recording_gate(values), last_only=True)
        changed = sparse.run(tokens_bt, gate=self._gate(values), last_only=True)
        if self.site is not None:
            site_b = torch.full((len(tokens_bt),), self.site)
            return {self.site: decode_changes(self.coupling, site_b, change_between(plain, changed, site_b))}
        found = {}
        for site in self.clamped_sites:
            own_bts = changed.residuals[site + 1] - sparse.sublayer(site)(changed.residuals[site])
            found[site + 1] = decode_changes(self.coupling, torch.full((len(tokens_bt),), site + 1), own_bts)
        return found

    @torch.no_grad()
    def generate(self, strength: float, count: int) -> Tensor:
        """Return tokens_t that the steered dense model adds to the prompt, each the likeliest; fewer if the context ends."""
        dense, tokens_1t = self.coupling.dense, self.tokens_t[None]
        for _ in range(min(count, self.coupling.context - len(self.tokens_t))):
            trace = dense.run(tokens_1t)
            if strength:
                added = {site: strength * change_btd for site, change_btd in self.residual_changes(tokens_1t).items()}
                trace = run_patched(self.coupling, tokens_1t, trace, added)
            tokens_1t = torch.cat([tokens_1t, trace.logits_btv[:, -1].argmax(-1, keepdim=True)], 1)
        return tokens_1t[0, len(self.tokens_t) :]

    def _values(self, tokens_t: Tensor) -> dict[Location, Tensor]:
        values: dict[Location, Tensor] = {}
        with torch.no_grad():
            self.coupling.sparse.run(tokens_t[None], gate=recording_gate(values), last_only=True)
        return values

    def _gate(self, plain: Mapping[Location, Tensor]) -> Gate:
        def gate(location: Location, x_btn: Tensor) -> Tensor:
            clamp = self.clamps.get(location)
            return x_btn if clamp is None else clamp.apply(x_btn, plain[location])

        return gate


def _group_by_location(interventions: Iterable[Intervention]) -> dict[Location, list[Intervention]]:
    found: dict[Location, dict[Node, Intervention]] = {}
    for each in interventions:
        found.setdefault(each.node.location, {})[each.node] = each
    return {location: list(its.values()) for location, its in found.items()}


def _clamp(
    interventions: Sequence[Intervention], length: int, size: int, other_tn: Tensor | None, device: torch.device
) -> _Clamp:
    """Return the interventions at a location as masks; other_tn holds the location's nodes on the counterfactual."""
    mask_tn = torch.zeros(length + 1, size, dtype=torch.bool)
    keep_tn, amount_tn = torch.zeros(length + 1, size), torch.zeros(length + 1, size)
    everywhere_tn = torch.zeros(length + 1, size) if other_tn is None else torch.cat([other_tn.cpu(), torch.zeros(1, size)])
    for positions in (False, True):  # positions last: they override the node everywhere
        its = [m for m in interventions if (m.node.position is not None) == positions]
        if not its:
            continue
        if other_tn is None and (without := [m.node for m in its if m.way == "counterfactual"]):
            raise SteerError(
                without[0], "has no counterfactual value, because no counterfactual is given", "give one, or write =1 or +1"
            )
        rows, index_m = torch.arange(length + 1)[:, None], torch.tensor([m.node.index for m in its])
        if positions:
            rows = torch.tensor([m.node.position for m in its])
            if int(rows.max()) >= length:
                raise SteerError(its[int(rows.argmax())].node, f"is outside the prompt, whose tokens go from 0 to {length - 1}")
        other_m = torch.tensor([m.way == "counterfactual" for m in its])
        given_m = torch.tensor([m.value if m.value is not None else m.amount or 0.0 for m in its])
        mask_tn[rows, index_m] = True
        keep_tn[rows, index_m] = torch.tensor([float(m.way == "amount") for m in its])
        amount_tn[rows, index_m] = torch.where(other_m, everywhere_tn[rows, index_m], given_m)
        if not positions:
            mask_tn[length, index_m[other_m]] = False  # no counterfactual value exists after the prompt
    return _Clamp(mask_tn.to(device), keep_tn.to(device), amount_tn.to(device))


@torch.no_grad()
def run_patched(coupling: CoupledModels, tokens_bt: Tensor, plain: Trace, changes: Mapping[int, Tensor]) -> Trace:
    """Run the dense model with change_btd added to its residual at each of some sites, one after the other.

    `plain` is the dense model's own run of the tokens; if it has one row, that row serves all.
    """
    trace = plain
    for site in sorted(changes):
        trace = run_with_changes(coupling, tokens_bt, trace, torch.full((len(tokens_bt),), site), changes[site])
    return trace

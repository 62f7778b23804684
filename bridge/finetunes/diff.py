"""Explain how a fine-tune changed an answer: two couplings, one prompt or many -> a Diff, checked by transplanting the changes.

    question    why the fine-tuned model gives its answer: d of both dense models; if they differ by less than `least` nats,
                nothing changed and nothing is listed
    changes     the own change of every node (`grafts`), and its share of the change of d by integrated gradients
    changed     the smallest number of nodes, largest effects first, whose own changes give the same d as those of all nodes, to
                within a tenth of the change of d. A node came (AbsTopK set it to 0 in the base), went, or changed its value
    edges       weights into these nodes that differ: (W_B - W_A)_ji a_i(B), times dd / d target, averaged over both runs
    effects     of every node on d in both models, from its mean, by integrated gradients: consequences of the changes

The own changes of the changed nodes, transplanted, should change the base's dense model as the fine-tune did. At its own site,
each sublayer i adds what its nodes' changes write, given all earlier changes, and the dense model computes on from there:

    h_(i+1)  <-  h_(i+1) + lin g_(i+1)(x'_(i+1) - F_i(x'_i))        x' the graft's run, F_i A's sublayer unchanged, g A's decoder

so no site has to be chosen (`by site` transplants the whole change at one site at a time, by `evidence`'s Transporter). There are
two controls: own changes of as many other active nodes with the same locations and positions (matched), and the changed nodes'
own changes added at those nodes (displaced). The share over several prompts is the least-squares one, sum of gained * change over
sum of change^2, with a bootstrap interval over prompts.

Shape legend: r graft, k item, t token, n nodes of a location, s sparse width, d dense width, v vocabulary, f all changes in one
row, nodes and errors first as in a MaskedModel.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bridge.circuits.error_nodes import Followed, follow_dense, reference_means
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel, effects_on_difference
from bridge.circuits.question import Question
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.errors import UserError
from bridge.evidence.bootstrap import bootstrap_interval
from bridge.evidence.carry import Transporter
from bridge.evidence.controls import matched_nodes
from bridge.evidence.measures import Control, Criterion, Measure, Point
from bridge.explanations.build import prompt_tokens, question_of, token_of, top_answers
from bridge.finetunes.grafts import KINDS, Grafts
from bridge.finetunes.result import ChangedChannel, ChangedEdge, ChangedNode, Diff, PromptDiff, ShiftedEffect, Status, Transplant
from bridge.graph.flow import flow_through
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import Node, NodeSpace
from bridge.models.schema import ERROR
from bridge.models.sparse import Location
from bridge.models.transport import decode_changes
from bridge.steering.interventions import run_patched


class DiffError(UserError):
    """Two couplings that cannot be compared, or prompts that cannot be used, in one line."""


@dataclass(frozen=True)
class DiffConfig:
    """Bounds of a diff, and the numbers of draws and listed items."""

    least: float = 1.0  # smallest change of d, in nats, that is analysed, as in a search
    within: float = 0.1  # tolerance between the changed nodes and all nodes, as a fraction of the change of d
    share: float = 0.5  # smallest share of the change that transplanting the changed nodes must make
    control: float = 0.1  # largest share that the control may make, on average
    draws: int = 8
    alphas: int = 8
    most_nodes: int = 500  # maximum number listed, largest first
    most_edges: int = 500
    most_effects: int = 100


@torch.no_grad()
def diff(
    base: CoupledModels,
    tuned: CoupledModels,
    prompts: str | Sequence[str],
    *,
    target: str | int | None = None,
    contrast: str | int | None = None,
    config: DiffConfig | None = None,
    seed: int = 0,
    progress: OnProgress | None = None,
) -> Diff:
    """Return how the fine-tune that `tuned` was adapted to changed the answers to some prompts, compared with `base`.

    The question is why the fine-tuned model's answer (or `target`) follows, against all others (or `contrast`). Raises DiffError
    if `tuned` was not adapted from a coupling such as `base`, PromptError or ExplainError if a prompt cannot be used.
    """
    config, on_progress = config or DiffConfig(), progress or ignore_progress
    check_pair(base, tuned)
    texts = [prompts] if isinstance(prompts, str) else [*prompts]
    if not texts:
        raise DiffError("there is no prompt to compare on", remedy="give at least one prompt")
    found = []
    for place, text in enumerate(texts, 1):
        on_progress(Phase("prompts", place, len(texts)))
        found.append(_of_prompt(base, tuned, text, target, contrast, config, seed))
    measure = _measure(base, [each for each in found if each.transplant is not None], config, seed)
    channels = _channels(found)
    return Diff(tuple(found), measure, channels, config.least, base.provenance, tuned.provenance, seed)


def check_pair(base: CoupledModels, tuned: CoupledModels) -> None:
    """Raise DiffError if the nodes of two couplings do not correspond."""
    names = [repr(one.path) if one.path else who for one, who in ((base, "the base coupling"), (tuned, "the tuned coupling"))]
    if base.sparse.locations() != tuned.sparse.locations() or base.dense.vocabulary != tuned.dense.vocabulary:
        raise DiffError(names[1], f"has a sparse model of another shape than {names[0]}", f"adapt {names[0]} (bridge adapt)")
    if not tuned.recipe.adapts:
        rule = f"was not adapted from another coupling, so its nodes do not correspond to those of {names[0]}"
        raise DiffError(names[1], rule, f"adapt {names[0]} (bridge adapt)")


def read_prompts(path: str | Path) -> list[str]:
    """Read the prompts of a file, one JSON string per line. Raises DiffError if a line is no string, or the file unreadable."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        remedy = "name a file with one JSON string per line"
        raise DiffError(f"prompts {str(path)!r}", f"cannot be read ({error})", remedy) from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            text = json.loads(line) if line.strip() else None
        except ValueError:
            text = 0
        if not isinstance(text, str | None):
            raise DiffError(f"line {number} of {str(path)!r}", "is not a JSON string", "write each prompt on one line, in quotes")
        found += [] if text is None else [text]
    return found


# -- one prompt ---------------------------------------------------------------------------------------------------------------


def _of_prompt(
    base: CoupledModels,
    tuned: CoupledModels,
    text: str,
    target: str | int | None,
    contrast: str | int | None,
    config: DiffConfig,
    seed: int,
) -> PromptDiff:
    tokens_t = prompt_tokens(base, text)
    ours, theirs = (follow_dense(one, tokens_t[None]) for one in (base, tuned))
    prompts = base.dense.prompts
    question = question_of(prompts, text, tokens_t, theirs.dense_bv[0], target, contrast)
    base_d, tuned_d = (float(question.difference(one.dense_bv)) for one in (ours, theirs))
    sparse_d = [
        float(question.difference(one.sparse.run(question.prompt_bt, last_only=True).logits_btv[:, -1])) for one in (base, tuned)
    ]
    known = PromptDiff(
        prompt=text,
        tokens=tuple(prompts.text(token) for token in tokens_t.tolist()),
        answer=token_of(prompts, question.answer),
        contrast=None if question.contrast is None else token_of(prompts, question.contrast),
        base_answers=top_answers(prompts, ours.dense_bv[0]),
        tuned_answers=top_answers(prompts, theirs.dense_bv[0]),
        base_d=base_d,
        tuned_d=tuned_d,
        base_sparse_d=sparse_d[0],
        tuned_sparse_d=sparse_d[1],
    )
    if abs(known.change) < config.least:
        return known
    grafts = Grafts.of(base, tuned, question, ours, theirs)
    effect_f = grafts.attributions(config.alphas)
    through = {kind: float(effect_f[grafts.kind_f == place].sum()) / known.change for place, kind in enumerate(KINDS)}
    changed_f = changed_nodes(grafts, effect_f, config.within * abs(known.change))
    masked = [_masked_model(one, question, followed, base) for one, followed in ((base, ours), (tuned, theirs))]
    nodes, effects = _list_nodes(grafts, masked, effect_f, changed_f, known, config)
    edges = _changed_edges(tuned, grafts, masked, changed_f, config)
    transplant = _transplant(base, grafts, masked[0], ours, changed_f, known.change, config, seed)
    return replace(
        known, through=through, changed=int(changed_f.sum()), nodes=nodes, edges=edges, effects=effects, transplant=transplant
    )


def changed_nodes(grafts: Grafts, effect_f: Tensor, within: float) -> Tensor:
    """Return changed_f: the smallest number of nodes, largest effects first, whose changes give the d of all to `within` nats."""
    score_f = torch.where(grafts.nodes_f, effect_f.abs(), 0)
    order_k, count = score_f.argsort(descending=True, stable=True), int((score_f > 0).sum())
    if not count:
        return torch.zeros_like(grafts.nodes_f)
    all_d = float(grafts.difference((grafts.own_f * grafts.nodes_f)[None]))
    low, high = 0, count  # the smallest number is above low and at most high
    while high - low > 1:
        sizes = sorted({low + round(more) for more in np.geomspace(1, high - low - 1, grafts.rows_per_batch)})
        added_rf = torch.zeros(len(sizes), len(order_k), device=order_k.device)
        for row, size in enumerate(sizes):
            added_rf[row, order_k[:size]] = grafts.own_f[order_k[:size]]
        missed = [size for size, d in zip(sizes, grafts.difference(added_rf).tolist(), strict=True) if abs(d - all_d) > within]
        low = max(missed, default=low)  # above the last size that misses: smaller sizes may be within by chance
        high = min((size for size in sizes if size > low), default=high) if missed else sizes[0]
    return torch.zeros_like(grafts.nodes_f).index_fill_(0, order_k[:high], True)


def _masked_model(coupling: CoupledModels, question: Question, followed: Followed, base: CoupledModels) -> MaskedModel:
    """Return the sparse model of a coupling with means over the base's reference text."""
    if base.reference_bt is None:
        raise DiffError("the base coupling", "holds no reference text to take means over", "fit it again")
    return MaskedModel(coupling.sparse, question, reference_means(coupling, base.reference_bt), followed.errors)


def _list_nodes(
    grafts: Grafts, masked: Sequence[MaskedModel], effect_f: Tensor, changed_f: Tensor, known: PromptDiff, config: DiffConfig
) -> tuple[tuple[ChangedNode, ...], tuple[ShiftedEffect, ...]]:
    """Return the changed nodes, largest shares first, and the other nodes whose effects differ most."""
    before_f, after_f = (effects_on_difference(one, config.alphas) for one in masked)
    space = NodeSpace(grafts.sparse.locations(), grafts.space.n_tokens)  # nodes only, which come first in every row
    values = [space.join({at: x_btn[0] for at, x_btn in values.items()}) for values in (grafts.before, grafts.after)]
    nodes = []
    place_k = changed_f.nonzero().flatten()
    for place in place_k[effect_f[place_k].abs().argsort(descending=True, stable=True)].tolist()[: config.most_nodes]:
        was, now, own, before, after = (float(x_f[place]) for x_f in (*values, grafts.own_f, before_f, after_f))
        where, share = _where(grafts.space.node(place), known), float(effect_f[place]) / known.change
        nodes.append(ChangedNode(*where, _status(was, now), was, now, own, share, before, after))
    other_f = (after_f - before_f).abs() * ~changed_f[: len(after_f)]
    effects = [
        ShiftedEffect(*_where(masked[0].space.node(place), known), float(before_f[place]), float(after_f[place]))
        for place in other_f.topk(min(config.most_effects, len(other_f))).indices.tolist()
        if other_f[place] > 0
    ]
    return tuple(nodes), tuple(effects)


def _status(was: float, now: float) -> Status:
    return "came" if was == 0 else "went" if now == 0 else "changed"


def _where(node: Node, known: PromptDiff) -> tuple[str, str, int, str]:
    position = node.position or 0
    return str(node), node.name, position, known.tokens[position]


def _changed_edges(
    tuned: CoupledModels, grafts: Grafts, masked: Sequence[MaskedModel], changed_f: Tensor, config: DiffConfig
) -> tuple[ChangedEdge, ...]:
    """Return the changed weights into changed nodes that have an effect, largest effects first; sources at 0 have none."""
    flows = [flow_through(one, torch.ones_like(one.is_error_f)) for one in masked]
    theirs, found = flows[1], list[ChangedEdge]()
    changed = grafts.space.split(changed_f)
    for layer in range(len(tuned.sparse.blocks)):
        for name, (source, target) in tuned.sparse.matrices.items():
            from_at, to_at = Location(layer, source), Location(layer, target)
            was_ji, now_ji = flows[0].weight(layer, name).detach(), theirs.weight(layer, name).detach()
            position_k, node_k = changed[to_at].nonzero(as_tuple=True)
            gradient_k = torch.stack([flow.output_gradient(to_at)[position_k, node_k] for flow in flows]).mean(0)
            effect_ki = (now_ji - was_ji)[node_k] * theirs.matrix_input(layer, name)[position_k] * gradient_k[:, None]
            most = effect_ki.flatten().abs().topk(min(config.most_edges, effect_ki.numel())).indices
            for k, i in ((at // effect_ki.shape[1], at % effect_ki.shape[1]) for at in most.tolist()):
                position, j = int(position_k[k]), int(node_k[k])
                from_node, to_node = Node(from_at, i, None if name == "o" else position), Node(to_at, j, position)
                was, now = float(was_ji[j, i]), float(now_ji[j, i])
                if effect := float(effect_ki[k, i]):
                    found.append(ChangedEdge(str(from_node), str(to_node), _status(was, now), was, now, effect))
    found.sort(key=lambda edge: -abs(edge.effect))
    return tuple(found[: config.most_edges])


# -- the transplant -----------------------------------------------------------------------------------------------------------


def _transplant(
    base: CoupledModels, grafts: Grafts, masked: MaskedModel, followed: Followed, changed_f: Tensor, change: float,
    config: DiffConfig, seed: int,
) -> Transplant:  # fmt: skip
    """Transplant the changes of the changed nodes, all nodes and controls; return their shares of the change of d."""
    generator = torch.Generator().manual_seed(seed + 4_000_037)
    own_f, size = grafts.own_f, masked.space.size
    matched_cf = torch.zeros(config.draws, grafts.space.size, dtype=torch.bool, device=own_f.device)
    matched_cf[:, :size] = matched_nodes(masked, changed_f[:size], config.draws, generator)
    displaced = [changes_at_other_nodes(grafts, changed_f, other_f) for other_f in matched_cf]
    rows = [own_f * changed_f, own_f * grafts.nodes_f, *(own_f * other_f for other_f in matched_cf), *displaced]
    added_rf = torch.stack(rows)
    share_r = gain_by_transplant(base, grafts, followed, added_rf) / change
    transporter = Transporter(base, CircuitLoss(masked, followed.dense_bv, SearchConfig()), followed.dense, masked.is_error_f)
    by_site = gain_by_site(transporter, grafts, torch.stack(rows[:2])) / change
    shares, draws = share_r.tolist(), config.draws
    return Transplant(
        share=shares[0], all_nodes=shares[1], matched=tuple(shares[2 : 2 + draws]), displaced=tuple(shares[2 + draws :]),
        by_site=tuple(by_site[0].tolist()), all_nodes_by_site=tuple(by_site[1].tolist()),
    )  # fmt: skip


@torch.no_grad()
def gain_by_transplant(base: CoupledModels, grafts: Grafts, followed: Followed, added_rf: Tensor) -> Tensor:
    """Return gained_r: the change of d of the base's dense model, in nats, with every sublayer's changes at its own site."""
    gained = []
    for some_rf in added_rf.split(grafts.rows_per_batch):
        residuals, changes = grafts.run(some_rf).residuals, dict[int, Tensor]()
        for site, x_rts in enumerate(residuals[:-1]):
            own_rts = residuals[site + 1] - grafts.errors[Location(site + 1, ERROR)] - base.sparse.sublayer(site)(x_rts)
            own_rts = torch.where(
                grafts.rows_writing_at(site, some_rf), own_rts, 0
            )  # exactly 0 if the graft changes no node there
            if bool(own_rts.any()):
                changes[site + 1] = decode_changes(base, torch.full((len(some_rf),), site + 1), own_rts)
        tokens_rt = grafts.question.prompt_bt.expand(len(some_rf), -1)
        plain = followed.dense.logits_btv[:, -1].expand(len(some_rf), -1)
        logits_rv = run_patched(base, tokens_rt, followed.dense, changes).logits_btv[:, -1] if changes else plain
        gained.append(grafts.question.difference(logits_rv) - grafts.question.difference(plain))
    return torch.cat(gained)


def gain_by_site(transporter: Transporter, grafts: Grafts, added_rf: Tensor) -> Tensor:
    """Return gained_rj: the change of d, in nats, if the whole change of the stream at site j enters only there."""
    plain_rf = torch.cat([torch.zeros_like(added_rf[:1]), added_rf])  # in one batch, so that rounding cancels if nothing changes
    residuals = grafts.run(plain_rf).residuals
    places = [(row, site) for row in range(1, len(plain_rf)) for site in transporter.sites]
    changes = [residuals[site][row] - residuals[site][0] for row, site in places]
    lost_k = transporter.dense_lost([0] * len(places), [site for _, site in places], changes)
    return -lost_k.view(len(added_rf), -1) * transporter.loss.span


def changes_at_other_nodes(grafts: Grafts, changed_f: Tensor, other_f: Tensor) -> Tensor:
    """Return added_f: the changed nodes' changes at other nodes of the same location and position; the surplus is dropped."""
    added_f = torch.zeros_like(grafts.own_f)
    place_f = torch.arange(len(added_f), device=added_f.device)
    parts = [grafts.space.split(x_f) for x_f in (place_f, changed_f, other_f)]
    for at in grafts.own:
        for place_n, changed_n, other_n in zip(*(part[at] for part in parts), strict=True):  # at each token
            node_k, other_k = place_n[changed_n], place_n[other_n]
            count = min(len(node_k), len(other_k))
            added_f[other_k[:count]] = grafts.own_f[node_k[:count]]
    return added_f


# -- all prompts --------------------------------------------------------------------------------------------------------------


def _measure(base: CoupledModels, changed: Sequence[PromptDiff], config: DiffConfig, seed: int) -> Measure:
    """Measure the share of the change that transplanting the changed nodes makes, over prompts on which something changed."""
    name, criterion = "transplanted share of the change of d", Criterion(">=", config.share, True, config.control)
    if not changed:
        return Measure("transplant", name, None, criterion, note=f"no prompt's d changes by {config.least:g} nats or more")
    weight_b = np.array([each.change for each in changed]) ** 2
    made = [each.transplant for each in changed if each.transplant is not None]

    def share(of_b: Sequence[float]) -> float:
        return float((np.array(of_b) * weight_b).sum() / weight_b.sum())

    def drawn(kind: str) -> list[float]:
        return [share([getattr(each, kind)[draw] for each in made]) for draw in range(config.draws)]

    own_b = np.array([each.share for each in made])
    bounds = bootstrap_interval(lambda pick_kb: (own_b * weight_b)[pick_kb].sum(1) / weight_b[pick_kb].sum(1), len(own_b), seed)
    displaced, kinds = drawn("displaced"), (*base.dense.sublayers, "unembed")
    points = tuple(
        Point(f"site {site} ({kinds[site]})", {
            "changed": share([each.by_site[site] for each in made]),
            "all nodes": share([each.all_nodes_by_site[site] for each in made]),
        })
        for site in range(base.n_sites)
    )  # fmt: skip
    note = f"{len(changed)} prompts; share of the same changes at the matched nodes: {sum(displaced) / len(displaced):.3f}"
    control = Control.of("matched", drawn("matched"), max, "largest")
    ceiling = share([each.all_nodes for each in made])
    return Measure("transplant", name, share(own_b.tolist()), criterion, control, bounds, ceiling, note, points)


def _channels(found: Sequence[PromptDiff]) -> tuple[ChangedChannel, ...]:
    """Return the channels that changed on any prompt and position, largest total shares of the change first."""
    share, prompts = defaultdict[str, float](float), defaultdict[str, set[int]](set)
    total = sum(abs(each.change) for each in found) or 1.0
    for place, each in enumerate(found):
        for node in each.nodes:
            share[node.name] += node.share * abs(each.change) / total
            prompts[node.name].add(place)
    order = sorted(share, key=lambda name: -abs(share[name]))
    return tuple(ChangedChannel(name, len(prompts[name]), share[name]) for name in order)

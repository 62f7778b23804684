"""Build an Explanation of a prompt: the dense model's answer, nested circuits of the sparse model, and the evidence on them.

    tokens      `prompts`: the prompt as the dense model reads it. The target (default: the dense model's answer) is compared with
                all other tokens, or with the given contrast
    errors      `circuits/error_nodes`: the dense run, and the errors that make the sparse model follow it
    means       of each node and each error over the coupling's reference text; kept with the coupling
    search      `circuits/search`: the nested circuits. If the span is too small, nothing is searched
    circuits    `evidence/sufficiency`: each circuit alone, in supersets, deleted; `verdicts/prompt` chooses the one that is drawn
    edges       `graph/flow`: the flow through that circuit; `graph/edge_pruning`: the edges that it needs
    groups      `graph/groups`: nodes that do one job, joined
    attention   `graph/attention`: what the circuit's heads read, why, and what this does
    evidence    `verdicts/prompt`: the circuit and its groups in both models

`explain` passes partial results to `stage`: an Answered at once, and a Drawn (the opening circuit) before the slower evidence.

Shape legend: b batch row (one), t token, n nodes of a location, f all nodes and errors of a prompt in one row, k index into f,
s sparse width, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bridge.circuits.error_nodes import follow_dense, reference_means, reference_rows
from bridge.circuits.loss import CircuitLoss, SearchConfig
from bridge.circuits.masked_model import MaskedModel
from bridge.circuits.question import Question
from bridge.circuits.search import NestedMasks, find_nested
from bridge.display.progress import OnProgress, Phase, ignore_progress
from bridge.evidence.patching import Counterfactual
from bridge.evidence.sufficiency import measure_nested
from bridge.explanations.explanation import ExplainError, Explanation
from bridge.explanations.parts import (
    Answer,
    Answered,
    Counts,
    Drawn,
    ExplainedEdge,
    ExplainedGroup,
    ExplainedNode,
    Provenance,
    Token,
)
from bridge.explanations.threads import cores
from bridge.graph.attention import explain_attention
from bridge.graph.attribution import Edges, draw_edges
from bridge.graph.edge_pruning import PrunedEdges, prune_edges
from bridge.graph.flow import Flow, flow_through
from bridge.graph.group_names import group_names
from bridge.graph.groups import Group, ablate_groups, group_edges, group_nodes
from bridge.graph.scores import replacement_and_completeness
from bridge.huggingface.prompts import Prompts
from bridge.models.bridges import CoupledModels
from bridge.models.circuit import COUNTED, Node
from bridge.models.schema import ERROR
from bridge.models.span import SparseSpan
from bridge.models.sparse import Location
from bridge.nodes.description import node_labels
from bridge.nodes.statistics import sparse_fingerprint
from bridge.verdicts.prompt import gather_evidence, opening_of

MOST_NODES = 5000  # maximum number of nodes that an explanation lists and draws; the others are only counted
MOST_EDGES = 5000  # maximum number of edges, the strongest ones
MAX_EDGES_TO_GROUP = 100_000  # maximum number of edges from which groups and group edges are made, the strongest ones
DELETED_TOKENS = 8000  # tokens of masked copies in which nodes are ablated one by one
MAX_NODES_ON_ONE_CORE = (
    1 << 19
)  # nodes of a prompt; up to so many, one core runs a pass faster than two, which would wait for each other


@torch.no_grad()
def explain(
    coupling: CoupledModels,
    prompt: str,
    *,
    target: str | int | None = None,
    contrast: str | int | None = None,
    counterfactual: str | None = None,
    config: SearchConfig | None = None,
    seed: int = 0,
    reference_bt: Tensor | None = None,
    progress: OnProgress | None = None,
    stage: Callable[[Answered | Drawn], None] | None = None,
) -> Explanation:
    """Explain the dense model's next token after a prompt: why `target` at all, or why `target` rather than `contrast`.

    Both are tokens, given as text, as "#id", or as ids. counterfactual, a prompt with as many tokens but another answer, adds
    patching to the evidence. Means are taken over the tokens reference_bt (default: the coupling's own), and kept with the
    coupling. progress receives the phases, stage the partial results: an Answered, then a Drawn. Either callback may raise to
    stop. Raises PromptError or ExplainError.
    """
    on_progress, on_stage = progress or ignore_progress, stage or (lambda _: None)
    config = replace(config or SearchConfig(), seed=seed)
    reference_bt = coupling.reference_bt if reference_bt is None else reference_bt
    if reference_bt is None or not reference_bt.numel():
        raise ExplainError(
            "the coupling", "holds no reference text to take corpus means over", "pass reference_bt, blocks of tokens"
        )
    tokens_t = prompt_tokens(coupling, prompt)
    other_t = None if counterfactual is None else counterfactual_tokens(prompt_tokens(coupling, counterfactual), tokens_t)
    on_progress(Phase("tokens: both models' answers"))
    followed = follow_dense(coupling, tokens_t[None])
    patched_to = None if other_t is None else Counterfactual(other_t[None], follow_dense(coupling, other_t[None]))
    question = question_of(coupling.dense.prompts, prompt, tokens_t, followed.dense_bv[0], target, contrast)
    used_bt = reference_rows(coupling, reference_bt)
    on_progress(Phase(f"means: {used_bt.numel():,} tokens of reference text"))
    means = reference_means(coupling, used_bt)
    masked = MaskedModel(coupling.sparse, question, means, followed.errors)
    is_single_core = masked.space.size <= MAX_NODES_ON_ONE_CORE and not isinstance(
        coupling.sparse, SparseSpan
    )  # whose dense model takes longer
    with cores(1 if is_single_core else torch.get_num_threads()):
        loss = CircuitLoss(masked, followed.dense_bv, config)
        answered = _answer_question(coupling, prompt, loss)
        on_stage(answered)
        on_progress(Phase("search"))
        nested = find_nested(loss, on_progress) if abs(loss.span) >= config.least_span else _empty_circuits(loss)
        on_progress(Phase("circuits: alone, in supersets, deleted"))
        circuits = measure_nested(loss, nested, seed)
        opening = opening_of(circuits, config.opening)
        kept_f = nested.kept(opening)
        on_progress(Phase("edges"))
        flow = flow_through(masked, kept_f)
        edges = draw_edges(flow, MAX_EDGES_TO_GROUP, on_progress)
        pruned = prune_edges(loss, flow, edges, nested.levels[opening], seed)
        on_progress(Phase("groups"))
        groups = group_nodes(flow, edges)
        drawn = _draw_circuit(coupling, loss, nested, opening, flow, edges, pruned, groups)
        on_stage(drawn)
        on_progress(Phase("attention"))
        attention, left_out = explain_attention(flow)
        replacement, completeness = replacement_and_completeness(masked, kept_f)
        none_f = torch.zeros_like(kept_f)
        group_masks = [none_f.index_fill(0, group.places(masked.space, none_f.device), True) for group in groups]
        evidence = gather_evidence(
            coupling, loss, nested, circuits, opening, followed, group_masks, patched_to, seed=seed,
            progress=on_progress,
        )  # fmt: skip
    parts = vars(answered) | vars(drawn)
    del parts["sizes"]  # the nested circuits have them
    parts["groups"] = tuple(
        replace(group, sparse_effect=lost.sparse, dense_effect=lost.dense)
        for group, lost in zip(drawn.groups, evidence.group_losses, strict=True)
    )
    return Explanation(
        **parts,
        report=evidence.report,
        nested=evidence.nested,
        attention=attention,
        attention_left_out=left_out,
        replacement=replacement,
        completeness=completeness,
        backup=evidence.backup,
        config=config,
        provenance=_provenance(coupling, used_bt, seed),
    )


# -- the question -------------------------------------------------------------------------------------------------------------


def prompt_tokens(coupling: CoupledModels, prompt: str) -> Tensor:
    """Return tokens_t of a prompt. Raises PromptError if it cannot be read, is empty, or is too long."""
    return torch.tensor(coupling.dense.prompts.read(prompt, coupling.context), device=coupling.dense.device)


def counterfactual_tokens(other_t: Tensor, tokens_t: Tensor) -> Tensor:
    """Return the counterfactual's tokens. Raises ExplainError unless they are as many as the prompt's, and differ from them."""
    if len(other_t) != len(tokens_t):
        counts = f"{len(other_t)} tokens and the prompt {len(tokens_t)}"
        raise ExplainError("the counterfactual", f"has {counts}", "give one of equal length, so that positions are the same")
    if torch.equal(other_t.to(tokens_t), tokens_t):
        raise ExplainError("the counterfactual", "is the prompt itself", "change what decides the answer")
    return other_t


def question_of(
    prompts: Prompts, prompt: str, tokens_t: Tensor, dense_v: Tensor, target: str | int | None, contrast: str | int | None
) -> Question:
    """Return the question why a target (default: the dense model's answer) follows. Raises PromptError or ExplainError."""
    answer = int(dense_v.argmax()) if target is None else prompts.target(target, prompt)
    against = None if contrast is None else prompts.target(contrast, prompt, "contrast")
    if answer == against:
        whose = "the dense model's own answer" if target is None else f"both {token_of(prompts, answer)}"
        raise ExplainError("target and contrast", f"are {whose}", "name two different tokens")
    return Question.of_prompt(tokens_t, answer, against)


def token_of(prompts: Prompts, token: int) -> Token:
    """Return a token with the text that names it."""
    return Token(token, prompts.text(token))


def top_answers(prompts: Prompts, logits_v: Tensor) -> tuple[Answer, ...]:
    """Return the 5 likeliest next tokens."""
    best = logits_v.softmax(-1).topk(5)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Answer(token_of(prompts, token), probability) for token, probability in pairs)


def _answer_question(coupling: CoupledModels, prompt: str, loss: CircuitLoss) -> Answered:
    question, prompts = loss.masked.question, coupling.dense.prompts
    sparse_v = coupling.sparse.run(question.prompt_bt, last_only=True).logits_btv[0, -1].float()
    contrast = question.contrast
    return Answered(
        prompt=prompt,
        tokens=tuple(token_of(prompts, token) for token in question.tokens_t.tolist()),
        answer=token_of(prompts, question.answer),
        contrast=None if contrast is None else token_of(prompts, contrast),
        dense=top_answers(prompts, loss.model_bv[0]),
        sparse=top_answers(prompts, sparse_v),
        dense_d=loss.model,
        sparse_d=float(question.difference(sparse_v[None])),
        nothing_d=loss.ablated,
    )


# -- the circuit --------------------------------------------------------------------------------------------------------------


def _empty_circuits(loss: CircuitLoss) -> NestedMasks:
    """Return empty circuits, for a span that is too small to search."""
    levels = loss.config.nested()
    level_f = torch.full((loss.masked.space.size,), len(levels), device=loss.model_bv.device)
    return NestedMasks(levels, level_f, (torch.inf,) * len(levels))


def _draw_circuit(
    coupling: CoupledModels,
    loss: CircuitLoss,
    nested: NestedMasks,
    opening: int,
    flow: Flow,
    edges: Edges,
    pruned: PrunedEdges,
    groups: tuple[Group, ...],
) -> Drawn:
    masked = loss.masked
    active = int(((values_under_mask(masked, torch.ones_like(flow.kept_f)) != 0) & loss.nodes_f).sum())
    nodes, labels = _nodes(coupling, loss, nested, opening, groups)
    drawn = pruned.edges
    ablated = ablate_groups(flow, groups)
    names = group_names(flow, edges, groups, ablated, coupling.dense.prompts, labels)
    return Drawn(
        nodes=nodes,
        edges=tuple(
            ExplainedEdge(str(e.source), str(e.target), e.kind, e.weight, e.effect)
            for e in drawn.select(slice(MOST_EDGES)).strongest
        ),
        groups=tuple(
            ExplainedGroup(
                place, name, tuple(map(str, group.nodes)), group.positions, group.layers, group.kind, effect, None
            )
            for place, (group, name, effect) in enumerate(zip(groups, names, ablated.effect_g, strict=True))
        ),
        group_edges=group_edges(flow, edges, groups),
        counts=Counts(
            int(flow.kept_f.sum()), int((flow.kept_f & masked.is_error_f).sum()), drawn.count(*COUNTED), pruned.before,
            pruned.faithfulness, drawn.distinct(*COUNTED), drawn.count("embedding"), drawn.count("unembedding"),
            drawn.count("bigram"), active,
        ),
        sizes=tuple(int((nested.kept(place) & loss.nodes_f).sum()) for place in range(len(nested.levels))),
        opening=opening,
    )  # fmt: skip


def _nodes(
    coupling: CoupledModels, loss: CircuitLoss, nested: NestedMasks, opening: int, groups: tuple[Group, ...]
) -> tuple[tuple[ExplainedNode, ...], dict[str, str]]:
    """Return the nodes of the opening circuit and of the next larger one, and the labels of their channels."""
    masked, kept_f = loss.masked, nested.kept(opening)
    above_f = nested.kept(min(opening + 1, len(nested.levels) - 1))
    if not bool(above_f.any()):
        return (), {}
    gradient_1f, _ = masked.gradient(kept_f[None], loss.miss)
    order_f = torch.where(kept_f, 1.0, 0.0) + gradient_1f[0].abs() / (gradient_1f.abs().max() * 2).clamp(min=1e-30)
    place_k = torch.where(above_f, order_f, -1).argsort(descending=True, stable=True)[: min(MOST_NODES, int(above_f.sum()))]
    measured_k = place_k[kept_f[place_k]][: max(1, 2 * DELETED_TOKENS // masked.n_tokens)]  # an ablation runs half of the model
    whole_1v, without_kv = masked.logits(kept_f[None]), masked.logits_without(kept_f, measured_k)
    lost_k = masked.question.difference(whole_1v) - masked.question.difference(without_kv)
    effects = dict(zip(measured_k.tolist(), lost_k.tolist(), strict=True))
    value_f = torch.where(kept_f, values_under_mask(masked, kept_f), values_under_mask(masked, above_f)).tolist()
    mean_f, level_f = _means_of(masked).tolist(), nested.level_f.tolist()
    found = [(place, masked.space.node(place)) for place in sorted(place_k.tolist())]
    labels = node_labels(coupling, [Node(node.location, node.index) for _, node in found if node.location.kind != ERROR])
    group_of = {str(node): number for number, group in enumerate(groups) for node in group.nodes}
    nodes = []
    for place, node in found:
        value, name, at = value_f[place], node.name, node.location
        label = labels.get(f"{'+' if value > 0 else '-' if value < 0 else ''}{name}", labels.get(name)) if labels else None
        where = (str(node), name, at.layer, at.kind, node.index, node.position or 0)
        measured = (value, mean_f[place], effects.get(place), level_f[place], group_of.get(str(node)))
        nodes.append(ExplainedNode(*where, *measured, label))
    return tuple(nodes), labels


@torch.no_grad()
def values_under_mask(masked: MaskedModel, kept_f: Tensor) -> Tensor:
    """Return value_f of each node after AbsTopK, in the run of the prompt under a mask; for an error the length of its vector."""
    assert masked.errors is not None
    gate, correct = masked.gates(kept_f[None])
    values = {at: torch.zeros(1, masked.space.n_tokens, n, device=kept_f.device) for at, n in masked.space.sizes.items()}

    def recording(at: Location, x_1tn: Tensor) -> Tensor:
        values[at][:, -x_1tn.shape[1] :] = x_1tn
        return gate(at, x_1tn)

    for at, error_1ts in masked.errors.items():
        values[at][:, -error_1ts.shape[1] :] = error_1ts.norm(dim=-1, keepdim=True)
    masked.sparse.run(masked.question.prompt_bt, gate=recording, correct=correct, last_only=True)
    return masked.space.join(values)[0]


def _means_of(masked: MaskedModel) -> Tensor:
    """Return mean_f of each node; for an error the length of its mean."""
    means = {at: masked.means[at].norm()[None] if at.kind == ERROR else masked.means[at] for at in masked.space.sizes}
    return masked.space.join({at: mean_n.expand(masked.space.n_tokens, -1) for at, mean_n in means.items()})


def _provenance(coupling: CoupledModels, used_bt: Tensor, seed: int) -> Provenance:
    digest = hashlib.sha256(used_bt.cpu().to(torch.int32).numpy().tobytes()).hexdigest()
    source = coupling.recipe.data.source
    return Provenance(
        **coupling.provenance,
        seed=seed,
        reference=f"{used_bt.numel()} tokens of held-out text ({source}), sha256 {digest[:12]}",
        coupling_fingerprint=sparse_fingerprint(coupling.sparse),
    )

"""A prompt -> an Explanation: what the dense model answers, the circuit of the sparse model that answers so, and the evidence.

    tokens      the prompt under the dense model's tokenizer; target and contrast, by default its first and second answer
    means       of every sparse node over the coupling's reference text
    search      `prune.find_circuit`: candidates, scores, masks, deletions
    levels      `levels.nested_circuits`: smaller circuits within it; and nodes deleted alone, for what each does there
    edges       `flow.draw_edges`, begun with the levels
    attention   `attention.explain_attention`: what the circuit's heads read, why, and what they move
    evidence    `validate.validate`, on the sparse and on the dense model
    card        on demand `card.assess.prompt_card`: further tests on the dense model

Who waits is told before all is known: `explain` hands over an Answered at once, a Drawn, the circuit with the first two
measures, before the slower evidence, and, where a card is asked for, the Explanation without it before it is computed.

Shape legend: b batch row, t token, f all nodes of a prompt in one row, k the circuit's nodes, v vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bridge.bridges import Coupling
from bridge.card.assess import counterfactual_tokens, prompt_card
from bridge.circuit import COUNTED, Ablations, Node, Question, corpus_means
from bridge.circuits.attention import explain_attention
from bridge.circuits.attribution import Edges, draw_edges
from bridge.explanation import (
    Answer,
    Answered,
    Counts,
    Drawn,
    ExplainedEdge,
    ExplainedNode,
    ExplainError,
    Explanation,
    Provenance,
    Searched,
    Token,
    quoted,
)
from bridge.levels import nested_circuits
from bridge.meanwhile import cores, meanwhile
from bridge.node_page import node_labels
from bridge.nodes import sparse_fingerprint, token_text
from bridge.prune import Found, find_circuit
from bridge.recipe import not_text
from bridge.validate import Measure, validate

REFERENCE_TOKENS = 4096  # of the reference text, over which means are taken: a second
DELETED_TOKENS = 2000  # of masked copies, in which nodes are deleted one by one
SHORT = 1 << 19  # nodes of a prompt up to which one core takes less time for a pass than two that wait for each other
MOST_EDGES = 5000  # that an explanation holds, the strongest ones; what there is beyond is only counted


@torch.no_grad()
def explain(
    coupling: Coupling,
    prompt: str,
    *,
    target: str | None = None,
    contrast: str | None = None,
    card: bool = False,
    counterfactual: str | None = None,
    seed: int = 0,
    reference_bt: Tensor | None = None,
    progress: Callable[[str], None] | None = None,
    stage: Callable[[Answered | Drawn | Explanation], None] | None = None,
) -> Explanation:
    """Explain the dense model's next token after a prompt, or why it prefers `target` to `contrast`.

    With `card` the circuit is also tested on the dense model; counterfactual is a prompt of as many tokens whose answer is
    another, which the first of these tests needs. reference_bt, tokens over which corpus means are taken, is by default the
    coupling's own; what is computed from them is kept with the coupling. progress is told the phases, stage what is known so
    far: an Answered, then a Drawn, then, with `card`, the whole Explanation (itself an Answered) but for the card. Either may
    raise to end the work. Raises ExplainError, or CardError for a counterfactual that cannot be used.
    """
    say, hand_over = progress or (lambda _: None), stage or (lambda _: None)
    dense, sparse = coupling.dense, coupling.sparse
    reference_bt = coupling.reference_bt if reference_bt is None else reference_bt
    if reference_bt is None or not reference_bt.numel():
        raise ExplainError("the coupling holds no reference text to take corpus means over; pass reference_bt, blocks of tokens")
    tokens_t = prompt_tokens(coupling, prompt)
    swapped_t = None if counterfactual is None else counterfactual_tokens(prompt_tokens(coupling, counterfactual), tokens_t)
    say("tokens: both models' answers")
    dense_v = dense.run(tokens_t[None]).logits_btv[0, -1].float()
    sparse_v = sparse.run(tokens_t[None], last_only=True).logits_btv[0, -1]
    question = _question(coupling, tokens_t, dense_v, target, contrast)
    tokenizer = dense.tokenizer
    answered = Answered(
        prompt=prompt,
        tokens=tuple(token_of(tokenizer, token) for token in tokens_t.tolist()),
        target=token_of(tokenizer, question.target),
        contrast=token_of(tokenizer, question.contrast),
        dense=top_answers(tokenizer, dense_v),
        sparse=top_answers(tokenizer, sparse_v),
        dense_difference=float(question.difference(dense_v)),
        sparse_difference=float(question.difference(sparse_v)),
    )
    hand_over(answered)

    used_bt = reference_bt[: max(1, REFERENCE_TOKENS // reference_bt.shape[1])].to(sparse.device)
    say(f"means: {used_bt.numel():,} tokens of reference text")
    ablations = Ablations(sparse, question, coupling.once("means", used_bt, lambda: corpus_means(sparse, used_bt)))
    every = torch.get_num_threads()
    short = 1 if ablations.space.size <= SHORT else every
    with cores(short if ablations.copies is None else every):  # whose halves do not wait for each other
        found = find_circuit(ablations, seed=seed, progress=say)
    with cores(short):
        known = _known_of(coupling, ablations, found, used_bt, seed, say, hand_over)
    explanation = Explanation(**vars(answered), **known, provenance=_provenance(coupling, used_bt, seed))
    if not card:
        return explanation
    hand_over(explanation)
    tested = prompt_card(coupling, found.circuit, explanation.faithfulness, swapped_t, seed=seed, progress=say)
    return replace(explanation, card=tested)


def _known_of(
    coupling: Coupling, ablations: Ablations, found: Found, used_bt: Tensor, seed: int, say: Callable[[str], None],
    hand_over: Callable[[Drawn], None],
) -> dict[str, Any]:  # fmt: skip
    """What an Explanation holds of a circuit that was found. Edges are drawn in a thread, beside all that needs none."""
    sparse, circuit = coupling.sparse, found.circuit
    known: dict[str, Any] = {"searched": Searched(found.n_active, found.n_candidates, found.silenced, found.complete)}

    def draw(*sufficiency: Measure) -> None:
        edges = drawn()
        known["edges"] = tuple(ExplainedEdge(str(e.source), str(e.target), e.kind, e.weight, e.effect) for e in edges.strongest)
        known["counts"] = _counts(found, edges)
        hand_over(Drawn(**known, sufficiency=(sufficiency[0], sufficiency[1])))

    say("levels")
    with meanwhile(lambda tell: draw_edges(sparse, circuit, MOST_EDGES, tell), say) as drawn:
        known["levels"], level_f = nested_circuits(ablations, found.kept_f)
        known["nodes"] = _explained(coupling, ablations, found, level_f)
        known["faithfulness"] = validate(coupling, ablations, circuit, used_bt, seed=seed, progress=say, sufficient=draw)
    say("attention")
    attention = explain_attention(sparse, circuit)
    return {**known, "attention": attention.heads, "attention_left_out": attention.left_out}


def prompt_tokens(coupling: Coupling, prompt: str) -> Tensor:
    """tokens_t of a prompt under the dense model's tokenizer. Raises ExplainError where it is empty or too long."""
    tokenizer = coupling.dense.tokenizer
    if tokenizer is None:
        raise ExplainError(f"the dense model {coupling.dense.name!r} has no tokenizer, so no text can be read; load it with one")
    if wrong := not_text(prompt):
        raise ExplainError(f"the prompt holds {wrong}, which is no character of UTF-8 text; give it in UTF-8")
    ids = tokenizer(prompt)["input_ids"] if prompt else []
    if not any(token not in tokenizer.all_special_ids for token in ids):
        raise ExplainError("the prompt is empty; give the text whose next token is to be explained")
    if len(ids) > coupling.context:
        raise ExplainError(
            f"the prompt is {len(ids)} tokens long, and the context is {coupling.context}; give its last part only"
        )
    return torch.tensor(ids, device=coupling.dense.device)


def _question(coupling: Coupling, tokens_t: Tensor, dense_v: Tensor, target: str | None, contrast: str | None) -> Question:
    first, second = dense_v.topk(2).indices.tolist()
    chosen = first if target is None else one_token(coupling, target, "target")
    against = (second if chosen == first else first) if contrast is None else one_token(coupling, contrast, "contrast")
    if chosen == against:
        whose = "the dense model's own answer" if target is None else f"both {target!r}"
        raise ExplainError(f"target and contrast are {whose}; name two different tokens")
    return Question(tokens_t, chosen, against)


def one_token(coupling: Coupling, text: str, role: str) -> int:
    """The id of a text that is a single token; role is what it is called where it is refused. Raises ExplainError."""
    tokenizer = coupling.dense.tokenizer
    assert tokenizer is not None
    if wrong := not_text(text):
        raise ExplainError(f"{role} {text!r} holds {wrong}, which is no character of UTF-8 text; give one token in UTF-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if len(ids) != 1:
        pieces = " ".join(quoted(token_of(tokenizer, token).text) for token in ids) or "none"
        remedy = f"; give one, such as {quoted(token_of(tokenizer, ids[0]).text)}" if ids else "; give one"
        raise ExplainError(f"{role} {text!r} is {len(ids)} tokens ({pieces}), and only a single token can be explained{remedy}")
    if ids[0] == tokenizer.unk_token_id:
        raise ExplainError(f"{role} {text!r} is not in the dense model's vocabulary; give one of its tokens")
    return ids[0]


def token_of(tokenizer: Any, token: int) -> Token:
    """A token with its text."""
    return Token(token, token_text(tokenizer, token))


def top_answers(tokenizer: Any, logits_v: Tensor) -> tuple[Answer, ...]:
    """The likeliest next tokens, at most 5."""
    best = logits_v.softmax(-1).topk(5)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return tuple(Answer(token_of(tokenizer, token), probability) for token, probability in pairs)


def _explained(coupling: Coupling, ablations: Ablations, found: Found, level_f: Tensor) -> tuple[ExplainedNode, ...]:
    question, kept_f = found.circuit.question, found.kept_f
    place_k = kept_f.nonzero().flatten()
    if not len(place_k):
        return ()
    slope_1f, _ = ablations.slopes(kept_f[None], question.difference)
    most = max(1, 2 * DELETED_TOKENS // ablations.space.n_tokens)  # a deletion runs half of the model, on average
    measured_k = slope_1f[0, place_k].abs().argsort(descending=True, stable=True)[:most]
    whole_1v, without_kv = ablations.logits(kept_f[None]), ablations.logits_without(kept_f, place_k[measured_k])
    rise_k = (ablations.kl(without_kv) - ablations.kl(whole_1v)).tolist()
    lost_k = (question.difference(whole_1v) - question.difference(without_kv)).tolist()
    measured = dict(zip(measured_k.tolist(), zip(rise_k, lost_k, strict=True), strict=True))
    columns = zip(*(each_f[place_k].tolist() for each_f in (ablations.value_f, ablations.mean_f, level_f)), strict=True)
    kept = found.circuit.kept
    channels = [Node(at, index) for at, kept_tn in kept.items() for index in kept_tn.any(0).nonzero().flatten().tolist()]
    labels, names = node_labels(coupling, channels), {(node.location, node.index): node.name for node in channels}
    nodes = []
    for at, kept_tn in kept.items():
        for position, index in kept_tn.nonzero().tolist():
            importance, effect = measured.get(len(nodes), (None, None))
            (value, mean, level), name = next(columns), names[at, index]
            where = (f"{name}@{position}", name, at.layer, at.kind, index, position)
            label = labels.get(f"{'+' if value > 0 else '-' if value < 0 else ''}{name}", labels.get(name)) if labels else None
            nodes.append(ExplainedNode(*where, value, mean, importance, effect, level, label))
    return tuple(nodes)


def _counts(found: Found, edges: Edges) -> Counts:
    entries = (edges.count("embedding"), edges.count("unembedding"), edges.count("bigram"))
    return Counts(int(found.kept_f.sum()), edges.count(*COUNTED), edges.distinct(*COUNTED), *entries)


def _provenance(coupling: Coupling, used_bt: Tensor, seed: int) -> Provenance:
    digest = hashlib.sha256(used_bt.cpu().to(torch.int32).numpy().tobytes()).hexdigest()
    source = coupling.recipe.data.source
    return Provenance(
        **coupling.provenance,
        seed=seed,
        reference=f"{used_bt.numel()} tokens of held-out text ({source}), sha256 {digest[:12]}",
        coupling_fingerprint=sparse_fingerprint(coupling.sparse),
    )

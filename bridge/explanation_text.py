"""An Explanation as text for a terminal and as HTML for a notebook."""

# still of format 1: to be rewritten for format 2
# -- as text ----------------------------------------------------------------------------------------------------------------


def render_text(explanation: Explanation, width: int = 100, *, answer: bool = True) -> str:
    """The explanation for a terminal `width` columns wide: answer, verdict, circuit, evidence, and how to read them.

    Without the answer where that has been shown already (`render_answer`).
    """
    where = explanation.provenance
    made = (
        f"bridge {where.version}, seed {where.seed}; {where.coupling or 'a coupling in memory'} (L0 {where.l0:g}), dense model "
        f"{where.dense} ({where.dense_fingerprint[:12]}), means over {where.reference}"
    )
    parts = (
        *((render_answer(explanation, width).split("\n"),) if answer else ()),
        _render_verdict(explanation, width),
        _render_circuit(explanation, width),
        _render_attention(explanation, width),
        _render_evidence(explanation, width),
        *(() if explanation.card is None else (render_card(explanation.card, width, verdict=False).split("\n"),)),
        textwrap.wrap(_HOW_TO_READ, width),
        textwrap.wrap(made, width),
    )
    return "\n".join(_cut(line, width) for part in parts for line in (*part, "")).rstrip()


_HOW_TO_READ = (
    "How to read this: D is the logit of the target less that of the contrast. A node is a channel of the sparse model at one "
    "token; value is its activation there (off: silenced by AbsTopK), mean its average over text, which replaces it when it is "
    "deleted; effect is what D loses when it alone is deleted from the circuit. Inputs are its strongest edges, with what D owes "
    "to each. What holds in the sparse model holds for the dense one only as far as the last line of the evidence goes."
)


def render_answer(answered: Answered, width: int = 100) -> str:
    """What is known at once, as `render_text` begins."""
    prompt, *lines = _render_answer(answered)
    return "\n".join((*_wrap("", prompt, width, " " * 10), *(_cut(line, width) for line in lines)))


def _tokens(count: int) -> str:
    return f"{count} token{'' if count == 1 else 's'}"


def _render_answer(explanation: Answered) -> list[str]:
    def listed(answers: tuple[Answer, ...]) -> str:
        return "  ".join(f"{quoted(each.token.text)} {each.probability:.1%}" for each in answers[:4])

    differences = explanation.dense_difference, explanation.sparse_difference
    own = "" if explanation.target.id == explanation.dense[0].token.id else ", which is not the dense model's answer"
    return [
        f"prompt    {quoted(explanation.prompt)}  ({_tokens(len(explanation.tokens))})",
        f"dense     {listed(explanation.dense)}",
        f"sparse    {listed(explanation.sparse)}  {'agrees' if explanation.agree else 'DISAGREES'}",
        f"question  why {quoted(explanation.target.text)} rather than {quoted(explanation.contrast.text)}{own}",
        "          D is {:+.2f} in the dense model, {:+.2f} in the sparse one".format(*differences),
    ]


def _render_verdict(explanation: Explanation, width: int) -> list[str]:
    """The card's verdict where there is a card, and then what the prompt's own evidence says."""
    own, card = explanation.faithfulness, explanation.card
    if card is None or card.verdict == own.verdict:
        return _wrap(
            "VERDICT   ", f"{own.verdict.upper()}. {' '.join((*own.reasons, *(card.reasons[1:] if card else ())))}", width
        )
    told = _wrap("VERDICT   ", f"{card.verdict.upper()}. {' '.join(card.reasons)}", width)
    return [*told, *_wrap("          ", f"Before the card, {own.verdict}: {' '.join(own.reasons)}", width)]


def _render_circuit(explanation: Explanation, width: int) -> list[str]:
    counts, searched = explanation.counts, explanation.searched
    lines = [
        f"CIRCUIT   {counts.nodes:,} nodes, where {searched.active:,} are active; {counts.edges:,} edges over "
        f"{counts.weights:,} weights"
    ]
    if not searched.complete:
        lines.append("          The search ran out of work: there may be a smaller circuit.")
    within = ", ".join(f"{level.nodes:,} with KL {level.kl:.2f} and {level.share:.2f} of D" for level in explanation.levels[:-1])
    lines += _wrap("          ", f"Within it {within}.", width) if within else []
    shown = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:LISTED_NODES]
    inputs: dict[str, list[ExplainedEdge]] = {}
    for edge in explanation.edges:  # strongest first
        if abs(edge.effect) >= 0.005:
            inputs.setdefault(edge.target, []).append(edge)
    longest = max((len(node.name) for node in shown), default=0)
    if shown:
        lines.append(f"        {'node':<{longest}}    value     mean   effect   inputs")
    for position, token in enumerate(explanation.tokens):
        here = [node for node in explanation.nodes if node.position == position and node in shown]
        lines += [f"  {position:>3}  {quoted(token.text)}"] if here else []
        for node in here:
            value = f"{node.activation:+.2f}" if node.activation else "off"
            arrows = ", ".join(_input(edge, position) for edge in inputs.get(node.id, [])[:LISTED_EDGES])
            lines.append(
                f"        {node.name:<{longest}}  {value:>7}  {node.mean:>+7.2f}  {node.effect or 0:>+7.2f}   {arrows}".rstrip()
            )
            lines += [f"            {node.label}"] if node.label else []
    last = len(explanation.tokens) - 1
    answer = [_input(edge, last) for edge in explanation.edges if edge.kind in ("unembedding", "bigram")]
    whole = ", ".join(text.replace(" ", "\u00a0") for text in answer[:8])  # a node and its effect on one line
    lines += [line.replace("\u00a0", " ") for line in _wrap("        D from ", whole, width)]
    if len(explanation.nodes) > len(shown):
        lines.append(f"        and {len(explanation.nodes) - len(shown):,} nodes of smaller effect, which the JSON lists")
    return lines


def _input(edge: ExplainedEdge, position: int) -> str:
    name, _, at = edge.source.partition("@")
    return f"{name}{'' if at == str(position) else '@' + at} {edge.effect:+.2f}"


def _render_attention(explanation: Explanation, width: int) -> list[str]:
    if not explanation.attention:
        return ["ATTENTION No head of the circuit does anything for D."]
    left = explanation.attention_left_out + max(0, len(explanation.attention) - LISTED_HEADS)
    head = "What D loses when a head's nodes are deleted at a token; by its pattern alone; by its values alone."
    lines = [
        *_wrap("ATTENTION ", f"{head} {left:,} more heads at tokens have some effect.", width),
        "        head         effect  pattern   values   sink   reads",
    ]
    for head in explanation.attention[:LISTED_HEADS]:
        numbers = f"{head.effect:>+7.2f}  {head.pattern_effect:>+7.2f}  {head.value_effect:>+7.2f}  {head.sink:>5.2f}"
        reads = ", ".join(_read(explanation, read) for read in head.reads[:3] if read.weight >= 0.05)
        lines.append(f"        {f'L{head.layer}.head {head.head}@{head.query}':<11}  {numbers}   {reads}".rstrip())
        for read in head.reads[:1]:
            why = ", ".join(f"q*k[{term.channel}] {term.product:+.2f}" for term in read.terms[:3])
            moved = ", ".join(
                f"{term.node.partition('.')[2].partition('@')[0]} {term.effect:+.2f}" for term in read.moved[:3] if term.effect
            )
            text = f"@{read.position} by {why or 'no channel'}; moves {moved or 'no node of the circuit'}"
            lines += textwrap.wrap(text, width, initial_indent=" " * 12, subsequent_indent=" " * 14)
    return lines


def _read(explanation: Explanation, read: Read) -> str:
    return f"{quoted(explanation.tokens[read.position].text)}@{read.position} {read.weight:.2f}"


def _render_evidence(explanation: Explanation, width: int) -> list[str]:
    faith, measures = explanation.faithfulness, explanation.faithfulness.measures
    if faith.profile_interval is not None:
        low, high = faith.profile_interval
        told = replace(faith.profile, note=f"95% interval {low:.2f} to {high:.2f}, p {faith.profile_p:.2g}; {faith.profile.note}")
        measures = tuple(told if measure is faith.profile else measure for measure in measures)
    return evidence(measures, width)


def _wrap(head: str, text: str, width: int, below: str | None = None) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=head, subsequent_indent=" " * len(head) if below is None else below)


def quoted(text: str) -> str:
    """Text as Python would write it, so that spaces, newlines and quotes can be seen."""
    return repr(text)


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "\u2026"


# -- in a notebook ------------------------------------------------------------------------------------------------------------


def render_html(explanation: Explanation) -> str:
    """The explanation as a piece of HTML: answer, verdict, what D owes to nodes at each token, nodes, evidence."""
    faithfulness, counts = explanation.faithfulness, explanation.counts
    effects = [0.0] * len(explanation.tokens)
    for node in explanation.nodes:
        effects[node.position] += abs(node.effect or 0)
    most = max(effects) or 1.0
    shaded = "".join(display.token(each.text, effect / most) for each, effect in zip(explanation.tokens, effects, strict=True))
    strongest = sorted(explanation.nodes, key=lambda node: -abs(node.effect or 0))[:LISTED_NODES]
    largest = max((abs(node.effect or 0) for node in strongest), default=0) or 1.0
    nodes = [
        (
            node.name,
            f"{node.position} {quoted(explanation.tokens[node.position].text)}",
            f"{node.activation:+.2f}",
            display.Cell(f"{node.effect or 0:+.2f}", (node.effect or 0) / largest),
            node.label or "",
        )
        for node in strongest
    ]
    answers = (
        _answer_row("dense", explanation.dense, explanation.dense_difference),
        _answer_row("sparse", explanation.sparse, explanation.sparse_difference),
    )
    size = f"circuit: {counts.nodes:,} nodes, {counts.edges:,} edges; the {len(nodes)} of largest effect"
    return display.card(
        _render_answer(explanation)[3].removeprefix("question").strip(),
        shaded,
        display.table(("", "answers", "D"), answers),
        f"{display.verdict(faithfulness.verdict)} {display.text(' '.join(faithfulness.reasons))}",
        display.fold(size, display.table(("node", "at", "value", "effect", ""), nodes)),
        display.fold("evidence", display.table(("", *EVIDENCE[1:]), (measure.row() for measure in faithfulness.measures))),
    )


def _answer_row(model: str, answers: tuple[Answer, ...], difference: float) -> tuple[str, str, str]:
    told = "  ".join(f"{quoted(each.token.text)} {each.probability:.1%}" for each in answers[:4])
    return model, told, f"{difference:+.2f}"

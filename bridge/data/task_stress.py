"""Stress prompts: a task's held-out pairs, changed in ways that the search has not seen, by rules that fit any task.

Each kind changes the text of both members of a pair in the same way; the result is tokenized and resolved again, as the task was:

    distractor   another pair's counterfactual, followed by its answer, is put before the prompt, on a line of its own
    context      a stretch of the coupling's held-out text, 16 to 48 tokens, is put before the prompt
    rename       one of the names is replaced everywhere by a name of another pair, in the answers too
    swap         two of the names are exchanged, in the answers too
    paraphrase   code: all lines are indented by four more spaces, or follow a comment; other text: it follows a lead-in

Names are those that filled the template; without a template (a user's task), the words in both members of the pair but not in
every pair. A kind that does not fit a pair (fewer than two names, too long for the context, unequal lengths) is skipped for it.

Shape legend: b row of text, t token.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bridge.data.task_pairs import Example, Task
from bridge.data.task_tokens import TokenPairs, resolve
from bridge.huggingface.prompts import Prompts

MAX_PROMPTS = 240  # maximum over all kinds; both members of a pair count
STRETCH_TOKENS = (16, 48)  # tokens of held-out text
LEAD_INS = ("As was said before: ", "It is known, and often told: ", "Note the following. ", "Here is what happened. ")
COMMENTS = ("# as before", "# see below", "# not used elsewhere", "# TODO: tidy")
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]+")

Rule = Callable[[Example, random.Random], Example | None]


@dataclass(frozen=True, eq=False)
class Stress:
    """Pairs of one kind, and for each the index of the held-out pair that it was made from."""

    pairs: TokenPairs
    source_b: Tensor

    def __len__(self) -> int:
        return len(self.pairs)


def stress_pairs(
    pairs: TokenPairs, prompts: Prompts, reference_bt: Tensor, context: int, *, language: str = "python", seed: int = 0
) -> dict[str, Stress]:
    """Return stress pairs by kind, in numbers as equal as possible; a kind that fits no pair is left out."""
    examples = pairs.examples
    rules = _rules(examples, _is_code(examples, language), _held_out_stretches(prompts, reference_bt, seed))
    wanted = MAX_PROMPTS // 2
    found: dict[str, Stress] = {}
    for kind, rule in rules.items():
        generator = random.Random(f"{seed} {kind}")
        order = generator.sample(range(len(examples)), len(examples))
        made = _drop_duplicates(((index, rule(examples[index], generator)) for index in order), examples)
        task = Task(kind, language, kind, {"test": tuple(made)}, {"test": wanted})
        resolved = resolve(task, prompts, context=context, splits=("test",)).splits["test"]
        if len(resolved):
            found[kind] = Stress(resolved, torch.tensor([made[example] for example in resolved.examples]))
    sizes = {kind: len(some) for kind, some in found.items()}
    while sum(sizes.values()) > wanted:  # shorten the largest kinds
        sizes = {kind: min(size, max(sizes.values()) - 1) for kind, size in sizes.items()}
    return {kind: Stress(found[kind].pairs.rows(torch.arange(n)), found[kind].source_b[:n]) for kind, n in sizes.items()}


def _drop_duplicates(made: Iterable[tuple[int, Example | None]], known: Sequence[Example]) -> dict[Example, int]:
    """Return the new examples, each once, and for each the index of the pair that it was made from."""
    seen = {example.prompt for example in known} | {example.counterfactual for example in known}
    new: dict[Example, int] = {}
    for index, example in made:
        if example is not None and example.prompt != example.counterfactual and example.prompt not in seen:
            seen |= {example.prompt, example.counterfactual}
            new[replace(example, spans=(), template="", variants=())] = index
    return new


def _rules(examples: Sequence[Example], code: bool, stretches: Sequence[str]) -> Mapping[str, Rule]:
    names = {example: _names(example, examples) for example in examples}
    pool = sorted({name for some in names.values() for name in some})

    def distractor(example: Example, generator: random.Random) -> Example | None:
        other = generator.choice(examples)
        if other is example:
            return None
        answer = other.wrong[0] if other.wrong else ""
        return _prepend(example, f"{other.counterfactual}{answer}\n")

    def context(example: Example, generator: random.Random) -> Example | None:
        return _prepend(example, f"{generator.choice(stretches)}\n") if stretches else None

    def rename(example: Example, generator: random.Random) -> Example | None:
        own, texts = names[example], (example.prompt, example.counterfactual, *example.answer, *example.wrong)
        used = {word for text in texts for word in _WORD.findall(text)}
        others = [name for name in pool if name not in used]
        if not own or not others:
            return None
        return _replace_names(example, {generator.choice(own): generator.choice(others)})

    def swap(example: Example, generator: random.Random) -> Example | None:
        own = names[example]
        if len(own) < 2:
            return None
        first, second = generator.sample(own, 2)
        return _replace_names(example, {first: second, second: first})

    def paraphrase(example: Example, generator: random.Random) -> Example | None:
        if not code:
            return _prepend(example, generator.choice(LEAD_INS))
        if generator.random() < 0.5:
            return _map_prompts(example, lambda text: "    " + text.replace("\n", "\n    "))
        indent = re.match(r" *", example.prompt)
        return _prepend(example, f"{indent.group() if indent else ''}{generator.choice(COMMENTS)}\n")

    return {"distractor": distractor, "context": context, "rename": rename, "swap": swap, "paraphrase": paraphrase}


def _map_prompts(example: Example, change: Callable[[str], str]) -> Example:
    return replace(example, prompt=change(example.prompt), counterfactual=change(example.counterfactual))


def _prepend(example: Example, text: str) -> Example:
    return _map_prompts(example, lambda prompt: f"{text}{prompt}")


def _replace_names(example: Example, names: Mapping[str, str]) -> Example:
    """Return the example with all given names replaced at once, wherever they are whole words."""
    found = re.compile("|".join(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])" for name in names))

    def change(text: str) -> str:
        return found.sub(lambda match: names[match[0]], text)

    answer, wrong = (tuple(map(change, side)) for side in (example.answer, example.wrong))
    return replace(_map_prompts(example, change), answer=answer, wrong=wrong)


def _names(example: Example, examples: Sequence[Example]) -> list[str]:
    """Return a pair's names: those that filled its template, or else the words of both members that not all pairs have."""
    if labelled := [span for span in example.spans if span.label != "differs"]:
        return sorted({example.prompt[slice(*span.prompt)] for span in labelled})
    words = set(_WORD.findall(example.prompt)) & set(_WORD.findall(example.counterfactual))
    common = set.intersection(*(set(_WORD.findall(other.prompt)) for other in examples))
    return sorted(words - common)


def _is_code(examples: Sequence[Example], language: str) -> bool:
    return language == "python" or any("\n" in example.prompt for example in examples)


def _held_out_stretches(prompts: Prompts, reference_bt: Tensor, seed: int) -> list[str]:
    """Return stretches of held-out text, cut to whole lines if they have more than three lines."""
    generator = random.Random(f"{seed} stretches")
    special, found = prompts.special, []
    for row_t in reference_bt[:64].tolist():
        ids = [token for token in row_t if token not in special]
        length = generator.randint(*STRETCH_TOKENS)
        start = generator.randrange(max(1, len(ids) - length))
        text = prompts.decode(ids[start : start + length])
        lines = text.split("\n")
        text = "\n".join(lines[1:-1]) if len(lines) > 3 else text
        if text.strip():
            found.append(text)
    return found

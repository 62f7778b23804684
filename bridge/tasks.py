"""Tasks as data: contrast pairs of text, their tokens under any tokenizer, and how well a model does on them.

    load_task   a built-in task's templates and names, or a user's file -> Task: pairs of text, by split
    resolve     Task, tokenizer -> Resolved: per split the TokenPairs that are left, and what was dropped and why
    score       model, TokenPairs -> Scores

A pair is a prompt and a counterfactual prompt of as many tokens; the answer of the one is the wrong answer of the other. An
answer is read at the first token that tells the two apart, and is a set of tokens where it has several spellings:

    D = log sum over answer of exp(logit) - log sum over wrong of exp(logit)     right: D > 0     two-way loss: softplus(-D) nats

How a pair is resolved, whatever the tokenizer: the prompt is tokenized with each spelling after it. Spellings before which its
own tokens change do not count; where that is all of an answer's, the quotes, spaces and other marks at its end are left to the
answers until they change no more. The tokens that all spellings share are appended to the prompt, and the next ones are the
answer's and the wrong answer's. The pair is dropped where these are no two sets, or other ones after the counterfactual, and
where the two members are not equally long.

Shape legend: b pair (row), t token, k token ids of an answer, v vocabulary.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bridge.recipe import UserError
from bridge.residual import ResidualModel
from bridge.templates import EARLIER, LATER, NAMES, POOLS, TASKS, Templates

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
PAIRS: Mapping[Split, int] = {"train": 256, "validation": 64, "test": 128}
SPARE = 4  # times as many pairs are generated, for a tokenizer to choose from
HELD_OUT = 0.25  # share of the names, and about of the templates, that validation has for itself, and test
_PIECE = re.compile(r"«([^|»]*)\|([^»]*)»|\$([A-Za-z])|([^«$]+)")
_FILLER = re.compile(r"⟦([^⟧]*)⟧")
_MOVABLE = 8  # marks at the end of a prompt that may be left to the answer
_LOGITS = 2**26  # at most in a batch that is scored


class TaskError(UserError):
    """A task that cannot be used, in one line that names the file and line, the rule and the remedy."""


@dataclass(frozen=True)
class Span:
    """A labelled part of a pair, as half-open ranges of characters in the prompt and in the counterfactual.

    The label is a name's placeholder ("a"), or "differs" for what tells the two prompts apart.
    """

    label: str
    prompt: tuple[int, int]
    counterfactual: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A contrast pair: the spellings of the right answer after the prompt, and of the wrong one, the counterfactual's answer.

    An empty `answer` or `wrong` (not both) is whatever is not the other one: " not" after `elif`, where `else` has ":". The
    variants are the same pair with other filling words, one of which may be equally long where this one is not; template is what
    a generated pair was made from, or "".
    """

    prompt: str
    counterfactual: str
    answer: tuple[str, ...]
    wrong: tuple[str, ...]
    spans: tuple[Span, ...] = ()
    template: str = ""
    variants: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task: pairs of text by split. Generated ones are more than `wanted`, since no tokenizer suits all of them.

    No name and no template of a built-in task is in two splits, no prompt of a user's.
    """

    name: str
    language: str
    about: str
    examples: Mapping[Split, tuple[Example, ...]]
    wanted: Mapping[Split, int]


@dataclass(frozen=True)
class TokenSpan:
    """A labelled part of a pair, as half-open ranges of tokens in the prompt and in the counterfactual."""

    label: str
    prompt: tuple[int, int]
    counterfactual: tuple[int, int]


@dataclass(frozen=True)
class TokenPairs:
    """Pairs as tokens. Both members of row b have last_b + 1 tokens, padded on the right; the answer is read at last_b.

    prompt_bt, counterfactual_bt  int64
    last_b                        int64, position of the last token
    answer_bk, wrong_bk           int64, ids of the first token that tells answer from wrong, -1 where there are fewer than k
    answer_not_b, wrong_not_b     bool: the side is every token but the ids listed for it
    examples, spans               row by row, what the tokens are of
    """

    prompt_bt: Tensor
    counterfactual_bt: Tensor
    last_b: Tensor
    answer_bk: Tensor
    wrong_bk: Tensor
    answer_not_b: Tensor
    wrong_not_b: Tensor
    examples: tuple[Example, ...]
    spans: tuple[tuple[TokenSpan, ...], ...]

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.last_b)

    def to(self, device: Any) -> TokenPairs:
        """The pairs on a device."""
        return replace(self, **{name: value.to(device) for name, value in self._tensors().items()})

    def rows(self, row_b: Tensor) -> TokenPairs:
        """Some of the pairs, by index, no longer than they need to be."""
        indices = row_b.tolist()
        few = {name: value[row_b.to(value.device)] for name, value in self._tensors().items()}
        longest = int(few["last_b"].max()) + 1 if indices else 0
        for name in ("prompt_bt", "counterfactual_bt"):
            few[name] = few[name][:, :longest]
        kept = tuple(self.examples[index] for index in indices)
        return replace(self, **few, examples=kept, spans=tuple(self.spans[index] for index in indices))

    def swapped(self) -> TokenPairs:
        """Every pair the other way round: the counterfactual as the prompt, the wrong answer as the right one."""
        return TokenPairs(
            prompt_bt=self.counterfactual_bt,
            counterfactual_bt=self.prompt_bt,
            last_b=self.last_b,
            answer_bk=self.wrong_bk,
            wrong_bk=self.answer_bk,
            answer_not_b=self.wrong_not_b,
            wrong_not_b=self.answer_not_b,
            examples=tuple(_swapped(example) for example in self.examples),
            spans=tuple(tuple(TokenSpan(s.label, s.counterfactual, s.prompt) for s in spans) for spans in self.spans),
        )

    def both(self) -> TokenPairs:
        """Both members of every pair as prompts: the pairs, then the pairs swapped."""
        other = self.swapped()
        tensors = {name: torch.cat([value, getattr(other, name)]) for name, value in self._tensors().items()}
        return TokenPairs(**tensors, examples=self.examples + other.examples, spans=self.spans + other.spans)

    def at_last(self, logits_btv: Tensor) -> Tensor:
        """logits_bv where the answers are read."""
        return logits_btv[torch.arange(len(self), device=logits_btv.device), self.last_b]

    def difference(self, logits_bv: Tensor) -> Tensor:
        """D_b of the prompts: the log of the odds of answer against wrong; the logit difference where each is one token."""
        logits_bv = logits_bv.float()
        return _pooled(logits_bv, self.answer_bk, self.answer_not_b) - _pooled(logits_bv, self.wrong_bk, self.wrong_not_b)

    def loss(self, logits_bv: Tensor) -> Tensor:
        """Two-way loss per prompt in nats, loss_b = -log p(answer) / (p(answer) + p(wrong)); chance is log 2."""
        return F.softplus(-self.difference(logits_bv))

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}


@dataclass(frozen=True)
class Resolved:
    """A task under a tokenizer: the pairs that are left by split, how many were looked at, and why others were dropped."""

    task: str
    language: str
    splits: Mapping[Split, TokenPairs]
    seen: int
    dropped: Mapping[str, int]

    @property
    def drop_rate(self) -> float:
        """Share of the pairs looked at that were dropped."""
        return sum(self.dropped.values()) / self.seen if self.seen else 0.0


@dataclass(frozen=True)
class Scores:
    """A model on pairs, both members of each scored: share answered right, two-way loss in nats per prompt, mean D in logits."""

    accuracy: float
    loss: float
    difference: float
    pairs: int


# -- tasks of text ------------------------------------------------------------------------------------------------------


def task_names(language: str | None = None) -> tuple[str, ...]:
    """The built-in tasks, of one language or of all. Raises TaskError for a language that has none."""
    names = tuple(task.name for task in TASKS if language in (None, task.language))
    if not names:
        languages = ", ".join(dict.fromkeys(task.language for task in TASKS))
        raise TaskError(f"there are no tasks in the language {language!r}; there are some in {languages}")
    return names


def load_task(name_or_path: str | Path, *, seed: int = 0) -> Task:
    """A built-in task, generated by the seed, or a user's from a .jsonl, .yaml or .yml file. Raises TaskError."""
    for templates in TASKS:
        if templates.name == str(name_or_path):
            return _generated(templates, seed)
    path = Path(name_or_path)
    if path.suffix in (".jsonl", ".yaml", ".yml"):
        return _users(path, seed)
    if path.exists():
        raise TaskError(f"{str(path)!r} is no task file; a task is a file of examples whose name ends in .jsonl, .yaml or .yml")
    near = get_close_matches(str(name_or_path), task_names(), 1)
    remedy = (
        f"did you mean {near[0]!r}?" if near else "`bridge tasks` lists those there are; a file's name ends in .jsonl or .yaml"
    )
    raise TaskError(f"there is no task {str(name_or_path)!r}; {remedy}")


def _generated(templates: Templates, seed: int) -> Task:
    words = _words(seed)
    texts = random.Random(f"{seed} {templates.name}").sample(templates.texts, len(templates.texts))
    held = max(1, round(HELD_OUT * len(texts)))
    share: dict[Split, list[str]] = {"validation": texts[:held], "test": texts[held : 2 * held], "train": texts[2 * held :]}
    pairs: dict[Split, tuple[Example, ...]] = {
        split: tuple(_drawn(templates, share[split], words[split], SPARE * PAIRS[split], seed)) for split in SPLITS
    }
    return Task(templates.name, templates.language, templates.about, pairs, PAIRS)


@lru_cache(maxsize=4)
def _words(seed: int) -> Mapping[Split, Mapping[str, tuple[str, ...]]]:
    """The words of every pool by split; a word that is in two pools is in the same split in both."""
    split_of: dict[str, Split] = {}
    for pool, words in POOLS.items():
        shuffled = random.Random(f"{seed} {pool}").sample(words, len(words))
        held = round(HELD_OUT * len(words))
        for index, word in enumerate(shuffled):
            split_of.setdefault(word, "validation" if index < held else "test" if index < 2 * held else "train")
    return {split: {pool: tuple(w for w in ws if split_of[w] == split) for pool, ws in POOLS.items()} for split in SPLITS}


def _drawn(
    templates: Templates, texts: Sequence[str], words: Mapping[str, tuple[str, ...]], wanted: int, seed: int
) -> Iterator[Example]:
    """At most `wanted` different pairs, the templates in turn, either prompt of a pair coming first by chance."""
    generator = random.Random(f"{seed} {templates.name} {texts}")
    seen: set[tuple[str, str]] = set()
    for attempt in range(4 * wanted):
        if len(seen) == 2 * wanted:
            return
        text = texts[attempt % len(texts)]
        names = _names(text, templates, words, generator)
        # a filler is in neither prompt, or in one of them
        pair, *variants = [
            _pair(templates, text, re.sub(_FILLER, filled, text), names)
            for filled in (("", r"«\1|»", r"«|\1»") if _FILLER.search(text) else ("",))
        ]
        if (pair.prompt, pair.counterfactual) not in seen:
            seen |= {(pair.prompt, pair.counterfactual), (pair.counterfactual, pair.prompt)}
            pair = replace(pair, variants=tuple(variants))
            yield _swapped(pair) if generator.random() < 0.5 else pair


def _pair(templates: Templates, template: str, text: str, names: Mapping[str, str]) -> Example:
    prompt, counterfactual, spans = _filled(text, names)
    first, second = (_spellings(side, names) for side in (templates.first, templates.second))
    return Example(prompt, counterfactual, first, second, spans, template)


def _names(text: str, templates: Templates, words: Mapping[str, tuple[str, ...]], generator: random.Random) -> dict[str, str]:
    names: dict[str, str] = {}
    for letter in dict.fromkeys(re.findall(r"\$([A-Za-z])", " ".join((text, *templates.first, *templates.second)))):
        choices = [word for pool in NAMES[letter] for word in words[pool] if word not in names.values()]
        names[letter] = generator.choice(choices)
    return names


def _filled(text: str, names: Mapping[str, str]) -> tuple[str, str, tuple[Span, ...]]:
    """Both prompts of a template, and where its names and its branches lie in them."""
    prompt = counterfactual = ""
    spans = []
    for piece in _PIECE.finditer(text):
        first, second, name, same = piece.groups()
        if name:
            first = second = names[name]
        elif same:
            first = second = same
        else:
            first, second = (re.sub(r"\$([A-Za-z])", lambda letter: names[letter[1]], branch) for branch in (first, second))
        if not same:
            at = (len(prompt), len(prompt) + len(first)), (len(counterfactual), len(counterfactual) + len(second))
            spans.append(Span(name or "differs", *at))
        prompt, counterfactual = prompt + first, counterfactual + second
    return prompt, counterfactual, tuple(spans)


def _spellings(side: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
    if side == (LATER,):
        return tuple(f"{year:02}" for year in range(100) if year // 10 > int(names["y"]) // 10)
    if side == (EARLIER,):
        return tuple(f"{year:02}" for year in range(100) if year // 10 < int(names["y"]) // 10)
    return tuple(re.sub(r"\$([A-Za-z])", lambda letter: names[letter[1]], spelling) for spelling in side)


def _swapped(example: Example) -> Example:
    spans = tuple(Span(span.label, span.counterfactual, span.prompt) for span in example.spans)
    return replace(
        example,
        prompt=example.counterfactual,
        counterfactual=example.prompt,
        answer=example.wrong,
        wrong=example.answer,
        spans=spans,
        variants=tuple(_swapped(variant) for variant in example.variants),
    )


# -- a user's file ------------------------------------------------------------------------------------------------------


def _users(path: Path, seed: int) -> Task:
    entries = list(_entries(path))
    if not entries:
        raise TaskError(f"{path} has no examples; give one per line" + ("" if path.suffix == ".jsonl" else ", each after a dash"))
    examples: list[Example] = []
    splits: list[Split | None] = []
    line_of: dict[str, int] = {}
    for line, values in entries:
        where = f"{path}, line {line}"
        example, split = _example(values, where)
        for text in (example.prompt, example.counterfactual):
            if text in line_of:
                raise TaskError(f"{where}: the prompt {_short(text)} is in line {line_of[text]} already; keep one of the two")
            line_of[text] = line
        if splits and (split is None) != (splits[0] is None):
            given, other = ("none", "has one") if split is None else ("one", "has none")
            raise TaskError(f"{where}: it has {given} of split, line {entries[0][0]} {other}; give a split to all or to none")
        examples.append(example)
        splits.append(split)
    if splits[0] is None:
        splits = _shared_out(path, len(examples), seed)
    by_split: dict[Split, tuple[Example, ...]] = {
        split: tuple(example for example, its in zip(examples, splits, strict=True) if its == split) for split in SPLITS
    }
    about = f"{len(examples)} examples of {path.name}"
    return Task(path.stem, "user", about, by_split, {split: len(some) for split, some in by_split.items()})


def _shared_out(path: Path, count: int, seed: int) -> list[Split | None]:
    if count < len(SPLITS):
        raise TaskError(f"{path} has {count} examples, too few to split in three; add some, or give each a split")
    held = max(1, round(HELD_OUT * count))
    order = random.Random(f"{seed} split").sample(range(count), count)
    return [SPLITS[1 if place < held else 2 if place < 2 * held else 0] for place in order]


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every example of a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise TaskError(f"there is no file {str(path)!r}; give the path of a task file, or the name of a built-in task") from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except json.JSONDecodeError as error:
                    raise TaskError(f"{path}, line {number}: not JSON ({error.msg}); write one object per line") from None
        return
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise TaskError(f"{path}, line 1: not a list; begin each example with a dash")
        for node in root.value:
            yield node.start_mark.line + 1, loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise TaskError(f"{path}{line}: not YAML ({error.problem}); quote texts that have marks in them") from None
    except yaml.YAMLError as error:
        raise TaskError(f"{path}: not YAML ({' '.join(str(error).split())}); remove what is not text") from None


_KEYS = ("prompt", "counterfactual", "answer", "answers", "wrong", "wrongs", "split")


def _example(values: Any, where: str) -> tuple[Example, Split | None]:
    if not isinstance(values, dict):
        raise TaskError(f"{where}: {_short(values)} is no example; write prompt, counterfactual, answer and wrong as keys")
    for key in values:
        if key not in _KEYS:
            near = get_close_matches(str(key), _KEYS, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(_KEYS)}"
            raise TaskError(f"{where}: there is no key {key!r}; {remedy}")
    prompts = []
    for key in ("prompt", "counterfactual"):
        if key not in values:
            raise TaskError(f"{where}: there is no {key}; a pair needs both prompts, add it")
        prompts.append(_text(values[key], key, where))
    if prompts[0] == prompts[1]:
        raise TaskError(f"{where}: prompt and counterfactual are the same; change what decides the answer")
    answer, wrong = _side(values, "answer", "wrong", where), _side(values, "wrong", "answer", where)
    if not answer and not wrong:
        raise TaskError(f"{where}: answers and wrongs are each what the other is not; spell one of them out")
    for spelling in answer:
        if spelling in wrong:
            raise TaskError(f"{where}: {spelling!r} is both an answer and a wrong one; remove it from one of them")
    split = values.get("split")
    if "split" in values and split not in SPLITS:
        raise TaskError(f"{where}: there is no split {_short(split)}; it is one of {', '.join(SPLITS)}")
    prompt, counterfactual = prompts
    return Example(prompt, counterfactual, answer, wrong, _difference(prompt, counterfactual)), split


def _side(values: dict, one: str, other: str, where: str) -> tuple[str, ...]:
    """The spellings of an answer, given as `answer` or `answers`; none where it is whatever the other is not."""
    several = f"{one}s"
    if one in values and several in values:
        raise TaskError(f"{where}: there are both {one} and {several}; keep one of them")
    if one in values:
        return (_text(values[one], one, where),)
    if several not in values:
        raise TaskError(f"{where}: there is no {one}; give {one}, or {several}: a list of spellings, or 'not {other}s'")
    given = values[several]
    if given == f"not {other}s":
        return ()
    if not isinstance(given, list) or not given:
        raise TaskError(f"{where}: {several} is {_short(given)}, not a list of spellings; write some, or 'not {other}s'")
    return tuple(dict.fromkeys(_text(spelling, several, where) for spelling in given))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where}: {key} has {_short(value)}, which is not text; put it in quotes")
    if not value:
        raise TaskError(f"{where}: {key} has an empty text; write what it is")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _difference(prompt: str, counterfactual: str) -> tuple[Span, ...]:
    """One span: from where the prompts part to where they are the same again."""
    shortest = min(len(prompt), len(counterfactual))
    start = next((index for index in range(shortest) if prompt[index] != counterfactual[index]), shortest)
    same = next((i for i in range(shortest - start) if prompt[-1 - i] != counterfactual[-1 - i]), shortest - start)
    return (Span("differs", (start, len(prompt) - same), (start, len(counterfactual) - same)),)


# -- tokens -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Read:
    """A prompt's tokens, and the first tokens of the answer and of the wrong answer after them; none: not those of the other."""

    tokens: tuple[int, ...]
    answer: frozenset[int]
    wrong: frozenset[int]


def resolve(
    task: Task,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    context: int | None = None,
    splits: Sequence[Split] = SPLITS,
) -> Resolved:
    """The pairs of a task as tokens, of at most `context` each, by split; a split is empty where nothing is left.

    Of a template's pairs those with names of few tokens come first, the templates in turn, until there are as many as the task
    wants. Raises TaskError where there is no tokenizer.
    """
    if tokenizer is None:
        raise TaskError(f"task {task.name!r} is text, and the model has no tokenizer; load it with one")
    seen, dropped = 0, Counter[str]()
    resolved: dict[Split, TokenPairs] = {}
    for split in splits:
        rows = []
        for example in _in_order(task.examples[split], tokenizer):
            if len(rows) == task.wanted[split]:
                break
            seen += 1
            reason = ""
            for variant in (example, *example.variants):
                reads = _resolved(variant, tokenizer, context)
                if not isinstance(reads, str):
                    rows.append((variant, *reads, _token_spans(variant, reads, tokenizer)))
                    break
                reason = reason or reads
            else:
                dropped[reason] += 1
        resolved[split] = _tensors(rows)
    return Resolved(task.name, task.language, resolved, seen, dict(dropped))


def _in_order(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[Example]:
    """A user's examples as they are; of generated ones the templates in turn, each beginning with its names of fewest tokens."""
    if not any(example.template for example in examples):
        yield from examples
        return
    names = {example: [example.prompt[slice(*s.prompt)] for s in example.spans if s.label != "differs"] for example in examples}
    words = list({name for some in names.values() for name in some})
    plain, spaced = _encoded(words, tokenizer), _encoded([f" {word}" for word in words], tokenizer)
    tokens = {word: max(len(a), len(b)) for word, a, b in zip(words, plain, spaced, strict=True)}
    by_template: dict[str, list[Example]] = {}
    for example in examples:
        by_template.setdefault(example.template, []).append(example)
    queues = [sorted(some, key=lambda example: sum(tokens[name] for name in names[example])) for some in by_template.values()]
    for row in zip_longest(*queues):
        yield from (example for example in row if example is not None)


def _resolved(example: Example, tokenizer: PreTrainedTokenizerBase, context: int | None) -> tuple[_Read, _Read] | str:
    """Both members of a pair, or why it is dropped."""
    prompt = _read(example.prompt, example.answer, example.wrong, tokenizer)
    counterfactual = _read(example.counterfactual, example.wrong, example.answer, tokenizer)
    if isinstance(prompt, str) or isinstance(counterfactual, str):
        return prompt if isinstance(prompt, str) else str(counterfactual)
    if len(prompt.tokens) != len(counterfactual.tokens):
        return "unequal length"
    if context is not None and len(prompt.tokens) > context:
        return "longer than the context"
    if prompt.tokens == counterfactual.tokens or (prompt.answer, prompt.wrong) != (counterfactual.wrong, counterfactual.answer):
        return "ambiguous"
    return prompt, counterfactual


def _read(prompt: str, answer: tuple[str, ...], wrong: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> _Read | str:
    moved = _movable(prompt) if answer and wrong else 0  # what is not an answer cannot be told from a mark before it
    heads = [prompt[: len(prompt) - n] for n in range(moved + 1)]
    encoded = _encoded([*(prompt + spelling for spelling in (*answer, *wrong)), *heads], tokenizer)
    sides = encoded[: len(answer)], encoded[len(answer) : len(answer) + len(wrong)]
    for head in encoded[len(answer) + len(wrong) :]:
        right, left = ([ids for ids in side if ids[: len(head)] == head and len(ids) > len(head)] for side in sides)
        if head and bool(right) == bool(answer) and bool(left) == bool(wrong):
            break
    else:
        return "no stable prompt"
    start = _shared(right + left) if right and left else len(head)
    firsts = [frozenset(ids[start] for ids in side if len(ids) > start) for side in (right, left)]
    if firsts[0] & firsts[1] or bool(firsts[0]) != bool(answer) or bool(firsts[1]) != bool(wrong):
        return "ambiguous"
    return _Read(tuple((right or left)[0][:start]), *firsts)


def _movable(prompt: str) -> int:
    """How many marks, quotes and spaces a prompt ends with, and may leave to its answer."""
    return min(len(prompt) - len(re.sub(r"\W+\Z", "", prompt)), _MOVABLE)


def _shared(rows: list[list[int]]) -> int:
    """How many tokens all rows begin with."""
    low, high = min(rows), max(rows)  # any row lies between these two
    return next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))


def _encoded(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens as the model is given them: with what the tokenizer puts before a text, without what it puts after."""
    ends: list[Any] = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    rows: Any = tokenizer(texts)["input_ids"]
    return [row[:-1] if row and row[-1] in ends else row for row in rows]


def _token_spans(example: Example, reads: tuple[_Read, _Read], tokenizer: PreTrainedTokenizerBase) -> tuple[TokenSpan, ...]:
    """The spans in tokens; none where the tokenizer cannot say what characters its tokens are of."""
    if not tokenizer.is_fast:
        return ()
    offsets: Any = tokenizer([example.prompt, example.counterfactual], return_offsets_mapping=True)["offset_mapping"]
    rows = [row[: len(read.tokens)] for row, read in zip(offsets, reads, strict=True)]
    return tuple(TokenSpan(s.label, _tokens(s.prompt, rows[0]), _tokens(s.counterfactual, rows[1])) for s in example.spans)


def _tokens(span: tuple[int, int], offsets: list[tuple[int, int]]) -> tuple[int, int]:
    """The half-open range of the tokens that have characters of a span."""
    touching = [index for index, (start, end) in enumerate(offsets) if start < span[1] and end > span[0] and start < end]
    if touching:
        return touching[0], touching[-1] + 1
    after = sum(end <= span[0] for _, end in offsets)
    return after, after


def _tensors(rows: Sequence[tuple[Example, _Read, _Read, tuple[TokenSpan, ...]]]) -> TokenPairs:
    prompts, counterfactuals = [row[1].tokens for row in rows], [row[2].tokens for row in rows]
    answers, wrongs = [sorted(row[1].answer) for row in rows], [sorted(row[1].wrong) for row in rows]
    # what is not the other one is listed by the other one's ids
    listed = [(answer or wrong, wrong or answer) for answer, wrong in zip(answers, wrongs, strict=True)]
    return TokenPairs(
        prompt_bt=_padded(prompts, 0),
        counterfactual_bt=_padded(counterfactuals, 0),
        last_b=torch.tensor([len(tokens) - 1 for tokens in prompts], dtype=torch.int64),
        answer_bk=_padded([answer for answer, _ in listed], -1),
        wrong_bk=_padded([wrong for _, wrong in listed], -1),
        answer_not_b=torch.tensor([not answer for answer in answers], dtype=torch.bool),
        wrong_not_b=torch.tensor([not wrong for wrong in wrongs], dtype=torch.bool),
        examples=tuple(row[0] for row in rows),
        spans=tuple(row[3] for row in rows),
    )


def _padded(rows: Sequence[Sequence[int]], padding: int) -> Tensor:
    longest = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[padding] * (longest - len(row))] for row in rows], dtype=torch.int64).view(len(rows), longest)


# -- scores -------------------------------------------------------------------------------------------------------------


def _pooled(logits_bv: Tensor, ids_bk: Tensor, not_b: Tensor) -> Tensor:
    """The log of the summed exp of the listed tokens' logits, or of all others' where not_b."""
    listed_bk = logits_bv.gather(1, ids_bk.clamp(min=0)).masked_fill(ids_bk < 0, -torch.inf)
    pooled_b = listed_bk.logsumexp(-1)
    if not bool(not_b.any()):
        return pooled_b
    first_bk = torch.where(ids_bk < 0, ids_bk[:, :1], ids_bk)  # a row lists one id at least
    others_b = logits_bv.scatter(1, first_bk, -torch.inf).logsumexp(-1)
    return torch.where(not_b, others_b, pooled_b)


@torch.no_grad()
def score(model: ResidualModel, pairs: TokenPairs) -> Scores:
    """How well a model does on pairs, which are on its device. Raises TaskError where there are none."""
    if not len(pairs):
        raise TaskError("there are no pairs to score; take another split, or a tokenizer that the task's prompts suit")
    prompts = pairs.both()
    rows = max(1, min(64, _LOGITS // (prompts.prompt_bt.shape[1] * model.vocabulary)))
    differences = []
    for row_b in prompts.last_b.argsort(stable=True).split(rows):  # those of a length together: little is padded
        some = prompts.rows(row_b)
        differences.append(some.difference(some.at_last(model.run(some.prompt_bt).logits_btv)))
    difference_b = torch.cat(differences).double()
    loss = float(F.softplus(-difference_b).mean())
    return Scores(float((difference_b > 0).double().mean()), loss, float(difference_b.mean()), len(pairs))

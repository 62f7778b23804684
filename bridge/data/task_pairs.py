"""Tasks as data: contrast pairs of text, by split; `task_tokens` turns them into tokens.

    load_task   a built-in task's templates and names, or a user's file -> Task: pairs of text, by split

A pair is a prompt and a counterfactual prompt; the right answer of each is the wrong answer of the other.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal

import yaml

from bridge.data.task_templates import EARLIER, LATER, POOLS, POOLS_BY_LETTER, Templates
from bridge.data.tasks_english import ENGLISH
from bridge.data.tasks_python import PYTHON
from bridge.errors import UserError
from bridge.recipe import encoding_fault

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TASKS: tuple[Templates, ...] = (*PYTHON, *ENGLISH)
PAIRS_PER_SPLIT: Mapping[Split, int] = {"train": 256, "validation": 64, "test": 128}
GENERATED_PER_WANTED = 4  # number of generated pairs per wanted pair, because a tokenizer does not suit all of them
HELD_OUT_FRACTION = 0.25  # fraction of the names, and roughly of the templates, that only validation has, and the same for test
_PIECE = re.compile(r"«([^|»]*)\|([^»]*)»|\$([A-Za-z])|([^«$]+)")
_FILLER = re.compile(r"⟦([^⟧]*)⟧")


class TaskError(UserError):
    """Error for a task that cannot be used: one line with the file and line, the rule and the remedy."""


@dataclass(frozen=True)
class Span:
    """A labelled part of a pair, as half-open character ranges in the prompt and in the counterfactual.

    The label is a name's placeholder ("a"), or "differs" for text that differs between the two prompts.
    """

    label: str
    prompt: tuple[int, int]
    counterfactual: tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A contrast pair: the spellings of the right answer after the prompt, and of the wrong one, the counterfactual's answer.

    An empty `answer` or `wrong` (not both) means any token that the other side does not list: after `elif`, any but the ":" of
    `else`. `variants` are the same pair with other filler words, of which one may have two equally long prompts if this one has
    not. `template` is the template of a generated pair, or "".
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
    """A task: pairs of text by split. More than `wanted` are generated, because a tokenizer does not suit all of them.

    No name and no template of a built-in task is in two splits, and no prompt of a user's task is.
    """

    name: str
    language: str
    about: str
    examples: Mapping[Split, tuple[Example, ...]]
    wanted: Mapping[Split, int]


# -- tasks as text ------------------------------------------------------------------------------------------------------


def task_names(language: str | None = None) -> tuple[str, ...]:
    """Return the names of the built-in tasks, of one language or of all. Raises TaskError for a language without tasks."""
    names = tuple(task.name for task in TASKS if language in (None, task.language))
    if not names:
        languages = ", ".join(dict.fromkeys(task.language for task in TASKS))
        raise TaskError(f"there are no tasks in the language {language!r}", remedy=f"use one of {languages}")
    return names


def load_task(name_or_path: str | Path, *, seed: int = 0) -> Task:
    """Return a built-in task, generated from the seed, or a user's task from a .jsonl, .yaml or .yml file. Raises TaskError."""
    for templates in TASKS:
        if templates.name == str(name_or_path):
            return _generate_task(templates, seed)
    path = Path(name_or_path)
    if path.suffix in (".jsonl", ".yaml", ".yml"):
        return _read_user_task(path, seed)
    if path.exists():
        remedy = "give a file of examples whose name ends in .jsonl, .yaml or .yml"
        raise TaskError(repr(str(path)), "is not a task file", remedy)
    otherwise = "run `bridge tasks` to list the built-in tasks, or give a file whose name ends in .jsonl or .yaml"
    raise TaskError(f"there is no task {str(name_or_path)!r}", remedy=_suggest_name(name_or_path, task_names(), otherwise))


def _suggest_name(name: object, known: Sequence[str], otherwise: str) -> str:
    near = get_close_matches(str(name), known, 1)
    return f"did you mean {near[0]!r}?" if near else otherwise


def _split_at(place: int, n_held_out: int) -> Split:
    """Return the split of an index in a shuffled order: validation comes first, then test, then train."""
    return "validation" if place < n_held_out else "test" if place < 2 * n_held_out else "train"


def _generate_task(templates: Templates, seed: int) -> Task:
    texts = random.Random(f"{seed} {templates.name}").sample(templates.texts, len(templates.texts))
    n_held_out = max(1, round(HELD_OUT_FRACTION * len(texts)))
    pairs: dict[Split, tuple[Example, ...]] = {}
    for split, words in _words(seed).items():
        its = [text for place, text in enumerate(texts) if _split_at(place, n_held_out) == split]
        pairs[split] = tuple(_draw_pairs(templates, its, words, GENERATED_PER_WANTED * PAIRS_PER_SPLIT[split], seed))
    return Task(templates.name, templates.language, templates.about, pairs, PAIRS_PER_SPLIT)


@lru_cache(maxsize=4)
def _words(seed: int) -> Mapping[Split, Mapping[str, tuple[str, ...]]]:
    """Return the words of each pool by split; a word that is in two pools is in the same split in both."""
    split_of: dict[str, Split] = {}
    for pool, words in POOLS.items():
        for place, word in enumerate(random.Random(f"{seed} {pool}").sample(words, len(words))):
            split_of.setdefault(word, _split_at(place, round(HELD_OUT_FRACTION * len(words))))
    return {split: {pool: tuple(w for w in ws if split_of[w] == split) for pool, ws in POOLS.items()} for split in SPLITS}


def _draw_pairs(
    templates: Templates, texts: Sequence[str], words: Mapping[str, tuple[str, ...]], wanted: int, seed: int
) -> Iterator[Example]:
    """Yield at most `wanted` different pairs, from the templates in turn, with the two prompts in random order."""
    generator = random.Random(f"{seed} {templates.name} {texts}")
    seen: set[tuple[str, str]] = set()
    for attempt in range(4 * wanted):
        if len(seen) == 2 * wanted:
            return
        text = texts[attempt % len(texts)]
        names = _draw_names(text, templates, words, generator)
        # one variant has the filler in neither prompt, the others in one of the two
        fillers = ("", r"«\1|»", r"«|\1»") if _FILLER.search(text) else ("",)
        pair, *variants = [_fill_template(templates, text, re.sub(_FILLER, filler, text), names) for filler in fillers]
        if (pair.prompt, pair.counterfactual) not in seen:
            seen |= {(pair.prompt, pair.counterfactual), (pair.counterfactual, pair.prompt)}
            pair = replace(pair, variants=tuple(variants))
            yield reverse_pair(pair) if generator.random() < 0.5 else pair


def _draw_names(
    text: str, templates: Templates, words: Mapping[str, tuple[str, ...]], generator: random.Random
) -> dict[str, str]:
    names: dict[str, str] = {}
    for letter in dict.fromkeys(re.findall(r"\$([A-Za-z])", " ".join((text, *templates.first, *templates.second)))):
        choices = [word for pool in POOLS_BY_LETTER[letter] for word in words[pool] if word not in names.values()]
        names[letter] = generator.choice(choices)
    return names


def _fill_template(templates: Templates, template: str, text: str, names: Mapping[str, str]) -> Example:
    """Return the pair made from a template by filling in `names`; `text` is the template with its fillers resolved."""
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
    answer, wrong = (_spellings(side, names) for side in (templates.first, templates.second))
    return Example(prompt, counterfactual, answer, wrong, tuple(spans), template)


def _spellings(side: tuple[str, ...], names: Mapping[str, str]) -> tuple[str, ...]:
    if side == (LATER,):
        return tuple(f"{year:02}" for year in range(100) if year // 10 > int(names["y"]) // 10)
    if side == (EARLIER,):
        return tuple(f"{year:02}" for year in range(100) if year // 10 < int(names["y"]) // 10)
    return tuple(re.sub(r"\$([A-Za-z])", lambda letter: names[letter[1]], spelling) for spelling in side)


def reverse_pair(example: Example) -> Example:
    """Return the pair with prompt and counterfactual exchanged, and the answers with them."""
    spans = tuple(Span(span.label, span.counterfactual, span.prompt) for span in example.spans)
    return replace(
        example,
        prompt=example.counterfactual,
        counterfactual=example.prompt,
        answer=example.wrong,
        wrong=example.answer,
        spans=spans,
        variants=tuple(reverse_pair(variant) for variant in example.variants),
    )


# -- a user's file ------------------------------------------------------------------------------------------------------


def _read_user_task(path: Path, seed: int) -> Task:
    entries = list(_read_entries(path))
    if not entries:
        raise TaskError(path, "has no examples", "give one per line" + ("" if path.suffix == ".jsonl" else ", each after a dash"))
    examples: list[Example] = []
    splits: list[Split | None] = []
    line_of: dict[str, int] = {}
    for line, values in entries:
        where = f"{path}, line {line}"
        example, split = _example(values, where)
        for text in (example.prompt, example.counterfactual):
            if text in line_of:
                rule = f"is already in line {line_of[text]}"
                raise TaskError(f"{where}: the prompt {_shorten(text)}", rule, "keep only one of the two")
            line_of[text] = line
        if splits and (split is None) != (splits[0] is None):
            here, there = ("no", "a") if split is None else ("a", "no")
            rule = f"has {here} split, and the one in line {entries[0][0]} has {there} split"
            raise TaskError(f"{where}: the example", rule, "give a split to all examples or to none")
        examples.append(example)
        splits.append(split)
    if splits[0] is None:
        splits = _assign_splits(path, len(examples), seed)
    by_split: dict[Split, tuple[Example, ...]] = {
        split: tuple(example for example, its in zip(examples, splits, strict=True) if its == split) for split in SPLITS
    }
    about = f"{len(examples)} examples of {path.name}"
    return Task(path.stem, "user", about, by_split, {split: len(some) for split, some in by_split.items()})


def _assign_splits(path: Path, count: int, seed: int) -> list[Split | None]:
    if count < len(SPLITS):
        rule = f"has {count} example{'' if count == 1 else 's'}, too few for three splits"
        raise TaskError(path, rule, "add examples, or give each one a split")
    order = random.Random(f"{seed} split").sample(range(count), count)
    return [_split_at(place, max(1, round(HELD_OUT_FRACTION * count))) for place in order]


def _read_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (line, value) of each example in a file."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        remedy = "give the path of a task file, or the name of a built-in task"
        raise TaskError(f"there is no file {str(path)!r}", remedy=remedy) from None
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}", f"is not UTF-8 text (byte {error.start})", "save it as UTF-8") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError) as error:
                    why = getattr(error, "msg", str(error).partition(";")[0])
                    raise TaskError(f"{path}, line {number}", f"is not JSON ({why})", "write one object per line") from None
        return
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return
        if not isinstance(root, yaml.SequenceNode):
            raise TaskError(f"{path}, line 1", "is not a list", "begin each example with a dash")
        for node in root.value:
            line = node.start_mark.line + 1
            try:
                value = loader.construct_document(node)
            except (ValueError, LookupError, AttributeError) as error:
                why = str(error).partition(";")[0] if isinstance(error, ValueError) else "its type is not that of its tag"
                rule = f"has a value that YAML cannot read ({why})"
                raise TaskError(f"{path}, line {line}", rule, "put texts in quotes") from None
            yield line, value
    except RecursionError:
        raise TaskError(path, "is nested too deeply", "write each example as keys and texts") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise TaskError(f"{path}{line}", f"is not YAML ({error.problem})", "put texts that have punctuation in quotes") from None
    except yaml.YAMLError as error:
        raise TaskError(
            path, f"is not YAML ({' '.join(str(error).split())})", "remove the characters that are not text"
        ) from None


_KEYS = ("prompt", "counterfactual", "answer", "answers", "wrong", "wrongs", "split")


def _example(values: Any, where: str) -> tuple[Example, Split | None]:
    if not isinstance(values, dict):
        raise TaskError(f"{where}: {_shorten(values)}", "is not an example", "give it prompt, counterfactual, answer and wrong")
    for key in values:
        if key not in _KEYS:
            remedy = _suggest_name(key, _KEYS, f"use one of {', '.join(_KEYS)}")
            raise TaskError(f"{where}: there is no key {key!r}", remedy=remedy)
    prompts = []
    for key in ("prompt", "counterfactual"):
        if key not in values:
            raise TaskError(f"{where}: {key}", "is missing", "give both prompts of the pair")
        prompts.append(_text(values[key], key, where))
    if prompts[0] == prompts[1]:
        raise TaskError(f"{where}: prompt and counterfactual", "are the same", "change what decides the answer")
    answer, wrong = _read_answers(values, "answer", "wrong", where), _read_answers(values, "wrong", "answer", where)
    if not answer and not wrong:
        raise TaskError(
            f"{where}: answers and wrongs", "are both given by what they are not", "list the spellings of one of them"
        )
    for spelling in answer:
        if spelling in wrong:
            raise TaskError(f"{where}: {spelling!r}", "is both an answer and a wrong answer", "remove it from one of them")
    split = values.get("split")
    if "split" in values and split not in SPLITS:
        raise TaskError(f"{where}: there is no split {_shorten(split)}", remedy=f"give one of {', '.join(SPLITS)}")
    prompt, counterfactual = prompts
    return Example(prompt, counterfactual, answer, wrong, _differing_span(prompt, counterfactual)), split


def _read_answers(values: dict, one: str, other: str, where: str) -> tuple[str, ...]:
    """Return the spellings of an answer, given as `answer` or `answers`; () if it is any token but the other side's."""
    several = f"{one}s"
    if one in values and several in values:
        raise TaskError(f"{where}: there are both {one} and {several}", remedy="keep only one of them")
    if one in values:
        return (_text(values[one], one, where),)
    if several not in values:
        remedy = f"give {one}, or give {several} as a list of spellings or as 'not {other}s'"
        raise TaskError(f"{where}: {one}", "is missing", remedy)
    given = values[several]
    if given == f"not {other}s":
        return ()
    if not isinstance(given, list) or not given:
        raise TaskError(
            f"{where}: {several}", f"is {_shorten(given)}, not a list of spellings", f"give a list, or 'not {other}s'"
        )
    return tuple(dict.fromkeys(_text(spelling, several, where) for spelling in given))


def _text(value: Any, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise TaskError(f"{where}: {key}", f"has {_shorten(value)}, which is not text", "put it in quotes")
    if not value:
        raise TaskError(f"{where}: {key}", "has an empty text", "write the text")
    if fault := encoding_fault(value):
        raise TaskError(f"{where}: {key}", fault, "write the whole character")
    return value


def _shorten(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # too many digits, or too deeply nested, for repr
        text = f"a large {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."


def _differing_span(prompt: str, counterfactual: str) -> tuple[Span, ...]:
    """Return one span, from the first to the last character that differs between the prompts."""
    start = len(commonprefix([prompt, counterfactual]))
    same = len(commonprefix([prompt[start:][::-1], counterfactual[start:][::-1]]))
    return (Span("differs", (start, len(prompt) - same), (start, len(counterfactual) - same)),)

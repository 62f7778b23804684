"""Stress prompts: what each kind changes and leaves, and that a tokenizer reads what comes of it."""

from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.models import CONTEXT, VOCABULARY, tiny_tokenizer
from transformers import AutoTokenizer

from bridge.data.task_pairs import Example, load_task
from bridge.data.task_stress import _is_code, _names, _replace_names, _rules, stress_pairs
from bridge.data.task_tokens import TokenPairs, resolve
from bridge.huggingface.prompts import Prompts

DENSE = Path(__file__).parents[2] / "checkpoints" / "python-dense"
PAIR = Example("for x in data:\n  data", "if x is data:\n  data", (" data",), (" x",))


@pytest.fixture(scope="module")
def prompts():
    return Prompts(AutoTokenizer.from_pretrained(DENSE))


def task_pairs(name: str, prompts: Prompts) -> TokenPairs:
    return resolve(load_task(name), prompts, context=128, splits=("test",)).splits["test"].rows(torch.arange(64))


@pytest.mark.parametrize("name", ["while_return_true", "class_init", "with_as"])
def test_every_kind_makes_new_pairs_that_end_as_they_did(name: str, prompts) -> None:
    pairs = task_pairs(name, prompts)
    reference_bt = torch.randint(10, 2000, (8, 128), generator=torch.Generator().manual_seed(0))
    found = stress_pairs(pairs, prompts, reference_bt, 128, seed=0)
    assert set(found) == {"distractor", "context", "rename", "swap", "paraphrase"}
    assert sum(2 * len(some) for some in found.values()) >= 200
    known = {example.prompt for example in pairs.examples} | {example.counterfactual for example in pairs.examples}
    for kind, stress in found.items():
        some = stress.pairs
        assert len(stress.source_b) == len(some) == len(set(stress.source_b.tolist()))
        for example, source, last in zip(some.examples, stress.source_b.tolist(), some.last_b.tolist(), strict=True):
            assert kind in ("rename", "swap") or example.prompt.endswith(pairs.examples[source].prompt.splitlines()[-1])
            assert example.prompt not in known and last < 128, kind
            assert example.prompt.count("\n") == example.counterfactual.count("\n")
        assert some.prompt_bt.shape[1] == int(some.last_b.max()) + 1
    assert {len(some) for some in found.values()} == {24}
    again = stress_pairs(pairs, prompts, reference_bt, 128, seed=0)
    assert all(torch.equal(found[kind].pairs.prompt_bt, again[kind].pairs.prompt_bt) for kind in found)
    other = stress_pairs(pairs, prompts, reference_bt, 128, seed=1)
    assert not all(torch.equal(found[kind].pairs.prompt_bt, other[kind].pairs.prompt_bt) for kind in found)


def test_names_are_renamed_as_words_in_answers_too() -> None:
    new = _replace_names(PAIR, {"data": "x", "x": "data"})
    assert new.prompt == "for data in x:\n  x" and new.counterfactual == "if data is x:\n  x"
    assert new.answer == (" x",) and new.wrong == (" data",)
    assert _replace_names(new, {"data": "x", "x": "data"}).prompt == PAIR.prompt
    assert _replace_names(PAIR, {"dat": "y", "or": "z"}).prompt == PAIR.prompt  # parts of words are no names


def test_names_of_a_users_task_are_the_words_that_vary() -> None:
    other = Example("for row in lines:\n  lines", "if row is lines:\n  lines", (" lines",), (" row",))
    assert _names(PAIR, (PAIR, other)) == ["data"]  # a word has two letters at least, for and in stand in both pairs
    assert _names(other, (PAIR, other)) == ["lines", "row"]


def test_each_kind_is_what_it_is_called(prompts) -> None:
    examples = task_pairs("while_return_true", prompts).examples
    rules = _rules(examples, True, ["a = 1\nb = 2"])
    generator, example = random.Random(0), examples[0]
    distracted = rules["distractor"](example, generator)
    assert distracted is not None and distracted.prompt.endswith(f"\n{example.prompt}")
    before = distracted.prompt.removesuffix(example.prompt)
    assert any(before.startswith(other.counterfactual) for other in examples if other is not example)
    contextual = rules["context"](example, generator)
    assert contextual is not None and contextual.prompt == f"a = 1\nb = 2\n{example.prompt}"
    assert contextual.counterfactual == f"a = 1\nb = 2\n{example.counterfactual}"
    words = re.compile(r"\w+")
    swapped = rules["swap"](example, generator)
    assert swapped is not None
    counts, before = (Counter(words.findall(each.prompt)) for each in (swapped, example))
    assert set(counts) == set(before) and sorted(counts.values()) == sorted(before.values())  # names change places
    renamed = rules["rename"](example, generator)
    assert renamed is not None
    differ = set(words.findall(renamed.prompt)) ^ set(words.findall(example.prompt))
    assert len(differ) == 2
    for _ in range(10):
        said = rules["paraphrase"](example, generator)
        assert said is not None
        assert [line.strip() for line in said.prompt.split("\n") if "#" not in line] == [
            line.strip() for line in example.prompt.split("\n")
        ]


def test_text_that_is_no_code_has_a_lead_in() -> None:
    example = Example("The cat is", "The cats is", (" a",), (" b",))
    assert not _is_code([example], "english") and _is_code([example], "python") and _is_code([PAIR], "user")
    said = _rules([example], False, [])["paraphrase"](example, random.Random(0))
    assert said is not None and said.prompt.endswith(f" {example.prompt}")
    assert _rules([example], False, [])["context"](example, random.Random(0)) is None
    assert _rules([example], False, [])["swap"](example, random.Random(0)) is None


def test_what_does_not_fit_is_left_out() -> None:
    prompts = Prompts(tiny_tokenizer())
    words = [f"w{index} w{index + 1} w{index + 2}" for index in range(6, 30)]
    examples = tuple(Example(f"{text} w2", f"{text} w3", (" w4",), (" w5",)) for text in words)
    from bridge.data.task_pairs import Task

    pairs = resolve(Task("tiny", "user", "", {"test": examples}, {"test": 24}), prompts, splits=("test",)).splits["test"]
    reference_bt = torch.randint(2, VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(0))
    found = stress_pairs(pairs, prompts, reference_bt, CONTEXT, language="user")
    assert set(found) >= {"distractor", "rename", "swap", "paraphrase"}
    assert all(int(some.pairs.last_b.max()) < CONTEXT for some in found.values())
    short = stress_pairs(pairs, prompts, reference_bt, 4, language="user")
    assert set(short) <= {"rename", "swap"}  # of as many tokens as the prompts have


def test_kinds_that_fit_make_up_for_those_that_do_not(prompts) -> None:
    pairs = task_pairs("while_return_true", prompts)
    nothing = torch.zeros(0, 128, dtype=torch.long)  # no text, so no stretches of it
    found = stress_pairs(pairs, prompts, nothing, 128, seed=0)
    assert set(found) == {"distractor", "rename", "swap", "paraphrase"}
    assert {len(some) for some in found.values()} == {30}

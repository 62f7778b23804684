"""Tasks: splits that share nothing, a resolver that holds for any tokenizer, and scores equal to a slow loop's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bridge.data.task_pairs import PAIRS_PER_SPLIT, SPLITS, TASKS, Example, Task, TaskError, load_task, task_names
from bridge.data.task_templates import POOLS
from bridge.data.task_tokens import Resolved, resolve, score
from bridge.models.dense import DenseModel, load_dense

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "checkpoints" / "python-dense"


def corpus() -> list[str]:
    """Every prompt of a few pairs of each task, with its answer."""
    lines = []
    for name in task_names():
        for examples in load_task(name).examples.values():
            lines += [e.prompt + spelling for e in examples[:6] for spelling in (*e.answer, *e.wrong)[:8]]
    return lines


def byte_level() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, as GPT-2's."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(corpus(), trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """A BPE tokenizer with spaces as marks and bytes to fall back on, and a token before and after every text."""
    tokenizer: Any = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=900, special_tokens=special, initial_alphabet=list(map(chr, range(33, 127))), show_progress=False
        ),
    )
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["shipped", "byte-level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    if request.param == "shipped":
        return PreTrainedTokenizerFast.from_pretrained(SHIPPED)
    return byte_level() if request.param == "byte-level" else metaspace()


@pytest.fixture(scope="module")
def shipped() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(SHIPPED)


def one(example: Example) -> Task:
    """A task of one example, in the test split."""
    return Task("own", "user", "", {"train": (), "validation": (), "test": (example,)}, {"train": 0, "validation": 0, "test": 1})


# -- generated tasks ----------------------------------------------------------------------------------------------------


def test_the_papers_tasks_are_there() -> None:
    assert len(task_names("python")) == 20 and len(task_names("english")) == 5
    assert len(set(task_names())) == 25
    with pytest.raises(TaskError, match="no tasks in the language 'latin'; use one of python, english"):
        task_names("latin")


@pytest.mark.parametrize("name", task_names())
def test_splits_share_no_template_and_no_name(name: str) -> None:
    task = load_task(name)
    seen: dict[str, dict[str, set[str]]] = {"template": {}, "name": {}}
    for split, examples in task.examples.items():
        assert examples
        seen["template"][split] = {example.template for example in examples}
        seen["name"][split] = {
            example.prompt[slice(*span.prompt)] for example in examples for span in example.spans if span.label != "differs"
        }
    for by_split in seen.values():
        assert len(set.union(*by_split.values())) == sum(map(len, by_split.values()))
    assert len(seen["template"]["validation"]) >= 2 and len(seen["template"]["test"]) >= 2


def test_no_name_is_part_of_a_template() -> None:
    """Else a held-out name would have been met in training."""
    names = {word for pool in ("variable", "function", "class") for word in POOLS[pool]}
    for task in TASKS:
        if task.language == "python":
            plain = " ".join(re.sub(r"\$[A-Za-z]", " ", text) for text in task.texts)
            fixed = names & set(re.findall(r"[A-Za-z]+", plain.replace("\\n", " ")))
            assert not fixed, f"{task.name}: {fixed}"


@pytest.mark.parametrize("name", ["class_init", "ioi", "for_while"])
def test_a_seed_is_a_task(name: str) -> None:
    assert load_task(name, seed=3) == load_task(name, seed=3)
    assert load_task(name, seed=3).examples["test"] != load_task(name, seed=4).examples["test"]


@pytest.mark.parametrize("name", task_names())
def test_pairs_are_pairs(name: str) -> None:
    for examples in load_task(name).examples.values():
        assert len({(example.prompt, example.counterfactual) for example in examples}) == len(examples)
        for example in examples:
            assert example.prompt != example.counterfactual and (example.answer or example.wrong)
            assert not set(example.answer) & set(example.wrong)
            changed = example.prompt
            for span in reversed(example.spans):  # what is outside the spans is the same in both
                start, end = span.prompt
                changed = changed[:start] + example.counterfactual[slice(*span.counterfactual)] + changed[end:]
            assert changed == example.counterfactual
        assert any(a.answer == b.wrong for a, b in zip(examples, examples[1:], strict=False))  # neither kind always comes first


# -- the resolver -------------------------------------------------------------------------------------------------------


def check(resolved: Resolved, tokenizer: PreTrainedTokenizerFast) -> int:
    """Everything that a resolved pair promises, against the tokenizer alone; how many pairs there were."""
    for pairs in resolved.splits.values():
        for row, example in enumerate(pairs.examples):
            length = int(pairs.last_b[row]) + 1
            members = (
                (example.prompt, pairs.prompt_bt, pairs.answer_bk, pairs.answer_not_b, example.answer),
                (example.counterfactual, pairs.counterfactual_bt, pairs.wrong_bk, pairs.wrong_not_b, example.wrong),
            )
            assert not pairs.prompt_bt[row, length:].any() and not pairs.counterfactual_bt[row, length:].any()
            assert pairs.prompt_bt[row].tolist() != pairs.counterfactual_bt[row].tolist()
            for text, tokens_bt, ids_bk, not_b, spellings in members:
                ids = {token for token in ids_bk[row].tolist() if token >= 0}
                tokens = tokens_bt[row, :length].tolist()
                assert bool(not_b[row]) == (not spellings) and ids
                continued = [tokenizer(text + spelling)["input_ids"] for spelling in spellings]
                after: set[Any] = {row[length] for row in continued if row[:length] == tokens and len(row) > length}
                assert not_b[row] or ids <= after  # a right answer is the prompt's tokens, then one of these
                # spaces aside, which a decoder may take for marks, they say the prompt, but for marks left to the answer
                said, asked = ("".join(t.split()) for t in (str(tokenizer.decode(tokens, skip_special_tokens=True)), text))
                common = min(len(said), len(asked))
                assert said[:common] == asked[:common] and not re.search(r"\w", asked[common:])
            if not pairs.answer_not_b[row] and not pairs.wrong_not_b[row]:
                assert not (set(pairs.answer_bk[row].tolist()) & set(pairs.wrong_bk[row].tolist())) - {-1}
    return sum(map(len, resolved.splits.values()))


@pytest.mark.parametrize("name", task_names())
def test_resolved_pairs_keep_their_promises(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    task = load_task(name)
    few = replace(task, wanted=dict.fromkeys(SPLITS, 6), examples={split: e[:48] for split, e in task.examples.items()})
    resolved = resolve(few, tokenizer, context=128)
    kept = check(resolved, tokenizer)
    assert resolved.seen == kept + sum(resolved.dropped.values())
    assert resolved.drop_rate == pytest.approx(1 - kept / resolved.seen)


def test_on_the_shipped_tokenizer_there_are_as_many_pairs_as_wanted(shipped: PreTrainedTokenizerFast) -> None:
    for name in task_names("python"):
        resolved = resolve(load_task(name), shipped, context=128, splits=("validation",))
        assert len(resolved.splits["validation"]) == PAIRS_PER_SPLIT["validation"], name
        assert resolved.drop_rate < 0.1, name


def test_a_trailing_quote_or_space_is_left_to_the_answer(shipped: PreTrainedTokenizerFast) -> None:
    quote = Example('x = {"a"', 'x = ["a"', (":",), (",",))  # the tokenizer has '":' and '",' as tokens
    pairs = resolve(one(quote), shipped).splits["test"]
    assert shipped.decode(pairs.prompt_bt[0].tolist()) == 'x = {"a'
    assert shipped.decode(pairs.answer_bk[0].tolist()) == '":' and shipped.decode(pairs.wrong_bk[0].tolist()) == '",'
    space = Example("def f(self, data): return ", "def f(self, path): return ", ("data",), ("path",))
    pairs = resolve(one(space), shipped).splits["test"]
    assert shipped.decode(pairs.prompt_bt[0].tolist()) == "def f(self, data): return"
    assert shipped.decode(pairs.answer_bk[0].tolist()) == " data"


def test_a_shared_beginning_of_the_answers_is_appended(shipped: PreTrainedTokenizerFast) -> None:
    example = Example("open(path, 'r') as f: f", "open(path, 'w') as f: f", (".read",), (".write",))
    pairs = resolve(one(example), shipped).splits["test"]
    assert str(shipped.decode(pairs.prompt_bt[0].tolist())).endswith("f: f.")
    assert shipped.decode(pairs.answer_bk[0].tolist()) == "read"


@pytest.mark.parametrize(
    ("example", "context", "reason"),
    [
        (Example("for a", "for a, b", (" in",), (":",)), None, "unequal length"),
        (Example("for a", "for b", (" in",), (" in", ":")), None, "ambiguous"),
        (Example("for a in b", "for a in c", (":",), (",",)), 3, "longer than the context"),
        (Example("def sel", "def cel", ("f",), ("g",)), None, "no stable prompt"),
    ],
)
def test_what_is_dropped_and_why(example: Example, context: int | None, reason: str, shipped: PreTrainedTokenizerFast) -> None:
    resolved = resolve(one(example), shipped, context=context)
    assert dict(resolved.dropped) == {reason: 1} and resolved.drop_rate == 1 and not len(resolved.splits["test"])


def test_a_model_without_a_tokenizer_has_no_tasks() -> None:
    with pytest.raises(
        TaskError, match="task 'ioi' cannot be read: the model has no tokenizer, so no text can be read; load the model with"
    ):
        resolve(load_task("ioi"), None)


# -- scores -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(shipped: PreTrainedTokenizerFast) -> DenseModel:
    """A random GPT-2 with the shipped tokenizer, whose answers are not all alike."""
    torch.manual_seed(0)
    shape = GPT2Config(vocab_size=len(shipped), n_positions=128, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    network = GPT2LMHeadModel(shape).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return load_dense(network, tokenizer=shipped)


@pytest.mark.parametrize("name", ["else_elif", "single_double_quote", "set_or_string"])
def test_scores_are_those_of_a_slow_loop(name: str, model: DenseModel, shipped: PreTrainedTokenizerFast) -> None:
    """Hugging Face's own logits, one prompt at a time, without padding; probabilities summed one by one."""
    pairs = resolve(load_task(name), shipped, splits=("validation",)).splits["validation"].rows(torch.arange(24))
    assert len(set(pairs.last_b.tolist())) > 1  # else nothing is padded
    right, losses, differences = 0, [], []
    for row in range(len(pairs)):
        length = int(pairs.last_b[row]) + 1
        sides = (pairs.answer_bk, pairs.answer_not_b), (pairs.wrong_bk, pairs.wrong_not_b)
        for tokens_bt, (answer, wrong) in ((pairs.prompt_bt, sides), (pairs.counterfactual_bt, sides[::-1])):
            with torch.no_grad():
                logits_v = model.model(input_ids=tokens_bt[row : row + 1, :length]).logits[0, -1]
            p_v = logits_v.double().softmax(-1).tolist()
            sums = []
            for ids_bk, not_b in (answer, wrong):
                ids = {token for token in ids_bk[row].tolist() if token >= 0}
                sums.append(sum(p for token, p in enumerate(p_v) if (token in ids) != bool(not_b[row])))
            right += sums[0] > sums[1]
            losses.append(-math.log(sums[0] / sum(sums)))
            differences.append(math.log(sums[0] / sums[1]))
    scores = score(model, pairs)
    assert scores.pairs == 24 and scores.accuracy == pytest.approx(right / 48)
    assert scores.loss == pytest.approx(sum(losses) / 48, abs=1e-4)
    assert scores.difference == pytest.approx(sum(differences) / 48, abs=1e-4)


def test_of_two_single_tokens_the_difference_is_that_of_their_logits(shipped: PreTrainedTokenizerFast) -> None:
    pairs = resolve(load_task("var_swap"), shipped, splits=("test",)).splits["test"]
    logits_bv = torch.randn(len(pairs), len(shipped), requires_grad=True)
    rows = torch.arange(len(pairs))
    expected_b = logits_bv[rows, pairs.answer_bk[:, 0]] - logits_bv[rows, pairs.wrong_bk[:, 0]]
    torch.testing.assert_close(pairs.difference(logits_bv), expected_b)
    torch.testing.assert_close(pairs.reversed().difference(logits_bv), -expected_b)
    torch.testing.assert_close(pairs.loss(logits_bv), torch.log1p(torch.exp(-expected_b)))
    pairs.loss(logits_bv).sum().backward()
    assert logits_bv.grad is not None and logits_bv.grad.isfinite().all()


def test_pairs_pooled_with_padding_have_finite_gradients(shipped: PreTrainedTokenizerFast) -> None:
    pairs = resolve(load_task("else_elif"), shipped, splits=("test",)).splits["test"].both_members()
    logits_bv = torch.randn(len(pairs), len(shipped), requires_grad=True)
    pairs.loss(logits_bv).sum().backward()
    assert logits_bv.grad is not None and logits_bv.grad.isfinite().all()


def test_no_pairs_have_no_score(model: DenseModel, shipped: PreTrainedTokenizerFast) -> None:
    pairs = resolve(one(Example("a", "a b", ("c",), ("d",))), shipped).splits["test"]
    with pytest.raises(TaskError, match="no pairs to score; use another split"):
        score(model, pairs)


# -- a user's file ------------------------------------------------------------------------------------------------------

GOOD = {"prompt": "for a", "counterfactual": "while a", "answer": " in", "wrongs": [":", ":\n"]}


def lines(count: int = 8, **changes: Any) -> str:
    values = [{**GOOD, "prompt": f"for x{n}", "counterfactual": f"while x{n}", **changes} for n in range(count)]
    return "".join(json.dumps(value) + "\n" for value in values)


def test_a_users_task_in_either_format(tmp_path: Path) -> None:
    (tmp_path / "own.jsonl").write_text(lines())
    entries = (
        f"- prompt: for x{n}\n  counterfactual: while x{n}\n  answer: ' in'\n  wrongs: [':', \":\\n\"]\n" for n in range(8)
    )
    (tmp_path / "own.yaml").write_text("# mine\n" + "".join(entries))
    task, same = load_task(tmp_path / "own.jsonl"), load_task(str(tmp_path / "own.yaml"))
    assert task.examples == same.examples == load_task(tmp_path / "own.jsonl").examples
    assert (task.name, task.language, dict(task.wanted)) == ("own", "user", {"train": 4, "validation": 2, "test": 2})
    (span,) = task.examples["test"][0].spans
    prompt, counterfactual = task.examples["test"][0].prompt, task.examples["test"][0].counterfactual
    assert prompt[slice(*span.prompt)] == "for" and counterfactual[slice(*span.counterfactual)] == "while"
    assert load_task(tmp_path / "own.jsonl", seed=1).examples != task.examples
    (tmp_path / "own.jsonl").write_text(lines(1, split="test") + lines(2, split="train").split("\n")[1] + "\n")
    assert {split: len(e) for split, e in load_task(tmp_path / "own.jsonl").examples.items()} == {
        "train": 1, "validation": 0, "test": 1,
    }  # fmt: skip


def test_whatever_is_not_the_answer(tmp_path: Path, shipped: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(
        json.dumps({"prompt": "x\nelse", "counterfactual": "x\nelif", "answer": ":", "wrongs": "not answers", "split": "test"})
    )
    pairs = resolve(load_task(file), shipped).splits["test"]
    assert pairs.wrong_not_b.all() and not pairs.answer_not_b.any()


def jsonl(**changes: Any) -> str:
    return json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not ...}) + "\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "line 1 is not JSON (Expecting property name enclosed in double quotes); write one object per line"),
        ("\n[1]\n", "line 2: [1] is not an example; give it prompt, counterfactual, answer and wrong"),
        (jsonl(anwser="x"), "line 1: there is no key 'anwser'; did you mean 'answer'?"),
        (jsonl(zzz="x"), "line 1: there is no key 'zzz'; use one of prompt, counterfactual,"),
        (jsonl(counterfactual=...), "line 1: counterfactual is missing; give both prompts of the pair"),
        (jsonl(answer=...), "line 1: answer is missing; give answer, or give answers as a list of spellings or as 'not wrongs'"),
        (jsonl(answer=True), "line 1: answer has True, which is not text; put it in quotes"),
        (jsonl(prompt=""), "line 1: prompt has an empty text; write the text"),
        (jsonl(answers=["a"]), "line 1: there are both answer and answers; keep only one of them"),
        (jsonl(wrongs=[]), "line 1: wrongs is [], not a list of spellings; give a list, or 'not answers'"),
        (jsonl(wrongs="x"), "line 1: wrongs is 'x', not a list of spellings"),
        (jsonl(wrongs=[" in"]), "line 1: ' in' is both an answer and a wrong answer; remove it from one of them"),
        (
            jsonl(answer=..., answers="not wrongs", wrongs="not answers"),
            "line 1: answers and wrongs are both given by what they are not; list the spellings of one of them",
        ),
        (jsonl(counterfactual="for a"), "line 1: prompt and counterfactual are the same; change what decides the answer"),
        (jsonl(split="dev"), "line 1: there is no split 'dev'; give one of train, validation, test"),
        (jsonl() + jsonl(prompt="if a"), "line 2: the prompt 'while a' is already in line 1; keep only one of the two"),
        (
            jsonl(split="test") + jsonl(prompt="if a", counterfactual="b"),
            "line 2: the example has no split, and the one in line 1 has a split; give a split to all examples or to none",
        ),
        (
            jsonl(prompt="\ud800"),
            r"line 1: prompt has '\ud800', which is not a character of UTF-8 text; write the whole character",
        ),
        (jsonl(wrongs=["a", "x\udcff"]), r"line 1: wrongs has '\udcff', which is not a character of UTF-8 text"),
        ("1" * 5000 + "\n", "line 1 is not JSON (Exceeds the limit (4300 digits) for integer string conversion"),
        ("[" * 100_000 + "\n", "line 1 is not JSON (maximum recursion depth exceeded"),
        ("", "has no examples; give one per line"),
        (jsonl(), "has 1 example, too few for three splits; add examples, or give each one a split"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text(text)
    with pytest.raises(TaskError) as error:
        load_task(file)
    assert str(error.value).startswith(str(file)) and message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt: a\n", "line 1 is not a list; begin each example with a dash"),
        ("- prompt: 'a\n", "line 2 is not YAML (found unexpected end of stream); put texts that have punctuation in quotes"),
        ("# x\n\n- prompt: a\n  counterfactual: b\n  answer: yes\n  wrong: c\n", "line 3: answer has True, which is not text"),
        ("- a: \x00", "is not YAML ("),
        ("- !!python/object:os.system {}\n", "is not YAML (could not determine a constructor"),
        (
            "- a: x\n- prompt: 2024-13-45\n",
            "line 2 has a value that YAML cannot read (month must be in 1..12); put texts in quotes",
        ),
        (
            "- prompt: 2024-02-30\n",
            "line 1 has a value that YAML cannot read (day is out of range for month); put texts in quotes",
        ),
        (
            "- prompt: !!int abc\n",
            "line 1 has a value that YAML cannot read (invalid literal for int() with base 10: 'abc'); put",
        ),
        (
            "- prompt: !!int ''\n",
            "line 1 has a value that YAML cannot read (its type is not that of its tag); put texts in quotes",
        ),
        ("- prompt: !!float abc\n", "line 1 has a value that YAML cannot read (could not convert string to float: 'abc'); put"),
        (
            "- prompt: !!bool abc\n",
            "line 1 has a value that YAML cannot read (its type is not that of its tag); put texts in quotes",
        ),
        ("- prompt: !!timestamp abc\n", "line 1 has a value that YAML cannot read (its type is not that of its tag); put texts"),
        (f"- prompt: {'1' * 5000}\n", "line 1 has a value that YAML cannot read (Exceeds the limit (4300 digits) for integer"),
        (
            f"- prompt: 0x{'f' * 5000}\n  counterfactual: b\n",
            "line 1: prompt has a large int, which is not text; put it in quotes",
        ),
        ("- " + "[" * 5000, "is nested too deeply; write each example as keys and texts"),
        ('- prompt: "\\uD800"\n  counterfactual: b\n', "line 1: prompt has '"),
    ],
)
def test_a_mistake_in_yaml_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yml"
    file.write_text(text)
    with pytest.raises(TaskError) as error:
        load_task(file)
    assert str(file) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_a_task_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="there is no task 'for_whlie'; did you mean 'for_while'?"):
        load_task("for_whlie")
    with pytest.raises(TaskError, match="there is no file '.*own.jsonl'; give the path of a task file"):
        load_task(tmp_path / "own.jsonl")
    with pytest.raises(TaskError, match="is not a task file; give a file of examples whose name ends in .jsonl"):
        load_task(tmp_path)
    (tmp_path / "own.jsonl").write_bytes(b"\xff")
    with pytest.raises(TaskError, match="own.jsonl is not UTF-8 text .byte 0.; save it as UTF-8"):
        load_task(tmp_path / "own.jsonl")


def test_both_sides_may_list_different_numbers_of_answers(shipped: PreTrainedTokenizerFast) -> None:
    example = Example("x = [1, 2", "x = (1, 2", ("]",), (")", "):", ")\n"))
    pairs = resolve(Task("one", "python", "one", {"test": (example,)}, {"test": 1}), shipped, splits=("test",)).splits["test"]
    assert len(pairs) == 1 and pairs.answer_bk.shape != pairs.wrong_bk.shape
    both = pairs.both_members()
    assert both.answer_bk.shape == both.wrong_bk.shape and len(both) == 2
    logits_bv = torch.randn(2, shipped.vocab_size or 2048, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(both.difference(logits_bv)[1:], pairs.reversed().difference(logits_bv[1:]))

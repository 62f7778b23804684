"""Which of the paper's 20 Python tasks a model solves, on hand-written prompts: right answer more likely than the wrong one.

    python tests/benchmarks/tasks.py checkpoints/python-dense
    python tests/benchmarks/tasks.py checkpoints/python-bridge      the dense and the sparse model, beside each other

Every task has two kinds of prompt that differ in what decides the answer, in equal number, so that a constant guess scores .5.
The answers are scored at the first token at which the tokenizations of prompt + right and prompt + wrong part ways; of several
spellings of an answer the probabilities are summed. A prompt whose spellings share that token is dropped and counted.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bridge.bridges import Coupling
from bridge.dense import DenseModel, load_dense
from bridge.sparse import SparseTransformer

Answers = tuple[str, ...]
NAMES = ("name", "path", "data", "value", "key", "index", "result", "text")


def both(left: list[str], right: list[str], left_answer: Answers, right_answer: Answers) -> list[tuple[str, Answers, Answers]]:
    """(prompt, right answers, wrong answers) for prompts of both kinds."""
    return [(p, left_answer, right_answer) for p in left] + [(p, right_answer, left_answer) for p in right]


def tasks() -> dict[str, list[tuple[str, Answers, Answers]]]:
    """The 20 tasks, each a list of prompts with the answers that are right and wrong after them."""
    n = NAMES
    words = ("world", "error", "utf-8", "name", "file", "text", "value", "w")
    four = "    "
    eight = "        "
    return {
        "single_double_quote": both(
            [f'print("{w}' for w in words], [f"print('{w}" for w in words], ('")', '"', '",'), ("')", "'", "',")
        ),
        "final_kwarg": both(
            [f"def load({a}=None, {b}" for a, b in zip(n, n[1:], strict=False)],
            [f"def load({a}, {b}" for a, b in zip(n, n[1:], strict=False)],
            ("=None", "="),
            ("):", ")", ","),
        ),
        "set_or_string": both(
            [f"{v} = set()\nfor x in items:\n    {v}" for v in n],
            [f"{v} = ''\nfor x in items:\n    {v}" for v in n],
            (".add", ".update"),
            (" +=", " = "),
        ),
        "set_or_string_fixedvarname": both(
            [f"current = set()\nfor {v} in items:\n    current" for v in n],
            [f"current = ''\nfor {v} in items:\n    current" for v in n],
            (".add", ".update"),
            (" +=", " = "),
        ),
        "class_init": [
            (f"class A:\n    def __init__(self, {a}, {b}):\n        self.{c} =", (f" {c}",), (f" {a if c == b else b}",))
            for a, b in zip(n, n[1:], strict=False)
            for c in (a, b)
        ],
        "with_as": both(
            [f"def run({v}):\n    with open({v})" for v in n],
            [f"def run({v}):\n    return open({v})" for v in n],
            (" as",),
            ("\n", ".read", "\n\n"),
        ),
        "bracket_brace": both(
            [f"x = {{'a': 1, 'b': 2, '{v}'" for v in n], [f"x = ['a', 'b', '{v}'" for v in n], (":", ": "), (",", "]", ")")
        ),
        "with_open": both(
            [f"with open({v}, 'r') as f:\n    f" for v in n],
            [f"with open({v}, 'w') as f:\n    f" for v in n],
            (".read", ".readlines", ".readline"),
            (".write", ".writelines"),
        ),
        "bracket_counting": both(
            [f"x = [[1, 2], [3, {i}" for i in range(4, 12)], [f"x = [1, 2, 3, {i}" for i in range(4, 12)], ("]]",), ("]", "]\n")
        ),
        "for_while": both([f"for {v}" for v in n], [f"while {v}" for v in n], (" in",), (":", ":\n")),
        "else_elif": both(
            [f"    if {v}:\n        pass\n    else" for v in n],
            [f"    if {v}:\n        pass\n    elif" for v in n],
            (":", ":\n"),
            (" not", " self", f" {n[0]}", " is", " x"),
        ),
        "fstring_brace": both(
            [f"print(f'{{{v}" for v in n], [f"print('({v}" for v in n], ("}", "!r}", "}'"), (")", ")'", ",")
        ),
        "if_ternary": both(
            [f"if {v} is None" for v in n], [f"x = 1 if {v} is None" for v in n], (":", ":\n"), (" else",)
        ),
        "var_swap": both(
            [f"a, {v} = {v}," for v in n], [f"a, {v} = b," for v in n], (" a",), (" c", " None", " b")
        ),
        "indent_for": both(
            [f"{four}for {v} in items:\n" for v in n],
            [f"{four}for {v} in items:\n{eight}print({v})\n{four}return\n" for v in n],
            (eight,),
            ("\n", "\n\n", "\n\n\n", f"{four}d", "d"),
        ),
        "lambda_func": both(
            [f"f = lambda {v}" for v in n], [f"def f{v}" for v in n], (":", ": "), ("(", "(self")
        ),
        "if_equals": both(
            [f"def f({v}):\n    if {v}" for v in n],
            [f"def f({v}):\n    {v}" for v in n],
            (" ==", " is", ":", " in", " and", " !=", " not"),
            (" =", " +=", " = "),
        ),
        "enumerate_range": both(
            [f"for i, {v} in" for v in n], [f"for {v} in" for v in ("i", "j", "k", "n", "x", "idx", "step", "epoch")],
            (" enumerate", " zip"), (" range",),
        ),
        "var_if": both(
            [f"if {v} is None" for v in n], [f"{v} = x is None" for v in n], (":", ":\n"), ("\n", "\n\n", " and", " or")
        ),
        "while_return_true": both(
            [f"def f({v}):\n    while True" for v in n],
            [f"def f({v}):\n    return True" for v in n],
            (":", ":\n"),
            ("\n", "\n\n", "\n\n\n"),
        ),
    }  # fmt: skip


def split(tokenizer, prompt: str, right: Answers, wrong: Answers) -> tuple[list[int], set[int], set[int]] | None:
    """(prompt tokens, first tokens of the right answers, of the wrong ones), or None where they share one."""
    encoded = [[tokenizer(prompt + a, add_special_tokens=True)["input_ids"] for a in answers] for answers in (right, wrong)]
    flat = encoded[0] + encoded[1]
    shared = 0
    while all(len(ids) > shared and ids[shared] == flat[0][shared] for ids in flat):
        shared += 1
    firsts = [{ids[shared] for ids in answers if len(ids) > shared} for answers in encoded]
    if not firsts[0] or not firsts[1] or firsts[0] & firsts[1]:
        return None
    return flat[0][:shared], firsts[0], firsts[1]


@torch.no_grad()
def accuracy(model: DenseModel | SparseTransformer, tokenizer, prompts: list) -> tuple[float, int]:
    """Share of the prompts answered right, and how many were dropped."""
    right_count = scored = 0
    for prompt, right, wrong in prompts:
        parts = split(tokenizer, prompt, right, wrong)
        if parts is None:
            continue
        ids, firsts, seconds = parts
        p_v = model.run(torch.tensor([ids])).logits_btv[0, -1].float().softmax(-1)
        right_count += bool(p_v[list(firsts)].sum() > p_v[list(seconds)].sum())
        scored += 1
    return (right_count / scored if scored else float("nan")), len(prompts) - scored


def main() -> None:
    """Print a row per task."""
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints/python-bridge")
    models: dict[str, DenseModel | SparseTransformer]
    if (path / "coupling.json").exists():
        coupling = Coupling.from_pretrained(path)
        dense, models = coupling.dense, {"dense": coupling.dense, "sparse": coupling.sparse}
    else:
        dense = load_dense(path)
        models = {"dense": dense}
    print("task".ljust(28), *(name.rjust(7) for name in models), "prompts dropped")
    solved = dict.fromkeys(models, 0)
    for task, prompts in tasks().items():
        scores = {name: accuracy(model, dense.tokenizer, prompts) for name, model in models.items()}
        for name, (score, _) in scores.items():
            solved[name] += score >= 0.9
        dropped = next(iter(scores.values()))[1]
        print(task.ljust(28), *(f"{score:7.2f}" for score, _ in scores.values()), f"{len(prompts):7} {dropped:7}")
    print("solved at .9".ljust(28), *(f"{count:7}" for count in solved.values()))


if __name__ == "__main__":
    main()

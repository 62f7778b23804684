"""The field's terms: no name, text or docstring of the package has a word that a reader of the literature would not know."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "bridge"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

NAMES = {  # words of a name between underscores -> the term
    "company": "random supersets", "companions": "random supersets", "worth": "importance", "slope": "gradient",
    "slopes": "gradients", "lesson": "train", "lessons": "train", "held": "validation, stored or clamped", "work": "budget",
    "say": "progress", "tell": "progress", "told": "what the value is", "said": "what the value is", "moved": "changed",
    "fewest": "greedy minimisation", "move": "intervention", "moves": "interventions", "swap": "interchange intervention",
    "swapped": "counterfactual, reversed", "carry": "patch, transport", "carried": "patched, transported",
    "turned": "rotated", "foreseen": "predicted", "silenced": "inactive", "meanwhile": "in the background",
}  # fmt: skip
PHRASES = {  # in docstrings and other text -> the term
    r"\bcompany\b": "random supersets", r"\bslopes?\b": "gradient", r"\blessons?\b": "train", r"\bworth\b": "importance",
    r"\bshare of D\b|\bmean D\b": "logit difference", r"\bswap(ped|s)?\b": "interchange intervention",
    r"\bcarr(y|ied|ies)\b(?! (on|over))": "patch, transport", r"\bforeseen?\b": "predict", r"\bturned\b": "rotated",
    r"\bsilenced\b": "inactive", r"\bnobody had looked at\b": "held out", r"\bwithout it\b": "ablated",
    r"\bmeanwhile\b": "at the same time",
}  # fmt: skip
ALLOWED = {  # names that stay, by file
    "kernels/attention.py": {"work"},  # in kernels work is multiplications, and a node is held where a mask has it
    "kernels/lanes.py": {"held"},
    "kernels/products.py": {"worth", "work"},  # `worth`: whether a kernel pays
    "evidence/carry.py": {"carry"},  # the module's name
    "graph/attention.py": {"moved"},  # a field of an explanation's JSON
    "recipe.py": {"carried", "move", "slopes"},  # fields of a recipe
    "training/adapt.py": {"slopes"},  # a field of a recipe
    "training/initialize.py": {"slopes"},  # ALiBi's, a field of a recipe
    "training/objective.py": {"carried"},  # a term of the objective, named in recipes
    "data/task_stress.py": {"swap"},  # of two names in a text
}


def definitions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of every function, class, argument, field and variable that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, " ".join(node.value.split())


@pytest.mark.parametrize("file", FILES)
def test_names_and_texts_are_the_fields_terms(file: str) -> None:
    tree, allowed = ast.parse((PACKAGE / file).read_text(encoding="utf-8")), ALLOWED.get(file, set())
    found = [
        f"{file}:{line}: {name}: {NAMES[word]}"
        for line, name in [*definitions(tree), (1, Path(file).stem)]
        for word in map(str.lower, re.findall(r"[A-Z]?[a-z]+|[A-Z]+", re.sub("held_out", "", name, flags=re.IGNORECASE)))
        if word in NAMES and word not in allowed
    ]
    for line, text in texts(tree):
        for pattern, term in PHRASES.items():
            if (match := re.search(pattern, text, re.IGNORECASE)) and match[0] not in allowed:
                found.append(f"{file}:{line}: {text[max(0, match.start() - 40) : match.end() + 20]!r}: {term}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", FILES)
def test_no_docstring_begins_with_what(file: str) -> None:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    riddle = re.compile(r"(What|That|Those|Such|Of|Where|The same)\b")
    found = [node for node in ast.walk(tree) if isinstance(node, kinds) and riddle.match(ast.get_docstring(node) or "")]
    assert not found, [f"{file}:{getattr(node, 'lineno', 1)}: {ast.get_docstring(node)!r:.60}" for node in found]


def test_options_of_the_command_line_are_named_in_cli_alone() -> None:
    """Elsewhere a text names a parameter as ‹name›, and `errors` writes it for whoever reads it."""
    option = re.compile(r"(?<![\w{.;:-])--[a-z][\w-]*(?!-*>)")
    allowed = {"models/schema.py"}  # arrows
    allowed |= {"explanations/export.py"}  # another program's command line
    for name in FILES:
        if not name.startswith("cli/") and name not in allowed:
            tree = ast.parse((PACKAGE / name).read_text(encoding="utf-8"))
            found = [(line, text) for line, text in texts(tree) if option.search(text)]
            assert not found, f"bridge/{name}: {found}"

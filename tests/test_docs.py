"""The documents that are contracts say what the code does: no field is missing, none is there that is not written."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import typer
from support.explanation_cases import PROMPT, agreeing
from support.models import VOCABULARY
from typer.cli import get_docs_for_click
from typer.main import get_command

from bridge.cli.main import app
from bridge.explanations.build import explain
from bridge.explanations.explanation import FORMAT, ExplainError, Explanation
from bridge.models.dense import DenseModel

DOCUMENT = Path(__file__).parent.parent / "docs" / "explanation-json.md"
WRITTEN_OUT = {  # properties that stand in the JSON beside the fields
    "Explanation": {"format": "int", "agree": "bool", "span": "float"},
    "Report": {"verdict": "str", "reasons": "tuple[str, ...]"},
    "Measure": {"passed": "bool | None"},
}


def documented() -> dict[str, dict[str, str]]:
    """Type by field by section, of the sections that are tables of fields."""
    sections: dict[str, dict[str, str]] = {}
    for section in re.split(r"^## ", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \| (.+?) \|$", section, flags=re.MULTILINE)
        assert all(meaning.strip() for _, _, meaning in rows)
        sections[section.split("\n", 1)[0]] = {field: kind.replace("\\|", "|") for field, kind, _ in rows}
    return sections


def inside(annotation: Any) -> list[type]:
    """The dataclasses in an annotation, at any depth."""
    found: list[type] = [annotation] if isinstance(annotation, type) and dataclasses.is_dataclass(annotation) else []
    return found + [each for part in typing.get_args(annotation) for each in inside(part)]


def reachable(start: type) -> dict[str, type]:
    """Every dataclass that the JSON of one is made of."""
    known: dict[str, type] = {}
    waiting = [start]
    while waiting:
        each = waiting.pop()
        if each.__name__ not in known:
            known[each.__name__] = each
            waiting += [other for annotation in typing.get_type_hints(each).values() for other in inside(annotation)]
    return known


def test_every_field_of_an_explanation_is_described() -> None:
    described, values = documented(), reachable(Explanation)
    assert sorted(described) == sorted(values), f"sections of {DOCUMENT.name} against the dataclasses there are"
    for name, value in values.items():
        fields = {field.name: str(field.type) for field in dataclasses.fields(value)} | WRITTEN_OUT.get(name, {})
        lines = "\n".join(f"| `{field}` | `{kind.replace('|', chr(92) + '|')}` | ... |" for field, kind in fields.items())
        assert described[name] == fields, f"section {name} of {DOCUMENT.name} should have the rows\n{lines}"


@pytest.fixture(scope="module")
def explanation(dense: DenseModel) -> Explanation:
    return explain(agreeing(dense), PROMPT)


def test_what_is_written_is_what_is_described(explanation: Explanation) -> None:
    described, values = documented(), reachable(Explanation)

    def check(value: Any, annotation: Any) -> None:
        if value is None:
            assert type(None) in typing.get_args(annotation)
        elif isinstance(value, dict) and inside(annotation):
            name = next(each.__name__ for each in inside(annotation))
            assert set(value) == set(described[name])
            hints = typing.get_type_hints(values[name])
            for field in hints:
                check(value[field], hints[field])
        elif isinstance(value, list):
            for part in value:
                check(part, annotation)

    written = explanation.to_json()
    check(written, Explanation)
    assert written["format"] == FORMAT
    assert 0 <= written["answer"]["id"] < VOCABULARY


@pytest.mark.parametrize("found", [None, 0, FORMAT + 1, "1"])
def test_another_format_is_refused(explanation: Explanation, found: Any) -> None:
    with pytest.raises(ExplainError, match=f"format {found!r}, not {FORMAT}"):
        Explanation.from_json(explanation.to_json() | {"format": found})


def test_a_field_that_is_not_known_is_ignored(explanation: Explanation) -> None:
    assert Explanation.from_json(explanation.to_json() | {"later": [1]}) == explanation


def test_numbers_that_are_no_json_are_refused(explanation: Explanation) -> None:
    with pytest.raises(ExplainError, match="no explanation"):
        Explanation.from_json(explanation.to_json() | {"dense_d": float("nan")})


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"dense": []}, "dense is empty"),
        ({"tokens": []}, "tokens is empty"),
        ({"prompt": 3}, "prompt: "),
        ({"opening": 9}, "it opens at circuit 9 of "),
    ],
)
def test_what_does_not_fit_together_is_refused(explanation: Explanation, change: dict[str, Any], why: str) -> None:
    with pytest.raises(ExplainError, match=f"this version reads .{why}"):
        Explanation.from_json(explanation.to_json() | change)


@pytest.mark.parametrize(("field", "value"), [("position", 999), ("position", -1), ("kind", "soul"), ("group", 999)])
def test_a_node_that_cannot_be_is_refused(explanation: Explanation, field: str, value: Any) -> None:
    values = explanation.to_json()
    values["nodes"][0][field] = value
    with pytest.raises(ExplainError, match=f"node .*{value}"):
        Explanation.from_json(values)


def test_the_reference_of_commands_is_what_they_say() -> None:
    command = get_command(app)
    written = get_docs_for_click(obj=command, ctx=typer.Context(command), name="bridge")
    assert (DOCUMENT.parent / "cli.md").read_text(encoding="utf-8").strip() == written.strip(), "run `make docs`"

"""A recipe says in one line what is wrong with it, and how to put it right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from bridge import recipe as module
from bridge.recipe import (
    BRIDGE_LOSSES,
    Recipe,
    RecipeError,
    kept_fraction,
    known_names,
    n_kept,
    parse_setting,
    read_recipe,
    recipe_values,
    resolve,
)

SHIPPED = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


def values(**parts: Any) -> dict[str, Any]:
    """The least that a recipe must say, with parts replaced."""
    return {"dense": "gpt2", "sparsity": {"l0": 0.1}, "budget": {"tokens": 1000}, **parts}


def assigned(*assignments: str) -> Recipe:
    """The least recipe with some of its numbers set as on the command line."""
    settings = dict(parse_setting(assignment) for assignment in assignments)
    return resolve({"dense": "gpt2", **recipe_values(l0=0.1, tokens=1000, settings=settings)})


def refusal(*assignments: str, **parts: Any) -> str:
    """The one line with which a recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        _ = assigned(*assignments) if assignments else resolve(values(**parts))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_least_recipe_is_complete() -> None:
    recipe = resolve(values())
    assert (recipe.sparsity.l0, recipe.budget.tokens, recipe.sparse.keep, recipe.seed) == (0.1, 1000, None, 0)
    assert recipe.losses.coupled


@pytest.mark.parametrize("l0", [0, -1, -0.5])
def test_an_l0_that_keeps_nothing_is_refused(l0: float) -> None:
    remedy = "must keep some weights; give the fraction of weights that stay (such as 0.05) or, from 1 on, their number"
    assert refusal(sparsity={"l0": l0}) == refusal(f"l0={l0}") == f"sparsity.l0 = {l0}: {remedy}"


@pytest.mark.parametrize("name", ["sparsity.l0", "sparse.width", "sparse.positions", "optimizer.rate"])
def test_true_is_neither_a_number_nor_a_text(name: str) -> None:
    assert refusal(f"{name}=true") == f"{name} = True: must not be true or false; give a value"


@pytest.mark.parametrize("l0", [0, 1.5, "nan"])
def test_an_l0_of_the_embedding_is_a_fraction(l0: object) -> None:
    assert refusal(f"embed_l0={l0}").startswith("sparsity.embed_l0 = ")


@pytest.mark.parametrize("l0", ["nan", "inf", "1/16"])
def test_an_l0_that_is_no_number_is_refused(l0: str) -> None:
    assert refusal(f"l0={l0}").startswith("sparsity.l0 = ")


def test_an_unknown_key_is_refused_and_the_known_ones_listed() -> None:
    for message in (refusal("sparse.widht=3"), refusal(sparse={"widht": 3}), refusal(spares={"width": 32})):
        assert "is not one of the recipe's settings; choose from " in message
        assert all(name in message for name in known_names())
    assert refusal(sparse={"widht": 3}).startswith("sparse.widht ")
    assert refusal("sparse=3").startswith("the setting sparse is not one of the recipe's settings")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"dense": None}, "dense = None: input should be a valid string"),
        ({"sparse": 5}, "sparse = 5: must be a table of settings; write a setting in full, for example sparse.width = 512"),
        (
            {"sparse": {"width": 100, "head_channels": 16}},
            "sparse.width 100 is not a multiple of sparse.head_channels 16; change one of them",
        ),
        (
            {"sparse": {"positions": "rotary", "head_channels": 5}},
            "sparse.head_channels 5 is odd, but rotary positions rotate pairs; give an even number",
        ),
        ({"sparse": {"positions": "sinus"}}, "sparse.positions = 'sinus': input should be 'auto', 'none', 'learned' or 'rotary'"),
        ({"budget": {"minutes": -1}}, "budget.minutes = -1: input should be greater than 0"),
        ({"budget": {"tokens": 0}}, "budget.tokens = 0: input should be greater than or equal to 1"),
        ({"data": {"context": 1}}, "data.context = 1: input should be greater than or equal to 2"),
        ({"optimizer": {"betas": (0.9, 1.0)}}, "optimizer.betas.1 = 1.0: input should be less than 1"),
        ({"seed": -1}, "seed = -1: input should be greater than or equal to 0"),
        ({"seed": 2**32}, "seed = 4294967296: input should be less than or equal to 4294967295"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_named_with_its_rule(parts: dict[str, Any], message: str) -> None:
    assert refusal(**parts) == message


def test_what_is_missing_is_named() -> None:
    with pytest.raises(RecipeError, match="dense is missing"):
        resolve({key: value for key, value in values().items() if key != "dense"})


def test_losses_that_are_all_zero_are_refused() -> None:
    losses = dict.fromkeys(("ce", "kl", *BRIDGE_LOSSES), 0)
    assert refusal(losses=losses) == "every loss weight is 0; give at least losses.ce a weight above 0"


def test_bridges_alone_have_something_to_learn_and_to_learn_it_to() -> None:
    alone = {"optimizer": {"rate": 0}}
    assert "give a coupling's folder as sparse.start" in refusal(**alone)
    there = {**alone, "sparse": {"start": "runs/there"}}
    assert resolve(values(**there)).losses.coupled
    assert "a weight above 0 to a loss that involves bridges" in refusal(**there, losses=dict.fromkeys(BRIDGE_LOSSES, 0))
    assert "losses.carried has no literal form" in refusal(losses={"carried": 1, "splice": "literal"})
    assert "losses.ablated has no literal form" in refusal(losses={"ablated": 1, "splice": "literal"})
    assert "together with bridges only" in refusal(losses={"ablated": 1, **dict.fromkeys(BRIDGE_LOSSES, 0)})


def test_an_uncoupled_recipe_reads_text_alone() -> None:
    losses = resolve(values(losses={"splice": "literal", "ce": 0})).losses.uncoupled()
    assert not losses.coupled
    assert (losses.ce, losses.kl, losses.splice) == (1.0, 0.0, "literal")


@pytest.mark.parametrize(
    ("assignment", "where", "value"),
    [
        ("sparse.width=512", ("sparse", "width"), 512),
        ("width=512", ("sparse", "width"), 512),
        ("budget.tokens=1_000_000", ("budget", "tokens"), 1_000_000),
        ("tokens=1e6", ("budget", "tokens"), 1_000_000),
        ("optimizer.rate=1e-3", ("optimizer", "rate"), 1e-3),
        ("rate = 0.5", ("optimizer", "rate"), 0.5),
        ("sinks=false", ("sparse", "sinks"), False),
        ("sparsity.biases=true", ("sparsity", "biases"), True),
        ("positions=rotary", ("sparse", "positions"), "rotary"),
        ('positions="rotary"', ("sparse", "positions"), "rotary"),
        ("data.source=stdlib+packages", ("data", "source"), "stdlib+packages"),
        ("source=../my text/a=b.txt", ("data", "source"), "../my text/a=b.txt"),
        ("betas=[0.8, 0.99]", ("optimizer", "betas"), (0.8, 0.99)),
        ("seed=7", ("seed",), 7),
        ("revision=main", ("revision",), "main"),
    ],
)
def test_assignments(assignment: str, where: tuple[str, ...], value: Any) -> None:
    found: Any = assigned(assignment)
    for name in where:
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("assignment", ["", "seed", "=3", "sparse.width"])
def test_assignments_without_a_key_or_value_are_refused(assignment: str) -> None:
    form = f"the setting {assignment!r} is not of the form key=value; write, for example, sparse.width=512"
    assert refusal(assignment) == form


def test_a_bare_key_that_two_parts_have_must_be_written_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "known_names", lambda: ["sparse.width", "bridges.width"])
    assert refusal("width=3") == "the setting width could mean sparse.width or bridges.width; write the full name"


def test_assigning_within_something_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("sparse = 5")
    with pytest.raises(RecipeError, match="^sparse = 5: must be a table of settings"):
        recipe_values(recipe=tmp_path / "recipe.toml", width=32)


def test_every_number_has_a_name_that_can_be_set() -> None:
    assert len(known_names()) == len(set(known_names())) > 30
    for name in known_names():
        *part, key = name.split(".")
        changed = recipe_values(settings=dict([parse_setting(f"{name}=1")]))
        assert changed == ({part[0]: {key: 1}} if part else {key: 1})


def test_a_recipe_is_frozen() -> None:
    recipe = resolve(values())
    with pytest.raises(ValidationError, match="frozen"):
        recipe.sparse.keep = 1.0  # type: ignore[misc]


def test_json_round_trip() -> None:
    recipe = resolve(values(sparse={"width": 64}, optimizer={"betas": [0.8, 0.9]}, adapter="folder"))
    assert resolve(json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_recipes_resolve(path: Path) -> None:
    resolve({"dense": "gpt2", **read_recipe(path)})


def test_recipe_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "good.toml").write_text("seed = 3")
    (tmp_path / "bad.toml").write_text("seed = = 3")
    (tmp_path / "latin.toml").write_bytes(b'dense = "\xe9"')
    assert read_recipe(tmp_path / "good.toml") == {"seed": 3}
    with pytest.raises(RecipeError, match=r"does not exist \(recipes in its folder: bad\.toml, good\.toml, latin\.toml\)"):
        read_recipe(tmp_path / "goof.toml")
    with pytest.raises(RecipeError, match=r"does not exist \(recipes in its folder: none\)"):
        read_recipe(tmp_path / "nowhere" / "a.toml")
    for name in ("bad.toml", "latin.toml", "."):
        with pytest.raises(RecipeError, match=r"is not a TOML file \(.+\); name a file such as those in recipes/$"):
            read_recipe(tmp_path / name)


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("seed = 3\n[sparsity]\nl0 = 0.5\n[budget]\ntokens = 10\n[sparse]\nwidth = 32\nkeep = 0.5\n")
    recipe = resolve({"dense": "x", **recipe_values(recipe=file, l0=0.1, minutes=2, width=64, settings={"keep": 1.0})})
    assert (recipe.seed, recipe.sparsity.l0, recipe.sparse.width, recipe.sparse.keep) == (3, 0.1, 64, 1.0)
    assert (recipe.budget.tokens, recipe.budget.minutes) == (None, 2)  # a budget as a flag replaces the file's
    assert not resolve({"dense": "x", **recipe_values(recipe=file, uncoupled=True)}).losses.coupled


def test_flags_that_do_not_make_a_recipe_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text("[losses]\nce = -1\n[sparsity]\nl0 = 0.5")
    with pytest.raises(RecipeError, match=r"^losses\.ce = -1: input should be greater than or equal to 0$"):
        recipe_values(recipe=file, uncoupled=True)


@pytest.mark.parametrize(
    ("l0", "count", "total", "kept"),
    [(0.5, 10, 99, 5), (0.25, 10, 99, 3), (0.01, 10, 99, 1), (1, 10, 99, 1), (50, 10, 100, 5), (100, 10, 100, 10)],
)
def test_how_many_weights_stay(l0: float, count: int, total: int, kept: int) -> None:
    assert n_kept(kept_fraction(l0, total), count) == kept


def test_more_weights_than_there_are_cannot_stay() -> None:
    with pytest.raises(RecipeError, match="l0 1000001 is more than the number of weights, 100; give a fraction"):
        kept_fraction(1_000_001, 100)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, bridge.recipe; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"

"""Every number that determines a checkpoint, validated and frozen.

A recipe is a small TOML file that people read (see `recipes/`); the resolved recipe, with all defaults filled in, is saved beside
the weights. Names follow the method and the paper: see Gao et al. 2025, sections 2.2 and 2.3 and appendix A.

This module does not import torch, so that a command line can check its arguments before anything heavy is loaded.
"""

from __future__ import annotations

import math
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from bridge.errors import UserError

MAX_SEED = 2**32 - 1  # the largest seed that numpy accepts


def encoding_fault(text: str) -> str | None:
    """Return the fault of a text that UTF-8 cannot encode (half of a surrogate pair, an undecoded byte), as a rule; or None."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"has {text[error.start]!r}, which is not a character of UTF-8 text"
    return None


class RecipeError(UserError):
    """A recipe that cannot be used; one line names the value, the rule and the remedy."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name or ""].annotation is not bool:
            raise RecipeError("must not be true or false", remedy="give a value")
        return value


_Share = Annotated[float, Field(ge=0, lt=1)]


class AttentionShape(_Part):
    """How a block's attention depends on positions."""

    frequencies: tuple[float, ...] = Field(default=(), description="radians per token by which a head's channel pairs rotate")
    window: int | None = Field(default=None, ge=1, description="tokens that a query attends to, its own included; unset: all")
    slopes: tuple[float, ...] = Field(default=(), description="ALiBi: for each head, its scores' increase per key position")


class BlockShape(_Part):
    """Parts of the dense model's block that the sparse one has too, as measured; default: a plain block (paper, section 2.2)."""

    heads: int | None = Field(default=None, ge=1, description="query heads; unset: width / head_channels")
    kv_heads: int | None = Field(default=None, ge=1, description="heads of keys and values; unset: as many as query heads")
    neurons: int | None = Field(default=None, ge=1, description="MLP neurons; unset: mlp_ratio times the width")
    gated: bool = False
    activation: Literal["gelu_new", "gelu", "silu", "relu", "quick_gelu", "relu2"] = "gelu_new"
    attention: tuple[AttentionShape, ...] = Field(default=(), description="one per block; a shorter list is repeated")
    score_cap: float | None = Field(default=None, gt=0, description="soft cap of attention scores")
    logit_cap: float | None = Field(default=None, gt=0, description="soft cap of logits, before the bigram table")
    qk_norm: Literal["head", "all"] | None = Field(default=None, description="norm of queries and keys, per head or over all")
    reads_normed: bool = Field(default=True, description="sublayers read the residual through a norm")
    writes_normed: bool = Field(default=False, description="sublayers write through a norm with a gain")
    eps: float = Field(default=1e-6, ge=0, description="epsilon of the norms")

    @model_validator(mode="after")
    def _heads_share(self) -> BlockShape:
        if self.kv_heads and (self.heads or 0) % self.kv_heads:
            raise RecipeError(
                f"{self.heads} query heads", f"cannot share {self.kv_heads} heads of keys and values", "give a multiple"
            )
        return self


class SparseShape(_Part):
    """The shape of the weight-sparse model (paper, section 2.2 and appendix A.1)."""

    width: int | None = Field(default=None, ge=16, description="residual width; unset: twice the dense model's")
    blocks: str | None = Field(
        default=None, description="dense blocks that are coupled, as a slice (12:16); unset: the whole model"
    )
    head_channels: int | None = Field(default=None, ge=2, description="channels of a head; unset: the dense model's")
    mlp_ratio: int | None = Field(default=None, ge=1, description="MLP neurons per channel; unset: the dense model's")
    mlp: Literal["auto", "plain", "gated"] = "auto"
    keep: float | None = Field(
        default=None, gt=0, le=1,
        description="share of the values AbsTopK keeps at every node; unset: 1/4, or more if a copy of the dense model needs it",
    )  # fmt: skip
    sinks: bool = Field(default=True, description="a learnt logit per head in the softmax denominator")
    positions: Literal["auto", "none", "learned", "rotary"] = Field(default="auto", description="auto: the dense model's")
    bigram: Literal["none", "full", "low-rank"] = Field(default="low-rank", description="table added to the logits, dense")
    bigram_rank: int = Field(default=64, ge=1)
    start: str = Field(
        default="auto", description="auto: copied from the dense model as far as possible; random; or a coupling's folder"
    )
    block: BlockShape | None = Field(default=None, description="unset: the dense model's, filled in when fitting begins")

    @field_validator("blocks")
    @classmethod
    def _slice(cls, blocks: str | None) -> str | None:
        if blocks is not None and not re.fullmatch(r"-?\d*:-?\d*", blocks):
            raise ValueError("must be a slice of the dense model's blocks, first:last; give one, such as 12:16 or -4:")
        return blocks

    @model_validator(mode="after")
    def _heads_fit(self) -> SparseShape:
        apart = self.block is not None and self.block.heads is not None
        if self.width is not None and self.head_channels is not None and self.width % self.head_channels and not apart:
            rule = f"is not a multiple of sparse.head_channels {self.head_channels}"
            raise RecipeError(f"sparse.width {self.width}", rule, "change one of them")
        if self.positions == "rotary" and (self.head_channels or 0) % 2 and not apart:
            raise RecipeError(
                f"sparse.head_channels {self.head_channels}", "is odd, but rotary positions rotate pairs", "give an even number"
            )
        if self.blocks is not None and self.positions == "learned":
            rule = "cannot be used for a span (sparse.blocks), which has no token embedding"
            raise RecipeError("sparse.positions 'learned'", rule, "give sparse.positions 'auto'")
        return self


class Sparsity(_Part):
    """How many weights stay nonzero (paper, appendix A.2)."""

    l0: float = Field(default=1 / 16, description="weights that stay nonzero: below 1 their fraction, from 1 on their number")
    embed_l0: float | None = Field(
        default=None, gt=0, le=1, description="fraction of embedding, positions and unembedding that stays nonzero; unset: l0's"
    )
    biases: bool = Field(default=False, description="biases are projected too, each to the fraction of the blocks")
    min_per_neuron: int = Field(default=0, ge=0, description="nonzeros kept on each side of every neuron and channel")
    anneal: float = Field(default=0.5, gt=0, le=1, description="share of the training over which L0 falls from 1 to its target")

    native: Literal["auto", "always", "never"] = Field(
        default="auto", description="train only the nonzeros after the anneal: where that is measured to be faster, always, never"
    )
    look_every: int = Field(default=20, ge=1, description="steps between dense gradients, which update the mask, when native")
    move: float = Field(default=0.1, ge=0, lt=1, description="share of nonzeros replaced at first, when native; falls to 0")

    @field_validator("l0")
    @classmethod
    def _positive(cls, l0: float) -> float:
        if l0 <= 0:
            remedy = "give the fraction of weights that stay (such as 0.05) or, from 1 on, their number"
            raise RecipeError("must keep some weights", remedy=remedy)
        return l0


class Data(_Part):
    """The training text."""

    source: str = Field(default="stdlib", description="stdlib, stdlib+packages, self, a file or folder, or a hub data set")
    stream: bool = Field(default=False, description="text is read during the fit, not beforehand")
    most_tokens: int | None = Field(default=None, ge=1, description="limit on tokens read or sampled; unset: the budget's")
    context: int | None = Field(default=None, ge=2, description="tokens per row; unset: 128, or the dense model's limit")
    rows: int | None = Field(
        default=None, ge=2, description="rows per step, over all processes; unset: 32, or fewer if memory is short"
    )
    micro_rows: int | None = Field(
        default=None, ge=1, description="rows that a process runs at once, accumulating gradients; unset: its share"
    )

    @model_validator(mode="after")
    def _read_once(self) -> Data:
        if self.stream and self.most_tokens is not None:
            raise RecipeError("data.most_tokens", "does not apply if data.stream is on", "leave one of them out")
        return self


class Budget(_Part):
    """When training ends: at the first of the two limits that is reached; after 20 million tokens if neither is given."""

    tokens: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _some(cls, values: Any) -> Any:
        unset = isinstance(values, dict) and all(value is None for value in values.values())
        return {"tokens": 20_000_000} if unset else values


class Optimizer(_Part):
    """AdamW with RMS-normalised gradients (paper, appendix A.2); eps and the normalisation belong together."""

    rate: float | None = Field(
        default=None,
        ge=0,
        description="sparse model's peak learning rate, before sharkfin; 0: it is frozen, and only the bridges learn; "
        "unset: 3e-3 from a random start, otherwise at most 1e-3, less if the answers would change too much",
    )
    bridge_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of the bridges' matrices")
    bridge_bias_rate: float = Field(
        default=1e-2, gt=0, description="that of their biases, which store means and so drift further than matrix entries"
    )
    sharkfin: bool = Field(default=True, description="multiply the sparse weights' rate by 1/sqrt(L0)")
    betas: tuple[_Share, _Share] = (0.9, 0.95)
    eps: float = Field(default=0.1, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    warmup: float = Field(default=0.01, ge=0, lt=1, description="share of the training in which the rates rise")


BRIDGE_LOSSES = (
    "nmse_encoder",
    "nmse_decoder",
    "hybrid_in",
    "hybrid_out",
    "hybrid_both",
    "carried",
)  # terms that involve the bridges


class Losses(_Part):
    """The weight of every loss term (paper, section 2.3); terms over sites are averaged over them, so depth changes no weight."""

    ce: float = Field(default=1.0, ge=0, description="cross-entropy of the sparse model on text")
    kl: float = Field(default=1.0, ge=0, description="KL(y_d, y_s)")
    nmse_encoder: float = Field(default=1.0, ge=0, description="NMSE(f_i(h_d), stop(h_s))")
    nmse_decoder: float = Field(default=1.0, ge=0, description="NMSE(g_i(h_s), h_d)")
    hybrid_in: float = Field(default=1.0, ge=0, description="dense until i, encoded, sparse to the end: KL(y_d, .)")
    hybrid_out: float = Field(default=1.0, ge=0, description="sparse until i, decoded, dense to the end: KL(y_d, .)")
    hybrid_both: float = Field(default=1.0, ge=0, description="rows that enter at i and leave at j > i; 0: none")
    carried: float = Field(default=0.0, ge=0, description="dense, with a difference of two rows' sparse residuals added at i")
    ablated: float = Field(default=0.0, ge=0, description="KL(y_d, y_s with random nodes at their means), rows from tokens")
    ablated_most: float = Field(default=0.5, gt=0, le=1, description="largest share of nodes ablated; each row draws its own")
    temperature: float = Field(default=1.0, gt=0, description="temperature of both answers in the hybrid terms and in carried")
    splice: Literal["sampled", "literal"] = Field(default="sampled", description="one site per row, or every site for every row")

    @property
    def coupled(self) -> bool:
        """Whether any term involves the bridges."""
        return any(getattr(self, term) > 0 for term in BRIDGE_LOSSES)

    def without_bridges(self) -> Losses:
        """Return the losses on text and on the dense model's answers only, without any inside either model."""
        return self.model_copy(update=dict.fromkeys((*BRIDGE_LOSSES, "ablated"), 0.0))

    def uncoupled(self) -> Losses:
        """Return the losses of the paper's interpretable-by-construction setting: text only, no dense model."""
        return self.without_bridges().model_copy(update={"ce": self.ce or 1.0, "kl": 0.0})


class Refit(_Part):
    """The decoders' last fit, in closed form, after training, so that small changes too act alike (`training/refit.py`)."""

    slopes: float = Field(
        default=1.0, ge=0, description="weight of gradients relative to the decoders' trained values; 0: no refit"
    )
    rows: int = Field(default=256, ge=1, description="rows of the training text that it uses")


class Recipe(_Part):
    """Everything that decides what a fit produces, together with the dense model's weights and the machine's arithmetic."""

    dense: str = Field(description="hub id or folder of the dense model, or the class of a live one")
    revision: str | None = None
    adapter: str | None = Field(default=None, description="folder of a PEFT (LoRA) adapter merged into the dense model")
    dense_dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        default="float32", description="precision of the dense model's weights and computation; a live model keeps its own"
    )
    adapts: bool = Field(default=False, description="sparse.start is a coupling of the model whose fine-tune this dense model is")
    sparse: SparseShape = SparseShape()
    sparsity: Sparsity = Sparsity()
    data: Data = Data()
    budget: Budget = Budget()
    optimizer: Optimizer = Optimizer()
    losses: Losses = Losses()
    refit: Refit = Refit()
    seed: int = Field(default=0, ge=0, le=MAX_SEED)

    @model_validator(mode="after")
    def _useful(self) -> Recipe:
        if self.losses.ce == self.losses.kl == 0 and not self.losses.coupled:
            raise RecipeError("every loss weight is 0", remedy="give at least losses.ce a weight above 0")
        for name in ("carried", "ablated"):
            if getattr(self.losses, name) and self.losses.splice == "literal":
                remedy = f"leave losses.splice at 'sampled' or losses.{name} at 0"
                raise RecipeError(f"losses.{name}", "has no literal form", remedy)
        if self.losses.ablated and not self.losses.coupled:
            remedy = "give a loss that involves bridges a weight above 0, or leave losses.ablated at 0"
            raise RecipeError("losses.ablated", "is trained together with bridges only", remedy)
        if self.adapts and self.sparse.start in ("auto", "random"):
            rule = "continues a coupling, and none is given"
            raise RecipeError("adapts = true", rule, "give the coupling's folder as sparse.start, as `bridge adapt` does")
        if self.optimizer.rate == 0 and (not self.losses.coupled or self.sparse.start in ("auto", "random")):
            raise RecipeError(
                "optimizer.rate 0",
                "trains only the bridges, which needs a trained sparse model",
                "give a coupling's folder as sparse.start, and a weight above 0 to a loss that involves bridges",
            )
        return self


def parse_blocks(text: str, depth: int) -> tuple[int, int]:
    """Return the first block of a span, and the block after its last, from a slice of a model's blocks. Raises RecipeError."""
    ends = [int(end) if end else None for end in text.split(":")]
    first, last, _ = slice(*ends).indices(depth)
    if first >= last or any(end is not None and not -depth <= end <= depth for end in ends):
        raise RecipeError(
            f"sparse.blocks {text!r}", f"is not a span of the dense model's {depth} blocks", f"give first:last within 0:{depth}"
        )
    return first, last


def read_recipe(path: str | Path) -> dict[str, Any]:
    """Return a recipe file as nested dictionaries, not yet validated, so that flags can still change it. Raises RecipeError."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(file.name for file in path.parent.glob("*.toml"))) or "none"
        raise RecipeError(f"recipe {str(path)!r}", f"does not exist (recipes in its folder: {known})", "name another") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise RecipeError(
            f"recipe {str(path)!r}", f"is not a TOML file ({error})", "name a file such as those in recipes/"
        ) from None


def recipe_values(
    *,
    recipe: str | Path | dict[str, Any] | None = None,
    data: str | None = None,
    uncoupled: bool = False,
    settings: dict[str, Any] | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Return nested recipe values from a file or a dictionary (changed in place), overridden by flags.

    Flags are numbers of the recipe by their short names (l0, tokens, width), None if not given; a budget flag replaces the whole
    budget. `data` is data.source; `settings` maps names of numbers ("optimizer.rate") to values. Raises RecipeError.
    """
    values = recipe if isinstance(recipe, dict) else read_recipe(recipe) if recipe is not None else {}
    if any(flags.get(name) is not None for name in Budget.model_fields):
        values.pop("budget", None)
    for name, value in {"data.source": data, **flags, **(settings or {})}.items():
        if value is not None:
            _put(values, name, value)
    if uncoupled:
        losses = resolve({"dense": "", "losses": values.get("losses", {})}).losses
        values["losses"] = losses.uncoupled().model_dump()
    return values


def parse_setting(assignment: str) -> tuple[str, Any]:
    """Return (full name, value) of `part.key=value`, or of `key=value` if only one part has the key. Raises RecipeError."""
    name, equals, text = assignment.partition("=")
    if not equals or not name:
        raise RecipeError(f"the setting {assignment!r}", "is not of the form key=value", "write, for example, sparse.width=512")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    return _full_name(name.strip()), value


def resolve(values: dict[str, Any]) -> Recipe:
    """Return nested values as a Recipe. Raises RecipeError with the first fault, in one line."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _refusal(error) from None


def known_names() -> list[str]:
    """Return the full name of every number of a recipe."""
    names = []
    for field, info in Recipe.model_fields.items():
        part = info.annotation
        if isinstance(part, type) and issubclass(part, _Part):
            names += [f"{field}.{key}" for key in part.model_fields]
        else:
            names.append(field)
    return names


def kept_fraction(l0: float, total: int) -> float:
    """Return the fraction of the weights that stays: l0 itself if it is below 1, otherwise l0 as a number of all `total` weights.

    Raises RecipeError if l0 is more than `total`.
    """
    if l0 > total:
        raise RecipeError(
            f"l0 {l0:.15g}", f"is more than the number of weights, {total}", "give a fraction below 1 or a smaller number"
        )
    return l0 if l0 < 1 else l0 / total


def n_kept(fraction: float, count: int) -> int:
    """Return the number of a matrix's `count` weights that stay: the same fraction of each matrix, at least one weight."""
    return max(1, min(count, math.floor(fraction * count + 0.5)))


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    *parts, key = _full_name(name).split(".")
    for part in parts:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{part} = {values!r}:", *_NOT_A_TABLE)
    values[key] = value


def _full_name(name: str) -> str:
    names = known_names()
    if name in names:
        return name
    matches = [full for full in names if full.split(".")[-1] == name]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise RecipeError(f"the setting {name}", f"could mean {' or '.join(matches)}", "write the full name")
    raise RecipeError(f"the setting {name}", "is not one of the recipe's settings", f"choose from {', '.join(names)}")


_NOT_A_TABLE = "must be a table of settings", "write a setting in full, for example sparse.width = 512"


def _refusal(error: ValidationError) -> RecipeError:
    """Return the first fault in a recipe."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    value, own = f"{where} = {first['input']!r}:", first.get("ctx", {}).get("error")
    match first["type"]:
        case "extra_forbidden":
            return RecipeError(where, "is not one of the recipe's settings", f"choose from {', '.join(known_names())}")
        case "missing":
            return RecipeError(where, "is missing from the recipe", "give it there or in ‹settings›")
        case "model_type":
            return RecipeError(value, *_NOT_A_TABLE)
    if isinstance(own, RecipeError):  # a rule between several numbers names them itself
        return own if isinstance(first["input"], dict) else RecipeError(value, own.problem, own.remedy)
    return RecipeError(value, first["msg"][0].lower() + first["msg"][1:])

"""Requests and responses as pydantic models, from which the OpenAPI description is generated.

The schema of an explanation is `explanation.Explanation` itself, so the two cannot drift apart.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from bridge.evidence.measures import Report
from bridge.explanations.explanation import Explanation
from bridge.explanations.parts import Answer, Answered, Drawn
from bridge.studies.result import TaskFacts

LONGEST_PROMPT = 20_000  # characters; the number of tokens is limited by the coupling's context
Text = Annotated[str, Field(max_length=200)]
Status = Literal["queued", "running", "done", "failed", "cancelled"]
Stage = Literal["answered", "drawn", "explanation"]


class Asking(BaseModel):
    """A request body; unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Refusal(BaseModel):
    """The reason why a request was refused."""

    detail: str = Field(description="One line that names the value, the rule and the remedy.")


class Health(BaseModel):
    """The state of the server and of its queue."""

    status: Literal["ok"] = "ok"
    version: str
    queued: int = Field(description="Explanations that wait.")
    running: int = Field(description="Explanations under way: 0 or 1.")
    remembered: int = Field(description="Explanations that are over and still remembered.")


class CouplingEntry(BaseModel):
    """A coupling that can explain prompts; if it cannot be read, the error in place of its facts."""

    name: str
    default: bool = Field(description="Whether it is used where none is named.")
    loaded: bool = Field(description="Whether it is in memory.")
    dense: str | None = Field(default=None, description="The dense model it explains.")
    blocks: str | None = Field(default=None, description="Its blocks that are coupled, as a slice; none given: all.")
    l0: float | None = Field(default=None, description="Nonzero weights: below 1 a fraction, from 1 on their number.")
    width: int | None = Field(default=None, description="Residual width of the sparse model.")
    sublayers: int | None = None
    context: int | None = Field(default=None, description="Most tokens a prompt may have.")
    vocabulary: int | None = None
    error: str | None = None


class TaskEntry(BaseModel):
    """A built-in task."""

    name: str
    language: str
    about: str


class TaskPair(BaseModel):
    """A contrast pair: two prompts, and the right and the wrong answer to the first, each as a list of alternative spellings."""

    prompt: str
    counterfactual: str
    answer: list[str]
    wrong: list[str]


class TaskDetail(TaskEntry):
    """A built-in task with some of its pairs."""

    pairs: list[TaskPair]


class CircuitEntry(BaseModel):
    """A summary of a task's circuit; `error` is set if the task has none, or if the circuit cannot be read."""

    name: str
    task: str | None = None
    null: str | None = Field(default=None, description="Set for a search that must fail: labels, weights or shuffled.")
    verdict: str | None = None
    nodes: int | None = None
    edges: int | None = None
    error: str | None = None


class CircuitDetail(BaseModel):
    """A task's circuit as `bridge circuit` wrote it, without masks and means."""

    name: str
    facts: TaskFacts
    report: Report
    verdict: str
    reasons: list[str]
    nodes: list[str]


class Prompted(Asking):
    """A prompt to explain."""

    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT, description="The text whose next token is explained.")
    bridge: Text | None = Field(
        default=None, description="A coupling as /api/couplings names it; the default one where none is given."
    )
    target: Text | None = Field(default=None, description="Explain this token; the dense model's answer where none is given.")
    contrast: Text | None = Field(default=None, description="Rather than this token; than any other where none is given.")
    counterfactual: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)] | None = Field(
        default=None, description="A prompt of as many tokens with another answer, which adds patching to the evidence."
    )


class JobEntry(BaseModel):
    """A requested explanation and its state."""

    id: str
    bridge: str
    prompt: str
    target: str | None
    contrast: str | None
    counterfactual: str | None
    status: Status
    phase: str = Field(description="What it is at, for a person to read.")
    error: str | None = Field(default=None, description="Why it failed, in one line.")
    place: int | None = Field(description="Its place in the queue, 1 for the next; null where it does not wait.")
    stopping: bool = Field(description="Whether it was cancelled and stops once the phase that it is at ends.")
    stage: Stage | None = Field(description="How much is known: the question and both answers, the circuit, or all of it.")
    verdict: str | None = Field(description="What the evidence comes to; null before it is readable.")
    asked_at: datetime
    began_at: datetime | None = Field(description="When work on it began; null before.")
    ended_at: datetime | None = Field(description="When it was done, failed or cancelled; null before.")
    readable: bool = Field(description="Whether the explanation is there.")


class ExplanationJob(JobEntry):
    """A requested explanation and its known values; only the last stage that was reached has a value, the others are null."""

    answered: Answered | None = Field(None, description="The question, both models' answers, and the span, at once.")
    drawn: Drawn | None = Field(None, description="The opening circuit, before the evidence on it.")
    explanation: Explanation | None = Field(
        None,
        description="As `Explanation.to_json` writes it: besides these fields `format`, `agree`, `span`, and in the report "
        "verdict and reasons.",
    )


class Steering(Asking):
    """A node of the circuit to set, and how strongly the change is patched into the dense model."""

    node: Text = Field(description="A node of the explanation, as its id: L1.mlp_act[37]@5.")
    value: float = Field(ge=-1e6, le=1e6, description="The activation that it is set to in the sparse model.")
    strength: float = Field(default=1.0, ge=0, le=1, description="0 leaves the dense model as it is.")


class Steered(BaseModel):
    """The dense model's answer and text when a node is steered."""

    strength: float
    dense: list[Answer] = Field(description="Its next tokens, the likeliest first.")
    probability_target: float
    probability_contrast: float = Field(description="Of the contrast; where there is none, of its second answer.")
    text: str = Field(description="What it goes on to write.")

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
    queued: int = Field(description="Number of explanations in the queue.")
    running: int = Field(description="Number of running explanations: 0 or 1.")
    remembered: int = Field(description="Number of ended explanations that are still remembered.")


class CouplingEntry(BaseModel):
    """A coupling that can explain prompts; if it cannot be read, the error in place of its facts."""

    name: str
    default: bool = Field(description="Whether it is used if a request names no coupling.")
    loaded: bool = Field(description="Whether it is in memory.")
    dense: str | None = Field(default=None, description="The dense model it explains.")
    blocks: str | None = Field(default=None, description="The coupled blocks of the dense model, as a slice; null: all.")
    l0: float | None = Field(default=None, description="Weights that are kept: below 1 a fraction, otherwise their number.")
    width: int | None = Field(default=None, description="Residual width of the sparse model.")
    sublayers: int | None = None
    context: int | None = Field(default=None, description="Largest number of tokens of a prompt.")
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
    null: str | None = Field(default=None, description="If the search was a null, which must fail: labels, weights or shuffled.")
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
    bridge: Text | None = Field(default=None, description="Name of a coupling as in /api/couplings; default: the first.")
    target: Text | None = Field(default=None, description="Token to explain; default: the dense model's answer.")
    contrast: Text | None = Field(default=None, description="Token to explain it against; default: all other tokens.")
    counterfactual: Annotated[str, Field(min_length=1, max_length=LONGEST_PROMPT)] | None = Field(
        default=None, description="A prompt with the same number of tokens and another answer; it adds patching to the evidence."
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
    phase: str = Field(description="The current phase, as a text for people.")
    error: str | None = Field(default=None, description="Why it failed, in one line.")
    place: int | None = Field(description="Its place in the queue, 1 for the next; null if it is not queued.")
    stopping: bool = Field(description="Whether it was cancelled and stops when its current phase ends.")
    stage: Stage | None = Field(description="Last known stage: the question and both answers, the circuit, or everything.")
    verdict: str | None = Field(description="The verdict of the evidence; null until the explanation is readable.")
    asked_at: datetime
    began_at: datetime | None = Field(description="When it began to run; null before.")
    ended_at: datetime | None = Field(description="When it was done, failed or cancelled; null before.")
    readable: bool = Field(description="Whether the whole explanation is known.")


class ExplanationJob(JobEntry):
    """A requested explanation and its known values; only the last stage that was reached has a value, the others are null."""

    answered: Answered | None = Field(None, description="First stage: the question, both models' answers, and the span.")
    drawn: Drawn | None = Field(None, description="Second stage: the opening circuit, before the evidence on it.")
    explanation: Explanation | None = Field(
        None,
        description="Last stage: the explanation as `Explanation.to_json` writes it. In addition to these fields it has "
        "`format`, `agree` and `span`, and its report has `verdict` and `reasons`.",
    )


class Steering(Asking):
    """A node of the circuit to set, and how strongly the change is patched into the dense model."""

    node: Text = Field(description="Id of a node of the explanation, such as L1.mlp_act[37]@5.")
    value: float = Field(ge=-1e6, le=1e6, description="The activation that the node is set to in the sparse model.")
    strength: float = Field(default=1.0, ge=0, le=1, description="Fraction of the change; 0 leaves the dense model unchanged.")


class Steered(BaseModel):
    """The dense model's answer and text when a node is steered."""

    strength: float
    dense: list[Answer] = Field(description="Its most probable next tokens, the most probable first.")
    probability_target: float
    probability_contrast: float = Field(description="Probability of the contrast (default: the dense model's second answer).")
    text: str = Field(description="The text that the dense model generates after the prompt.")

"""The HTTP service: its routes pass requests on to the library and the jobs; nothing is computed here.

    GET  /                                  the start page, from which prompts are sent
    GET  /api/health /api/couplings /api/tasks /api/circuits
    POST /api/explanations                  answers 202 with an id; GET the id until its status is done, DELETE it to cancel
    GET  /api/explanations/{id}/page        the explanation as a page
    POST /api/explanations/{id}/steer       run the dense model with a node of the circuit changed
    GET, PUT, PATCH /api/labels             the labels that people give to nodes
    GET  /openapi.json                      the description of all routes

A refusal is `{"detail": one line}`: 404 if something does not exist, 409 if it is damaged or not done yet, 422 if a value breaks
a rule, 429 with Retry-After if a queue is full. `security` adds refusals of its own.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from fastapi.security import HTTPBearer
from pydantic import Field
from starlette.exceptions import HTTPException

from bridge.data.task_pairs import TASKS, load_task, task_names
from bridge.display.progress import OnProgress, Phase
from bridge.errors import UserError
from bridge.explanations.build import counterfactual_tokens, explain, prompt_tokens
from bridge.explanations.explanation import Explanation
from bridge.explanations.page import described_nodes, fill_template, page_data, render_html
from bridge.explanations.parts import Answered, Drawn
from bridge.models.bridges import CoupledModels
from bridge.models.schema import ERROR
from bridge.models.store import CheckpointError, refuse_unreadable
from bridge.server import schema
from bridge.server.jobs import NO_KNOWN_VALUES, FullError, Job, Jobs, Publish
from bridge.server.library import Library, NotListedError, finite_json
from bridge.server.security import Guard, Rules, one_line, page_policy, refusal
from bridge.steering.curves import steer

PAIRS_SHOWN = 8
STOP_SECONDS = 3.0
Bridge = Annotated[str | None, Query(max_length=200, description="Name of a coupling as in /api/couplings; default: the first.")]
Brief = Annotated[bool, Query(description="Return the state alone, without the known values, which can be megabytes.")]
Labels = Annotated[dict[Annotated[str, Field(max_length=80)], Annotated[str, Field(max_length=2000)]], Body()]
_REFUSALS = {
    400: "The request cannot be read as HTTP or JSON.",
    401: "The server's token is missing or wrong.",
    403: "The request comes from a page of another site.",
    404: "The path, or something that the request names, does not exist.",
    408: "The body was not received in time.",
    409: "A file that the request needs is damaged, or the explanation is not done yet.",
    413: "The body is too large.",
    421: "The Host header names another machine.",
    422: "A value breaks a rule.",
    429: "The queue is full.",
}
_HTML: dict[int | str, dict[str, Any]] = {200: {"content": {"text/html": {"schema": {"type": "string"}}}}}
_ALWAYS = (400, 401, 403, 408, 413, 421, 422)


class NotDoneError(UserError):
    """An explanation that is not done yet, or that failed or was cancelled."""


def create_app(
    library: Library, rules: Rules, *, explain: Callable[..., Explanation] = explain, waiting: int = 8, remembered: int = 32
) -> FastAPI:
    """The service over a library, behind the access rules; at most `waiting` jobs queue and `remembered` ended jobs are kept."""

    def compute(job: Job, on_progress: OnProgress, publish: Publish) -> Mapping[str, Any]:
        on_progress(Phase("coupling" if library.find_loaded(job.bridge) is not None else "coupling: loading it"))
        coupling, _ = library.load(job.bridge)

        def stage(known: Answered | Drawn) -> None:
            publish("answered" if isinstance(known, Answered) else "drawn", asdict(known))

        explanation = explain(
            coupling, job.prompt, target=job.target, contrast=job.contrast, counterfactual=job.counterfactual,
            progress=on_progress, stage=stage,
        )  # fmt: skip
        return _as_listed(explanation, coupling, job.bridge).to_json()

    jobs = Jobs(compute, waiting=waiting, remembered=remembered)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(jobs.stop, STOP_SECONDS)

    app = FastAPI(
        title="bridge",
        summary="Explanations of a dense language model by circuits of a weight-sparse transformer coupled to it.",
        description=(
            "Ask for an explanation, then poll it: `POST /api/explanations`, `GET /api/explanations/{id}`. The server runs one "
            "at a time and queues the others; if the queue is full, it answers 429 with the seconds after which to try again. "
            "The question and both answers are known first, then the circuit, then the evidence on it. Every refusal is "
            "`{\"detail\": ...}`: one line that names the value, the rule and the remedy."
        ),
        version=version("bridge"),
        docs_url=None,  # FastAPI's page of docs loads scripts from a CDN
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        responses=refusals(*_ALWAYS),
        dependencies=[Depends(HTTPBearer(auto_error=False))] if rules.token is not None else [],
        generate_unique_id_function=lambda route: route.name,
    )  # fmt: skip
    handlers = {UserError: _user_error, RequestValidationError: _invalid, HTTPException: _http_error}
    for kind, handler in handlers.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(Guard, rules=rules)
    app.state.jobs = jobs
    _add_reading_routes(app, library, jobs)
    _add_explanation_routes(app, library, jobs)
    return app


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI descriptions of the refusals with these statuses."""
    seconds = {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}
    headers = {429: {"headers": {"Retry-After": seconds}}}
    return {status: {"model": schema.Refusal, "description": _REFUSALS[status], **headers.get(status, {})} for status in statuses}


def start_page() -> str:
    """The start page, in the style and the fonts of the explanations' pages."""
    page = (files("bridge.server") / "index.html").read_text(encoding="utf-8")
    return fill_template(page, lambda name: (files("bridge") / "viewer" / name).read_text(encoding="utf-8"))


# -- couplings, tasks, circuits, labels -------------------------------------------------------------------------------------


def _add_reading_routes(app: FastAPI, library: Library, jobs: Jobs) -> None:
    index = start_page()
    sent, policy = index.encode(), page_policy(index)

    @app.get("/", summary="The start page, with a form for prompts", response_class=Response, responses=_HTML)
    def home() -> HTMLResponse:
        return HTMLResponse(sent, headers={"Content-Security-Policy": policy})

    @app.get("/api/health", summary="The state of the server and of its queue")
    async def health() -> schema.Health:
        statuses = [job.status for job in jobs.all()]
        queued, running = statuses.count("queued"), statuses.count("running")
        return schema.Health(version=app.version, queued=queued, running=running, remembered=len(statuses) - queued - running)

    @app.get("/api/couplings", summary="The couplings that prompts can be explained with")
    def couplings() -> list[schema.CouplingEntry]:
        listed = library.couplings().items()
        return [_coupling_entry(library, name, folder, not index) for index, (name, folder) in enumerate(listed)]

    @app.get("/api/tasks", summary="The built-in tasks")
    def tasks() -> list[schema.TaskEntry]:
        return [schema.TaskEntry(name=task.name, language=task.language, about=task.about) for task in TASKS]

    @app.get("/api/tasks/{name}", summary="A built-in task, with prompts to try", responses=refusals(404))
    def task(name: str) -> schema.TaskDetail:
        if name not in task_names():
            raise NotListedError(f"there is no task {name[:80]!r}", remedy="choose one that GET /api/tasks lists")
        found = load_task(name)
        pairs = [
            schema.TaskPair(prompt=e.prompt, counterfactual=e.counterfactual, answer=list(e.answer), wrong=list(e.wrong))
            for e in found.examples["validation"][:PAIRS_SHOWN]
        ]
        return schema.TaskDetail(name=found.name, language=found.language, about=found.about, pairs=pairs)

    @app.get("/api/circuits", summary="The circuits of tasks that `bridge circuit` wrote")
    def circuits() -> list[schema.CircuitEntry]:
        return [_circuit_entry(name, folder) for name, folder in library.circuits().items()]

    @app.get("/api/circuits/{name:path}", summary="A task's circuit and its evidence", responses=refusals(404, 409))
    def circuit(name: str) -> schema.CircuitDetail:
        return _circuit_detail(*library.circuit(name))

    @app.get("/api/labels", summary="The labels of a coupling's nodes", responses=refusals(404, 409))
    def labels(bridge: Bridge = None) -> dict[str, str]:
        return library.labels(bridge)

    @app.put("/api/labels", summary="Replace all labels of a coupling's nodes by these", responses=refusals(404, 409))
    def put_labels(labels: Labels, bridge: Bridge = None) -> dict[str, str]:
        return library.relabel(bridge, labels, others=False)

    @app.patch(
        "/api/labels", summary="Set these labels, or drop those with an empty text; keep all others", responses=refusals(404, 409)
    )
    def patch_labels(labels: Labels, bridge: Bridge = None) -> dict[str, str]:
        return library.relabel(bridge, labels, others=True)


def _coupling_entry(library: Library, name: str, folder: Path, default: bool) -> schema.CouplingEntry:
    try:
        loaded = library.in_memory(folder) is not None
        return schema.CouplingEntry(name=name, default=default, loaded=loaded, **library.facts(folder))
    except UserError as error:
        return schema.CouplingEntry(name=name, default=default, loaded=False, error=one_line(str(error)))


def _circuit_detail(name: str, folder: Path) -> schema.CircuitDetail:
    values = finite_json(folder / "circuit.json")
    if "failed" in values:
        raise CheckpointError(f"{name!r}", f"holds no circuit: {values['failed']}")
    with refuse_unreadable(f"{name!r}", "circuit", "search again"):
        return schema.CircuitDetail.model_validate({**values, "name": name})


def _circuit_entry(name: str, folder: Path) -> schema.CircuitEntry:
    try:
        found = _circuit_detail(name, folder)
    except UserError as error:
        return schema.CircuitEntry(name=name, error=one_line(str(error)))
    facts = found.facts
    return schema.CircuitEntry(
        name=name, task=facts.task, null=facts.null, verdict=found.verdict, nodes=facts.size.nodes, edges=facts.size.edges
    )


# -- explanations -----------------------------------------------------------------------------------------------------------


def _add_explanation_routes(app: FastAPI, library: Library, jobs: Jobs) -> None:
    @app.get("/api/explanations", summary="All remembered explanations, the most recently used last")
    def explanations() -> Sequence[schema.JobEntry]:
        return jobs.all()

    @app.post(
        "/api/explanations", status_code=202, summary="Ask for an explanation of a prompt", responses=refusals(404, 409, 429)
    )
    def ask(body: schema.Prompted, response: Response) -> schema.JobEntry:
        name, _ = library.coupling(body.bridge)
        if (there := library.find_loaded(name)) is not None:  # otherwise the job checks the prompt, after loading the coupling
            coupling, _ = there
            tokens_t = prompt_tokens(coupling, body.prompt)
            if body.counterfactual is not None:
                counterfactual_tokens(prompt_tokens(coupling, body.counterfactual), tokens_t)
            for role, text in (("target", body.target), ("contrast", body.contrast)):
                if text is not None:
                    coupling.dense.prompts.target(text, body.prompt, role)
        job = jobs.submit(body.model_copy(update={"bridge": name}))
        response.headers["Location"] = f"/api/explanations/{job.id}"
        return job

    @app.get(
        "/api/explanations/{id}", summary="The state of an explanation, and its known values",
        response_model=schema.ExplanationJob, responses=refusals(404),
    )  # fmt: skip
    def explanation(id: str, brief: Brief = False) -> Response:
        job = jobs.get(id)
        entry = job.model_dump_json(exclude={"packed"}).encode()
        known = NO_KNOWN_VALUES if brief else job.known
        return Response(entry[:-1] + b"," + known[1:], media_type="application/json")

    @app.delete(
        "/api/explanations/{id}",
        summary="Cancel an explanation; a running one stops at its next phase, and its known values are kept",
        responses=refusals(404),
    )
    def cancel(id: str) -> schema.JobEntry:
        return jobs.cancel(id)

    @app.get(
        "/api/explanations/{id}/page",
        summary="An explanation as a page",
        response_class=Response,
        responses=_HTML | refusals(404, 409),
    )
    def page(id: str) -> HTMLResponse:
        text = _page(library, *_finished_explanation(jobs, id))
        return HTMLResponse(text, headers={"Content-Security-Policy": page_policy(text)})

    @app.post(
        "/api/explanations/{id}/steer", summary="Run the dense model with a node of the circuit changed",
        responses=refusals(404, 409, 429),
    )  # fmt: skip
    async def steered(id: str, body: schema.Steering) -> schema.Steered:
        job, found = await asyncio.to_thread(_finished_explanation, jobs, id)
        if body.node not in {node.id for node in found.nodes if node.kind != ERROR}:
            raise NotListedError(
                f"there is no node {body.node!r} in this circuit",
                remedy="give the id of one of its nodes, such as L1.mlp_act[37]@5",
            )
        return await asyncio.wrap_future(jobs.submit_call(lambda: _steer_node(library.load(job.bridge)[0], found, body)))


def _finished_explanation(jobs: Jobs, id: str) -> tuple[Job, Explanation]:
    """A job and its explanation. Raises NotListedError or NotDoneError."""
    job = jobs.get(id)
    if not job.readable:
        raise NotDoneError(f"explanation {id!r}", f"is {job.status}", "GET it until its status is done")
    return job, Explanation.from_json(json.loads(job.known)["explanation"])


def _as_listed(explanation: Explanation, coupling: CoupledModels, name: str) -> Explanation:
    """The explanation with its coupling's listed name, and with absolute paths of this machine cut to their last part."""
    source, made = str(coupling.recipe.data.source), explanation.provenance
    reference = made.reference.replace(source, _without_folder(source))
    return replace(explanation, provenance=replace(made, coupling=name, dense=_without_folder(made.dense), reference=reference))


def _without_folder(name: str) -> str:
    """The name, or several joined by +, with absolute paths cut to their last part; others, such as a hub id, are unchanged."""
    return "+".join(Path(part).name if Path(part).is_absolute() else part for part in name.split("+"))


def _steer_node(coupling: CoupledModels, found: Explanation, body: schema.Steering) -> schema.Steered:
    """The dense model's answer with the requested node set to its value, at the requested strength."""
    curve = steer(
        coupling, found.prompt, [f"{body.node}={body.value!r}"], strengths=(body.strength,), draws=1,
        target=found.answer.id, contrast=None if found.contrast is None else found.contrast.id,
    ).curve  # fmt: skip
    return schema.Steered.model_validate(curve[-1], from_attributes=True)


def _page(library: Library, job: Job, found: Explanation) -> str:
    """The explanation as a self-contained page that can send requests to this server."""
    coupling, known = library.load(job.bridge)
    nodes = described_nodes(coupling, found, known)
    return render_html(page_data(found, nodes, library.labels(job.bridge), job=job.id))


# -- errors -----------------------------------------------------------------------------------------------------------------


def _user_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, FullError):
        return refusal(429, str(error), {"Retry-After": str(error.seconds)})
    if isinstance(error, NotListedError):
        return refusal(404, str(error))
    return refusal(409 if isinstance(error, (CheckpointError, NotDoneError)) else 422, str(error))


def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return refusal(422, f"the body is not valid JSON ({first['ctx']['error']}); send a JSON object")
    if isinstance(first["input"], bytes):
        return refusal(422, "the body is not declared as JSON; send it with Content-Type: application/json")
    where = ".".join(str(part) for part in first["loc"][1:]) or "the body"
    value = "" if first["type"] == "missing" else f" {repr(first['input'])[:80]}"
    return refusal(422, f"{where}{value}: {first['msg'][:1].lower()}{first['msg'][1:]}; see /openapi.json for what is accepted")


def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:80], request.method
    details = {
        404: f"there is nothing at {path!r}; see /openapi.json for all paths",
        405: f"{method} is not allowed at {path!r}; see /openapi.json for the allowed methods",
        400: "the body cannot be read as JSON; send a JSON object in UTF-8",
    }
    return refusal(error.status_code, details.get(error.status_code, str(error.detail)), error.headers)

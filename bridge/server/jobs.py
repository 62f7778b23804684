"""Run explanations in one worker thread, one after another, with short calls between their phases and a bounded store of results.

    submit    puts a job into a bounded queue and returns it
    worker    an executor of one thread runs all models. Dense models run under hooks, so two runs at once would only wait for
              each other; one run at a time also needs the memory of one. PyTorch and the kernels release the interpreter lock,
              so requests are answered while a job runs
    phases    a job reports each phase by `on_progress`. At that point it stops if it was cancelled, and short calls, such as
              steering, are run, so no request waits for a whole explanation
    stages    a job may `publish` values before it is done: first the question and answers, then the circuit. Published values
              are kept if the job is cancelled or fails later
    results   are compressed JSON; of the jobs that have ended, the least recently used are forgotten

A Job is a frozen snapshot: it does not change while a request reads it.
"""

from __future__ import annotations

import json
import logging
import math
import secrets
import threading
import time
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, get_args

from pydantic import ConfigDict

from bridge.display.progress import OnProgress, Phase
from bridge.errors import UserError
from bridge.server.library import NotListedError
from bridge.server.schema import JobEntry, Prompted, Stage

STAGES: tuple[Stage, ...] = get_args(Stage)
Publish = Callable[[Stage, Mapping[str, Any]], None]
NO_KNOWN_VALUES = json.dumps(dict.fromkeys(STAGES)).encode()  # the known values of a new job: null for every stage

FIRST_GUESS = 30.0  # seconds that a job is assumed to take until one is done
MOST_SHORT = 32  # short calls in the queue, at most
LONGEST_WAIT = 600  # seconds, the longest wait that a client is asked for
_log = logging.getLogger("bridge.server")


class FullError(UserError):
    """A queue is full, or the server is stopping; `seconds` is the time after which to try again."""

    def __init__(self, what: str, seconds: int, remedy: str) -> None:
        super().__init__(what, remedy=remedy)
        self.seconds = seconds


class CancelledError(Exception):
    """Raised inside a job that has to stop."""


class Job(JobEntry):
    """The state of an explanation; `packed` is its known values as compressed JSON.

    The JSON has a key for each stage. Only the last stage reached has a value, all others are null.
    """

    model_config = ConfigDict(frozen=True)
    packed: bytes | None = None

    @property
    def has_ended(self) -> bool:
        """Whether the job has ended."""
        return self.status in ("done", "failed", "cancelled")

    @property
    def known(self) -> bytes:
        """The known values as JSON: an object with a key for each stage."""
        return NO_KNOWN_VALUES if self.packed is None else zlib.decompress(self.packed)


class Jobs:
    """A bounded queue of explanations, the thread that works on them, and the results.

    `compute` returns the explanation of a job as JSON values; before that it reports progress and may publish stages. At most
    `waiting` jobs queue, and at most `remembered` ended jobs are kept.
    """

    def __init__(
        self, compute: Callable[[Job, OnProgress, Publish], Mapping[str, Any]], *, waiting: int, remembered: int
    ) -> None:
        self._compute, self._most_waiting, self._most_remembered = compute, waiting, remembered
        self._lock, self._worker = threading.RLock(), ThreadPoolExecutor(1, "bridge-worker")
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[str] = []
        self._short: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._cancelled: set[str] = set()
        self._end: Future[bool] | None = None  # set by `stop`; done when the worker is
        self._seconds = FIRST_GUESS

    # -- called by requests from any thread, without waiting ----------------------------------------------------------------

    def submit(self, asked: Prompted) -> Job:
        """Queue an explanation; `asked.bridge` is a coupling's listed name. Raises FullError if the queue is full."""
        with self._lock:
            self._check_room(len(self._waiting), self._most_waiting, "explanations are waiting")
            job = Job(
                id=secrets.token_urlsafe(9), **asked.model_dump(), status="queued", phase="waiting", place=None, stopping=False,
                stage=None, verdict=None, asked_at=datetime.now(UTC), began_at=None, ended_at=None, readable=False,
            )  # fmt: skip
            self._jobs[job.id] = job
            self._waiting.append(job.id)
            self._worker.submit(self._run_job, job.id)
            return self._seen(job.id)

    def submit_call(self, call: Callable[[], Any]) -> Future[Any]:
        """Queue a short call on models, run between two phases of the running job. Raises FullError if too many calls wait."""
        with self._lock:
            self._check_room(len(self._short), MOST_SHORT, "requests are waiting for the models")
            future: Future[Any] = Future()
            self._short.append((call, future))
            self._worker.submit(self._do_short)
            return future

    def get(self, id: str) -> Job:
        """The current state of a job. Raises NotListedError if there is no job of that id."""
        with self._lock:
            if id not in self._jobs:
                raise NotListedError(
                    f"there is no explanation {id!r}",
                    remedy=f"ask for it again; only the last {self._most_remembered} that ended are kept",
                )
            self._jobs.move_to_end(id)
            return self._seen(id)

    def all(self) -> tuple[Job, ...]:
        """All remembered jobs, the least recently used first."""
        with self._lock:
            return tuple(map(self._seen, self._jobs))

    def cancel(self, id: str) -> Job:
        """Cancel a job: at once if it is queued, at its next phase if it runs. A job that has ended stays as it is.

        Published values are kept.
        """
        with self._lock:
            job = self.get(id)
            if job.status == "queued":
                self._waiting.remove(id)
                self._end_job(id, status="cancelled", phase="cancelled before it began")
            elif job.status == "running":
                self._cancelled.add(id)
                self._set(id, stopping=True)
            return self._seen(id)

    def stop(self, seconds: float) -> bool:
        """Cancel all jobs and wait for the worker; False if a phase is still running after `seconds`."""
        with self._lock:
            for id in tuple(self._waiting):
                self.cancel(id)
            while self._short:
                self._short.popleft()[1].cancel()
            self._end = self._end or self._worker.submit(bool)  # runs after everything still queued
        try:
            self._end.result(seconds)
        except TimeoutError:
            return False
        return True

    def _check_room(self, there: int, most: int, what: str) -> None:
        if self._end is not None:
            raise FullError("the server is stopping", 5, "start it again")
        if there >= most:
            seconds = min(LONGEST_WAIT, max(1, math.ceil(self._seconds)))
            raise FullError(f"{there} {what}, and at most {most} may", seconds, f"try again in {seconds} seconds, or cancel some")

    def _seen(self, id: str) -> Job:
        """The current state of a job, with its place in the queue."""
        job = self._jobs[id]
        return job.model_copy(update={"place": self._waiting.index(id) + 1}) if job.status == "queued" else job

    def _set(self, id: str, **values: Any) -> None:
        self._jobs[id] = self._jobs[id].model_copy(update=values)

    def _end_job(self, id: str, **values: Any) -> None:
        self._set(id, **values, stopping=False, ended_at=datetime.now(UTC))
        self._jobs.move_to_end(id)
        self._cancelled.discard(id)
        over = [each for each, job in self._jobs.items() if job.has_ended]
        for each in over[: max(0, len(over) - self._most_remembered)]:
            del self._jobs[each]

    # -- the worker ---------------------------------------------------------------------------------------------------------

    def _run_job(self, id: str) -> None:
        self._do_short()
        with self._lock:
            if id not in self._waiting:
                return  # cancelled while it was queued
            self._waiting.remove(id)
            self._set(id, status="running", phase="starting", began_at=datetime.now(UTC))
            job = self._jobs[id]
        started = time.monotonic()
        ending = self._run_to_end(job)
        with self._lock:
            if ending["status"] == "done":
                self._seconds = time.monotonic() - started
            self._end_job(id, **ending)

    def _run_to_end(self, job: Job) -> dict[str, Any]:
        """Run a job and return its final values."""
        id = job.id

        def on_progress(phase: Phase) -> None:
            self._stop_if_cancelled(id)
            with self._lock:
                self._set(id, phase=str(phase))
            self._do_short()
            self._stop_if_cancelled(id)

        def publish(stage: Stage, values: Mapping[str, Any]) -> None:
            self._stop_if_cancelled(id)
            known = _stage_fields(stage, values)
            with self._lock:
                self._set(id, **known)

        try:
            known = _stage_fields("explanation", self._compute(job, on_progress, publish))
            self._stop_if_cancelled(id)
        except CancelledError:
            return {"status": "cancelled", "phase": "cancelled"}
        except UserError as error:
            return {"status": "failed", "phase": "failed", "error": str(error)}
        except Exception as error:
            _log.exception("explanation %s failed", id)
            why = f"the explanation failed inside bridge ({type(error).__name__}); see the server's output"
            return {"status": "failed", "phase": "failed", "error": why}
        return {"status": "done", "phase": "done", **known}

    def _stop_if_cancelled(self, id: str) -> None:
        with self._lock:
            if self._end is not None or id in self._cancelled:
                raise CancelledError

    def _do_short(self) -> None:
        """Run the short calls that are queued now."""
        for _ in range(len(self._short)):
            with self._lock:
                if not self._short:
                    return
                call, future = self._short.popleft()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(call())
            except BaseException as error:  # passed on to the caller that waits for it
                future.set_exception(error)


def _stage_fields(stage: Stage, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Job that reached a stage: its values, compressed, and the fields that lists of jobs show."""
    packed = zlib.compress(json.dumps({**dict.fromkeys(STAGES), stage: values}, allow_nan=False).encode(), level=3)
    readable = stage == "explanation"
    verdict = values["report"]["verdict"] if readable else None
    return {"packed": packed, "stage": stage, "readable": readable, "verdict": verdict}

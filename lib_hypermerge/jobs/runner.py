"""Runs jobs in the background, one after another, and remembers how they went."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import BusyError, Cancelled, HypermergeError, SpecError, defect
from .host import Context, Host
from .report import Report
from .spec import Spec
from .verbs import Verb, find_verb

log = logging.getLogger("hypermerge")

_REMEMBERED = 50
_MOST_WAITING = 20  # each holds a thread
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"


@dataclass
class Job:
    """A submitted job; its fields are safe to read at any time."""

    id: str
    verb: Verb
    spec: Spec
    status: str = QUEUED
    fraction: float = 0.0
    text: str = "waiting"
    report: Report | None = None
    error: HypermergeError | None = None
    started: float | None = None
    _forget: Callable[[str], None] = field(default=lambda job_id: None, repr=False)
    _cancel: threading.Event = field(default_factory=threading.Event, repr=False)
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def cancel(self) -> None:
        """Ask the job to stop; a running one does so within a layer, a waiting one at once."""
        self._cancel.set()
        with self._lock:
            waiting = self.status == QUEUED
            if waiting:
                self._end(CANCELLED, Cancelled())
        if waiting:
            self._forget(self.id)

    def _begin(self) -> bool:
        """Its turn has come; False if it was cancelled while it waited."""
        with self._lock:
            if self.status != QUEUED:
                return False
            self.status, self.started = RUNNING, time.time()
            return True

    def _finish(self, status: str, error: HypermergeError | None = None) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._end(status, error)

    def _end(self, status: str, error: HypermergeError | None) -> None:
        self.error, self.text = error, status
        if status == DONE:
            self.fraction = 1.0
        self.status = status  # last: whoever sees it may read the rest
        self._ended.set()

    def wait(self, timeout: float | None = None) -> bool:
        """Whether the job ended within the time."""
        return self._ended.wait(timeout)

    def to_json(self) -> dict[str, Any]:
        return {
            "id": self.id, "verb": self.verb.id, "status": self.status, "progress": round(self.fraction, 4),
            "text": self.text, "report": self.report.to_json() if self.report else None,
            "error": self.error.to_json() if self.error else None,
        }  # fmt: skip


class Runner:
    """Submits jobs to a host. Requests that are wrong are refused by submit itself, from headers alone."""

    def __init__(self, host: Host):
        self.host = host
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._lock = threading.Lock()

    def submit(self, verb_name: object, values: Any, job_id: str | None = None) -> Job:
        """Check, plan, and start or queue a job. Raises what the plan refuses.

        verb_name: an id of the list, or a Verb that is in no list.
        """
        verb = verb_name if isinstance(verb_name, Verb) else find_verb(verb_name)
        spec = verb.spec.from_json(values)
        with verb.load().make_plan(spec, self.host):
            pass  # the plan is made again when its turn comes: files may change while it waits
        job = Job(job_id or secrets.token_hex(8), verb, spec, _forget=self.host.forget)
        with self._lock:
            if sum(other.status == QUEUED for other in self._jobs.values()) >= _MOST_WAITING:
                raise BusyError(f"{_MOST_WAITING} jobs are waiting already.", hint="Try again when some are done.")
            if job.id in self._jobs:
                raise SpecError(f"There is a job {job.id!r} already.")
            self._jobs[job.id] = job
            while len(self._jobs) > _REMEMBERED:
                ended = next((i for i, j in self._jobs.items() if j._ended.is_set()), None)
                if ended is None:
                    break
                del self._jobs[ended]
        threading.Thread(target=self._run, args=(job,), name=f"hypermerge-{job.id}", daemon=True).start()
        return job

    def get(self, job_id: str) -> Job:
        """SpecError if there is none."""
        with self._lock:
            if job_id not in self._jobs:
                raise SpecError(f"There is no job {job_id!r}.", "It never was, or it is long over.")
            return self._jobs[job_id]

    def jobs(self) -> list[Job]:
        """All remembered ones, the newest last."""
        with self._lock:
            return list(self._jobs.values())

    def latest(self, verb: str) -> Job | None:
        """The newest job of a verb."""
        return next((job for job in reversed(self.jobs()) if job.verb.id == verb), None)

    def _run(self, job: Job) -> None:
        def waits() -> None:
            if job.status == QUEUED:
                job.text = "waiting for another job"

        try:
            with self.host.running(job.id, waits) as context:
                if not job._begin():
                    return
                job.report = execute(job.verb, job.spec, self.host, _tie(context, job))
            if job.report.outputs:
                self._refresh(job.report)
            job._finish(DONE)
        except Cancelled as error:
            job._finish(CANCELLED, error)
        except HypermergeError as error:
            job._finish(FAILED, error)
        except Exception as error:  # a defect of ours: the page must still get an answer
            log.exception("job %s failed", job.id)
            job._finish(FAILED, defect(error))

    def _refresh(self, report: Report) -> None:
        """The file is written by now: that the host's lists do not know it yet is no failure."""
        try:
            self.host.refresh()
        except Exception as error:
            log.exception("the host's lists could not be refreshed")
            report.warnings.append(f"The host's list of LoRAs could not be refreshed ({error}); refresh it by hand.")


def _tie(context: Context, job: Job) -> Context:
    def on_progress(fraction: float, text: str) -> None:
        job.fraction, job.text = fraction, text
        context.on_progress(fraction, text)

    return Context(on_progress, lambda: job._cancel.is_set() or context.interrupted())


def execute(verb: Verb, spec: Spec, host: Host, context: Context) -> Report:
    """Plan and run in this thread."""
    module = verb.load()
    context.check()
    with module.make_plan(spec, host) as plan:
        return module.run(plan, host, context)


def forecast(verb: Verb, spec: Spec, host: Host) -> dict[str, Any]:
    """What a job would read, compute and write, and about how long it would take; nothing is done."""
    module = verb.load()
    with module.make_plan(spec, host) as plan:
        return {**plan.to_json(host), "dry_run": True}

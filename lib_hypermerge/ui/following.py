"""A panel's jobs: started by a click, followed by short questions, shown when they are over.

No connection is held while a job runs: gradio shows nothing but "Error" where one breaks, be it by a proxy's time
limit, a laptop that slept, or its own queue, which drops a page that does not take a message within a second.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..errors import HypermergeError, defect
from ..jobs.runner import QUEUED, RUNNING, Job, Runner
from ..jobs.verbs import Verb
from .compat import on, update
from .results import error_html, job_html
from .widgets import element_id, keep_out_of_config

log = logging.getLogger("hypermerge")

_WAIT = 0.3  # s that an answer may take: a job that ends meanwhile is shown at once

_REMEMBERED = 50  # refusals

_ABSENT = HypermergeError(
    "Nothing is known of this job.", "It never reached the server, or that has run many others since.",
    "Look whether its file is there, and start it again if not.",
)  # fmt: skip


class Following:
    """The place of the results; made inside the panel's column, below everything else."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self._number = itertools.count()
        self._planned: dict[str, bool] = {}  # jobs that the runner does not know yet; whether they are to be cancelled
        self._refusals: dict[str, str] = {}
        self._lock = threading.Lock()  # of these two
        self.result = gr.HTML("", elem_id=element_id(verb.id, "result"))
        # invisible controls are not in the page, so the page's script fills these through the events' inputs
        self.task = gr.Textbox(visible=False, elem_id=element_id(verb.id, "task"))
        self.news = gr.Textbox(visible=False, elem_id=element_id(verb.id, "news"))
        # buttons that the page's script presses: how is the job; it is over
        self.ask, self.over = (
            gr.Button(name, elem_id=element_id(verb.id, name), elem_classes=["hypermerge-spare"])
            for name in ("ask", "over")
        )
        for component in (self.task, self.news, self.ask, self.over):
            keep_out_of_config(component)

    def wire(self) -> None:
        asked = on(
            self.ask.click, self._tell, [self.task], [self.result, self.news],
            js=f"() => [hypermergeJobs.task({self.verb.id!r})]",
        )  # fmt: skip
        self._follow(asked)

    def start(self, event: Callable[..., Any], submit: Callable[..., Job], components: list[Any]) -> None:
        """An event that starts a job. submit(task, *values) raises what the job refuses."""
        inputs = [self.task, *components]
        started = on(
            event, lambda task, *raw: self._start(submit, task, *raw), inputs, [self.result, self.news],
            js=f"(...values) => hypermergeJobs.start({self.verb.id!r}, values, {len(inputs)})",
        )  # fmt: skip
        self._follow(started)

    def when_loaded(self, loaded: Any) -> None:
        """loaded: an event that gave the result and the news of the page's opening."""
        on(loaded.then, None, [self.news], js=f"(news) => hypermergeJobs.loaded({self.verb.id!r}, news)")

    def _follow(self, event: Any) -> None:
        on(event.then, None, [self.news], js=f"(news) => hypermergeJobs.follow({self.verb.id!r}, news)")

    def interrupt(self, task: str) -> None:
        """Cancel the job that this page shows, never another's."""
        with self._lock:
            if task in self._planned:
                self._planned[task] = True
                return
        job = self._job(task)
        if job is not None:
            job.cancel()

    def last(self) -> list[str]:
        """What there is to say of the newest job as the page opens: result and news."""
        job = self.runner.latest(self.verb.id)
        return [_shown(job), self._news(job.id, over=not _is_under_way(job))] if job else ["", ""]

    def _start(self, submit: Callable[..., Job], task: str, *raw: Any) -> list[Any]:
        """Also for a job that was started already: a browser may send a request again whose connection broke."""
        job_id = task or f"task({secrets.token_hex(8)})"
        if self._is_new(job_id):
            try:
                job = submit(job_id, *raw)
            except HypermergeError as error:
                self._refuse(job_id, error)
            except Exception as error:
                log.exception("%s could not be started", self.verb.id)
                self._refuse(job_id, defect(error))
            else:
                with self._lock:
                    cancelled = self._planned.pop(job_id)
                if cancelled:
                    job.cancel()
        return self._tell(job_id)

    def _is_new(self, task: str) -> bool:
        """Whether nobody has sent it before; from now on somebody has."""
        with self._lock:
            if task in self._planned or task in self._refusals or self._job(task) is not None:
                return False
            self._planned[task] = False
            return True

    def _refuse(self, task: str, error: HypermergeError) -> None:
        self.runner.host.forget(task)
        with self._lock:
            self._refusals[task] = error_html(error)
            if len(self._refusals) > _REMEMBERED:
                del self._refusals[next(iter(self._refusals))]
            del self._planned[task]

    def _tell(self, task: str) -> list[Any]:
        """The result if it is there or will be in a moment, and the news."""
        if not task:  # pressed by nobody
            return [update(), update()]
        planned = task in self._planned  # before the others: it is one of them as soon as it is no more this
        job = self._job(task)
        if job is not None:
            over = job.wait(_WAIT)
            return [_shown(job) if over else update(), self._news(task, over)]
        if planned:
            time.sleep(_WAIT)
            return [update(), self._news(task, over=False)]
        return [self._refusals.get(task) or error_html(_ABSENT), self._news(task, over=True)]

    def _news(self, task: str, over: bool) -> str:
        """Numbered, for the page has to tell an answer from one that never came."""
        return json.dumps({"task": task, "over": over, "number": next(self._number)})

    def _job(self, task: str) -> Job | None:
        return next((job for job in self.runner.jobs() if job.id == task), None)


def _is_under_way(job: Job) -> bool:
    return job.status in (QUEUED, RUNNING)


def _shown(job: Job) -> str:
    """job_html, whatever happens: the rest of the page must not suffer."""
    try:
        return job_html(job)
    except Exception as error:
        log.exception("the result of %s could not be shown", job.id)
        return error_html(defect(error))

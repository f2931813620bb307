"""A panel's jobs: started by a click, followed by short questions, shown when they are over.

No connection is held while a job runs: gradio shows nothing but "Error" where one breaks, be it by a proxy's time
limit, a laptop that slept, or its own queue, which drops a page that does not take a message within a second.
"""

from __future__ import annotations

import itertools
import json
import logging
import secrets
from collections.abc import Callable
from typing import Any

import gradio as gr

from ..errors import HypermergeError, defect
from ..jobs.runner import QUEUED, RUNNING, Job, Runner
from ..jobs.verbs import Verb
from .compat import AT_ONCE, on, update
from .results import error_html, job_html
from .widgets import element_id, keep_out_of_config

log = logging.getLogger("hypermerge")

_WAIT = 0.3  # s that an answer may take: a job that ends meanwhile is shown at once

_ABSENT = HypermergeError(
    "Nothing is known of this job.", "It did not reach the server, or that was started again since.",
    "Look whether its file is there, and start it again if not.",
)  # fmt: skip


class Following:
    """The place of the results; made inside the panel's column, below everything else."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self._number = itertools.count()
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
            js=f"() => [hypermerge.task({self.verb.id!r})]", **AT_ONCE,
        )  # fmt: skip
        self._follow(asked)

    def start(self, event: Callable[..., Any], submit: Callable[..., Job], components: list[Any]) -> None:
        """An event that starts a job. submit(task, *values) raises what the job refuses."""
        inputs = [self.task, *components]
        started = on(
            event, lambda task, *raw: self._start(submit, task, *raw), inputs, [self.result, self.news],
            js=f"(...values) => hypermerge.start({self.verb.id!r}, values, {len(inputs)})", **AT_ONCE,
        )  # fmt: skip
        self._follow(started)

    def when_loaded(self, loaded: Any) -> None:
        """loaded: an event that gave the result and the news of the page's opening."""
        on(loaded.then, None, [self.news], js=f"(news) => hypermerge.loaded({self.verb.id!r}, news)")

    def _follow(self, event: Any) -> None:
        on(event.then, None, [self.news], js=f"(news) => hypermerge.follow({self.verb.id!r}, news)")

    def interrupt(self, task: str) -> None:
        """Cancel the job that this page shows, never another's."""
        job = self._job(task)
        if job is not None:
            job.cancel()

    def last(self) -> list[str]:
        """What there is to say of the newest job as the page opens: result and news."""
        job = self.runner.latest(self.verb.id)
        return [_shown(job), self._news(job.id, over=not _is_under_way(job))] if job else ["", ""]

    def _start(self, submit: Callable[..., Job], task: str, *raw: Any) -> list[Any]:
        job_id = task or f"task({secrets.token_hex(8)})"
        try:
            submit(job_id, *raw)
        except HypermergeError as error:
            return self._refused(job_id, error)
        except Exception as error:
            log.exception("%s could not be started", self.verb.id)
            return self._refused(job_id, defect(error))
        return self._tell(job_id)

    def _refused(self, job_id: str, error: HypermergeError) -> list[Any]:
        self.runner.host.forget(job_id)
        return [error_html(error), self._news(job_id, over=True)]

    def _tell(self, task: str) -> list[Any]:
        """The result if it is there or will be in a moment, and the news."""
        if not task:  # pressed by nobody
            return [update(), update()]
        job = self._job(task)
        if job is None:
            return [error_html(_ABSENT), self._news(task, over=True)]
        if not job.wait(_WAIT):
            return [update(), self._news(task, over=False)]
        return [_shown(job), self._news(task, over=True)]

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

"""One verb's panel: its controls, a forecast, Run and Interrupt, progress, and the result."""

from __future__ import annotations

import logging
import re
import secrets
from pathlib import PurePath
from typing import Any

import gradio as gr

from ..errors import HypermergeError, defect
from ..jobs.runner import QUEUED, RUNNING, Job, Runner, forecast
from ..jobs.spec import CHECKPOINT, FLAG, OUTPUT
from ..jobs.verbs import Verb
from .compat import on, update
from .results import error_html, job_html, plan_html
from .widgets import control, element_id, keep_out_of_config, values_of

log = logging.getLogger("hypermerge")

# Events that answer at once keep out of the queue: in gradio 3 all events share its few places, and a job that is
# awaited holds one until it ends.
_AT_ONCE = {"queue": False, "show_progress": "hidden"}
_HASH = re.compile(r" \[[0-9a-fA-F]+\]$")


class Panel:
    """Builds the controls inside the current gr.Blocks and wires them to a runner."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self.controls: dict[str, Any] = {}
        self._build()
        self._wire()

    # --- what it looks like -----------------------------------------------------------------------

    def _build(self) -> None:
        params, defaults, names = self.verb.spec.params(), self.verb.spec.defaults(), self.runner.host.checkpoints()

        def add(field: str) -> None:
            self.controls[field] = control(self.verb.id, field, params[field], defaults[field], names)

        checkpoints = [f for f, p in params.items() if p.kind == CHECKPOINT]
        rest = [f for f, p in params.items() if p.kind != CHECKPOINT and not p.advanced]
        advanced = [f for f, p in params.items() if p.advanced]
        with gr.Column(elem_id=self._id("panel")):
            gr.HTML(f"<p>{self.verb.help}</p>")
            with gr.Row():
                for field in checkpoints:
                    add(field)
                self.refresh = gr.Button("🔄", elem_id=self._id("refresh"), elem_classes=["tool"])
            for chunk in _rows(rest, params):
                with gr.Row():
                    for field in chunk:
                        add(field)
            with gr.Accordion("Advanced", open=False, elem_id=self._id("advanced")):
                for chunk in _rows(advanced, params):
                    with gr.Row():
                        for field in chunk:
                            add(field)
            self.forecast = gr.HTML("", elem_id=self._id("plan"))
            with gr.Row():
                self.run = gr.Button(self.verb.title, variant="primary", elem_id=self._id("run"))
                self.interrupt = gr.Button("Interrupt", elem_id=self._id("interrupt"))
            with gr.Column(
                elem_id=self._id("progress_box"), elem_classes=["progress-container", "hypermerge-progress"]
            ):
                gr.HTML("", elem_id=self._id("progress"))
            self.result = gr.HTML("", elem_id=self._id("result"))
            # invisible controls are not in the page, so the page's script fills this one through the event's inputs
            self.task = gr.Textbox(visible=False, elem_id=self._id("task"))
            # names for the result: the last one that was filled in, and the one that would be now
            self.suggested = gr.Textbox(visible=False, elem_id=self._id("suggested"))
            self.fresh = gr.Textbox(visible=False, elem_id=self._id("fresh"))
            for hidden in (self.task, self.suggested, self.fresh, self.refresh, self.run, self.interrupt):
                keep_out_of_config(hidden)

    def _id(self, field: str) -> str:
        return element_id(self.verb.id, field)

    # --- what it does -----------------------------------------------------------------------------

    def _wire(self) -> None:
        spec_order = [self.controls[field] for field in self.verb.spec.params()]
        dropdowns = [self.controls[f] for f, p in self.verb.spec.params().items() if p.kind == CHECKPOINT]
        verb = self.verb.id
        started = on(
            self.run.click, self._run, [self.task, *spec_order], [self.result],
            js=f"(...values) => hypermerge.start({verb!r}, values, {len(spec_order) + 1})", show_progress="hidden",
        )  # fmt: skip
        on(started.then, None, js=f"() => hypermerge.ended({verb!r})")
        on(
            self.interrupt.click, self._interrupt, [self.task], js=f"() => [hypermerge.task({verb!r})]", **_AT_ONCE
        )  # fmt: skip
        on(self.refresh.click, self._refresh, dropdowns, dropdowns, **_AT_ONCE)
        for component in spec_order:
            on(component.change, self._forecast, spec_order, [self.forecast], **_AT_ONCE)
        tuned, out = self.controls.get("tuned"), self.controls.get("out")
        if tuned is not None and out is not None:
            for event in (tuned.change, started.then):  # after a run its name is taken
                named = on(event, self._fresh_name, [tuned], [self.fresh], **_AT_ONCE)
                names = [out, self.suggested]  # the page decides, because somebody may have typed meanwhile
                on(named.then, None, [*names, self.fresh], names, js="(...names) => hypermerge.suggest(...names)")

    def on_load(self, blocks: gr.Blocks) -> None:
        """When the page is opened: fresh lists, and the last job, in case its page was closed.

        One that is not over yet is watched again as if it had been started here.
        """
        verb = self.verb.id
        dropdowns = [self.controls[f] for f, p in self.verb.spec.params().items() if p.kind == CHECKPOINT]
        loaded = on(blocks.load, self._loaded, dropdowns, [*dropdowns, self.result, self.task], **_AT_ONCE)
        resumed = on(
            loaded.then, self._resume, [self.task], [self.result],
            js=f"(task) => [hypermerge.resume({verb!r}, task)]", show_progress="hidden",
        )  # fmt: skip
        on(resumed.then, None, [self.task], js=f"(task) => hypermerge.resumed({verb!r}, task)")

    def _run(self, task: str, *raw: Any) -> str:
        job_id = task or f"task({secrets.token_hex(8)})"
        try:
            job = self.runner.submit(self.verb.id, values_of(self.verb.spec, raw), job_id)
            job.wait()
            return job_html(job)
        except HypermergeError as error:
            self.runner.host.forget(job_id)
            return error_html(error)
        except Exception as error:
            log.exception("%s could not be started, or its result not be shown", self.verb.id)
            self.runner.host.forget(job_id)
            return error_html(defect(error))

    def _interrupt(self, task: str) -> None:
        """Cancel the job that this page shows, never another's."""
        job = self._job(task)
        if job is not None:
            job.cancel()

    def _job(self, task: str) -> Job | None:
        return next((job for job in self.runner.jobs() if job.id == task), None)

    def _resume(self, task: str) -> Any:
        """The result of a job that was under way when the page was opened; nothing if there was none."""
        job = self._job(task)
        if job is None:
            return update()
        job.wait()
        return _shown(job)

    def _fresh_name(self, tuned: str | None) -> str:
        """A name after the fine-tune's that no LoRA has yet; empty if there is none."""
        if not tuned:
            return ""
        stem = name = PurePath(_HASH.sub("", tuned)).stem + "-lora"
        number = 1
        try:
            while self.runner.host.lora_output(name).exists():
                number += 1
                name = f"{stem}-{number}"
        except (HypermergeError, OSError):  # a checkpoint's name need not do as ours, or its folder is not there
            return ""
        return name

    def _forecast(self, *raw: Any) -> str:
        """What would happen; quiet until both models are chosen."""
        try:
            values = values_of(self.verb.spec, raw)
            required = [f for f, p in self.verb.spec.params().items() if p.kind == CHECKPOINT]
            if not all(values[field] for field in required):
                return ""
            values["out"] = values.get("out") or "unnamed"
            return plan_html(forecast(self.verb, self.verb.spec.from_json(values), self.runner.host))
        except HypermergeError as error:
            return error_html(error)

    def _names(self, chosen: tuple[str | None, ...]) -> list[Any]:
        """Dropdown updates; a choice whose title has changed (a hash was added) follows its file."""
        host = self.runner.host
        names = host.checkpoints()
        files: dict[Any, str] = {}
        updates = []
        for name in chosen:
            if not name or name in names:  # leave the value alone: somebody may be choosing one at this moment
                updates.append(update(choices=names))
                continue
            try:
                files = files or {host.resolve_checkpoint(n): n for n in names}
                value = files.get(host.resolve_checkpoint(name))
            except HypermergeError:
                value = None
            updates.append(update(choices=names, value=value))
        return updates if len(updates) != 1 else updates[0]

    def _refresh(self, *chosen: str | None) -> Any:
        self.runner.host.refresh()
        return self._names(chosen)

    def _loaded(self, *chosen: str | None) -> list[Any]:
        job = self.runner.latest(self.verb.id)
        names = self._names(chosen)
        under_way = job is not None and job.status in (QUEUED, RUNNING)
        return [
            *(names if isinstance(names, list) else [names]),
            _shown(job) if job else "",
            job.id if job and under_way else "",
        ]


def _rows(fields: list[str], params: dict[str, Any]) -> list[list[str]]:
    """Three controls a row; names stand alone, switches together at the end."""
    plain = [f for f in fields if params[f].kind not in (FLAG, OUTPUT)]
    flags = [f for f in fields if params[f].kind == FLAG]
    rows = [[f] for f in fields if params[f].kind == OUTPUT]
    rows += [plain[i : i + 3] for i in range(0, len(plain), 3)]
    return rows + ([flags] if flags else [])


def _shown(job: Job) -> str:
    """job_html, whatever happens: the rest of the page must not suffer."""
    try:
        return job_html(job)
    except Exception as error:
        log.exception("the result of %s could not be shown", job.id)
        return error_html(defect(error))

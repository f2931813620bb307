"""In a WebUI, below the result of a hyper-merge: every model's prompt kept as a style."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import HypermergeError, SpecError, defect
from ..jobs.report import Report
from ..jobs.runner import Runner
from ..jobs.verbs import Verb
from .compat import on
from .results import error_html
from .widgets import element_id, keep_out_of_config

log = logging.getLogger("hypermerge")


def offers_styles(verb: Verb, runner: Runner) -> bool:
    """Whether results have several prompts, and the host a place for them."""
    return verb.id == "hyper" and hasattr(runner.host, "add_styles")


def styles_of(report: Report | None) -> dict[str, str]:
    """Name → style of every model that has a prompt. SpecError where none has, or the LoRAs were not written.

    With {prompt} in front: without it, a WebUI joins prompt and style by a comma, and the picture would change.
    """
    d = report.details if report else {}
    prompts = {model: prompt for model, prompt in d.get("prompts", {}).items() if prompt}
    if not prompts or d["preview"]:
        raise SpecError("There are no prompts to save.", "The result has none, or its LoRAs were not written.")
    family = Path(d["hyper"]).stem if d["hyper"] else d["loras"][0]["name"].rpartition("-")[0]
    return {f"{family}: {model}": f"{{prompt}} {prompt}" for model, prompt in prompts.items()}


class StyleControls:
    """A button that the result's own one presses, and a line that says what came of it."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self.note = gr.HTML("", elem_id=element_id(verb.id, "styles_note"))
        self.save = gr.Button(
            "Save as styles", elem_id=element_id(verb.id, "save_styles"), elem_classes=["hypermerge-spare"]
        )
        keep_out_of_config(self.save)

    def wire(self, task: Any) -> None:
        """task: any hidden text; the page's script puts the shown job's id in its place."""
        shown = f"() => [hypermerge.shownJob({self.verb.id!r})]"
        saved = on(self.save.click, self._save, [task], [self.note], js=shown)
        on(saved.then, None, js="() => hypermerge.stylesSaved()")

    def _save(self, job_id: str) -> str:
        try:
            saved = getattr(self.runner.host, "add_styles")(styles_of(self.runner.get(job_id).report))  # noqa: B009
        except HypermergeError as error:
            return error_html(error)
        except Exception as error:
            log.exception("the styles could not be saved")
            return error_html(defect(error))
        return f'<div class="hypermerge-note">Styles: {", ".join(f"<b>{escape(name)}</b>" for name in saved)}.</div>'

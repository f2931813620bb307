"""In a WebUI, beside Merge: try it in memory without saving, and take it back."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

import gradio as gr

from ..jobs.runner import Runner
from ..jobs.verbs import Verb
from .compat import on, update
from .widgets import element_id, keep_out_of_config


def offers_trial(verb: Verb, runner: Runner) -> bool:
    """Whether there is a model in memory for such a job to change."""
    return verb.id == "merge" and hasattr(runner.host, "model_in_memory")


class TrialControls:
    """Two buttons and a line that says what is changed at the moment; made inside the panel's row of buttons."""

    def __init__(self, verb: Verb, runner: Runner):
        self.verb, self.runner = verb, runner
        self.attempt = gr.Button("Try in memory", elem_id=element_id(verb.id, "try"))
        self.back = gr.Button("Take it back", elem_id=element_id(verb.id, "take_back"), visible=False)
        for button in (self.attempt, self.back):
            keep_out_of_config(button)

    def add_note(self) -> None:
        self.note = gr.HTML("", elem_id=element_id(self.verb.id, "trial"))

    def wire(self, start: Callable[..., None], over: Callable[..., Any]) -> None:
        """start(event, verb, bare) runs a job, with the panel's parameters or bare of them; over: its end's event."""
        # torch is there by now: the host has a model
        from ..jobs.trial import TAKE_BACK_VERB, TRY_VERB

        start(self.attempt.click, TRY_VERB)
        start(self.back.click, TAKE_BACK_VERB, bare=True)
        self.show_after(over)

    def show_after(self, event: Callable[..., Any]) -> None:
        """Tell anew what is changed."""
        on(event, self._state, [], [self.note, self.back])

    def _state(self) -> list[Any]:
        from ..jobs.trial import current

        trial = current(self.runner.host)
        text = f'<div class="hypermerge-note">{escape(trial.text)}</div>' if trial else ""
        return [text, update(visible=trial is not None)]

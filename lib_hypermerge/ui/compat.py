"""The few things that gradio 3.41 and 4.40 spell differently."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

_JS = "_js" if gr.__version__.startswith("3.") else "js"


def on(
    event: Callable, fn: Callable | None, inputs: Sequence = (), outputs: Sequence = (), js: str | None = None, **more
):
    """Attach an event: on(button.click, fn, inputs, outputs, js=…).

    Outside gradio's queue, which in gradio 3 is one small queue for everything in the page and in either version
    forgets who waits there when a connection breaks. So fn must answer soon; jobs are followed (see following).
    """
    if fn is not None:
        more = {"queue": False, "show_progress": "hidden", **more}
    if js is not None:
        more[_JS] = js
    return event(fn, list(inputs), list(outputs), **more)


def update(**properties: Any) -> Any:
    """New properties of a component, as an event's result."""
    return gr.update(**properties)

"""The few things that gradio 3.41 and 4.40 spell differently."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

_JS = "_js" if gr.__version__.startswith("3.") else "js"

# For events that answer at once, which keep out of the queue: in gradio 3 all events share its few places, and a
# job that is awaited holds one until it ends.
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def on(
    event: Callable, fn: Callable | None, inputs: Sequence = (), outputs: Sequence = (), js: str | None = None, **more
):
    """Attach an event: on(button.click, fn, inputs, outputs, js=…)."""
    if js is not None:
        more[_JS] = js
    return event(fn, list(inputs), list(outputs), **more)


def update(**properties: Any) -> Any:
    """New properties of a component, as an event's result."""
    return gr.update(**properties)


def queue(blocks: gr.Blocks) -> gr.Blocks:
    """Let several events run at once, so that Interrupt gets through while a job is awaited."""
    parameters = inspect.signature(gr.Blocks.queue).parameters
    name = "default_concurrency_limit" if "default_concurrency_limit" in parameters else "concurrency_count"
    arguments: dict[str, Any] = {name: 8}
    return blocks.queue(**arguments)

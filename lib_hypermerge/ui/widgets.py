"""A control for each kind of parameter."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ..errors import SpecError
from ..jobs.spec import CHECKPOINT, CHOICE, CHOICES, FLAG, INTEGER, NUMBER, OUTPUT, Param, Spec, read_text

_UNSAVED = (CHECKPOINT, OUTPUT)  # a WebUI stores the defaults of all other controls in ui-config.json


def element_id(verb: str, field: str) -> str:
    return f"hypermerge_{verb}_{field}"


def control(verb: str, name: str, param: Param, default: Any, checkpoints: list[str]) -> Any:
    """The gradio component of a parameter. Labels are unique in the tab: a WebUI keeps settings by label."""
    common: dict[str, Any] = {"label": param.label, "elem_id": element_id(verb, name), "interactive": True}
    choices = [choice for choice, _ in param.choices]
    if param.kind == CHECKPOINT:
        made = gr.Dropdown(choices=checkpoints, value=None, **common)
    elif param.kind == FLAG:
        made = gr.Checkbox(value=default, info=param.help, **common)
    elif param.kind == CHOICE:
        made = gr.Dropdown(choices=choices, value=default, info=_meanings(param), **common)
    elif param.kind == CHOICES:
        made = gr.CheckboxGroup(choices=choices, value=list(default), info=param.help, **common)
    elif param.kind == INTEGER and not param.optional:
        made = gr.Number(value=default, precision=0, info=param.help, **common)
    elif param.kind == NUMBER and not param.optional:
        made = gr.Number(value=default, info=param.help, **common)
    else:
        made = gr.Textbox(value="", placeholder=param.placeholder, info=param.help, max_lines=1, **common)
    if param.kind in _UNSAVED or name == "overwrite":
        keep_out_of_config(made)
    return made


def keep_out_of_config(component: Any) -> None:
    """Tell a WebUI not to store this control's value in its ui-config.json."""
    component.do_not_save_to_config = True


def _meanings(param: Param) -> str:
    return param.help + " " + "; ".join(f"{choice}: {meaning}" for choice, meaning in param.choices) + "."


def values_of(spec: type[Spec], raw: tuple[Any, ...]) -> dict[str, Any]:
    """What the controls hold, as the spec's JSON. SpecError for a number that is none."""
    values = {}
    for (name, param), value in zip(spec.params().items(), raw, strict=True):
        if isinstance(value, str) and param.kind in (INTEGER, NUMBER):
            try:
                value = read_text(param, value)
            except ValueError:
                kind = "whole number" if param.kind == INTEGER else "number"
                raise SpecError(f"{param.label}: {value!r} is no {kind}.", hint=param.help) from None
        values[name] = value
    return values

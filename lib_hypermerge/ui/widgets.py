"""A control for each kind of parameter: one or several gradio components, and how to read them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from ..errors import SpecError
from ..jobs.host import Host
from ..jobs.spec import (
    CHECKPOINT,
    CHOICE,
    CHOICES,
    FILES,
    FLAG,
    INTEGER,
    INTEGERS,
    LORA,
    LORA_FILES,
    LORAS,
    NAME_LISTS,
    NUMBER,
    OUTPUT,
    PROMPT,
    Param,
    Spec,
    read_text,
)
from ..jobs.verbs import VERBS

MODELS = (CHECKPOINT, LORA, *NAME_LISTS, LORAS)  # kinds that are chosen from the host's lists
# a WebUI stores the defaults of all other controls in ui-config.json
_UNSAVED = (CHECKPOINT, LORA, *NAME_LISTS, OUTPUT)

NONE = "(none)"  # a dropdown cannot be emptied again, so that what is optional has this choice

Lists = dict[str, list[str]]  # kind of dropdown (CHECKPOINT, LORA, NAME_LISTS; optional ones) → names to choose from


@dataclass
class Control:
    """components: in the order in which read() takes their values.  pickers: the dropdowns among them, by kind.

    wire: attaches what the control does with others of its panel, by their fields, once all are there.
    """

    param: Param
    components: list[Any]
    read: Callable[[Sequence[Any]], Any]
    pickers: list[tuple[Any, str]] = field(default_factory=list)
    wire: Callable[[Mapping[str, Control], Host], None] | None = None


def element_id(verb: str, field: str) -> str:
    return f"hypermerge_{verb}_{field}"


def kind_of_list(param: Param) -> str:
    """Which of the lists a dropdown shows."""
    return f"optional {param.kind}" if param.optional and param.kind in (CHECKPOINT, LORA) else param.kind


def lists_of(checkpoints: list[str], loras: list[str]) -> Lists:
    """What every kind of dropdown shows."""
    both = list(dict.fromkeys((*checkpoints, *loras)))
    lists = {CHECKPOINT: checkpoints, LORA: loras, LORA_FILES: loras, FILES: both}
    return lists | {f"optional {kind}": [NONE, *lists[kind]] for kind in (CHECKPOINT, LORA)}


def control(verb: str, name: str, param: Param, default: Any, lists: Lists) -> Control:
    """The control of a parameter, made inside the current gr.Blocks."""
    if param.kind == LORAS:
        from .lora_rows import lora_rows

        return lora_rows(verb, name, param, lists[LORA])
    if param.kind == PROMPT:
        from .prompt_rows import prompt_field

        return prompt_field(verb, name, param)
    common: dict[str, Any] = {"label": param.label, "elem_id": element_id(verb, name), "interactive": True}
    made = _component(param, default, lists, common)
    if param.kind in _UNSAVED or name == "overwrite" or _is_known(verb, param.label):
        keep_out_of_config(made)
    pickers = [(made, kind_of_list(param))] if param.kind in lists else []
    return Control(param, [made], lambda values: _single(param, values[0]), pickers)


def _is_known(verb: str, label: str) -> bool:
    """Whether an earlier verb has a control of that label: a WebUI stores defaults by label, and would mix them up."""
    earlier = itertools.takewhile(lambda other: other.id != verb, VERBS.values())
    return any(param.label == label for other in earlier for param in other.spec.params().values())


def _component(param: Param, default: Any, lists: Lists, common: dict[str, Any]) -> Any:
    choices = [choice for choice, _ in param.choices]
    if param.kind in (CHECKPOINT, LORA):
        info = param.help if param.optional else None
        return gr.Dropdown(choices=lists[kind_of_list(param)], value=None, info=info, **common)
    if param.kind in NAME_LISTS:
        return gr.Dropdown(choices=lists[param.kind], value=[], multiselect=True, info=param.help, **common)
    if param.kind == FLAG:
        return gr.Checkbox(value=default, info=param.help, **common)
    if param.kind == CHOICE:
        return gr.Dropdown(choices=choices, value=default, info=_meanings(param), **common)
    if param.kind == CHOICES:
        return gr.CheckboxGroup(choices=choices, value=list(default), info=param.help, **common)
    if param.kind == INTEGER and not param.optional:
        return gr.Number(value=default, precision=0, info=param.help, **common)
    if param.kind == NUMBER and not param.optional:
        return gr.Number(value=default, info=param.help, **common)
    text = default if isinstance(default, str) else ""
    if param.kind == INTEGERS:
        text = ", ".join(map(str, default or ()))
    return gr.Textbox(value=text, placeholder=param.placeholder, info=param.help, max_lines=1, **common)


def keep_out_of_config(component: Any) -> None:
    """Tell a WebUI not to store this control's value in its ui-config.json."""
    component.do_not_save_to_config = True


def _meanings(param: Param) -> str:
    return param.help + " " + "; ".join(f"{choice}: {meaning}" for choice, meaning in param.choices) + "."


def _single(param: Param, value: Any) -> Any:
    if isinstance(value, str) and param.kind in (INTEGER, INTEGERS, NUMBER):
        return number_of(param.label, value, param)
    return None if value == [] or (value == NONE and param.kind in (CHECKPOINT, LORA)) else value


def number_of(label: str, text: str, param: Param) -> Any:
    """The number in a text field, None if it is empty. SpecError if it is none."""
    try:
        return read_text(param, text)
    except ValueError:
        kind = "number" if param.kind == NUMBER else "whole number"
        raise SpecError(f"{label}: {text!r} is no {kind}.", hint=param.help) from None


def values_of(spec: type[Spec], controls: dict[str, Control], raw: Sequence[Any]) -> dict[str, Any]:
    """What the controls hold, in the order of the spec, as its JSON. SpecError for a number that is none."""
    values, start = {}, 0
    for name in spec.params():
        stop = start + len(controls[name].components)
        values[name] = controls[name].read(raw[start:stop])
        start = stop
    return values

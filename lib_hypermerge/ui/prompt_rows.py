"""A field for a pasted prompt, and a button that fills the rows of LoRAs with the names and weights in it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from html import escape
from typing import Any

import gradio as gr

from ..errors import HypermergeError, SpecError, defect
from ..jobs.combine.names import in_prompt
from ..jobs.host import Host
from ..jobs.spec import LORAS, Param
from .compat import on, update
from .lora_rows import ROWS
from .results import error_html
from .widgets import Control, element_id, keep_out_of_config

log = logging.getLogger("hypermerge")


def prompt_field(verb: str, name: str, param: Param) -> Control:
    """The control of a PROMPT parameter; the rows of the same panel are filled from it."""
    with gr.Row(elem_classes=["hypermerge-prompt-row"]):
        box = gr.Textbox(
            value="", label=param.label, info=param.help, placeholder=param.placeholder, lines=2, max_lines=6, scale=6,
            elem_id=element_id(verb, f"{name}_box"), interactive=True,  # a result has the id without
        )  # fmt: skip
        button = gr.Button("Read the prompt", scale=1, min_width=120, elem_id=element_id(verb, f"{name}_read"))
    note = gr.HTML("", elem_id=element_id(verb, f"{name}_note"))
    for component in (box, button):
        keep_out_of_config(component)

    def wire(controls: Mapping[str, Control], host: Host) -> None:
        rows_name, rows = next((n, c) for n, c in controls.items() if c.param.kind == LORAS)
        outputs = [*rows.components, box, note]
        read = on(button.click, lambda text: _read(text, host), [box], outputs)
        loras = [component for component, _ in rows.pickers]
        on(read.then, None, loras, [], js=f"(...loras) => hypermerge.showRows({verb!r}, {rows_name!r}, loras, {ROWS})")

    return Control(param, [box], lambda values: values[0] or None, wire=wire)


def _read(text: str, host: Host) -> list[Any]:
    """Values of all rows, of the prompt's field, and a note. A prompt that cannot be read leaves all as it was."""
    try:
        values, notes = rows_of(text or "", host)
    except HypermergeError as error:
        return [update()] * (4 * ROWS + 1) + [error_html(error)]
    except Exception as error:
        log.exception("a prompt could not be read")
        return [update()] * (4 * ROWS + 1) + [error_html(defect(error))]
    return [*values, "", f'<div class="hypermerge-note">{"<br>".join(map(escape, notes))}</div>']


def rows_of(text: str, host: Host) -> tuple[list[Any], list[str]]:
    """What the components of all rows are to hold, and what there is to say. SpecError if the rows cannot hold it."""
    read, files = in_prompt(text, host)
    if not {name for name, _ in files} <= {*host.loras()}:  # a file that the host's list does not have yet
        host.refresh()
        read, files = in_prompt(text, host)
    if len(files) > ROWS:
        raise SpecError(f"The prompt has {len(files)} LoRAs, and there are {ROWS} rows.", hint="Leave it as a prompt.")
    with_dyn = next((mention for mention in read.loras if mention.dyn is not None), None)
    if with_dyn is not None:
        raise SpecError(
            f"A row has no place for dyn={with_dyn.dyn} of {with_dyn.name!r}.", hint="Leave it as a prompt: that works."
        )
    listed, values = host.loras(), []
    for mention, (name, _) in zip(read.loras, files, strict=True):
        item = mention.weighted(name)
        te = "" if item.te_weight is None else f"{item.te_weight:g}"
        values += [update(choices=listed, value=name), item.weight, te, item.blocks]
    values += [None, 1.0, "", ""] * (ROWS - len(files))
    return values, [f"{len(files)} LoRA{'s' if len(files) > 1 else ''} read into the rows.", *read.notes]

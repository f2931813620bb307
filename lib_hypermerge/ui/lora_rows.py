"""Rows of LoRAs, each with a weight, one for text encoders, and block weights with a graph."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from html import escape
from typing import Any

import gradio as gr

from ..errors import SpecError
from ..jobs import block_weights
from ..jobs.spec import LORA, NUMBER, Param
from .compat import on
from .widgets import Control, element_id, keep_out_of_config, number_of

ROWS = 12
_TE = Param(NUMBER, "Text encoders", "Empty: as the weight.", optional=True)
# formats of block weights that the graph knows: number of values → what its choice is called
_FORMATS = {26: "SD1/SD2, 26 values", 17: "SD1/SD2, 17", 20: "SDXL, 20", 12: "SDXL, 12", 61: "Flux, 61"}


def lora_rows(verb: str, name: str, param: Param, loras: list[str]) -> Control:
    """The control of a LORAS parameter: one row is shown, more on demand."""
    components: list[Any] = []
    pickers: list[tuple[Any, str]] = []
    with gr.Column(elem_id=element_id(verb, name), elem_classes=["hypermerge-loras"]):
        gr.HTML(f'<p title="{escape(param.help, quote=True)}"><b>{escape(param.label)}</b> {escape(param.help)}</p>')
        gr.HTML(f'<div class="hypermerge-block-formats" hidden>{escape(formats_json())}</div>')
        for index in range(ROWS):
            row = _row(verb, name, index, loras)
            components += row
            pickers.append((row[0], LORA))
        add = gr.Button("Add another LoRA", elem_id=element_id(verb, f"{name}_add"))
        on(add.click, None, js=f"() => hypermerge.addRow({verb!r}, {name!r}, {ROWS})")
        keep_out_of_config(add)
    return Control(param, components, _read, pickers)


def _row(verb: str, name: str, index: int, loras: list[str]) -> list[Any]:
    def part_id(kind: str) -> str:
        return element_id(verb, f"{name}_{index}_{kind}")

    def part(kind: str) -> dict[str, Any]:
        return {"elem_id": part_id(kind), "interactive": True}

    number = index + 1
    spare = ["hypermerge-spare"] if index else []
    with gr.Column(elem_id=part_id("row"), elem_classes=["hypermerge-lora-row", *spare]):
        with gr.Row():
            made = [
                gr.Dropdown(loras, value=None, label=f"LoRA {number}", scale=4, **part("lora")),
                gr.Number(1.0, label=f"Weight {number}", scale=1, min_width=80, **part("weight")),
                gr.Textbox("", label=f"Text encoders {number}", placeholder="as the weight", max_lines=1, scale=1,
                           min_width=80, **part("te_weight")),
                gr.Textbox("", label=f"Block weights {number}", placeholder="1 everywhere", max_lines=1, scale=3,
                           **part("blocks")),
            ]  # fmt: skip
            clear = gr.Button("✕", elem_id=part_id("clear"), elem_classes=["tool"])
        gr.HTML(
            f'<details id="{part_id("graph")}" class="hypermerge-blocks" '
            f'data-blocks="{part_id("blocks")}" data-plan="{element_id(verb, "plan")}" '
            f'ontoggle="hypermergeBlocks.toggle(this)"><summary>Graph of block weights</summary></details>'
        )
    on(clear.click, None, [], made, js=f"() => hypermerge.clearRow({verb!r}, {name!r}, {index})")
    for component in (*made, clear):
        keep_out_of_config(component)
    return made


def _read(values: Sequence[Any]) -> list[dict[str, Any]] | None:
    """Rows without a LoRA are no LoRAs, whatever else stands in them."""
    loras = []
    for index in range(ROWS):
        lora, weight, te_weight, blocks = values[4 * index : 4 * index + 4]
        if not lora:
            continue
        if weight is None:
            raise SpecError(f"Weight {index + 1} is empty.", hint="1 is the weight of a plain <lora:name:1>.")
        te_weight = number_of(f"Text encoders {index + 1}", te_weight or "", _TE)
        loras.append({"lora": lora, "weight": weight, "te_weight": te_weight, "blocks": blocks or ""})
    return loras or None


@lru_cache(maxsize=1)
def formats_json() -> str:
    """What the graph has to know: every format's blocks and every preset's values in it."""
    formats = []
    for count, label in _FORMATS.items():
        architectures, blocks = block_weights.FORMATS[count]
        presets = {}
        for preset in block_weights.PRESETS:
            try:
                weights = block_weights.parse(preset, architectures[0])
            except SpecError:  # it is not for this architecture
                continue
            presets[preset] = [
                weights.base if block == block_weights.BASE else weights.of("unet", block) for block in blocks
            ]
        formats.append({"label": label, "architectures": architectures, "blocks": blocks, "presets": presets})
    return json.dumps(formats)

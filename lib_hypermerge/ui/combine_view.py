"""The result of combine: how alike the LoRAs are first, then file, prompt and what was lost."""

from __future__ import annotations

from typing import Any

from ..jobs.report import Report
from ..render_combine import alike, describe
from ..words import mib, percent
from . import html
from .combine_plots import blocks_picture, errors_picture
from .inspect_plots import matrix_picture

_ROUNDING = 2e-3  # relative error above which more than rounding is lost


def view(report: Report) -> str:
    """Of a finished combination or of its preview."""
    d = report.details
    parts = [_headline(report)]
    if len(d["loras"]) > 1:
        parts += _alike(d)
    if any(part["relative_error"] > _ROUNDING for part in d["components"].values()):
        parts.append(html.picture(lambda: errors_picture(d["components"])))
    rows = [(name[:1].upper() + name[1:], value) for name, value in describe(report)]
    rows += [("SHA-256", output.sha256) for output in report.outputs]
    return "".join([*parts, html.table(rows)])


def _headline(report: Report) -> str:
    d = report.details
    misses = f"It misses <b>{percent(report.relative_error or 0)}</b> of the change (norm), {report.modules} layers."
    if d["preview"]:
        size = mib(d["bytes"])
        return f'<p class="hypermerge-preview"><b>Preview: nothing was written.</b> A run writes {size}. {misses}</p>'
    return f"<p>{html.files(report)} written in {report.seconds:.1f} s. {misses}</p>" + html.prompt(report)


def _alike(d: dict[str, Any]) -> list[str]:
    own, names = d["alike"], [lora["name"].removesuffix(".safetensors") for lora in d["loras"]]
    parts = ["<h4>How alike they are</h4>", html.table(alike(d))]
    if len(names) > 2:
        parts.append(html.picture(lambda: matrix_picture(own, names)))
    if own["by_block"]:
        parts.append(html.picture(lambda: blocks_picture(own, names)))
    return parts

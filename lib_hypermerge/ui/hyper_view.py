"""The result of hyper: every model's line of prompt and error, how else it could be had, pictures and numbers."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from ..jobs.report import Report
from ..render_hyper import describe, errors, headline, without
from ..words import mib, percent
from . import html
from .hyper_plots import blocks_picture, course_picture, multipliers_picture
from .inspect_plots import matrix_picture


def view(report: Report) -> str:
    """Of a finished hyper-merge or of its preview."""
    d = report.details
    parts = [_written(report), f"<p>{escape(headline(report))}</p>", _models(report)]
    parts.append(html.picture(lambda: course_picture(d)))
    if d["loras"]:
        parts.append(html.picture(lambda: multipliers_picture(d)))
    parts.append(html.picture(lambda: blocks_picture(d["by_model"])))
    similarity = d["similarity"]
    parts.append("<p>How alike the models' changes are, as cosines:</p>")
    parts.append(html.picture(lambda: matrix_picture({"cosine": similarity["cosines"]}, similarity["labels"])))
    rows = [*describe(report), *((f"SHA-256 of {Path(o.path).name}", o.sha256) for o in report.outputs)]
    return "".join([*parts, html.table(rows)])


def _written(report: Report) -> str:
    """What lies on the disk now; of a preview what a run would put there."""
    d = report.details
    if d["preview"]:
        files = [(f"{lora['name']}.safetensors", lora["bytes"]) for lora in d["loras"]]
        if d["hyper"]:
            files.insert(0, (d["hyper"], d["hyper_bytes"]))
        if d["container"]:
            files.append((d["container"]["name"], d["container"]["bytes"]))
        files += [(f"{rest['name']}.safetensors", rest["bytes"]) for rest in d["remainders"].values()]
        told = ", ".join(f"<b>{escape(name)}</b> ({mib(size)})" for name, size in files)
        return f'<p class="hypermerge-preview"><b>Preview: nothing was written.</b> A run writes {told}.</p>'
    load = html.button("hyper", "load", d["hyper"], "Load it now") if d["hyper"] and report.outputs else ""
    return f"<p>{html.files(report)} written in {report.seconds:.1f} s. {load}</p>"


def _models(report: Report) -> str:
    """A row for each model: how much of it is missed, and what brings it back."""
    d = report.details
    body = ""
    for index, (model, error) in enumerate(errors(report).items()):
        body += f"<tr><td>{escape(model)}</td><td>{percent(error)}</td><td>{_prompt(d, model, index)}</td></tr>"
    head = "<tr><th>Model</th><th>missed (norm)</th><th>Prompt that brings it back</th></tr>"
    usable = any(d["prompts"].values()) and not d["preview"]
    save = html.button("hyper", "styles", "hyper", "Save as styles") if usable else ""
    return f'<table class="hypermerge-table hypermerge-prompts">{head}{body}</table>{save}'


def _prompt(d: dict[str, Any], model: str, index: int) -> str:
    text = d["prompts"].get(model, "")
    if not text:
        return without(d)
    code = f'<code id="hypermerge_hyper_prompt_{index}">{escape(text)}</code>'
    if d["preview"]:  # no LoRA of that name is there
        return code
    copy = html.button("hyper", "copy", text, "Copy", index)
    return f"{code} {copy}{html.button('hyper', 'send', text, 'Send to txt2img', index, 'sendInstead')}"

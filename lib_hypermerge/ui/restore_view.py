"""The result of restore: a checkpoint with a button that loads it, or one LoRA with its prompt."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..jobs.report import Report
from ..render_hyper import restore_describe, restore_headline
from . import html


def view(report: Report) -> str:
    """Of a finished restoration."""
    load = ""
    if report.details["kind"] == "checkpoint":
        load = html.button(report.verb, "load", Path(report.outputs[0].path).name, "Load it now")
    text = f"{html.files(report)} written in {report.seconds:.1f} s: {escape(restore_headline(report))} {load}"
    rows = [*restore_describe(report), ("SHA-256", report.outputs[0].sha256)]
    return f"<p>{text}</p>" + html.prompt(report) + html.table(rows)

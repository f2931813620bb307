"""The result of convert: file or folder, prompt snippet, how exact it is, what was left out."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..jobs.report import Report
from ..render_convert import describe
from ..words import mib, percent
from . import html


def view(report: Report) -> str:
    """Of a finished conversion."""
    d = report.details
    if d.get("folder"):
        size = sum(output.bytes for output in report.outputs)
        what = f"Folder <b>{escape(Path(d['folder']).name)}</b> ({len(report.outputs)} files, {mib(size)})"
    else:
        what = html.files(report)
    headline = f"{what} written in {report.seconds:.1f} s."
    if report.relative_error is not None:
        headline += f" It misses <b>{percent(report.relative_error)}</b> of the change (norm)."
    rows = [(name[:1].upper() + name[1:], value) for name, value in describe(report)]
    rows += [("SHA-256", output.sha256) for output in report.outputs[:1] if not d.get("folder")]
    return f"<p>{headline}</p>" + html.prompt(report) + html.table(rows)

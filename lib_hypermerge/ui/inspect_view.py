"""The result of inspect: a table for each file, pictures of norms, spectra and similarity."""

from __future__ import annotations

from html import escape
from typing import Any

from ..jobs.report import Report
from ..render_inspect import describe, similarity_title
from . import html
from .inspect_plots import matrix_picture, measured_picture

_MOST_METADATA = 40


def view(report: Report) -> str:
    """Of a finished inspection."""
    d = report.details
    names = [file["name"] for file in d["files"]]
    parts = [_file(file) for file in d["files"]]
    for item in d["similarity"]:
        labels = [names[index] for index in item["files"]]
        parts.append(f"<h4>{escape(similarity_title(item))}</h4>")
        parts.append(html.picture(lambda item=item, labels=labels: matrix_picture(item, labels)))
        parts.append(_matrix(item["cosine"], labels))
    if d["told_equal"] or "duplicates" in d:
        parts.append(_equals(d))
    return "".join(parts)


def _file(file: dict[str, Any]) -> str:
    head = f"<h4>{escape(file['name'])}</h4>"
    if file["kind"] == "unreadable":
        error = file["error"]
        more = "".join(f"<div>{escape(text)}</div>" for text in (error["why"], error["hint"]) if text)
        box = f'<div class="hypermerge-error" data-code="{error["code"]}">'
        return f"{head}{box}<b>{escape(error['what'])}</b>{more}</div>"
    parts = [head, html.table(describe(file))]
    if any(part["blocks"] and part["norm"] > 0 for part in file.get("measured", {}).get("components", {}).values()):
        parts.append(html.picture(lambda: measured_picture(file["measured"])))
    if file["metadata"]:
        rows = list(file["metadata"].items())
        parts.append(f"<details><summary>Metadata ({len(rows)})</summary>{html.table(rows[:_MOST_METADATA])}</details>")
    return "".join(parts)


def _matrix(rows: list[list[float | None]], labels: list[str]) -> str:
    """The picture's numbers, so that they can be read and copied."""
    head = "".join(f"<th>{escape(label)}</th>" for label in ("", *labels))
    body = ""
    for label, row in zip(labels, rows, strict=True):
        cells = "".join(f"<td>{'–' if value is None else format(value, '.4f')}</td>" for value in row)
        body += f"<tr><td>{escape(label)}</td>{cells}</tr>"
    return f'<table class="hypermerge-table"><tr>{head}</tr>{body}</table>'


def _equals(d: dict[str, Any]) -> str:
    rows = [(pair["file"], f"says that its data is that of {pair['equals']}") for pair in d["told_equal"]]
    for pair in d.get("duplicates", ()):
        how = "bit for bit" if pair["same"] == "file" else "but for its metadata"
        rows.append((pair["file"], f"is {pair['equals']}, {how}"))
    if not rows:
        rows = [("Duplicates", f"none among {d['looked_at']} files")]
    return f"<h4>Duplicates</h4>{html.table(rows)}"

"""The result of transfer: files, what the similarity of the bases means, pictures, and what became of every layer."""

from __future__ import annotations

from html import escape

from ..jobs.report import Report
from ..render_transfer import describe, honest
from ..words import counts, percent
from . import html
from .transfer_plots import similarity_picture


def view(report: Report) -> str:
    """Of a finished transfer or of its preview."""
    d = report.details
    if d["preview"]:
        names = ", ".join(f"<b>{escape(lora['output'])}</b>" for lora in d["loras"])
        head = f'<p class="hypermerge-preview"><b>Preview: nothing was written.</b> A run writes {names}.</p>'
    else:
        head = f"<p>{html.files(report)} written in {report.seconds:.1f} s.</p>"
    parts = [head, f"<p>{escape(honest(report))}</p>", html.prompt(report)]
    parts += [html.picture(lambda: similarity_picture(d)), _loras(report)]
    rows = [(name[:1].upper() + name[1:], value) for name, value in describe(report)[: -len(d["loras"])]]
    rows += [(f"SHA-256 of {output.path.rpartition('/')[2]}", output.sha256) for output in report.outputs]
    return "".join([*parts, html.table(rows)])


def _loras(report: Report) -> str:
    """A row for each LoRA, those that failed last."""
    body = ""
    for lora in report.details["loras"]:
        cells = [
            lora["name"], counts(lora["actions"]), counts(lora["skipped_because"]), _share(lora["retained"]),
            _share(lora["arrived"]), _share(lora["apart"]), _share(lora["relative_error"]),
        ]  # fmt: skip
        body += f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
    heads = ("LoRA", "modules", "left out", "energy retained", "energy of the whole LoRA", "away from a copy (norm)",
             "lost to rank and rounding, of what was carried over (norm)")  # fmt: skip
    for one in report.details["failed"]:
        why = " ".join(filter(None, (one["error"]["what"], one["error"]["why"], one["error"]["hint"])))
        body += (f'<tr class="hypermerge-failed"><td>{escape(one["name"])}</td>'
                 f'<td colspan="{len(heads) - 1}">{escape(why)}</td></tr>')  # fmt: skip
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<table class="hypermerge-table hypermerge-rows"><tr>{head}</tr>{body}</table>'


def _share(value: float | None) -> str:
    return "–" if value is None else percent(value)

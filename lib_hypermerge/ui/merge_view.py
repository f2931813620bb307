"""The result of merge: the checkpoint and a button that loads it, what went into it, what found no place."""

from __future__ import annotations

from html import escape
from pathlib import Path

from ..jobs.report import Report
from ..render import counts
from . import html

_SHOWN = 12


def view(report: Report) -> str:
    """Of a finished merge, whether into a file or into the model in memory."""
    return f"<p>{_headline(report)}</p>" + html.table(_rows(report))


def taken_back(report: Report) -> str:
    """Of a trial that was undone."""
    d = report.details
    return f"<p>{escape(d['checkpoint'])} in memory is as it was: {d['restored']} parameters restored.</p>"


def _headline(report: Report) -> str:
    if not report.outputs:
        return (
            f"The model in memory is changed, {report.details['changed_tensors']} tensors in {report.seconds:.1f} s. "
            "No file was written."
        )
    load = html.button(report.verb, "load", Path(report.outputs[0].path).name, "Load it now")
    return f"{html.files(report)} written in {report.seconds:.1f} s. {load}"


def _rows(report: Report) -> list[tuple[str, str]]:
    d = report.details
    rows = [
        ("Model", d["architecture"]),
        ("Modules by component", counts(d["components"])),
        ("Modules by family", counts(d["families"])),
        ("Tensors changed", str(d["changed_tensors"])),
    ]
    if report.outputs:
        rows.append(("Tensors carried over as they were", str(d["carried_tensors"])))
    rows += [(f"LoRA {lora['name']}", _lora(lora)) for lora in d["loras"]]
    skipped = {why: count for why, count in d["skipped_because"].items() if count}
    if skipped:
        rows.append(("Modules left out", counts(skipped)))
    names = d["unreachable_tensors"]
    if names:
        more = f" … and {report.unreachable - _SHOWN} more" if report.unreachable > _SHOWN else ""
        rows.append(("Not in this model", ", ".join(names[:_SHOWN]) + more))
    if report.outputs:
        rows.append(("SHA-256", report.outputs[0].sha256))
    return rows


def _lora(lora: dict) -> str:
    text = f"{lora['modules']} modules ({counts(lora['families'])}), written as {lora['dialect']}"
    return text + (f"; {lora['unmatched']} not in this model" if lora["unmatched"] else "")

"""Reports, plans and errors as HTML."""

from __future__ import annotations

import json
import logging
from html import escape
from pathlib import Path
from typing import Any

from ..errors import HypermergeError
from ..jobs.report import Report
from ..jobs.runner import CANCELLED, DONE, FAILED, Job
from ..render import mib, percent
from .plots import errors_picture

log = logging.getLogger("hypermerge")


def job_html(job: Job) -> str:
    """Whatever there is to say of a job by now."""
    if job.status == DONE and job.report:
        return report_html(job.report)
    if job.status in (FAILED, CANCELLED) and job.error:
        return error_html(job.error)
    return (
        f'<div class="hypermerge-note">A job is running ({job.fraction:.0%}); its result will be '
        "here when it ends.</div>"
    )


def error_html(error: HypermergeError) -> str:
    """What, why, and what to try."""
    more = "".join(f"<div>{escape(text)}</div>" for text in (error.why, error.hint) if text)
    kind = "note" if error.code == "cancelled" else "error"
    return f'<div class="hypermerge-{kind}" data-code="{error.code}"><b>{escape(error.what)}</b>{more}</div>'


def plan_html(plan: dict[str, Any]) -> str:
    """Size and time before the run."""
    size = plan["expected_bytes"]
    text = f"about {mib(size)}" if size else f"at most {mib(plan['most_bytes'])}, by the layers' spectra"
    lines = [
        f"<b>{escape(plan['architecture'])}</b>: {plan['modules']} layers, {text}, "
        f"about {plan['expected_seconds']:.0f} s"
        + (f"; {plan['left_out']} layers left out" if plan["left_out"] else "")
    ]
    lines += [escape(warning) for warning in plan["warnings"]]
    return '<div class="hypermerge-note">' + "<br>".join(lines) + "</div>"


def report_html(report: Report) -> str:
    """The result panel: file, errors as a picture and in numbers, prompt snippet, notes."""
    d = report.details
    parts = [_headline(report)]
    if d.get("prompt"):
        parts.append(_prompt(report.verb, d["prompt"]))
    parts.append(_picture(d))
    parts.append(_table(report))
    parts += [f'<div class="hypermerge-note">{escape(warning)}</div>' for warning in report.warnings]
    return f'<div class="hypermerge-report">{"".join(parts)}</div>'


def _picture(details: dict[str, Any]) -> str:
    try:
        return errors_picture(details)
    except Exception:  # a host's matplotlib may be broken; the result must be shown all the same
        log.exception("no picture of the errors")
        return '<div class="hypermerge-note">The picture could not be drawn; the console says why.</div>'


def _headline(report: Report) -> str:
    files = ", ".join(f"<b>{escape(Path(o.path).name)}</b> ({mib(o.bytes)})" for o in report.outputs)
    return (
        f"<p>{files} written in {report.seconds:.1f} s. It misses <b>{percent(report.relative_error or 0)}</b> of the "
        f"change (norm), {report.modules} layers.</p>"
    )


def _prompt(verb: str, prompt: str) -> str:
    quoted = escape(json.dumps(prompt), quote=True)
    button = (
        '<button type="button" id="hypermerge_{}_{}" class="hypermerge-button" onclick="hypermerge.{}({})">{}</button>'
    )
    copy = button.format(verb, "copy", "copy", quoted, "Copy")
    send = button.format(verb, "send", "send", quoted, "Send to txt2img")
    return f'<p><code id="hypermerge_{verb}_prompt">{escape(prompt)}</code> {copy} {send}</p>'


def _table(report: Report) -> str:
    d = report.details
    ranks = [int(rank) for rank in d["ranks"]]
    why = ", ".join(f"{count} {reason}" for reason, count in d["skipped_because"].items() if count) or "none"
    rows = [
        ("Ranks", " … ".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"),
        ("Layers skipped", why),
        ("Changed tensors that no LoRA reaches", str(report.unreachable)),
        ("Changed tensors that could be included", ", ".join(f"{n} {kind}" for kind, n in d["not_asked_for"].items())),
        ("Share of the change (squared) not in the file", percent(d["uncarried_share"])),
        ("Error with those counted in", percent(d["relative_error_with_uncarried"])),
    ]
    rows += [
        (
            f"Error in {component}",
            f"{percent(p['relative_error'])}, where {percent(p['share_of_change'])} of the change (squared) lies",
        )
        for component, p in d["components"].items()
    ]
    rows.append(("Decomposition", ", ".join(f"{n} {m}" for m, n in d["methods"].items()) + f" on {d['device']}"))
    rows.append(("SHA-256", report.outputs[0].sha256))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<table class="hypermerge-table">{cells}</table>'

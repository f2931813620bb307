"""Reports, plans and errors as HTML. What only one verb has to show is that verb's view."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from typing import Any

from ..errors import HypermergeError
from ..jobs.report import Report
from ..jobs.runner import CANCELLED, DONE, FAILED, Job
from ..render import mib
from . import (
    combine_view,
    convert_view,
    extract_view,
    fit_view,
    html,
    hyper_view,
    inspect_view,
    merge_view,
    resize_view,
    restore_view,
    transfer_view,
)

# verb → what its report shows before the notes
VIEWS: dict[str, Callable[[Report], str]] = {
    "extract": extract_view.view,
    "merge": merge_view.view,
    "combine": combine_view.view,
    "inspect": inspect_view.view,
    "convert": convert_view.view,
    "resize": resize_view.view,
    "hyper": hyper_view.view,
    "fit": fit_view.view,
    "restore": restore_view.view,
    "transfer": transfer_view.view,
    "try": merge_view.view,
    "take_back": merge_view.taken_back,
}


def job_html(job: Job) -> str:
    """Whatever there is to say of a job by now."""
    if job.status == DONE and job.report:
        return report_html(job.report, job.id)
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
    """Model, layers, size and time before the run, as far as the verb foresees them."""
    model, modules, size = plan.get("architecture"), plan.get("modules"), plan.get("expected_bytes")
    facts = [f"{modules} layers"] if modules is not None else []
    if size:
        facts.append(f"about {mib(size)}")
    elif plan.get("most_bytes"):
        facts.append(f"at most {mib(plan['most_bytes'])}, by the layers' spectra")
    if plan.get("expected_seconds") is not None:
        facts.append(f"about {plan['expected_seconds']:.0f} s")
    line = (f"<b>{escape(model)}</b>: " if model else "") + ", ".join(facts)
    if plan.get("left_out"):
        line += f"; {plan['left_out']} layers left out"
    if plan.get("unmatched"):
        line += f"; {plan['unmatched']} keys not in this model"
    lines = [line, *_sizes(plan), *(escape(warning) for warning in plan.get("warnings", ()))]
    # tells the graph of block weights how many blocks this model has
    mark = f' data-blocks="{plan["blocks"]}"' if plan.get("blocks") else ""
    return f'<div class="hypermerge-note"{mark}>' + "<br>".join(filter(None, lines)) + "</div>"


def _sizes(plan: dict[str, Any]) -> list[str]:
    """Of a plan with a hyper-model: how large each file will be, and what the run needs."""
    if "hyper_bytes" not in plan:
        return []
    loras = plan["loras"]
    files = [f"hyper-model {mib(plan['hyper_bytes'])}"] if plan["hyper_bytes"] else []
    if loras:
        each = ", ".join(f"rank {lora['rank']}: {mib(lora['bytes'])}" for lora in loras)
        files.append(f"LoRAs <b>{mib(sum(lora['bytes'] for lora in loras))}</b> ({each})")
    needs = f"needs {mib(plan['expected_memory'])} of memory, reads {mib(plan['bytes_to_read'])}"
    return [" + ".join(files), needs]


def report_html(report: Report, job_id: str = "") -> str:
    """The result panel: the verb's view, then notes."""
    told = VIEWS[report.verb](report) + html.notes(report.warnings)
    return f'<div class="hypermerge-report" data-job="{escape(job_id, quote=True)}">{told}</div>'

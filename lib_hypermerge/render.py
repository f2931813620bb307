"""A report in words, for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from . import (
    render_combine,
    render_convert,
    render_extract,
    render_hyper,
    render_inspect,
    render_resize,
    render_transfer,
)
from .jobs.report import Report
from .words import counts as counts
from .words import mib as mib
from .words import percent as percent


def as_text(report: Report) -> str:
    """Some twenty lines: what was written, what the verb has to say of it, and notes."""
    d = report.details
    lines = [f"{output.path}  {mib(output.bytes)}  sha256 {output.sha256[:16]}…" for output in report.outputs]
    if report.verb in TEXTS:
        lines += TEXTS[report.verb](report)
    if d.get("prompt"):
        lines.append(f"prompt: {d['prompt']}")
    lines += [f"note: {warning}" for warning in report.warnings]
    lines.append(f"{report.seconds:.1f} s on {d.get('device', 'cpu')}")
    return "\n".join(lines)


def _merge(report: Report) -> list[str]:
    d = report.details
    lines = [
        f"{d['architecture']}: {d['changed_tensors']} tensors changed, {d['carried_tensors']} carried over",
        f"modules by component: {counts(d['components'])}; by family: {counts(d['families'])}",
    ]
    lines += [
        f"  {lora['name']} ({lora['dialect']}): {lora['modules']} modules"
        + (f", {lora['unmatched']} unmatched" if lora["unmatched"] else "")
        for lora in d["loras"]
    ]
    if d["skipped_because"]:
        lines.append(f"modules left out: {counts(d['skipped_because'])}")
    if d["unreachable_tensors"]:
        lines.append(f"unmatched: {', '.join(d['unreachable_tensors'][:5])}{_more(d['unreachable_tensors'], 5)}")
    return lines


def _more(items: list[str], shown: int) -> str:
    return f", … ({len(items)})" if len(items) > shown else ""


# verb → the lines that only its report has; a verb's own file may supply them
TEXTS: dict[str, Callable[[Report], list[str]]] = {
    "extract": render_extract.text, "merge": _merge, "inspect": render_inspect.text,
    "convert": render_convert.text, "resize": render_resize.text, "hyper": render_hyper.text,
    "fit": render_hyper.fit_text, "restore": render_hyper.restore_text,
    "transfer": render_transfer.text, "combine": render_combine.text,
}  # fmt: skip

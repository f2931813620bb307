"""The result of extract: file, prompt snippet, errors as a picture and in numbers."""

from __future__ import annotations

from typing import Any

from ..jobs.report import Report
from ..render_extract import FAMILIES, compared, sampled
from ..words import counts, percent
from . import html
from .plots import errors_picture


def view(report: Report) -> str:
    """Of a finished extraction."""
    headline = (
        f"<p>{html.files(report)} written in {report.seconds:.1f} s. It misses "
        f"<b>{percent(report.relative_error or 0)}</b> of the change (norm), {report.modules} layers.</p>"
    )
    picture = html.picture(lambda: errors_picture(report.details))
    return headline + html.prompt(report) + _families(report.details) + picture + html.table(_rows(report))


def _families(d: dict[str, Any]) -> str:
    """How far each family would be off; "" for a plain LoRA."""
    if not d["families"]:
        return ""
    kinds = counts({FAMILIES[family]: layers for family, layers in d["family_layers"].items()})
    return f"<p>Written as {kinds} layers. Compared {sampled(d)}:</p>{html.table(compared(d))}"


def _rows(report: Report) -> list[tuple[str, str]]:
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
    return rows

"""The result of fit: the prompt for a model that was not merged, and how near it comes."""

from __future__ import annotations

from html import escape

from ..jobs.report import Report
from ..render_hyper import fit_describe, fit_headline
from . import html


def view(report: Report) -> str:
    """Of a finished fit."""
    text = fit_headline(report)
    return f"<p>{escape(text[:1].upper() + text[1:])}</p>" + html.prompt(report) + html.table(fit_describe(report))

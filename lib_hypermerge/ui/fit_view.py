"""The result of fit: the prompt, how much it misses and where, the multipliers."""

from __future__ import annotations

from html import escape

from ..jobs.report import Report
from ..render_hyper import fit_describe, fit_headline
from . import html
from .hyper_plots import fit_picture


def view(report: Report) -> str:
    """Of a finished fit."""
    told = fit_headline(report)
    picture = html.picture(lambda: fit_picture(report.details))
    headline = f"<p>{escape(told[0].upper() + told[1:])}</p>"
    return headline + html.prompt(report) + picture + html.table(fit_describe(report))

"""What extract reports, in words: for the terminal, and the parts of it that the page shows too."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, mib, percent

FAMILIES = {"lora": "LoRA", "dora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "svdiff": "SVDiff"}


def text(report: Report) -> list[str]:
    """What was missed where, and how other families would do."""
    d = report.details
    lines = [
        f"{d['architecture']}: {report.modules} modules, {report.skipped} skipped "
        f"({', '.join(f'{n} {why}' for why, n in d['skipped_because'].items() if n) or 'none'}), "
        f"{report.unreachable} changed tensors out of a LoRA's reach",
        f"relative error {percent(report.relative_error or 0)} of the change; "
        f"{percent(d['uncarried_share'])} of the change (squared) is not in the file{_could(d)}",
    ]
    for component, part in d["components"].items():
        worst = max(part["blocks"].items(), key=lambda item: item[1]["relative_error"])
        lines.append(
            f"  {component}: error {percent(part['relative_error'])}{_gain(part.get('gain'))}, "
            f"{percent(part['share_of_change'])} of the change, "
            f"worst block {worst[0]} ({percent(worst[1]['relative_error'])})"
        )
    ranks = [int(rank) for rank in d["ranks"]]
    span = "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"
    methods = ", ".join(f"{count} {method}" for method, count in sorted(d["methods"].items()))
    lines.append(f"  rank {span}; {methods}" if ranks else f"  {methods}")
    if d["families"]:
        kinds = counts({FAMILIES[family]: layers for family, layers in d["family_layers"].items()})
        lines.append(f"  written as {kinds}{_gain(d['gain'])}; compared {sampled(d)}:")
        lines += [f"    {family}: {told}" for family, told in compared(d)]
    curve = ", ".join(f"{p['rank']}: {percent(p['relative_error'])}" for p in d["curve"])
    return [*lines, f"  error with no rank above  {curve}"] if curve else lines


def compared(d: dict[str, Any]) -> list[tuple[str, str]]:
    """(family, what a file of it misses) for every family that an extraction measured."""
    rows = []
    for row in d["families"]:
        told = f"{mib(row['bytes'])}, error {percent(row['relative_error'])}"
        if row["family"] != "lora":
            told += (f", {percent(_rounded(row['gain']))} less than a LoRA of its size; closer in {row['layers']} of "
                     f"{d['families_measured']['layers']} layers")  # fmt: skip
        rows.append((FAMILIES[row["family"]], told))
    return rows


def sampled(d: dict[str, Any]) -> str:
    """On how many layers families were compared."""
    measured = d["families_measured"]
    return f"on {measured['layers']} of {measured['of']} layers" if measured else ""


def _gain(gain: float | None) -> str:
    return f", {percent(gain)} less than a LoRA of its size" if gain and _rounded(gain) else ""


def _rounded(gain: float) -> float:
    """Without what only rounding makes of two equal errors."""
    return 0.0 if abs(gain) < 1e-6 else gain


def _could(d: dict[str, Any]) -> str:
    """What more the file could hold, if it was asked to."""
    left = " and ".join(f"{count} {kind}" for kind, count in d["not_asked_for"].items() if count)
    return f", of it {left} that can be included" if left else ""

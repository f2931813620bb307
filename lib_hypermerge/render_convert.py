"""A conversion in words: what became what, how exactly, and what was left out."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, mib, percent


def text(report: Report) -> list[str]:
    """The lines of a finished conversion."""
    return [f"{name}: {value}" for name, value in describe(report)]


def describe(report: Report) -> list[tuple[str, str]]:
    """What there is to say of it; for the terminal and the page alike."""
    d = report.details
    return _checkpoint(report, d) if d["kind"] == "checkpoint" else _lora(report, d)


def _checkpoint(report: Report, d: dict[str, Any]) -> list[tuple[str, str]]:
    size = sum(output.bytes for output in report.outputs)
    rows = [
        ("model", d["architecture"]),
        ("tensors", f"{d['converted']} in another number format, {d['carried']} carried over as they were"),
        ("number formats", counts(d["formats"])),
        ("size", f"{mib(d['bytes_before'])} before, {mib(size)} now"),
    ]
    return [*rows, ("pruned", counts(d["pruned"]))] if d["pruned"] else rows


def _lora(report: Report, d: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [
        ("model", d["architecture"]),
        ("dialect", f"{d['from']} → {d['to']}"),
        ("modules read", counts(d["families"])),
        ("modules written", f"{report.modules} ({counts(d['written_per_component'])})"),
    ]
    if d["ranks"]:
        rows.append(("ranks", _ranks(d["ranks"])))
    if d["methods"]:
        rows.append(("computed", counts(d["methods"])))
    if report.relative_error is not None:
        rows.append(("relative error", f"{percent(report.relative_error)} of the change"))
    for component, part in d["components"].items():
        worst, block = max(part["blocks"].items(), key=lambda item: item[1]["relative_error"])
        where = f"{percent(part['share_of_change'])} of the change (squared) lies"
        told = f"{percent(part['relative_error'])}, where {where}; worst block {worst}"
        rows.append((f"error in {component}", f"{told} ({percent(block['relative_error'])})"))
    if d["joined"]:
        rows.append(("layers joined", counts(d["joined"])))
    if d["left_out"]:
        rows.append(("left out", counts(d["left_out"])))
    if d["embeddings"]:
        rows.append(("tensors of bundled embeddings", str(d["embeddings"])))
    return rows


def _ranks(table: dict[str, int]) -> str:
    ranks = sorted(int(rank) for rank in table)
    return " … ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))

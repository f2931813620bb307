"""A resize in words: a row for each result, and what each method misses."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, mib, percent

METHODS = {"svd": "SVD", "rsvd": "randomised SVD", "random": "random projection", "sparse": "sparse projection"}


def text(report: Report) -> list[str]:
    """The lines of a finished resize."""
    d = report.details
    lines = ["preview: nothing was written"] if d["preview"] else []
    for file in d["files"]:
        lines.append(f"{file['name']}  {mib(file['bytes'])}, rank {file['rank']}, {describe(file)}")
        for result in file["results"]:
            lines.append(f"  {result['file']}: " + ", ".join(f"{name} {value}" for name, value in facts(result)))
            lines += [f"    {line}" for line in blocks(result)] if len(d["files"]) == 1 else []
    lines += [f"{one['name']}: {one['error']['what']} {one['error']['hint']}".rstrip() for one in d["failed"]]
    return lines


def describe(file: dict[str, Any]) -> str:
    """What kind of LoRA went in."""
    left = {what: count for what, count in file["left_out"].items() if count}
    return f"{file['architecture']}, {counts(file['families'])} modules, written as {file['dialect']}" + (
        f"; left out: {counts(left)}" if left else ""
    )


def facts(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to say of one result, name and value."""
    ranks = [int(rank) for rank in result["ranks"]]
    span = "–".join(map(str, dict.fromkeys((ranks[0], ranks[-1])))) if ranks else "none"
    return [("rank", span), ("size", mib(result["bytes"])), ("misses", percent(result["relative_error"])),
            *errors(result)]  # fmt: skip


def errors(result: dict[str, Any]) -> list[tuple[str, str]]:
    """What every method that was measured misses at this rank, and what random directions are expected to."""
    found = result["errors"] if len(result["errors"]) > 1 else {}
    return [
        (METHODS[method], percent(error)
         + (f" ({percent(result['expected'][method])} expected)" if method in result["expected"] else ""))
        for method, error in found.items()
    ]  # fmt: skip


def blocks(result: dict[str, Any]) -> list[str]:
    """A line for each component with its worst block."""
    lines = []
    for component, part in result["components"].items():
        block, worst = max(part["blocks"].items(), key=lambda item: item[1]["relative_error"])
        lines.append(
            f"{component}: misses {percent(part['relative_error'])}, worst block {block} "
            f"({percent(worst['relative_error'])})"
        )
    return lines

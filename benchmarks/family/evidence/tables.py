"""Tables in Markdown, and the page that holds them between markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .study import Likeness

LIKENESS = ("missed %", "pixels missed %", "features %", "judged the same %", "as asked %", "in its manner %")
_MARK = "<!-- {} {} -->"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def likeness(row: Likeness) -> list[str]:
    """Its cells under LIKENESS."""
    return [percent(row.missed.mean), *map(str, (row.unlike, row.features, row.same, row.asked, row.manner))]


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def mib(size: int | float) -> str:
    return f"{size / 2**20:.2f}"


def fill(page: Path, name: str, content: str) -> None:
    """Put the content between the page's marks of that name. Raises KeyError if the page has no such marks."""
    start, end = _MARK.format("begin", name), _MARK.format("end", name)
    text = page.read_text(encoding="utf-8")
    if start not in text or end not in text:
        raise KeyError(f"{page} has no place for {name}")
    pattern = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{start}\n{content}\n{end}", text), encoding="utf-8")

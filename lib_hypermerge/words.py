"""Numbers as people read them, for the terminal and the page alike."""

from __future__ import annotations

from collections.abc import Mapping


def mib(size: float) -> str:
    """A size; the smallest in KiB."""
    return f"{size / 2**10:,.1f} KiB" if 0 < size < 0.05 * 2**20 else f"{size / 2**20:,.1f} MiB"


def percent(share: float) -> str:
    """A share with as many digits as it deserves."""
    value = 100 * share
    return f"{value:.1f} %" if value >= 1 or value == 0 else f"{value:.2g} %"


def two_digits(value: float) -> str:
    """A number about 0 as 0.00, on whichever side of it."""
    return f"{round(value, 2) + 0.0:.2f}"


def counts(table: Mapping[str, int]) -> str:
    """As in "192 LoRA, 3 norm", the largest first; "none" for nothing."""
    ordered = sorted(table.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ordered if count) or "none"


def millions(count: float) -> str:
    """A number of parameters."""
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M" if count >= 1e5 else f"{count:,}"


def listed(names: list[str], count: int, shown: int = 5) -> str:
    """The first of a long list of so many names."""
    text = ", ".join(names[:shown])
    return text + (f", … ({count})" if count > len(names[:shown]) else "")

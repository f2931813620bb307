"""Pictures as inline images: drawn without a window, readable on light and dark pages."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from typing import Any

INK, BARS, LINE = "#888888", ("#4c78a8", "#f58518", "#54a24b", "#b279a2"), "#e45756"

_TITLE = "What the LoRA misses, per block"


def errors_picture(details: dict[str, Any]) -> str:
    """An <img> of an extraction: relative error per block, and error against file size over ranks."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    if not details["curve"]:  # nothing with ranks
        axes = figure.subplots()
        block_bars(axes, details["components"], _TITLE)
        in_ink((axes,))
        return as_image(figure, "Relative error per block")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    block_bars(left, details["components"], _TITLE)
    _curve(right, details["curve"])
    in_ink((left, right))
    return as_image(figure, "Relative error per block, and error over rank")


def in_ink(all_axes: Iterable[Any]) -> None:
    """Colours that are readable on light and dark pages."""
    for axes in all_axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        for side in axes.spines.values():
            side.set_color(INK)


def short(label: str, most: int = 28) -> str:
    """A name as a picture has room for it: its end, with signs that matplotlib would read as mathematics."""
    return (label if len(label) <= most else "…" + label[1 - most :]).replace("$", r"\$")


def as_image(figure: Any, alt: str) -> str:
    """An <img> of a matplotlib figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100, transparent=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="hypermerge-picture" alt="{alt}" src="data:image/png;base64,{data}">'


def block_bars(axes: Any, components: dict[str, Any], title: str) -> None:
    """Relative errors of all blocks, by component."""
    start, ticks, names = 0, [], []
    for (component, part), color in zip(components.items(), BARS, strict=False):
        heights = [100 * block["relative_error"] for block in part["blocks"].values()]
        places = range(start, start + len(heights))
        axes.bar(places, heights, color=color, label=component)
        ticks += places
        names += part["blocks"]
        start += len(heights) + 1
    axes.set_xticks(ticks, names, rotation=90, fontsize=6)
    axes.set_ylabel("relative error, %")
    axes.set_title(title, fontsize=10)
    axes.set_ylim(top=1.15 * max(axes.get_ylim()[1], 1e-9))
    axes.legend(fontsize=7, framealpha=0, labelcolor=INK, ncols=len(components), loc="upper right")


def _curve(axes: Any, curve: list[dict[str, float]]) -> None:
    sizes = [point["bytes"] / 2**20 for point in curve]
    errors = [100 * point["relative_error"] for point in curve]
    axes.plot(sizes, errors, marker="o", markersize=3, color=LINE)
    for point, x, y in zip(curve, sizes, errors, strict=True):
        axes.annotate(str(point["rank"]), (x, y), xytext=(3, 3), textcoords="offset points", fontsize=7, color=INK)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="x", which="minor", labelsize=6, labelcolor=INK)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("size, MiB")
    axes.set_ylabel("relative error, %")
    axes.set_title("Error and size with no rank above …", fontsize=10)

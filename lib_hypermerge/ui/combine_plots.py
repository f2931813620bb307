"""Pictures of a combination: how alike LoRAs are in each block, and what the result misses there."""

from __future__ import annotations

from typing import Any

from .plots import BARS, INK, LINE, as_image, block_bars, in_ink, short

_PAIRS = 20  # rows, beyond which a picture tells nothing
_NAME = 18  # signs of a LoRA's name


def blocks_picture(alike: dict[str, Any], names: list[str]) -> str:
    """An <img>: of two LoRAs cosine and overlap per block as bars and a line; of more a row for each two."""
    from matplotlib.figure import Figure

    if len(alike["pairs"]) == 1:
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        axes = figure.subplots()
        _pair(axes, alike)
    else:
        rows = len(alike["pairs"][:_PAIRS])
        figure = Figure(figsize=(11, 1.6 + 0.28 * rows), layout="constrained")
        axes = figure.subplots()
        _pairs(figure, axes, alike, names)
    in_ink([axes])
    return as_image(figure, "How alike the LoRAs are in each block")


def errors_picture(components: dict[str, Any]) -> str:
    """An <img>: relative error per block."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots()
    block_bars(axes, components, "What the combined LoRA misses, per block")
    in_ink([axes])
    return as_image(figure, "Relative error per block")


def _pair(axes: Any, alike: dict[str, Any]) -> None:
    start, ticks, labels = 0, [], []
    for (component, blocks), color in zip(alike["by_block"].items(), BARS, strict=False):
        places = range(start, start + len(blocks))
        axes.bar(places, [_number(b["cosine"][0]) for b in blocks.values()], color=color, label=f"cosine, {component}")
        axes.plot(places, [_number(b["overlap"][0]) for b in blocks.values()], color=LINE, marker="o", markersize=3,
                  linewidth=1, label="overlap of directions" if not start else None)  # fmt: skip
        ticks += places
        labels += blocks
        start += len(blocks) + 1
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(ticks, labels, rotation=90, fontsize=6)
    low, high = axes.get_ylim()
    axes.set_ylim(max(-1.0, min(low, -0.1)), max(0.2, 1.2 * high))
    axes.set_title("How alike the two are, per block: 1 the same, 0 unrelated, −1 opposite", fontsize=10)
    axes.legend(fontsize=7, framealpha=0, labelcolor=INK, ncols=4, loc="upper right")


def _pairs(figure: Any, axes: Any, alike: dict[str, Any], names: list[str]) -> None:
    columns = [(component, block) for component, blocks in alike["by_block"].items() for block in blocks]
    shown = list(range(len(alike["pairs"])))[:_PAIRS]
    rows = [[_number(alike["by_block"][c][b]["cosine"][pair]) for c, b in columns] for pair in shown]
    image = axes.imshow(rows, vmin=-1, vmax=1, cmap="RdBu", aspect="auto")
    axes.set_xticks(range(len(columns)), [block for _, block in columns], rotation=90, fontsize=6)
    labels = [" · ".join(short(names[i], _NAME) for i in alike["pairs"][pair]) for pair in shown]
    axes.set_yticks(range(len(shown)), labels, fontsize=7)
    for place in range(1, len(columns)):
        if columns[place][0] != columns[place - 1][0]:
            axes.axvline(place - 0.5, color=INK, linewidth=2)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=7)
    more = len(alike["pairs"]) - len(shown)
    axes.set_title("Cosine of every two, per block" + (f" ({more} more pairs)" if more else ""), fontsize=10)


def _number(value: float | None) -> float:
    return float("nan") if value is None else value

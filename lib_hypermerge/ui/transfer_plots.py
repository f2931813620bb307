"""Pictures of a transfer: the similarity of every layer by block, and how much of each LoRA arrived there."""

from __future__ import annotations

from typing import Any

from .plots import BARS, INK, LINE, as_image, in_ink, short

_COLORS = {"copied": BARS[2], "projected": BARS[0], "mapped": BARS[1]}
_LEFT_OUT = "left out"
_MOST = 4  # LoRAs whose bars have room beside each other


def similarity_picture(details: dict[str, Any]) -> str:
    """An <img>: a dot for each layer at its similarity, coloured by what was done; below, the energy retained."""
    from matplotlib.figure import Figure

    columns = list(dict.fromkeys((layer["component"], layer["block"]) for layer in details["layers"]))
    columns.sort(key=lambda column: (column[0] != "unet", column))
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=(3, 2), sharex=True)
    _dots(above, details, columns)
    _retained(below, details["loras"], columns)
    below.set_xticks(range(len(columns)), [block for _, block in columns], rotation=90, fontsize=6)
    below.set_xlim(-1, len(columns))
    for place, (component, _) in enumerate(columns):
        if place == 0 or component != columns[place - 1][0]:
            above.annotate(component, (place - 0.4, 0.03), fontsize=8, color=INK)
            for axes in (above, below) if place else ():
                axes.axvline(place - 0.5, color=INK, linewidth=1.5)
    in_ink((above, below))
    return as_image(figure, "Similarity of every layer, and energy retained, by block")


def _dots(axes: Any, details: dict[str, Any], columns: list[tuple[str, str]]) -> None:
    place = {column: x for x, column in enumerate(columns)}
    known = [layer for layer in details["layers"] if layer["similarity"] is not None]
    for action in (*_COLORS, _LEFT_OUT):
        own = [layer for layer in known if (layer["action"] if layer["action"] in _COLORS else _LEFT_OUT) == action]
        if not own:
            continue
        xs = [place[layer["component"], layer["block"]] for layer in own]
        color = _COLORS.get(action, INK)
        axes.plot(xs, [layer["similarity"] for layer in own], linestyle="none", marker="x" if action == _LEFT_OUT else
                  "o", markersize=4, alpha=0.7, color=color, label=f"{action} ({len(own)})")  # fmt: skip
    axes.axhline(details["threshold"], color=LINE, linewidth=1, linestyle="--", label="least similarity")
    axes.axhline(0, color=INK, linewidth=0.6)
    axes.set_ylim(min([-0.1, *(layer["similarity"] - 0.05 for layer in known)]), 1.08)
    axes.set_ylabel("similarity Φ")
    unknown = len(details["layers"]) - len(known)
    more = f" ({unknown} layers of other sizes are not shown)" if unknown else ""
    axes.set_title(f"How alike the leading directions of each layer are: 1 the same, 0 chance{more}", fontsize=10)
    axes.legend(fontsize=7, framealpha=0, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))


def _retained(axes: Any, loras: list[dict[str, Any]], columns: list[tuple[str, str]]) -> None:
    loras = loras[:_MOST]
    width = 0.8 / len(loras)
    for i, lora in enumerate(loras):
        blocks = [lora["components"].get(component, {}).get("blocks", {}).get(block) for component, block in columns]
        values = [100 * (block["retained"] or 0.0) if block else 0.0 for block in blocks]
        places = [x + (i + 0.5) * width - 0.4 for x in range(len(columns))]
        axes.bar(places, values, width=0.9 * width, color=BARS[i % len(BARS)], label=short(lora["name"]))
    axes.set_ylabel("retained, % (squared)")
    axes.set_title("Energy of the change that is retained where it was carried over", fontsize=10)
    if len(loras) > 1:
        axes.legend(fontsize=7, framealpha=0, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))

"""Pictures of a hyper-merge: error against size, loss, multipliers, and the error of every model in every block."""

from __future__ import annotations

from typing import Any

from ..jobs.hyper.recipe import Multipliers
from ..render_hyper import KINDS
from ..words import percent
from .plots import BARS, INK, LINE, as_image, block_bars, in_ink, short

COLORS = (*BARS, "#72b7b2", "#eeca3b", "#9d755d", "#ff9da6")
_MARKERS = {"average": "x", "own": "s", "greedy": "^", "joint": "o", "container": "D"}
_MANY = 8  # models, beyond which their names stand upright


def course_picture(details: dict[str, Any]) -> str:
    """An <img>: error against the size of all LoRAs, with what else there is at that size, and the solver's loss."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _sizes(left, details)
    _loss(right, details["loss"])
    in_ink((left, right))
    return as_image(figure, "Error against size, and loss over iterations")


def multipliers_picture(details: dict[str, Any]) -> str:
    """An <img>: each model's multipliers as bars, those of its text encoders as marks on them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.2), layout="constrained")
    axes = figure.subplots()
    _multipliers(axes, details["multipliers"], details["te_multipliers"])
    in_ink([axes])
    return as_image(figure, "Multipliers of every model")


def fit_picture(details: dict[str, Any]) -> str:
    """An <img> of a fit: relative error per block, and the multipliers."""
    from matplotlib.figure import Figure

    components = {
        name: {"blocks": {block: {"relative_error": error} for block, error in part["blocks"].items()}}
        for name, part in details["components"].items()
    }
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    block_bars(left, components, "What the LoRAs miss, per block")
    te = details["te_multipliers"]
    _multipliers(right, {details["model"]: details["multipliers"]}, None if te is None else {details["model"]: te})
    in_ink((left, right))
    return as_image(figure, "Relative error per block, and multipliers")


def blocks_picture(by_model: dict[str, Any]) -> str:
    """An <img>: relative error of every model in every block, the darker the more is missed."""
    from matplotlib.figure import Figure

    columns = [
        (component, block)
        for component, part in next(iter(by_model.values()))["components"].items()
        for block in part["blocks"]
    ]
    rows = [
        [100 * part["components"][component]["blocks"][block] for component, block in columns]
        for part in by_model.values()
    ]
    figure = Figure(figsize=(11, 1.5 + 0.28 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=0, cmap="Blues", aspect="auto")
    axes.set_xticks(range(len(columns)), [block for _, block in columns], rotation=90, fontsize=6)
    axes.set_yticks(range(len(rows)), [short(model) for model in by_model], fontsize=7)
    for place in range(1, len(columns)):
        if columns[place][0] != columns[place - 1][0]:
            axes.axvline(place - 0.5, color=INK, linewidth=2)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.ax.tick_params(colors=INK, labelsize=7)
    axes.set_title("Relative error of each model in each block, %", fontsize=10)
    in_ink([axes])
    return as_image(figure, "Relative error of every model in every block")


def _multipliers(axes: Any, of_unet: Multipliers, of_te: Multipliers | None) -> None:
    models, loras = list(of_unet), list(next(iter(of_unet.values())))
    width = 0.8 / len(loras)
    for i, lora in enumerate(loras):
        places = [m + (i + 0.5) * width - 0.4 for m in range(len(models))]
        heights = [of_unet[model][lora] for model in models]
        axes.bar(places, heights, width=0.9 * width, color=COLORS[i % len(COLORS)], label=str(i + 1))
        if of_te is not None:
            marks = [of_te[model][lora] for model in models]
            axes.plot(places, marks, linestyle="none", marker="D", markersize=4, color=INK,
                      label="text encoders" if i == len(loras) - 1 else None)  # fmt: skip
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(range(len(models)), [short(model) for model in models], fontsize=7,
                    **({"rotation": 45, "ha": "right"} if len(models) > _MANY else {}))  # fmt: skip
    axes.set_ylabel("multiplier")
    axes.set_title("Multiplier of each LoRA", fontsize=10)
    legend = axes.legend(title="LoRA", fontsize=7, title_fontsize=7, framealpha=0, labelcolor=INK, loc="center left",
                         bbox_to_anchor=(1, 0.5))  # fmt: skip
    legend.get_title().set_color(INK)


def _sizes(axes: Any, details: dict[str, Any]) -> None:
    curve = details["curve"]
    if curve:
        sizes, shares = [point["bytes"] / 2**20 for point in curve], [100 * point["residual_share"] for point in curve]
        axes.plot(sizes, shares, marker="o", markersize=4, color=LINE, label="the first 1, 2, … LoRAs")
        for point, x, y in zip(curve, sizes, shares, strict=True):
            axes.annotate(str(point["loras"]), (x, y), xytext=(4, 4), textcoords="offset points", fontsize=7, color=INK)
    for item, color in zip(details["alternatives"], COLORS, strict=False):
        label = f"{KINDS.get(item['kind'], item['name'])}: {percent(item['residual_share'])}"
        axes.plot([item["bytes"] / 2**20], [100 * item["residual_share"]], linestyle="none", color=color, markersize=6,
                  marker=_MARKERS.get(item["kind"], "*"), label=label)  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set_xlabel("size of the LoRAs, MiB")
    axes.set_ylabel("missed, % (squared)")
    axes.set_title("What is missed at which size", fontsize=10)
    axes.legend(fontsize=7, framealpha=0, labelcolor=INK, loc="center left", bbox_to_anchor=(1, 0.5))


def _loss(axes: Any, loss: list[float]) -> None:
    axes.plot(range(1, len(loss) + 1), [100 * value for value in loss], color=LINE, marker="o",
              markersize=3 if len(loss) < 30 else 0)  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("iteration")
    axes.set_ylabel("missed, % (squared)")
    axes.set_title("Loss", fontsize=10)

"""Pictures of an inspection: norms by block, spectra, and how alike files are."""

from __future__ import annotations

from typing import Any

from .plots import BARS, INK, as_image, in_ink, short

_NUMBERS_UP_TO = 12  # files, beyond which a matrix has no room for numbers


def measured_picture(measured: dict[str, Any]) -> str:
    """An <img>: the norm of the change in each block and, where there are spectra, their usual course."""
    from matplotlib.figure import Figure

    components = {name: part for name, part in measured["components"].items() if part["blocks"]}
    spectra = {part["title"]: part["spectrum"] for part in components.values() if part.get("spectrum", {}).get("curve")}
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = list(figure.subplots(1, 2, width_ratios=(3, 2))) if spectra else [figure.subplots()]
    _norms(axes[0], components)
    if spectra:
        _spectra(axes[1], spectra)
    in_ink(axes)
    return as_image(figure, "Norm of the change in each block" + (", and its singular values" if spectra else ""))


def _norms(axes: Any, components: dict[str, Any]) -> None:
    start, ticks, names = 0, [], []
    for part, color in zip(components.values(), BARS, strict=False):
        heights = [block["norm"] for block in part["blocks"].values()]
        places = range(start, start + len(heights))
        axes.bar(places, heights, color=color, label=part["title"])
        ticks += places
        names += part["blocks"]
        start += len(heights) + 1
    axes.set_xticks(ticks, names, rotation=90, fontsize=6)
    axes.set_ylabel("norm")
    axes.set_title("Norm of the change, per block", fontsize=10)
    axes.set_ylim(top=1.15 * max(axes.get_ylim()[1], 1e-9))
    if components:
        axes.legend(fontsize=7, framealpha=0, labelcolor=INK, ncols=len(components), loc="upper right")


def _spectra(axes: Any, spectra: dict[str, Any]) -> None:
    for (title, spectrum), color in zip(spectra.items(), BARS, strict=False):
        curve = spectrum["curve"]
        indices = [point["index"] for point in curve]
        axes.plot(indices, [point["median"] for point in curve], color=color, label=title)
        axes.fill_between(
            indices, [point["low"] for point in curve], [point["high"] for point in curve], color=color, alpha=0.2
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    longest = max(spectrum["curve"][-1]["index"] for spectrum in spectra.values())
    axes.xaxis.set_minor_formatter("{x:g}" if longest < 10 else "")
    axes.tick_params(axis="x", which="minor", labelsize=6, labelcolor=INK)
    axes.set_ylim(0, 1.05)
    axes.set_xlabel("direction")
    axes.set_ylabel("singular value / largest")
    axes.set_title("Spectra: the usual layer, and eight of ten", fontsize=10)
    axes.legend(fontsize=7, framealpha=0, labelcolor=INK, loc="upper right")


def matrix_picture(item: dict[str, Any], labels: list[str]) -> str:
    """An <img> of a matrix of cosines, in blue for alike and in red for opposite."""
    from matplotlib.figure import Figure

    rows = [[float("nan") if value is None else value for value in row] for row in item["cosine"]]
    side = 1.6 + 0.55 * len(labels)
    figure = Figure(figsize=(side + 2.5, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(rows, vmin=-1, vmax=1, cmap="RdBu")
    names = [short(label) for label in labels]
    axes.set_xticks(range(len(labels)), names, rotation=45, ha="right", fontsize=7)
    axes.set_yticks(range(len(labels)), names, fontsize=7)
    if len(labels) <= _NUMBERS_UP_TO:
        for y, row in enumerate(item["cosine"]):
            for x, value in enumerate(row):
                color = "white" if value is not None and abs(value) > 0.6 else "black"
                text = "–" if value is None else f"{round(value, 2) + 0.0:.2f}"
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(colors=INK, labelsize=7)
    in_ink([axes])
    return as_image(figure, "Cosine similarity of the files")

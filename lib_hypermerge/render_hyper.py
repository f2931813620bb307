"""A hyper-merge in words: how close each model comes, by which prompt, and at what size."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, mib, percent

_AS_MEAN = 0.999
KINDS = {  # of what could stand for the models at the same size
    "average": "the plain average alone",
    "own": "a LoRA of its own per model",
    "greedy": "shared LoRAs (greedy)",
    "joint": "shared LoRAs (joint)",
    "directions": "shared LoRAs (main directions)",
    "container": "a container",
}

# seen in docs/evidence.md, "Hyper-merge"
_OWN_FROM_MEAN = (
    "counted from the models' mean, as all of these are; extracted from the checkpoint that the models were trained "
    "from, they can draw closer than shared ones: choose it as the base to compare"
)


def text(report: Report) -> list[str]:
    """The lines of a finished hyper-merge."""
    d = report.details
    lines = [("Preview, nothing was written. " if d["preview"] else "") + headline(report)]
    width = max(map(len, d["models"]))
    for model, error in errors(report).items():
        lines.append(f"  {model:<{width}}  misses {percent(error):>7}  {d['prompts'].get(model) or without(d)}")
    lines += [f"  {name}: {value}" for name, value in describe(report)]
    return lines


def headline(report: Report) -> str:
    """What it is, and how close it comes as a whole."""
    d = report.details
    size = sum(lora["bytes"] for lora in d["loras"])
    parts = [f"{len(d['loras'])} LoRA{'s' if len(d['loras']) > 1 else ''} ({mib(size)})"] if d["loras"] else []
    if d["container"]:
        parts.append(f"a container ({mib(d['container']['bytes'])})")
    start = "one hyper-model" if d["hyper"] else "their base"
    what = f"{d['architecture']}: {len(d['models'])} models as {start} and {' and '.join(parts)}"
    share = (d if d["loras"] else d["container"])["residual_share"]
    return f"{what}; {percent(share)} of what tells them apart (squared) is missed."


def errors(report: Report) -> dict[str, float]:
    """Model → what is missed of it (norm): by the LoRAs, or by the container where that stands alone."""
    d = report.details
    return d["models"] if d["loras"] else d["container"]["models"]


def without(d: dict[str, Any]) -> str:
    """What brings back a model that has no prompt."""
    if not d["loras"]:
        return "no prompt: Restore makes its LoRA from the container"
    return "the hyper-model alone" if d["hyper"] else "the base alone"


def describe(report: Report) -> list[tuple[str, str]]:
    """What else there is to say of it; for the terminal and the page alike."""
    d = report.details
    rows = [
        (
            f"LoRA {lora['name']}",
            f"rank {lora['rank']}, {mib(lora['bytes'])}, carries {percent(lora['share'])} alone",
        )
        for lora in d["loras"]
    ]
    if d["container"]:
        box = d["container"]
        each = ", ".join(f"{model} {percent(error)}" for model, error in box["models"].items())
        told = f"{mib(box['bytes'])}, misses {percent(box['residual_share'])} (squared); of {each} (norm)"
        rows.append((f"Container {box['name']}", told))
    rows += [
        (f"Remainder of {model}", f"{rest['name']}, {mib(rest['bytes'])}, restores {percent(rest['restores'])} of the "
                                  "error outside the LoRAs (squared)")
        for model, rest in d["remainders"].items()
    ]  # fmt: skip
    rows.append(("Solver", f"{d['solver']}; {loss_trace(d['loss'])}"))
    if d["alternatives"]:
        rows.append(("Missed at the same size", alternatives(d["alternatives"])))
        if not d["from_base"]:
            rows.append(("LoRAs of their own", _OWN_FROM_MEAN))
    if d["better"]:
        rows.append(("LoRAs or container", d["better"]))
    firsts = [point for point in d["curve"] if 0 < point["loras"] < len(d["loras"])]
    if firsts:
        told = ", ".join(f"{p['loras']}: {percent(p['residual_share'])} ({mib(p['bytes'])})" for p in firsts)
        rows.append(("Missed with the first LoRAs only", told))
    rows.append(("Of the whole change outside the LoRAs' layers", f"{percent(d['rest_share'])} (squared)"))
    rest = {model: part["rest_error"] for model, part in d["by_model"].items() if part["rest_error"] is not None}
    if any(error < _AS_MEAN for error in rest.values()):  # a mean misses all of what is told apart, always
        told = ", ".join(f"{model} {percent(error)}" for model, error in rest.items())
        rows.append(("Relative error of norms, biases and embeddings", told))
    if d["te_multipliers"] is not None:
        rows.append(("Multipliers", "text encoders have their own, the first of a prompt's two numbers"))
    if d["recipe"]:
        rows.append(("Recipe", d["recipe"]))
    if d["resumed"]:
        rows.append(("Resumed", "what an interrupted run had computed was used again"))
    took = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in d["steps"].items())
    return [*rows, ("Time", took)] if took else rows


def loss_trace(loss: list[float]) -> str:
    """First and last value, and how many iterations lie between."""
    if not loss:
        return "no iterations"
    if len(loss) == 1:
        return f"{percent(loss[0])} missed"
    return f"{percent(loss[0])} … {percent(loss[-1])} missed after {len(loss)} iterations"


def alternatives(items: list[dict[str, Any]]) -> str:
    """The best first."""
    ordered = sorted(items, key=lambda item: item["residual_share"])
    return ", ".join(f"{KINDS.get(item['kind'], item['name'])} {percent(item['residual_share'])}" for item in ordered)


def fit_text(report: Report) -> list[str]:
    """The lines of a finished fit."""
    lines = [f"{report.details['architecture']}: {fit_headline(report)}"]
    return lines + [f"  {name}: {value}" for name, value in fit_describe(report)]


def fit_headline(report: Report) -> str:
    """How near it comes."""
    d = report.details
    return f"of {d['model']}, {d['hyper']} and its LoRAs miss {percent(report.relative_error or 0)} of the change."


def fit_describe(report: Report) -> list[tuple[str, str]]:
    """What else there is to say of it; for the terminal and the page alike."""
    d = report.details
    rows = []
    for lora in d["loras"]:
        number, te = d["multipliers"][lora["name"]], d["te_multipliers"]
        told = f"{number:.4f}" if te is None else f"{number:.4f}, in text encoders {te[lora['name']]:.4f}"
        told += f"; {lora['modules']} modules ({counts(lora['families'])})"
        rows.append(
            (f"Multiplier of {lora['name']}", told + (f", {lora['unmatched']} of no use" if lora["unmatched"] else ""))
        )
    for component, part in d["components"].items():
        told = (
            f"{percent(part['relative_error'])}, where {percent(part['share_of_change'])} of the change (squared) lies"
        )
        if part["blocks"]:
            worst = max(part["blocks"], key=lambda block: part["blocks"][block])
            told += f"; worst block {worst} ({percent(part['blocks'][worst])})"
        rows.append((f"Error in {component}", told))
    rows.append(("Of the whole change outside the LoRAs' layers", f"{percent(d['rest_share'])} (squared)"))
    if d["as_in_recipe"]:
        rows.append(("Multipliers", "text encoders have their own, as in the recipe"))
    if not d["prompt"]:
        rows.append(("Prompt", "none: the hyper-model alone"))
    return rows


def restore_text(report: Report) -> list[str]:
    """The lines of a finished restoration."""
    d = report.details
    lines = [f"{d['architecture']}: {restore_headline(report)}"]
    return lines + [f"  {name}: {value}" for name, value in restore_describe(report)]


def restore_headline(report: Report) -> str:
    """What it is of."""
    d = report.details
    what = d["model"] or "a blend"
    return f"{what} as {'one LoRA' if d['kind'] == 'lora' else 'a checkpoint'}, from {d['hyper'] or d['container']}."


def restore_describe(report: Report) -> list[tuple[str, str]]:
    """What else there is to say of it; for the terminal and the page alike."""
    d = report.details
    te = d["te_multipliers"]
    rows = [
        (
            f"{'Share of' if d['container'] else 'LoRA'} {name}",
            f"{weight:g}" + ("" if te is None else f", in text encoders {te[name]:g}"),
        )
        for name, weight in d["multipliers"].items()
    ]
    if d["remainder"]:
        rows.append(("Remainder", d["remainder"]))
    if d["expected_error"] is not None:
        rows.append(("Missed of the original's change", percent(d["expected_error"])))
    rows.append(("Modules by component", counts(d["components"])))
    if d["kind"] == "lora":
        rows.append(("Modules by rank", ", ".join(f"{count} of {rank}" for rank, count in d["ranks"].items())))
        rows.append(("Lost by rank and rounding", percent(report.relative_error or 0)))
    return rows

"""A combination in words: how alike the LoRAs are, what became of them, how exactly, and what was left out."""

from __future__ import annotations

from itertools import islice
from typing import Any

from .jobs.report import Report
from .words import counts, percent

_SHOWN = 6  # pairs and blocks


def text(report: Report) -> list[str]:
    """The lines of a finished combination, or of its preview."""
    d = report.details
    head = ["preview: nothing was written"] if d["preview"] else []
    return [*head, *(f"{name}: {value}" for name, value in (*alike(d), *describe(report)))]


def alike(d: dict[str, Any]) -> list[tuple[str, str]]:
    """What there is to know before combining: cosines and overlaps of every two, and what their sum keeps."""
    own, names = d["alike"], [lora["name"] for lora in d["loras"]]
    rows = []
    for i, j in islice(own["pairs"], _SHOWN):
        cosine, overlap = own["cosine"][i][j], own["overlap"][i][j]
        told = _unlike(own, names, i, j) or f"cosine {_two(cosine)}"
        told += "" if overlap is None else f", overlap of directions {percent(overlap)}"
        rows.append((f"{names[i]} and {names[j]}", told + _extremes(own, own["pairs"].index([i, j]))))
    more = len(own["pairs"]) - _SHOWN
    if more > 0:
        rows.append(("further pairs", str(more)))
    if own["kept"] is not None and len(names) > 1:
        rows.append(("squared change of their sum", f"{percent(own['kept'])} of what they have one by one: "
                     f"{_meaning(own['kept'])}"))  # fmt: skip
    return rows


def _unlike(own: dict[str, Any], names: list[str], i: int, j: int) -> str:
    """Why there is no cosine of two; "" where there is one."""
    idle = [k for k in (i, j) if own["cosine"][k][k] is None]
    if not idle:
        return "" if own["common"][i][j] else "have no layer in common"
    told = ("all changes of {} are zero", "{} changes no matrix at these weights")
    return ", ".join(told[not own["common"][k][k]].format(names[k]) for k in idle)


def _extremes(own: dict[str, Any], pair: int) -> str:
    """The blocks in which two are least and most alike."""
    found = [
        (block["cosine"][pair], f"{component} {name}")
        for component, blocks in own["by_block"].items()
        for name, block in blocks.items()
        if block["cosine"][pair] is not None
    ]
    if len(found) < 2:
        return ""
    least, most = min(found), max(found)
    return f" (by block {_two(least[0])} in {least[1]} to {_two(most[0])} in {most[1]})"


def _meaning(kept: float) -> str:
    if kept < 0.9:
        return "they cancel each other in part"
    return "they strengthen each other" if kept > 1.1 else "they do not disturb each other"


def _two(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}"


def describe(report: Report) -> list[tuple[str, str]]:
    """What else there is to say of it; for the terminal and the page alike."""
    d = report.details
    rows = [("model", d["architecture"]), ("method", d["advice"])]
    rows += [(f"LoRA {lora['name']}", lora_text(lora)) for lora in d["loras"]]
    rows.append(("layers", f"{report.modules} ({counts(d['made'])})"))
    if d["ranks"]:
        ranks = sorted(map(int, d["ranks"]))
        rows.append(("ranks", " … ".join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))))
    if report.relative_error is not None:
        cut = f" and cutting to {d['cut']}" if d["cut"] else ""
        rows.append(("relative error", f"{percent(report.relative_error)}, by rounding{cut}"))
    for component, part in d["components"].items():
        worst, block = max(part["blocks"].items(), key=lambda item: item[1]["relative_error"])
        where = f"{percent(part['share_of_change'])} of the change (squared) lies"
        rows.append((f"error in {component}", f"{percent(part['relative_error'])}, where {where}; worst block {worst} "
                     f"({percent(block['relative_error'])})"))  # fmt: skip
    if d["skipped_because"]:
        rows.append(("modules left out", counts(d["skipped_because"])))
    if d["unmatched_keys"]:
        shown = ", ".join(d["unmatched_keys"][:_SHOWN])
        rows.append(("in no layer", f"{report.unreachable}, such as {shown}"))
    if d["embeddings"]:
        rows.append(("tensors of bundled embeddings", str(d["embeddings"])))
    return rows


def lora_text(lora: dict[str, Any]) -> str:
    """Its weights and what is in it."""
    weight = f"weight {lora['weight']:g}"
    if lora["te_weight"] != lora["weight"]:
        weight += f", {lora['te_weight']:g} in text encoders"
    weight += f", blocks {lora['blocks']}" if lora["blocks"] else ""
    weight += f", {lora['dyn']} directions" if lora["dyn"] is not None else ""
    unmatched = f", {lora['unmatched']} in no layer" if lora["unmatched"] else ""
    return f"{weight}; {lora['modules']} modules ({counts(lora['families'])}), written as {lora['dialect']}{unmatched}"

"""A transfer in words: how alike the bases are, what was carried over and how, and how much arrived."""

from __future__ import annotations

from typing import Any

from .jobs.report import Report
from .words import counts, percent, two_digits

METHODS = {
    "copy": "copying", "lora-x": "projection on the target's leading directions (LoRA-X)",
    "prolora": "leading directions to leading directions, the rest to the rest (ProLoRA)",
    "cross": "projection, and direction by direction where sizes differ (Cross-LoRA)",
}  # fmt: skip
_SHOWN = 4


def text(report: Report) -> list[str]:
    """The lines of a finished transfer or of its preview."""
    head = ["preview: nothing was written"] if report.details["preview"] else []
    failed = [f"{one['name']}: {one['error']['what']} {one['error']['hint']}".rstrip()
              for one in report.details["failed"]]  # fmt: skip
    return [*head, honest(report), *(f"{name}: {value}" for name, value in describe(report)), *failed]


def honest(report: Report) -> str:
    """What the similarity means, and what can be hoped for."""
    d = report.details
    if d["similarity"] is None:
        return "Transfer works between related models; nothing tells whether these are."
    near = [lora["apart"] for lora in d["loras"] if lora["apart"] is not None]
    alike = d["method"] != "copy" and near and max(near) < 0.05
    return (
        f"Transfer works between related models. These have a similarity Φ of {two_digits(d['similarity'])} "
        "(1: the same leading directions, 0: those of strangers)."
        + (" So near, copying would do the same." if alike else "")
    )


def describe(report: Report) -> list[tuple[str, str]]:
    """What there is to say of it; for the terminal and the page alike."""
    d = report.details
    rows = [
        ("bases", f"{d['source']} → {d['target']} ({d['architecture']})"),
        ("method", METHODS[d["method"]]),
        ("layers compared", f"{d['layers_compared']}, of which {d['layers_equal']} are the same numbers in both"),
        ("paired by", ", ".join(f"{how} ({count})" for how, count in d["paired"].items())),
    ]
    if d["method"] != "copy":
        rows.insert(2, ("leading directions", f"those with {percent(d['basis_energy'])} of a weight's energy"))
    rows += [(f"blocks of {choice['list']}", pairs(choice)) for choice in d["choices"]]
    for component, part in d["components"].items():
        rows.append((f"similarity in {component}", _similarity(part)))
    for lora in d["loras"]:
        rows.append((lora["name"], of_lora(lora)))
    return rows


def pairs(choice: dict[str, Any]) -> str:
    """As in "0←0, 1←4, 2←9, of 10"."""
    told = ", ".join(f"{p['target']}←{'none' if p['source'] is None else p['source']}" for p in choice["pairs"])
    return f"{told}; of {choice['source_blocks']}, by {choice['how']}"


def of_lora(lora: dict[str, Any]) -> str:
    """What was copied, projected, mapped and left out, and how much arrived."""
    parts = [counts(lora["actions"])]
    if lora["skipped_because"]:
        parts.append(f"left out: {counts(lora['skipped_because'])}")
    if lora["retained"] is not None:
        parts.append(f"energy retained in what was carried over {percent(lora['retained'])}, of all "
                     f"{percent(lora['arrived'] or 0)}")  # fmt: skip
    if lora["apart"] is not None and lora["apart"] > 0:
        parts.append(f"{percent(lora['apart'])} away from a copy (norm)")
    if lora["relative_error"]:
        cost = percent(lora["relative_error"])
        parts.append(f"rank and rounding cost {cost} of the change that was carried over (norm)")
    return "; ".join(parts)


def _similarity(part: dict[str, Any]) -> str:
    if part["similarity"] is None:
        return "unknown: sizes differ"
    known = {name: block["similarity"] for name, block in part["blocks"].items() if block["similarity"] is not None}
    lowest = sorted(known.items(), key=lambda item: item[1])[:_SHOWN]
    worst = ", ".join(f"{block} {two_digits(value)}" for block, value in lowest)
    least = two_digits(part["least"])
    of = "" if part["compared"] == part["layers"] else f" of {part['layers']}"
    return f"{two_digits(part['similarity'])} in {part['compared']}{of} layers, least {least}; lowest blocks {worst}"

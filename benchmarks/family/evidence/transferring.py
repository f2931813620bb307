"""Transfer: to a base of another seed, which is no relative, and to a fine-tune of the same base."""

from __future__ import annotations

from pathlib import Path

from ..members import BASE, SECOND
from .extraction import first_seed, lora
from .sheets import save_sheet
from .study import Study
from .tables import percent, table

RANK = 16
METHODS = ("copy", "lora-x", "prolora", "cross")
# LoRA, the base it goes to, the manner that its pictures should have there.
CASES = (
    ("ink", SECOND, "ink"),
    ("night", SECOND, "night"),
    ("night", "stripes", "night-stripes"),
    ("ink", "night", "ink-night"),
)


def answer(study: Study, pictures: Path) -> dict[str, str]:
    rows, sheet, likes = [], [], []
    for name, target, manner in CASES:
        source = lora(study, name, f"r{RANK}", rank=RANK)[0]
        title = f"{name} to {target}"
        alone = study.compare(study.original(target), target, manner)
        rows.append([title, "nothing", "", str(alone.manner), str(alone.asked)])
        sheet.append((f"{target}\nalone", first_seed(study, study.original(target), target)))
        for method in METHODS:
            out = study.made(f"{name}-to-{target}-{method}")
            report = study.run(
                "transfer", loras=[source], source_base=study.original(BASE), target_base=study.original(target),
                out=out, method=method, force=True,
            )  # fmt: skip
            model = study.merged(study.original(target), [(out, 1.0)], f"{out.stem}-applied")
            study.forget(model)
            found = study.compare(model, target, manner)
            likes.append(report.details)
            rows.append([title, method, _similarity(report.details), str(found.manner), str(found.asked)])
            if method in ("copy", "prolora"):
                sheet.append((f"{name} to {target}\n{method}", first_seed(study, model, target)))
    save_sheet(pictures / "transfer.png", sheet, label=190)
    return {"transfer": table(["LoRA", "method", "similarity Φ %", "in the LoRA's manner too %", "as asked %"], rows)}


def _similarity(details: dict) -> str:
    return (
        percent(details["similarity"]["mean"])
        if isinstance(details.get("similarity"), dict)
        else percent(details.get("similarity"))
    )

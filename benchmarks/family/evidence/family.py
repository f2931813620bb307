"""Who the family are: what each draws, how far its weights and pictures are from the base's."""

from __future__ import annotations

from pathlib import Path

import torch

from ..members import BASE, EVERY, SECOND
from .sheets import save_sheet
from .study import PROMPTS, SEEDS, Study, captions_of, member_of
from .tables import LIKENESS, likeness, percent, table
from .weights import change

ABOUT = {
    BASE: "trained from nothing on plain shapes",
    SECOND: "the same, from another seed, with a text encoder of its own",
}


def answer(study: Study, pictures: Path) -> dict[str, str]:
    rows, sheet = [], []
    for name in [BASE, SECOND, *(member.name for member in EVERY)]:
        member = member_of(name)
        parent = member.parent if member else BASE
        own = study.compare(study.original(name), name)
        as_base = study.compare(study.original(parent), name) if name != BASE else None
        away = change(study.original(parent), study.original(name)) if name != BASE else None
        rows.append([
            name, member.about if member else ABOUT[name], percent(away), str(own.asked), str(own.manner),
            str(as_base.pixels) if as_base else "", str(as_base.same) if as_base else "",
        ])  # fmt: skip
        shown = study.draw(study.original(name), name).pictures.unflatten(0, (len(PROMPTS), len(SEEDS)))
        sheet.append((name, shown[:, 0]))
    heads = [caption.replace(" on ", "\non ").replace("a ", "", 1) for caption in captions_of(BASE)[:: len(SEEDS)]]
    save_sheet(pictures / "family.png", sheet, heads)
    heads = [
        "model",
        "what it is",
        "change of the weights %",
        "as asked %",
        "in its manner %",
        "its parent's pictures: pixels %",
        "judged the same %",
    ]
    return {"family": table(heads, rows)}


__all__ = ["LIKENESS", "answer", "likeness", "torch"]

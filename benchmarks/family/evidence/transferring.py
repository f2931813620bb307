"""Transfer: to a base of another seed, which is no relative, and between a base and its fine-tunes, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lib_hypermerge.errors import LayoutError

from ..jobs import run
from ..members import BASE, SECOND
from .extraction import lora
from .sheets import save_sheet
from .study import Study
from .tables import percent, table

RANK = 16
METHODS = ("copy", "lora-x", "prolora", "cross")
# The LoRA is the difference of the first two; the base that it goes to; the model that it should make of that, or
# only the manner in which that should draw then.
CASES = (
    (BASE, "ink", SECOND, None, "ink"),
    (BASE, "night", SECOND, None, "night"),
    (BASE, "night", "stripes", "night-stripes", "night-stripes"),
    (BASE, "ink", "night", "ink-night", "ink-night"),
    ("night", "ink-night", BASE, "ink", "ink"),
    ("stripes", "night-stripes", BASE, "night", "night"),
)


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    rows, sheet = [], []
    for source, tuned, target, like, manner in CASES:
        made = lora(study, tuned, f"from-{source}-r{RANK}", study.original(source), rank=RANK)
        title = f"{tuned} − {source}, to {target}"
        reference = study.original(like) if like else None
        alone = study.compare(study.original(target), target, reference, manner)
        rows.append([title, "nothing", "", "", str(alone.manner), str(alone.asked), str(alone.pixels) if like else ""])
        sheet.append((f"{target}\nalone", study.first_seed(study.original(target), target)))
        for method in METHODS:
            out = study.made(f"{made.stem}-to-{target}-{method}")
            given = {"loras": [made], "source_base": study.original(source), "target_base": study.original(target)}
            refused = "no"
            try:
                report = run("transfer", out=out, method=method, **given)
            except LayoutError:  # of unrelated models
                refused = "yes"
                report = run("transfer", out=out, method=method, force=True, **given)
            model = study.applied(study.original(target), out)
            found = study.compare(model, target, reference, manner)
            told = [title, method, percent(report.details["similarity"]), refused]
            rows.append([*told, str(found.manner), str(found.asked), str(found.pixels) if like else ""])
            if method in ("copy", "prolora"):
                sheet.append((f"{tuned} − {source}\nto {target}, {method}", study.first_seed(model, target)))
    save_sheet(pictures / "transfer.png", sheet, label=200)
    heads = (
        "LoRA", "method", "similarity Φ %", "refused unless forced", "in the manner it should have %", "as asked %",
        "pixels % to what it should be",
    )  # fmt: skip
    yield "transfer", table(heads, rows)

"""Two styles at once: LoRAs combined, checkpoints merged by hand, a hyper-model; against a model trained on both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..jobs import run
from ..members import BASE
from .extraction import lora
from .hypermerge import JOINT, ORDER, RANKS, WAYS, Merge
from .sheets import save_sheet
from .study import Likeness, Study, average
from .tables import table
from .weights import weighted_sum

PAIRS = {"ink-night": ("ink", "night"), "night-stripes": ("stripes", "night")}
RANK = 16
METHODS: dict[str, dict[str, Any]] = {
    "linear": {},
    "TIES": {"method": "ties"},
    "DARE, three seeds": {"method": "dare"},
    "KnOTS": {"method": "knots"},
    "TSV": {"method": "tsv"},
    "Iso-C": {"method": "iso-c"},
    "SVD-aligned": {"method": "aligned"},
}
# Of each LoRA: where a method averages or dampens, 2 undoes that.
WEIGHTS = {"linear": (0.7, 1.0), "Iso-C": (1.0, 1.4, 2.0), "SVD-aligned": (1.0, 1.4, 2.0)}
USUAL_WEIGHTS = (1.0, 1.4)
SHOWN = (
    "trained on both", "palette alone", "linear, 1", "linear, 0.7", "TIES, 1.4", "KnOTS, 1.4", "TSV, 1", "Iso-C, 1",
    "checkpoints averaged", "hyper-model",
)  # fmt: skip


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    rows: dict[str, list[str]] = {}
    sheet = []
    # neither model that is asked for is among those that were merged
    joint = Merge(study, "combining", [n for n in ORDER if n not in PAIRS], RANKS, **WAYS[JOINT])
    for target, parts in PAIRS.items():
        loras = [lora(study, name, f"r{RANK}", rank=RANK) for name in parts]
        shown = {}
        found: dict[str, Likeness] = {}
        titles = ("trained on both", "the base", "style or texture alone", "palette alone")
        for title, name in zip(titles, (target, BASE, *parts), strict=True):
            shown[title] = study.original(name)
            found[title] = study.compare(shown[title], target)
        for title, params in METHODS.items():
            for weight in WEIGHTS.get(title, USUAL_WEIGHTS):
                label = f"{title}, {weight:g}"
                likes = []
                for seed in (0, 1, 2) if "DARE" in title else (0,):
                    file = _combined(
                        study, f"{target}-{title}-{weight}-{seed}", loras, weight, {**params, "seed": seed}
                    )
                    likes.append(study.compare(file, target))
                    shown[label] = file
                found[label] = average(likes)
        for title, file in _by_hand(study, target, parts, joint).items():
            found[title], shown[title] = study.compare(file, target), file
        for title, likeness in found.items():
            cells = [str(likeness.manner), str(likeness.asked), str(likeness.pixels), str(likeness.features)]
            rows.setdefault(title, [title]).extend(cells)
        sheet += [(f"{target}\n{title}", study.first_seed(shown[title], target)) for title in SHOWN]
    save_sheet(pictures / "combine.png", sheet, label=180)
    whats = ("both manners %", "as asked %", "pixels %", "features %")
    yield "combine", table(["", *(f"{target}: {what}" for target in PAIRS for what in whats)], rows.values())


def _combined(study: Study, label: str, loras: list[Path], weight: float, params: dict[str, Any]) -> Path:
    out = study.made(label.replace(" ", "-").replace(",", ""))
    run("combine", loras=[{"lora": file, "weight": weight} for file in loras], out=out, **params)
    return study.applied(study.original(BASE), out)


def _by_hand(study: Study, target: str, parts: tuple[str, ...], joint: Merge) -> dict[str, Path]:
    """What checkpoint mergers do, and multipliers of a hyper-model, as a prompt would have them."""
    first, second = (study.original(name) for name in parts)
    whole = {first: 1.0, second: 1.0, study.original(BASE): -1.0}
    return {
        "checkpoints averaged": study.new(weighted_sum({first: 0.5, second: 0.5}, study.made(f"{target}-half"))),
        "difference added": study.new(weighted_sum(whole, study.made(f"{target}-added"))),
        "hyper-model": joint.blend(joint.added(parts), f"{target}-hyper"),
    }

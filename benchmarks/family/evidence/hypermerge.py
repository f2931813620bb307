"""Hyper-merge: its ways at equal bytes, what a budget carries, a model left out, an outlier among the models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..members import BASE, LEFT_OUT
from .extraction import first_seed
from .sheets import save_sheet
from .study import OUTLIER, RELATED, Likeness, Study, average
from .tables import LIKENESS, likeness, mib, percent, table
from .weights import weighted_sum

BUDGET = 2.0  # MiB of LoRAs or container for nine models of 11 MiB of U-Net each
COUNTS = (2, 3, 5, 7, 9)
BUDGETS = (0.5, 1.0, 2.0, 4.0, 8.0)
# In this order they come into "how many models": the unlike first, then what is made of them.
ORDER = ("ink", "night", "stripes", "soft", "pair", "ink-night", "contour", "round", "turned")
MEAN = "mean"


def answer(study: Study, pictures: Path) -> dict[str, str]:
    assert set(ORDER) == set(RELATED)
    weighted_sum({study.original(name): 1 / len(ORDER) for name in ORDER}, study.made(MEAN))
    return {
        "hyper-ways": _ways(study, pictures),
        "hyper-models": _models(study),
        "hyper-budget": _budgets(study),
        "hyper-how-many": _how_many(study),
        "hyper-left-out": _left_out(study),
        "hyper-outlier": _outlier(study),
    }


class Merge:
    """One hyper-merge and the checkpoints that it gives back."""

    def __init__(self, study: Study, label: str, names: tuple[str, ...] = ORDER, **params: Any):
        self.study, self.label, self.names = study, label, names
        self.folder = study.work / f"hyper-{label}"
        self.report = study.run(
            "hyper", models=[study.original(name) for name in names], name=label, out_dir=self.folder, **params
        )
        self.bytes = sum(
            file.stat().st_size for file in self.folder.iterdir()
            if file.stem != label and file.suffix in (".safetensors", ".hypermerge")
        )  # fmt: skip

    @property
    def errors(self) -> dict[str, float]:
        d = self.report.details
        return d["models"] if d["loras"] else d["container"]["models"]

    def restore(self, name: str) -> Path:
        out = self.study.made(f"hyper-{self.label}-{name}")
        start = {} if self.report.details["hyper"] is None else {"hyper": self.folder / f"{self.label}.safetensors"}
        self.study.run("restore", model=name, out=out, **start)
        self.study.forget(out)
        return out

    def likeness(self, names: tuple[str, ...] | None = None) -> list[Likeness]:
        return [self.study.compare(self.restore(name), name) for name in names or self.names]


def _yardsticks(study: Study) -> list[list[str]]:
    rows = []
    for title, file in (("the base", study.original(BASE)), ("the plain average", study.made(MEAN))):
        rows.append([title, "0", "", *likeness(average([study.compare(file, name) for name in ORDER]))])
    return rows


def _own(study: Study, size: float, base: Path, label: str) -> list[str]:
    """A LoRA of its own for each model, the ranks allotted; the files of all together have the size."""
    found, errors, total = [], [], 0
    for name in ORDER:
        out = study.made(f"own-{label}-{name}")
        report = study.run(
            "extract", base=base, tuned=study.original(name), out=out, rank_rule="size", rank_target=size / len(ORDER)
        )
        model = study.merged(base, [(out, 1.0)], f"own-{label}-{name}-applied")
        found.append(study.compare(model, name))
        errors.append(report.relative_error or 0.0)
        total += out.stat().st_size
    return [mib(total), percent(sum(errors) / len(errors)), *likeness(average(found))]


FORMS: dict[str, dict[str, Any]] = {"joint": {"allocation": "layers"}, "container": {"form": "container"}}
WAYS: dict[str, dict[str, Any]] = {
    "joint, uniform ranks": {"size": BUDGET},
    "joint, ranks of the layers": {"size": BUDGET, "allocation": "layers"},
    "greedy": {"size": BUDGET, "solver": "greedy"},
    "directions": {"size": BUDGET, "solver": "directions"},
    "joint, every layer by its size": {"size": BUDGET, "layer_weights": "relative"},
    "joint, with norms and biases": {"size": BUDGET, "remainders": "all"},
    "container": {"size": BUDGET, "form": "container"},
}


def _ways(study: Study, pictures: Path) -> str:
    rows = _yardsticks(study)
    sheets = {}
    for number, (title, params) in enumerate(WAYS.items()):
        merge = Merge(study, f"way{number}", **params)
        found = merge.likeness()
        mean = sum(merge.errors.values()) / len(merge.errors)
        rows.append([title, mib(merge.bytes), percent(mean), *likeness(average(found))])
        sheets[title] = merge
    rows.append(["own LoRAs from the base", *_own(study, BUDGET, study.original(BASE), "base")])
    rows.append(["own LoRAs from the average", *_own(study, BUDGET, study.made(MEAN), "mean")])
    sheet = []
    for name in ORDER:
        sheet.append((f"{name}\nthe fine-tune", first_seed(study, study.original(name), name)))
        sheet.append(("hyper-model and\nshared LoRAs", first_seed(study, study.made(f"hyper-way1-{name}"), name)))
        sheet.append(("container", first_seed(study, study.made(f"hyper-way6-{name}"), name)))
    save_sheet(pictures / "hyper.png", sheet)
    return table(["", "MiB", "missed %", *LIKENESS], rows)


def _models(study: Study) -> str:
    """Per model, of the ways that are the defaults."""
    rows = []
    for name in ORDER:
        row = [name]
        for file in (
            study.made(MEAN),
            study.made(f"hyper-way1-{name}"),
            study.made(f"hyper-way6-{name}"),
            study.made(f"own-base-{name}-applied"),
        ):
            found = study.compare(file, name)
            row += [str(found.pixels), str(found.same)]
        rows.append(row)
    ways = ("average", "joint, layers", "container", "own LoRA")
    return table(["model", *(f"{way}: {what}" for way in ways for what in ("pixels %", "same %"))], rows)


def _budgets(study: Study) -> str:
    rows = []
    for budget in BUDGETS:
        for title, params in FORMS.items():
            merge = Merge(study, f"budget-{title}-{budget}", size=budget, **params)
            mean = sum(merge.errors.values()) / len(merge.errors)
            rows.append(
                [f"{budget:g} MiB, {title}", mib(merge.bytes), percent(mean), *likeness(average(merge.likeness()))]
            )
    return table(["", "MiB", "missed %", *LIKENESS], rows)


def _how_many(study: Study) -> str:
    """The same bytes for more and more models; the pictures are those of the first two, which are always there."""
    rows = []
    for count in COUNTS:
        row = [str(count)]
        for title, params in FORMS.items():
            merge = Merge(study, f"of-{count}-{title}", ORDER[:count], size=BUDGET / 2, **params)
            found = average(merge.likeness(ORDER[:2]))
            mean = sum(merge.errors.values()) / count
            row += [percent(mean), str(found.pixels), str(found.same)]
        rows.append(row)
    heads = [f"{way}: {what}" for way in ("joint", "container") for what in ("missed %", "pixels %", "same %")]
    return table(["models", *heads], rows)


def _left_out(study: Study) -> str:
    """A model that no LoRA was made for, by multipliers fitted to it; beside it the members alone."""
    target = LEFT_OUT.name
    merge = Merge(study, "way1", **WAYS["joint, ranks of the layers"])
    hyper = merge.folder / "way1.safetensors"
    report = study.run("fit", hyper=hyper, model=study.original(target))
    numbers = report.details["multipliers"]
    out = study.made("left-out-fitted")
    study.run("restore", hyper=hyper, multipliers=",".join(f"{k}={v}" for k, v in numbers.items()), out=out)
    study.forget(out)
    rows = [["fitted multipliers", percent(report.relative_error), *likeness(study.compare(out, target))]]
    # by hand: the multipliers of stripes and of night together, less those of neither
    recipe = json.loads(next(merge.folder.glob("*.json")).read_text(encoding="utf-8"))
    by_model = merge.report.details["multipliers"]
    both = {lora: by_model["stripes"][lora] + by_model["night"][lora] - by_model["turned"][lora] for lora in numbers}
    study.run(
        "restore",
        hyper=hyper,
        multipliers=",".join(f"{k}={v}" for k, v in both.items()),
        out=study.made("left-out-added"),
    )
    study.forget(study.made("left-out-added"))
    rows.append(
        ["those of stripes and of night, added", "", *likeness(study.compare(study.made("left-out-added"), target))]
    )
    for title, file in (
        ("the average", study.made(MEAN)), ("the base", study.original(BASE)), ("stripes", study.original("stripes")),
        ("night", study.original("night")),
    ):  # fmt: skip
        rows.append([title, "", *likeness(study.compare(file, target))])
    assert recipe
    return table(["", "missed %", *LIKENESS], rows)


def _outlier(study: Study) -> str:
    rows = []
    for title, names in (("without the outlier", ORDER), ("with it", (*ORDER, OUTLIER))):
        merge = Merge(study, f"outlier-{len(names)}", names, size=BUDGET, allocation="layers")
        errors = [merge.errors[name] for name in ORDER]
        own = (
            [percent(merge.errors[OUTLIER]), str(merge.likeness((OUTLIER,))[0].same)] if OUTLIER in names else ["", ""]
        )
        rows.append([title, percent(sum(errors) / len(errors)), *likeness(average(merge.likeness(ORDER))), *own])
    return table(["", "missed % of the nine", *LIKENESS, "the outlier: missed %", "judged the same %"], rows)

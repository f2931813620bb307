"""Hyper-merge: its ways at equal bytes, what a budget carries, a model left out, an outlier among the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib_hypermerge.jobs.report import Report

from ..members import BASE, LEFT_OUT
from .sheets import save_sheet
from .study import OUTLIER, RELATED, Likeness, Study, at_size, average, numbers_of
from .tables import LIKENESS, likeness, mib, percent, table
from .weights import weighted_sum

BUDGET = 8.0  # MiB of numbers for nine models; whole, their U-Nets and text encoders have fifteen each
BUDGETS = (2.0, 4.0, 16.0)  # besides
COUNTS = (2, 4, 6, 9)
COUNTED_BUDGETS = (2.0, 8.0)
# In this order they come into "how many models": the unlike first, then what is made of them.
ORDER = ("ink", "night", "stripes", "soft", "pair", "ink-night", "contour", "round", "turned")
FORMS: dict[str, dict[str, Any]] = {
    "LoRAs, ranks of the layers": {"allocation": "layers"}, "container": {"form": "container"},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "joint": {},
    "joint, ranks of the layers": FORMS["LoRAs, ranks of the layers"],
    "joint, every layer by its size": {"layer_weights": "relative"},
    "joint, norms and biases beside": {"remainders": "all"},
    "greedy, as published": {"solver": "greedy"},
    "directions": {"solver": "directions"},
    "container": FORMS["container"],
}


def answer(study: Study, pictures: Path) -> dict[str, str]:
    assert set(ORDER) == set(RELATED)
    layers = Merge(study, "layers", ORDER, BUDGET, **WAYS["joint, ranks of the layers"])
    return {
        "hyper-ways": _ways(study, pictures),
        "hyper-budget": _budgets(study),
        "hyper-how-many": _how_many(study),
        "hyper-left-out": _left_out(study, layers),
        "hyper-outlier": _outlier(study, layers),
    }


class Merge:
    """One hyper-merge whose LoRAs, container and remainders have so many MiB of numbers together."""

    report: Report
    numbers: int  # bytes

    def __init__(self, study: Study, label: str, names: Sequence[str], size: float, **params: Any):
        self.study, self.label, self.names = study, label, tuple(names)
        self.model = study.work / f"hyper-{label}" / f"{label}.safetensors"

        def make(target: float) -> int:
            self.report = study.run(
                "hyper", models=[study.original(name) for name in names], name=label, out_dir=self.model.parent,
                size=target, **params,
            )  # fmt: skip
            written = [Path(output.path) for output in self.report.outputs]
            beside = [file for file in written if file != self.model and file.suffix in (".safetensors", ".hypermerge")]
            self.numbers = sum(map(numbers_of, beside))
            return self.numbers

        at_size(make, size)

    def restore(self, name: str) -> Path:
        out = self.study.made(f"hyper-{self.label}-{name}")
        self.study.run("restore", hyper=self.model, model=name, out=out)
        return self.study.new(out)

    def blend(self, multipliers: dict[str, float], label: str) -> Path:
        out = self.study.made(label)
        told = ",".join(f"{name}={number}" for name, number in multipliers.items())
        self.study.run("restore", hyper=self.model, multipliers=told, out=out)
        return self.study.new(out)

    def both(self, parts: Sequence[str]) -> dict[str, float]:
        """The multipliers of all parts added, less those of the model that is nearest to the base, for all but one."""
        given = self.report.details["multipliers"]
        return {
            lora["name"]: sum(given[part][lora["name"]] for part in parts)
            - (len(parts) - 1) * given["turned"][lora["name"]]
            for lora in self.report.details["loras"]
        }

    def likeness(self, names: Sequence[str] | None = None) -> list[Likeness]:
        return [self.study.compare(self.restore(name), name) for name in names or self.names]


def mean_of(study: Study, names: Sequence[str]) -> Path:
    """Their plain average, kept (it is not deleted when it was compared)."""
    out = study.work / "kept" / f"mean-{len(names)}.safetensors"
    out.parent.mkdir(exist_ok=True)
    return out if out.exists() else weighted_sum({study.original(name): 1 / len(names) for name in names}, out)


def _against(study: Study, file: Path, names: Sequence[str]) -> Likeness:
    return average([study.compare(file, name) for name in names])


def _own(study: Study, base: Path, label: str, names: Sequence[str] = ORDER) -> tuple[int, dict[str, Likeness]]:
    """A LoRA for each model, ranks allotted, all together with the numbers of the budget."""
    found, total = {}, 0
    for name in names:
        out = study.made(f"own-{label}-{name}")

        def make(target: float, name: str = name, out: Path = out) -> int:
            study.run("extract", base=base, tuned=study.original(name), out=out, rank_rule="size", rank_target=target)
            return numbers_of(out)

        at_size(make, BUDGET / len(names))
        total += numbers_of(out)
        found[name] = study.compare(study.applied(base, out), name)
    return total, found


def _ways(study: Study, pictures: Path) -> str:
    mean = mean_of(study, ORDER)
    rows = [
        ["the base", "0", *likeness(_against(study, study.original(BASE), ORDER))],
        ["the plain average", "0", *likeness(_against(study, mean, ORDER))],
    ]
    for number, (title, params) in enumerate(WAYS.items()):
        merge = Merge(study, f"way{number}", ORDER, BUDGET, **params)
        rows.append([title, mib(merge.numbers), *likeness(average(merge.likeness()))])
    for title, base in (("base", study.original(BASE)), ("average", mean)):
        total, found = _own(study, base, title)
        rows.append([f"own LoRAs from the {title}", mib(total), *likeness(average(list(found.values())))])
    ways = list(WAYS)
    shown = {
        "hyper-model and\nshared LoRAs": f"hyper-way{ways.index('joint, ranks of the layers')}",
        "container": f"hyper-way{ways.index('container')}",
    }
    sheet = []
    for name in ORDER:
        sheet.append((f"{name}\nthe fine-tune", study.first_seed(study.original(name), name)))
        sheet += [(title, study.first_seed(study.made(f"{made}-{name}"), name)) for title, made in shown.items()]
    save_sheet(pictures / "hyper.png", sheet)
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _budgets(study: Study) -> str:
    rows = []
    for budget in BUDGETS:
        for title, params in FORMS.items():
            merge = Merge(study, f"of{budget:g}-{title.split(',')[0]}", ORDER, budget, **params)
            count = len(merge.report.details["loras"])
            told = f"{count} {title}" if count else title
            rows.append([told, mib(merge.numbers), *likeness(average(merge.likeness()))])
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _how_many(study: Study) -> str:
    """The same bytes for more and more models. The figures are those of the first two, which are always among them."""
    rows = []
    for count in COUNTS:
        names = ORDER[:count]
        average_of_all = _against(study, mean_of(study, names), ORDER[:2])
        cells = [str(count), percent(average_of_all.missed.mean), str(average_of_all.same)]
        for budget in COUNTED_BUDGETS:
            for title, params in FORMS.items():
                merge = Merge(study, f"first{count}-{budget:g}-{title.split(',')[0]}", names, budget, **params)
                found = average(merge.likeness(ORDER[:2]))
                cells += [percent(found.missed.mean), str(found.same)]
        rows.append(cells)
    ways = ["average", *(f"{title.split(',')[0]} {budget:g} MiB" for budget in COUNTED_BUDGETS for title in FORMS)]
    return table(["models", *(f"{way}: {what}" for way in ways for what in ("missed %", "same %"))], rows)


def _left_out(study: Study, merge: Merge) -> str:
    """A model that no LoRA was made for, by multipliers fitted to it; beside it what else could stand in for it."""
    target = LEFT_OUT.name
    report = study.run("fit", hyper=merge.model, model=study.original(target))
    files = {
        "fitted multipliers": merge.blend(report.details["multipliers"], "left-out-fitted"),
        "those of stripes and of night, added": merge.blend(merge.both(("stripes", "night")), "left-out-added"),
        "the average": mean_of(study, ORDER),
        **{name: study.original(name) for name in ("stripes", "night", BASE)},
    }
    return table(["", *LIKENESS], ([title, *likeness(study.compare(file, target))] for title, file in files.items()))


def _outlier(study: Study, without: Merge) -> str:
    rows = []
    both = (
        ("without the outlier", without),
        ("with it", Merge(study, "outlier", (*ORDER, OUTLIER), BUDGET, **WAYS["joint, ranks of the layers"])),
    )
    for title, merge in both:
        own = ["", ""]
        if OUTLIER in merge.names:
            found = merge.likeness((OUTLIER,))[0]
            own = [percent(found.missed.mean), str(found.same)]
        rows.append([title, *likeness(average(merge.likeness(ORDER))), *own])
    return table(["the nine", *LIKENESS, "the outlier: missed %", "judged the same %"], rows)

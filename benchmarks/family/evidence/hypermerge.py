"""Hyper-merge: its ways at equal bytes, what a budget carries, a model left out, an outlier among the models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_hypermerge.jobs.report import Report

from ..jobs import run
from ..members import BASE, LEFT_OUT
from .extraction import sized
from .sheets import save_sheet
from .study import OUTLIER, RELATED, Likeness, Study, average, numbers_of
from .tables import LIKENESS, likeness, mib, percent, table
from .weights import weighted_sum

# Ranks of the LoRAs, of nine models: 9 MiB of numbers; whole, their U-Nets and text encoders have 135.
RANKS = "10,8,6,6,5,5"
OTHER_RANKS = ("3,3,2,2",)
COUNTS, COUNTED_RANKS = (2, 5, 9), "8,6,6"
# One start and few sweeps instead of three and many: nine models in every way would take hours otherwise.
SOLVER: dict[str, Any] = {"starts": 1, "iterations": 40, "tolerance": 1e-3}
LAYERED = "joint, ranks of the layers"
# In this order they come into "how many models": the unlike first, then what is made of them.
ORDER = ("ink", "night", "stripes", "soft", "pair", "ink-night", "contour", "round", "turned")
FORMS: dict[str, dict[str, Any]] = {
    "LoRAs, ranks of the layers": {"allocation": "layers"}, "container": {"form": "container"},
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    LAYERED: FORMS["LoRAs, ranks of the layers"],
    "container": FORMS["container"],
    "joint": {},
    "greedy, as published": {"solver": "greedy"},
    "directions": {"solver": "directions"},
    "joint, every layer by its size": {"layer_weights": "relative"},
    "joint, norms and biases beside": {"remainders": "all"},
}


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    assert set(ORDER) == set(RELATED)
    merges: dict[str, Merge] = {}
    found: dict[str, list[Likeness]] = {}
    rows = _yardsticks(study)
    for number, (title, params) in enumerate(WAYS.items()):
        merge = merges[title] = Merge(study, f"way{number}", ORDER, RANKS, **params)
        found[title] = merge.likeness()
        rows.append([title, mib(merge.numbers), *likeness(average(found[title]))])
        yield "hyper-ways", table(["", "MiB of numbers", *LIKENESS], rows)  # the whole takes a while
    for title, base in (("base", study.original(BASE)), ("average", mean_of(study, ORDER))):
        total, own = _own(study, base, title, merges[LAYERED].numbers)
        rows.append([f"own LoRAs from the {title}", mib(total), *likeness(average(own))])
    yield "hyper-ways", table(["", "MiB of numbers", *LIKENESS], rows)
    _sheet(study, merges, pictures / "hyper.png")
    yield "hyper-left-out", _left_out(study, merges[LAYERED])
    yield "hyper-outlier", _outlier(study, average(found[LAYERED]))
    yield "hyper-how-many", _how_many(study)
    yield "hyper-budget", _budgets(study)


class Merge:
    """One hyper-merge; numbers: bytes of its LoRAs, container and remainders, without headers."""

    def __init__(self, study: Study, label: str, names: Sequence[str], ranks: str, **params: Any):
        self.study, self.label, self.names = study, label, tuple(names)
        self.model = study.work / f"hyper-{label}" / f"{label}.safetensors"
        self.report: Report = run(
            "hyper", models=[study.original(name) for name in names], name=label, out_dir=self.model.parent,
            ranks=ranks, **SOLVER, **params,
        )  # fmt: skip
        written = [Path(output.path) for output in self.report.outputs]
        self.numbers = sum(
            numbers_of(file) for file in written
            if file != self.model and file.suffix in (".safetensors", ".hypermerge")
        )  # fmt: skip

    def restore(self, name: str) -> Path:
        out = self.study.made(f"hyper-{self.label}-{name}")
        run("restore", hyper=self.model, model=name, out=out)
        return self.study.new(out)

    def blend(self, multipliers: dict[str, float], label: str) -> Path:
        out = self.study.made(label)
        told = ",".join(f"{name}={number}" for name, number in multipliers.items())
        run("restore", hyper=self.model, multipliers=told, out=out)
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


def _own(study: Study, base: Path, label: str, numbers: int) -> tuple[int, list[Likeness]]:
    """A LoRA of its own for each model, ranks allotted, all together with so many bytes of numbers."""
    loras = {name: sized(study, name, f"own-{label}", numbers / len(ORDER) / 2**20, base=base) for name in ORDER}
    found = [study.compare(study.applied(base, file), name) for name, file in loras.items()]
    return sum(map(numbers_of, loras.values())), found


def _yardsticks(study: Study) -> list[list[str]]:
    files = {"the base": study.original(BASE), "the plain average": mean_of(study, ORDER)}
    return [[title, "0", *likeness(_against(study, file, ORDER))] for title, file in files.items()]


def _sheet(study: Study, merges: dict[str, Merge], file: Path) -> None:
    """Every fine-tune, and what hyper-model and shared LoRAs, and a container, draw in its stead."""
    sheet = []
    for name in ORDER:
        sheet.append((f"{name}\nthe fine-tune", study.first_seed(study.original(name), name)))
        for title, way in (("hyper-model and\nshared LoRAs", LAYERED), ("container", "container")):
            sheet.append((title, study.first_seed(study.made(f"hyper-{merges[way].label}-{name}"), name)))
    save_sheet(file, sheet)


def _budgets(study: Study) -> str:
    rows = []
    for number, ranks in enumerate(OTHER_RANKS):
        for title, params in FORMS.items():
            merge = Merge(study, f"of{number}-{title.split(',')[0]}", ORDER, ranks, **params)
            told = f"{title}, {ranks}" if merge.report.details["loras"] else title
            rows.append([told, mib(merge.numbers), *likeness(average(merge.likeness()))])
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _how_many(study: Study) -> str:
    """The same bytes for more and more models. The figures are those of the first two, which are always among them."""
    rows = []
    for count in COUNTS:
        names = ORDER[:count]
        average_of_all = _against(study, mean_of(study, names), ORDER[:2])
        cells = [str(count), percent(average_of_all.missed.mean), str(average_of_all.pixels), str(average_of_all.same)]
        for title, params in FORMS.items():
            merge = Merge(study, f"first{count}-{title.split(',')[0]}", names, COUNTED_RANKS, **params)
            found = average(merge.likeness(ORDER[:2]))
            cells += [mib(merge.numbers), percent(found.missed.mean), str(found.pixels), str(found.same)]
        rows.append(cells)
    whats = ("missed %", "pixels %", "same %")
    heads = [f"average: {what}" for what in whats]
    heads += [f"{title.split(',')[0]}: {what}" for title in FORMS for what in ("MiB", *whats)]
    return table(["models", *heads], rows)


def _left_out(study: Study, merge: Merge) -> str:
    """A model that no LoRA was made for, by multipliers fitted to it; beside it what else could stand in for it."""
    target = LEFT_OUT.name
    report = run("fit", hyper=merge.model, model=study.original(target))
    files = {
        "fitted multipliers": merge.blend(report.details["multipliers"], "left-out-fitted"),
        "those of stripes and of night, added": merge.blend(merge.both(("stripes", "night")), "left-out-added"),
        "the average": mean_of(study, ORDER),
        **{name: study.original(name) for name in ("stripes", "night", BASE)},
    }
    return table(["", *LIKENESS], ([title, *likeness(study.compare(file, target))] for title, file in files.items()))


def _outlier(study: Study, without: Likeness) -> str:
    merge = Merge(study, "outlier", (*ORDER, OUTLIER), RANKS, **WAYS[LAYERED])
    nine, own = average(merge.likeness(ORDER)), merge.likeness((OUTLIER,))[0]
    rows = [
        ["the nine without the outlier", *likeness(without)],
        ["the nine with it", *likeness(nine)],
        ["the outlier", *likeness(own)],
    ]
    return table(["", *LIKENESS], rows)

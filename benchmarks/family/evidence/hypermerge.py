"""Hyper-merge: its ways at equal bytes, what a budget carries, a model left out, an outlier among the models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib_hypermerge.jobs.report import Report

from ..jobs import run
from ..members import BASE, LEFT_OUT
from .extraction import within
from .sheets import save_sheet
from .study import OUTLIER, RELATED, Likeness, Study, average, numbers_of
from .tables import LIKENESS, likeness, mib, percent, table
from .weights import weighted_sum

# Ranks of the LoRAs, of nine models: 9 MiB of numbers; whole, their U-Nets and text encoders have 135.
RANKS = "10,8,6,6,5,5"
OTHER_RANKS = ("3,3,2,2", "20,16,12,12,10,10")
COUNTS, COUNTED_RANKS = (2, 5, 8), "8,6,6"
# One start and few sweeps instead of three and many: nine models in every way would take hours otherwise.
SOLVER: dict[str, Any] = {"starts": 1, "iterations": 40, "tolerance": 1e-3}
JOINT = "joint"
# In this order they come into "how many models": the unlike first, then what is made of them; the last has a text
# encoder of its own, for which LoRAs would grow, and is left out there.
ORDER = ("ink", "night", "stripes", "soft", "pair", "ink-night", "contour", "round", "turned")
FORMS: dict[str, dict[str, Any]] = {"LoRAs": {}, "container": {"form": "container"}}
WAYS: dict[str, dict[str, Any]] = {
    JOINT: FORMS["LoRAs"],
    "container": FORMS["container"],
    "joint, one multiplier for U-Net and text encoder": {"separate_te": False},
    "greedy": {"solver": "greedy"},
    "greedy, one multiplier": {"solver": "greedy", "separate_te": False},
    "directions": {"solver": "directions"},
    "joint, ranks of the layers": {"allocation": "layers"},
    "joint, every layer by its size": {"layer_weights": "relative"},
    "joint, from the base": {"base": BASE},
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
        total, own = _own(study, base, title, merges[JOINT].numbers)
        rows.append([f"a LoRA of its own for each, from the {title}", mib(total), *likeness(average(own))])
    yield "hyper-ways", table(["", "MiB of numbers", *LIKENESS], rows)
    _sheet(study, merges, pictures / "hyper.png")
    yield "hyper-left-out", _left_out(study, merges[JOINT])
    yield "hyper-outlier", _outlier(study, average(found[JOINT]))
    yield "hyper-how-many", _how_many(study)
    yield "hyper-budget", _budgets(study)


Multipliers = dict[str, tuple[float, float]]  # LoRA → in text encoders, in the U-Net


def both(report: Report) -> tuple[dict[str, Any], dict[str, Any]]:
    """Multipliers in the U-Net and in text encoders, which are the same where those have none of their own."""
    unet = report.details["multipliers"]
    return unet, report.details["te_multipliers"] or unet


class Merge:
    """One hyper-merge; numbers: bytes of its LoRAs, container and remainders, without headers."""

    def __init__(self, study: Study, label: str, names: Sequence[str], ranks: str, **params: Any):
        self.study, self.label, self.names = study, label, tuple(names)
        if "base" in params:
            params["base"] = study.original(params["base"])
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

    def blend(self, multipliers: Multipliers, label: str) -> Path:
        out = self.study.made(label)
        told = ",".join(f"{name}={te}:{unet}" for name, (te, unet) in multipliers.items())
        run("restore", hyper=self.model, multipliers=told, out=out)
        return self.study.new(out)

    def added(self, parts: Sequence[str]) -> Multipliers:
        """Those of all parts, less those of the model whose U-Net is the base's for all but one; the text encoder is
        the base's in all parts, and so the multipliers there are the first part's."""
        unet, te = both(self.report)
        more = len(parts) - 1
        return {
            stem: (te[parts[0]][stem], sum(unet[part][stem] for part in parts) - more * unet["turned"][stem])
            for stem in unet[parts[0]]
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
    """A LoRA of its own for each model, of one rank, all together with no more than so many bytes of numbers."""
    sizes, found = [], []
    for name in ORDER:
        file = within(study, name, f"own-{label}", numbers / len(ORDER) / 2**20, base=base)
        sizes.append(numbers_of(file))
        found.append(study.compare(study.applied(base, file), name))
    return sum(sizes), found


def _yardsticks(study: Study) -> list[list[str]]:
    files = {"the base": study.original(BASE), "the plain average": mean_of(study, ORDER)}
    return [[title, "0", *likeness(_against(study, file, ORDER))] for title, file in files.items()]


def _sheet(study: Study, merges: dict[str, Merge], file: Path) -> None:
    """Every fine-tune, and what hyper-model and shared LoRAs, and a container, draw in its stead."""
    sheet = []
    for name in ORDER:
        sheet.append((f"{name}\nthe fine-tune", study.first_seed(study.original(name), name)))
        for title, way in (("hyper-model and\nshared LoRAs", JOINT), ("container", "container")):
            sheet.append((title, study.first_seed(study.made(f"hyper-{merges[way].label}-{name}"), name)))
    save_sheet(file, sheet)


def _budgets(study: Study) -> str:
    rows = []
    for number, ranks in enumerate(OTHER_RANKS):
        for title, params in FORMS.items():
            merge = Merge(study, f"of{number}-{title}", ORDER, ranks, **params)
            told = f"{title}, {ranks}" if merge.report.details["loras"] else title
            rows.append([told, mib(merge.numbers), *likeness(average(merge.likeness()))])
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _how_many(study: Study) -> str:
    """The same bytes for more and more models. The figures are those of the first two, which are always among them."""
    rows = []
    for count in COUNTS:
        names = ORDER[:count]
        average_of_all = _against(study, mean_of(study, names), ORDER[:2])
        cells = [str(count), percent(average_of_all.missed.mean), str(average_of_all.unlike), str(average_of_all.same)]
        for title, params in FORMS.items():
            merge = Merge(study, f"first{count}-{title}", names, COUNTED_RANKS, **params)
            found = average(merge.likeness(ORDER[:2]))
            cells += [mib(merge.numbers), percent(found.missed.mean), str(found.unlike), str(found.same)]
        rows.append(cells)
    whats = ("missed %", "pixels missed %", "same %")
    heads = [f"average: {what}" for what in whats]
    heads += [f"{title}: {what}" for title in FORMS for what in ("MiB", *whats)]
    return table(["models", *heads], rows)


def _left_out(study: Study, merge: Merge) -> str:
    """A model that no LoRA was made for, by multipliers fitted to it; beside it what else could stand in for it."""
    target = LEFT_OUT.name
    unet, te = both(run("fit", hyper=merge.model, model=study.original(target)))
    files = {
        "fitted multipliers": merge.blend({stem: (te[stem], unet[stem]) for stem in unet}, "left-out-fitted"),
        "those of stripes and of night, added": merge.blend(merge.added(("stripes", "night")), "left-out-added"),
        "the average": mean_of(study, ORDER),
        **{name: study.original(name) for name in ("stripes", "night", BASE)},
    }
    return table(["", *LIKENESS], ([title, *likeness(study.compare(file, target))] for title, file in files.items()))


def _outlier(study: Study, without: Likeness) -> str:
    merge = Merge(study, "outlier", (*ORDER, OUTLIER), RANKS, **WAYS[JOINT])
    nine, own = average(merge.likeness(ORDER)), merge.likeness((OUTLIER,))[0]
    rows = [
        ["the nine without the outlier", *likeness(without)],
        ["the nine with it", *likeness(nine)],
        ["the outlier", *likeness(own)],
    ]
    return table(["", *LIKENESS], rows)

"""Two styles at once: LoRAs combined, checkpoints merged by hand, a hyper-model; against a model trained on both."""

from __future__ import annotations

from pathlib import Path

from ..members import BASE
from .extraction import first_seed, lora
from .hypermerge import ORDER, Merge
from .sheets import save_sheet
from .study import Study
from .tables import percent, table
from .weights import weighted_sum

PAIRS = {"ink-night": ("ink", "night"), "night-stripes": ("stripes", "night")}
RANK = 16
METHODS: dict[str, dict[str, object]] = {
    "linear": {},
    "TIES": {"method": "ties"},
    "DARE": {"method": "dare"},
    "DARE and TIES": {"method": "dare-ties"},
    "KnOTS": {"method": "knots"},
    "TSV": {"method": "tsv"},
    "Iso-C": {"method": "iso-c"},
    "SVD-aligned": {"method": "aligned"},
}


def answer(study: Study, pictures: Path) -> dict[str, str]:
    rows: dict[str, list[str]] = {}
    sheet = []
    joint = Merge(
        study, "combining", tuple(name for name in ORDER if name != "ink-night"), size=2.0, allocation="layers"
    )
    for target, parts in PAIRS.items():
        made = [lora(study, name, f"r{RANK}", rank=RANK)[0] for name in parts]
        files: dict[str, Path] = {"trained on both": study.original(target)}
        for title, params in METHODS.items():
            for weight in (1.0, 0.7) if title == "linear" else (1.0,):
                label = f"{title} · {weight:g}" if title == "linear" else title
                out = study.made(f"{target}-{title}-{weight}".replace(" ", "-"))
                study.run("combine", loras=[{"lora": str(file), "weight": weight} for file in made], out=out, **params)
                files[label] = study.merged(study.original(BASE), [(out, 1.0)], f"{out.stem}-applied")
        first, second = (study.original(name) for name in parts)
        files["checkpoints averaged"] = weighted_sum({first: 0.5, second: 0.5}, study.made(f"{target}-half"))
        files["difference added (first + second − base)"] = weighted_sum(
            {first: 1.0, second: 1.0, study.original(BASE): -1.0}, study.made(f"{target}-added")
        )
        files["hyper-model, multipliers added"] = _hyper(study, joint, target, parts)
        for title, file in files.items():
            study.forget(file)
            found = study.compare(file, target)
            rows.setdefault(title, [title]).extend([str(found.manner), str(found.asked), str(found.pixels)])
        shown = (
            "trained on both",
            "linear · 1",
            "TIES",
            "KnOTS",
            "TSV",
            "Iso-C",
            "checkpoints averaged",
            "hyper-model, multipliers added",
        )
        sheet += [
            (f"{target}\n{title}".replace(", ", ",\n"), first_seed(study, files[title], target)) for title in shown
        ]
    save_sheet(pictures / "combine.png", sheet, label=200)
    heads = [f"{target}: {what}" for target in PAIRS for what in ("both manners %", "as asked %", "pixels %")]
    return {"combine": table(["", *heads], rows.values())}


def _hyper(study: Study, merge: Merge, target: str, parts: tuple[str, ...]) -> Path:
    """The multipliers of both models, less those of the one that is nearest to the base."""
    d = merge.report.details
    numbers = {
        name: sum(d["multipliers"][part][name] for part in parts) - d["multipliers"]["turned"][name]
        for name in (entry["name"] for entry in d["loras"])
    }
    out = study.made(f"{target}-hyper")
    study.run(
        "restore", hyper=merge.folder / "combining.safetensors", out=out,
        multipliers=",".join(f"{name}={number}" for name, number in numbers.items()),
    )  # fmt: skip
    return out


__all__ = ["answer", "percent"]

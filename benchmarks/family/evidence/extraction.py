"""Extraction: error and pictures against rank and size, and which variants are worth their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..members import BASE
from .sheets import save_sheet
from .study import OUTLIER, PROMPTS, RELATED, SEEDS, Likeness, Study, average, member_of
from .tables import LIKENESS, likeness, mib, percent, table

RANKS = (1, 2, 4, 8, 16, 32)
DRAWN_RANKS = (1, 2, 4, 8, 16)
TYPICAL = ("ink", "night", "stripes", "ink-night")
SMALL = 4  # the rank at which variants are compared


def answer(study: Study, pictures: Path) -> dict[str, str]:
    return {
        "extract-weights": _weights(study),
        "extract-rank": _by_rank(study, pictures),
        "extract-variants": _variants(study),
    }


def lora(study: Study, name: str, label: str, base: str = BASE, **params: Any) -> tuple[Path, float]:
    """A LoRA of a fine-tune, and what it misses of the change."""
    out = study.made(f"{name}-{label}")
    report = study.run("extract", base=study.original(base), tuned=study.original(name), out=out, **params)
    assert report.relative_error is not None
    return out, report.relative_error


def applied(study: Study, name: str, label: str, file: Path) -> Likeness:
    """What the base with that LoRA draws, against the fine-tune."""
    model = study.merged(study.original(BASE), [(file, 1.0)], f"{name}-{label}-applied")
    study.forget(model)
    return study.compare(model, name)


def _weights(study: Study) -> str:
    """Relative errors of the carried layers, of every model at every rank."""
    rows = []
    for name in (*RELATED, OUTLIER):
        errors = [lora(study, name, f"r{rank}", rank=rank)[1] for rank in RANKS]
        rows.append([name, *(percent(error) for error in errors)])
    return table(["model, missed %", *(f"rank {rank}" for rank in RANKS)], rows)


def _by_rank(study: Study, pictures: Path) -> str:
    rows, sheet = [], []
    yardstick = average([study.compare(study.original(BASE), name) for name in TYPICAL])
    rows.append(["the base itself", "0", "", *likeness(yardstick)])
    for rank in DRAWN_RANKS:
        found, sizes, errors = [], [], []
        for name in TYPICAL:
            file, error = lora(study, name, f"r{rank}", rank=rank)
            found.append(applied(study, name, f"r{rank}", file))
            sizes.append(file.stat().st_size)
            errors.append(error)
        rows.append(
            [
                f"rank {rank}",
                mib(sum(sizes) / len(sizes)),
                percent(sum(errors) / len(errors)),
                *likeness(average(found)),
            ]
        )
    for name in TYPICAL:
        sheet.append((f"{name}\nthe fine-tune", first_seed(study, study.original(name), name)))
        sheet += [
            (f"base + LoRA\nof rank {rank}", first_seed(study, study.made(f"{name}-r{rank}-applied"), name))
            for rank in (2, 8)
        ]
        sheet.append(("the base", first_seed(study, study.original(BASE), name)))
    save_sheet(pictures / "extract.png", sheet)
    return table(["", "MiB", "missed %", *LIKENESS], rows)


def first_seed(study: Study, file: Path, name: str) -> torch.Tensor:
    """[prompts, 3, 64, 64]: the first seed's pictures."""
    return study.draw(file, name).pictures.unflatten(0, (len(PROMPTS), len(SEEDS)))[:, 0]


def _variants(study: Study) -> str:
    size = study.made(f"{TYPICAL[0]}-r{SMALL}").stat().st_size / 2**20
    variants: dict[str, dict[str, Any]] = {
        f"rank {SMALL} in all layers": {"rank": SMALL},
        "linear layers alone, same size": {"rank_rule": "size", "rank_target": size, "conv_rank": 0},
        "ranks allotted, same size": {"rank_rule": "size", "rank_target": size},
        "DoRA, same size": {"rank": SMALL, "family": "dora"},
        f"rank {SMALL} and norms": {"rank": SMALL, "norms": True},
        f"rank {SMALL}, norms and biases": {"rank": SMALL, "norms": True, "biases": True},
        "ranks allotted, norms and biases": {"rank_rule": "size", "rank_target": size, "norms": True, "biases": True},
    }
    rows = []
    for number, (title, params) in enumerate(variants.items()):
        made = [lora(study, name, f"v{number}", **params) for name in TYPICAL]
        rows.append(_row(study, title, f"v{number}", made))
    clamped = []
    for name in TYPICAL:
        file, _ = lora(study, name, f"r{SMALL}", rank=SMALL)
        clamped.append((_clamped(file, study.made(f"{name}-clamped")), None))
    rows.insert(1, _row(study, "the same, clamped at the 0.99 quantile", "clamped", clamped))
    return table(["", "MiB", "missed %", *LIKENESS], rows)


def _row(study: Study, title: str, label: str, made: Sequence[tuple[Path, float | None]]) -> list[str]:
    found = [applied(study, name, label, file) for name, (file, _) in zip(TYPICAL, made, strict=True)]
    sizes = [file.stat().st_size for file, _ in made]
    errors = [
        error if error is not None else _missed(study, name, file)
        for name, (file, error) in zip(TYPICAL, made, strict=True)
    ]
    return [title, mib(sum(sizes) / len(sizes)), percent(sum(errors) / len(errors)), *likeness(average(found))]


def _clamped(file: Path, out: Path) -> Path:
    """As the widespread extraction scripts write it: U·Σ and Vᵀ clamped at the 0.99 quantile of all their entries."""
    tensors = load_file(file)
    for up_key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        down_key, alpha_key = (
            up_key.replace("lora_up.weight", "lora_down.weight"),
            up_key.replace("lora_up.weight", "alpha"),
        )
        up, down = tensors[up_key].float(), tensors[down_key].float()
        scale = float(tensors[alpha_key]) / down.shape[0]
        u, sigma, v = torch.linalg.svd(scale * up.flatten(1) @ down.flatten(1), full_matrices=False)
        rank = down.shape[0]
        factors = u[:, :rank] * sigma[:rank], v[:rank]
        limit = float(torch.cat([factor.flatten() for factor in factors]).quantile(0.99))
        for key, like, factor in zip((up_key, down_key), (up, down), factors, strict=True):
            tensors[key] = factor.clamp(-limit, limit).reshape(like.shape).half().contiguous()
        tensors[alpha_key] = torch.tensor(float(rank), dtype=tensors[alpha_key].dtype)
    save_file(tensors, out)
    return out


def _missed(study: Study, name: str, file: Path) -> float:
    """‖Δ − Δ of the LoRA‖ / ‖Δ‖ over the layers of the file, by merging it exactly as a host does."""
    merged, base, tuned = (
        load_file(path)
        for path in (
            study.merged(study.original(BASE), [(file, 1.0)], f"{name}-missed"),
            study.original(BASE), study.original(name),
        )
    )  # fmt: skip
    touched = [key for key in base if not torch.equal(merged[key], base[key])]
    missed = sum(float((merged[key].double() - tuned[key].double()).square().sum()) for key in touched)
    whole = sum(float((base[key].double() - tuned[key].double()).square().sum()) for key in touched)
    return (missed / whole) ** 0.5


assert set(TYPICAL) <= set(RELATED) and member_of(TYPICAL[0])

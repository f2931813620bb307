"""Extraction: error and pictures against rank and size, and which variants are worth their bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..jobs import run
from ..members import BASE
from .sheets import save_sheet
from .study import OUTLIER, RELATED, Likeness, Study, at_size, average, numbers_of
from .tables import LIKENESS, likeness, mib, percent, table

RANKS = (1, 2, 4, 8, 16, 32)
ALLOTTED = (2, 16)  # at the bytes of these ranks too, beside SMALL
DRAWN_RANKS = (1, 2, 4, 8, 16)
TYPICAL = ("ink", "night", "stripes", "ink-night")  # a style, a palette, a texture, and two at once
SMALL = 4  # the rank at which variants are compared


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    yield "extract-weights", _weights(study)
    yield "extract-rank", _by_rank(study, pictures)
    yield "extract-variants", _variants(study)


def lora(study: Study, name: str, label: str, base: Path | None = None, **params: Any) -> Path:
    """A LoRA of a fine-tune, for the base that it came from or for another."""
    out = study.made(f"{name}-{label}")
    run("extract", base=base or study.original(BASE), tuned=study.original(name), out=out, **params)
    return out


def sized(study: Study, name: str, label: str, numbers: float, **params: Any) -> Path:
    """A LoRA of so many MiB of numbers, ranks allotted."""

    def make(target: float) -> int:
        return numbers_of(lora(study, name, label, rank_rule="size", rank_target=target, **params))

    at_size(make, numbers)
    return study.made(f"{name}-{label}")


def within(study: Study, name: str, label: str, numbers: float, **params: Any) -> Path:
    """A LoRA of the highest rank in all layers with no more than so many MiB of numbers."""
    smallest = numbers_of(lora(study, name, label, rank=1, **params)) / 2**20
    return lora(study, name, label, rank=max(1, int(numbers / smallest)), **params)


def row(study: Study, title: str, files: dict[str, Path]) -> list[str]:
    """Size and likeness of the base with each fine-tune's LoRA, averaged."""
    size = sum(numbers_of(file) for file in files.values()) / len(files)
    return [title, mib(size), *likeness(average([_like(study, name, file) for name, file in files.items()]))]


def _like(study: Study, name: str, file: Path) -> Likeness:
    return study.compare(study.applied(study.original(BASE), file), name)


def _weights(study: Study) -> str:
    """What LoRAs miss of the layers that they can carry."""
    rows = []
    for name in (*RELATED, OUTLIER):
        given = {"base": study.original(BASE), "tuned": study.original(name)}
        reports = [run("extract", **given, out=study.made(f"{name}-r{rank}"), rank=rank) for rank in RANKS]
        errors = [percent(report.relative_error) for report in reports]
        rows.append([name, *errors, percent(reports[0].details["uncarried_share"] ** 0.5)])
    return table(["missed %", *(f"rank {rank}" for rank in RANKS), "not in the file (norms, biases …)"], rows)


def _by_rank(study: Study, pictures: Path) -> str:
    yardstick = average([study.compare(study.original(BASE), name) for name in TYPICAL])
    rows = [["the base itself", "0", *likeness(yardstick)]]
    for rank in DRAWN_RANKS:
        plain = {name: lora(study, name, f"r{rank}", rank=rank) for name in TYPICAL}
        rows.append(row(study, f"rank {rank}", plain))
        if rank in ALLOTTED:
            sizes = {name: numbers_of(file) / 2**20 for name, file in plain.items()}
            files = {name: sized(study, name, f"s{rank}", size) for name, size in sizes.items()}
            rows.append(row(study, f"ranks allotted, the bytes of rank {rank}", files))
    sheet = []
    for name in TYPICAL:
        sheet.append((f"{name}\nthe fine-tune", study.first_seed(study.original(name), name)))
        for rank in (DRAWN_RANKS[1], DRAWN_RANKS[-1]):
            sheet.append(
                (f"base + LoRA\nof rank {rank}", study.first_seed(study.made(f"{name}-r{rank}-applied"), name))
            )
        sheet.append(("the base", study.first_seed(study.original(BASE), name)))
    save_sheet(pictures / "extract.png", sheet)
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _variants(study: Study) -> str:
    plain = {name: lora(study, name, f"r{SMALL}", rank=SMALL) for name in TYPICAL}
    size = sum(numbers_of(file) for file in plain.values()) / len(plain) / 2**20
    rows = [
        row(study, f"rank {SMALL} in all layers", plain),
        row(study, "the same, clamped at the 0.99 quantile",
            {name: clamped(file, study.made(f"{name}-clamped")) for name, file in plain.items()}),
    ]  # fmt: skip
    variants: dict[str, Callable[[str, str], Path]] = {
        "linear layers alone, of one rank": lambda name, label: within(study, name, label, size, conv_rank=0),
        "ranks allotted": lambda name, label: sized(study, name, label, size),
        "DoRA": lambda name, label: lora(study, name, label, rank=SMALL, family="dora"),
        f"rank {SMALL}, and norms": lambda name, label: lora(study, name, label, rank=SMALL, norms=True),
        f"rank {SMALL}, norms and biases": lambda name, label: lora(
            study, name, label, rank=SMALL, norms=True, biases=True
        ),
        "ranks allotted, norms and biases": lambda name, label: sized(
            study, name, label, size, norms=True, biases=True
        ),
    }
    for number, (title, make) in enumerate(variants.items()):
        files = {name: make(name, f"v{number}") for name in TYPICAL}
        if title == "DoRA":
            title += f", in the {percent(_dora_share(files.values()))} % of layers where it is closer"
        rows.append(row(study, title, files))
    return table(["", "MiB of numbers", *LIKENESS], rows)


def _dora_share(files: Iterable[Path]) -> float:
    """Of the layers in these files, how many have a DoRA's magnitudes."""
    keys = [key for file in files for key in load_file(file)]
    return sum(key.endswith(".dora_scale") for key in keys) / sum(key.endswith(".lora_up.weight") for key in keys)


def clamped(file: Path, out: Path) -> Path:
    """As the widespread extraction scripts write it: U·Σ and Vᵀ clamped at the 0.99 quantile of all their entries."""
    tensors = load_file(file)
    for up_key in [key for key in tensors if key.endswith(".lora_up.weight")]:
        down_key, alpha_key = (up_key.replace("lora_up.weight", part) for part in ("lora_down.weight", "alpha"))
        up, down = tensors[up_key].float(), tensors[down_key].float()
        rank = down.shape[0]
        scale = float(tensors[alpha_key]) / rank
        u, sigma, v = torch.linalg.svd(scale * up.flatten(1) @ down.flatten(1), full_matrices=False)
        factors = u[:, :rank] * sigma[:rank], v[:rank]
        limit = float(torch.cat([factor.flatten() for factor in factors]).quantile(0.99))
        for key, like, factor in zip((up_key, down_key), (up, down), factors, strict=True):
            tensors[key] = factor.clamp(-limit, limit).reshape(like.shape).half().contiguous()
        tensors[alpha_key] = torch.tensor(float(rank), dtype=tensors[alpha_key].dtype)
    save_file(tensors, out)
    return out

"""Resize: which method, and what a rank rule is worth, for LoRAs that were extracted at a high rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..jobs import run
from .extraction import TYPICAL, lora, row
from .study import Study, at_size, numbers_of
from .tables import LIKENESS, table

FROM, TO = 32, 4


def answer(study: Study, pictures: Path) -> Iterator[tuple[str, str]]:
    del pictures
    high = {name: lora(study, name, f"r{FROM}", rank=FROM) for name in TYPICAL}
    low = {name: lora(study, name, f"r{TO}", rank=TO) for name in TYPICAL}
    rows = [row(study, f"extracted at rank {FROM}", high), row(study, f"extracted at rank {TO}", low)]
    size = sum(numbers_of(file) for file in low.values()) / len(low) / 2**20

    def resized(name: str, label: str, **params: Any) -> Path:
        out = study.made(f"{name}-{label}")
        run("resize", loras=[high[name]], out=out, **params)
        return out

    def allotted(name: str, label: str) -> Path:
        at_size(lambda mib: numbers_of(resized(name, label, rank_rule="size", rank_target=mib)), size)
        return study.made(f"{name}-{label}")

    rows.append(row(study, f"rank {FROM} resized to {TO}, SVD", {n: resized(n, "svd", rank=[TO]) for n in TYPICAL}))
    rows.append(row(study, "ranks allotted, same size", {name: allotted(name, "allotted") for name in TYPICAL}))
    for method, title in (
        ("rsvd", "randomised SVD"), ("random", "random directions"), ("sparse", "sparse random directions"),
    ):  # fmt: skip
        for seed in (0,) if method == "rsvd" else (0, 1):
            files = {name: resized(name, f"{method}{seed}", rank=[TO], method=method, seed=seed) for name in TYPICAL}
            rows.append(row(study, f"{title}, seed {seed}", files))
    yield "resize", table(["", "MiB of numbers", *LIKENESS], rows)

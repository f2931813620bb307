"""Resize: which method, and what a rank rule is worth, for LoRAs that were extracted at a high rank."""

from __future__ import annotations

from pathlib import Path

from .extraction import TYPICAL, applied, lora
from .study import Study, average
from .tables import LIKENESS, likeness, mib, percent, table

FROM, TO = 32, 4


def answer(study: Study, pictures: Path) -> dict[str, str]:
    del pictures
    for name in TYPICAL:
        lora(study, name, f"r{FROM}", rank=FROM)
    size = study.made(f"{TYPICAL[0]}-r{TO}").stat().st_size / 2**20
    ways: dict[str, dict[str, object]] = {
        "SVD": {"rank": [TO]},
        "ranks allotted, same size": {"rank_rule": "size", "rank_target": size},
        "randomised SVD": {"rank": [TO], "method": "rsvd"},
        "random directions": {"rank": [TO], "method": "random"},
        "sparse random directions": {"rank": [TO], "method": "sparse"},
    }
    rows = []
    whole = [applied(study, name, f"r{FROM}", study.made(f"{name}-r{FROM}")) for name in TYPICAL]
    rows.append(
        [
            f"the LoRA of rank {FROM}",
            mib(study.made(f"{TYPICAL[0]}-r{FROM}").stat().st_size),
            "",
            *likeness(average(whole)),
        ]
    )
    fresh = [applied(study, name, f"r{TO}", study.made(f"{name}-r{TO}")) for name in TYPICAL]
    rows.append([f"extracted at rank {TO}", mib(size * 2**20), "", *likeness(average(fresh))])
    for number, (title, params) in enumerate(ways.items()):
        found, errors, sizes = [], [], []
        for name in TYPICAL:
            out = study.made(f"{name}-resized{number}")
            report = study.run("resize", loras=[study.made(f"{name}-r{FROM}")], out=out, **params)
            errors.append(report.relative_error or 0.0)
            sizes.append(out.stat().st_size)
            found.append(applied(study, name, f"resized{number}", out))
        rows.append(
            [title, mib(sum(sizes) / len(sizes)), percent(sum(errors) / len(errors)), *likeness(average(found))]
        )
    return {"resize": table(["", "MiB", "missed of the LoRA %", *LIKENESS], rows)}

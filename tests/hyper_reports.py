"""Reports of hyper-merges as a job fills them, for tests of how they are shown."""

from __future__ import annotations

import random
from typing import Any

from lib_hypermerge.jobs.hyper.recipe import snippet
from lib_hypermerge.jobs.report import Output, Report

BLOCKS = {"unet": ["IN01", "IN02", "MID", "OUT03", "OUT04"], "te": ["TE00", "TE01", "TE02"]}


def hyper_report(models: int = 4, ranks: tuple[int, ...] = (64, 32, 16), name: str = "family", **more: Any) -> Report:
    """Of that many models; more replaces details."""
    draw = random.Random(0)
    labels = [f"model-{letter}" for letter in "abcdefghijklmnop"[:models]]
    loras = [f"{name}-{i + 1}" for i in range(len(ranks))]
    multipliers = {m: {lora: draw.uniform(-1, 1) for lora in loras} for m in labels}
    by_model = {
        label: {
            "components": {
                part: {
                    "relative_error": draw.random(),
                    "blocks": {b: draw.random() for b in blocks},
                }
                for part, blocks in BLOCKS.items()
            },
            "rest_error": draw.random(),
        }
        for label in labels
    }
    sizes = [rank * 2**20 for rank in ranks]
    loss = [0.3 / (i + 1) + 0.1 for i in range(20)]
    details = {
        "architecture": "SD1.5", "preview": False, "solver": "joint", "from_base": False, "residual_share": loss[-1],
        "multipliers": multipliers, "te_multipliers": None, "loss": loss,
        "models": {label: 0.2 + 0.05 * i for i, label in enumerate(labels)}, "ranks": list(ranks),
        "hyper": f"{name}.safetensors", "hyper_bytes": 2**31, "recipe": f"/models/{name}.hypermerge.json",
        "loras": [{"name": stem, "rank": rank, "bytes": size, "share": 0.5 / (i + 1)}
                  for i, (stem, rank, size) in enumerate(zip(loras, ranks, sizes, strict=True))],
        "prompts": {label: snippet(row) for label, row in multipliers.items()},
        "similarity": {"labels": labels,
                       "cosines": [[1.0 if a == b else draw.uniform(-0.6, 0.6) for a in labels] for b in labels]},
        "by_model": by_model,
        "curve": [{"loras": k + 1, "bytes": sum(sizes[: k + 1]), "residual_share": 0.5 / (k + 1)}
                  for k in range(len(ranks))],
        "alternatives": [{"name": kind, "kind": kind, "bytes": sum(sizes), "residual_share": share}
                         for kind, share in (("average", 1.0), ("own", 0.4), ("greedy", 0.2), ("joint", 0.17),
                                             ("container", 0.12))],
        "better": "At this size a container comes closer.", "rest_share": 0.01, "container": None, "remainders": {},
        "steps": {"sketch": 4.0, "solve": 2.0, "finish": 3.0}, "device": "cpu", "threads": 2, "resumed": False,
        **more,
    }  # fmt: skip
    files = [] if details["preview"] else [name, *loras]
    outputs = [Output(f"/models/{stem}.safetensors", 2**20, "0" * 64) for stem in files]
    return Report("hyper", outputs, loss[-1] ** 0.5, 354, seconds=9.0, warnings=["one note"], details=details)

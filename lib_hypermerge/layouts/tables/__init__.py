"""Key → shape tables of real checkpoints, for demonstrations, tests and benchmarks."""

from __future__ import annotations

import json
from importlib import resources

from . import mmdit

NAMES = ("sd15", "sd15_inpainting", "sd21", "sdxl", "flux_dev", *mmdit.MODELS)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Every key of a checkpoint with its shape."""
    if name in mmdit.MODELS:
        return mmdit.shapes(name)
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    return {key: tuple(shape) for key, shape in json.loads(text).items()}


def narrow(table: dict[str, tuple[int, ...]], divisor: int = 32) -> dict[str, tuple[int, ...]]:
    """The same keys with every width of 128 and more divided: a model of a few megabytes."""
    return {key: tuple(d // divisor if d >= 128 else d for d in shape) for key, shape in table.items()}

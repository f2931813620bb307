"""A full-sized model of each architecture without numbers: to tell what an adapter was made for."""

from __future__ import annotations

import functools
from pathlib import Path

from ..files.source import TensorFile, TensorInfo
from . import tables
from .detect import ARCHITECTURES, recognise
from .module import Model

_TABLES = {"sd1": "sd15", "sd2": "sd21", "sdxl": "sdxl", "flux": "flux_dev", "sd3": "sd35_large"}

IDS = tuple(a.id for a in ARCHITECTURES if _TABLES.get(a.id) in tables.NAMES)


class Outline(TensorFile):
    """Names and shapes of tensors that are nowhere: it can be recognised, not read."""

    def __init__(self, name: str, table: dict[str, tuple[int, ...]]):
        self.path = Path(name)
        self.tensors = {
            key: TensorInfo(key, "I64" if key.endswith("position_ids") else "F16", shape, 0)
            for key, shape in table.items()
        }
        self.metadata = {}
        self.size = 0

    def close(self) -> None:
        pass

    def is_same(self, other: TensorFile) -> bool:
        return other is self

    def check_unchanged(self) -> None:
        pass

    def read_into(self, offset: int, view: memoryview) -> None:
        raise AssertionError("An outline has no numbers.")


@functools.cache
def reference_model(architecture: str) -> Model:
    """The model of an architecture, by its id: "sd1", "sd2", "sdxl", "sd3" or "flux". Do not modify it."""
    return recognise(Outline(architecture, tables.shapes(_TABLES[architecture])))

"""A full-sized model of each architecture without numbers: to tell what an adapter was made for."""

from __future__ import annotations

import functools
from pathlib import Path

from ..files.source import TensorFile, TensorInfo
from . import tables
from .detect import recognise
from .module import Model
from .tables import text_encoders

# architecture → its members with other layers or sizes, and the text encoders that their tables lack
_TABLES = {
    "sd1": (("sd15",), ()),
    "sd2": (("sd21",), ()),
    "sdxl": (("sdxl",), ()),
    "sd3": (("sd3_medium", "sd35_medium", "sd35_large"), ("clip_l", "clip_g", "t5xxl")),
    "flux": (("flux_dev",), ("clip_l", "t5xxl")),
}

IDS = tuple(_TABLES)


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


def reference_model(architecture: str) -> Model:
    """The usual model of an architecture, by its id: "sd1", "sd2", "sdxl", "sd3" or "flux". Do not modify it."""
    return reference_models(architecture)[0]


@functools.cache
def reference_models(architecture: str) -> tuple[Model, ...]:
    """All members of an architecture that differ in layers or sizes, the usual first, with all text encoders."""
    names, encoders = _TABLES[architecture]
    more = text_encoders.shapes(encoders)
    return tuple(recognise(Outline(name, tables.shapes(name) | more)) for name in names)

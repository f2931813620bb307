"""Where a tensor of diffusers' lies in a single file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ...files.source import TensorInfo

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Spot:
    """A place in a single file: rows of a tensor.

    key: without the component's prefix.  part of parts: where the single file fuses several.  swapped: the halves
    of the rows change places.  turned: transposed.  axes: of the single file's tensor, where it has more of them.
    """

    key: str
    part: int = 0
    parts: int = 1
    swapped: bool = False
    turned: bool = False
    axes: int = 0


def inverse(*tables: Mapping[str, str]) -> dict[str, str]:
    """One table of all, from their names to ours."""
    return {theirs: ours for table in tables for ours, theirs in table.items()}

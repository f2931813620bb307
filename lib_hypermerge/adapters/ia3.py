"""IA3: ΔW = W scaled by row or by column (arXiv 2205.05638; LyCORIS).

`weight` (n,) or, for a convolution, (1, n, 1, 1) scales output rows: ΔW[o,…] = weight[o]·W[o,…]; with `on_input` 1 it
is of the input's size and ΔW[o,i,…] = weight[i]·W[o,i,…]. The numbers are what is added to 1.
"""

from __future__ import annotations

from collections.abc import Collection

from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, require

SCALES, ON_INPUT = "weight", "on_input"


class Ia3(Adapter):
    """The family. Whether the size fits rows or columns is known only once on_input has been read."""

    family, title, needs_weight = "ia3", "IA3", True
    parts = frozenset((SCALES, ON_INPUT))

    @classmethod
    def matches(cls, parts: Collection[str]) -> bool:
        return ON_INPUT in parts  # `weight` alone may be anything

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, SCALES, ON_INPUT)
        scales = shapes[SCALES]
        if sum(size != 1 for size in scales) > 1 or not scales or flat(shapes[ON_INPUT]) != (1, 1):
            raise disagree(cls.title, shapes, SCALES, ON_INPUT)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        return len(weight) > 1 and max(shapes[SCALES]) in weight[:2]

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        notes = [*super().notes(shapes), "ComfyUI and Forge do not read IA3."]
        if len(shapes[SCALES]) > 2:
            notes.append("AUTOMATIC1111 can scale a convolution's input, not its output.")
        return notes

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        axis = int(bool(self.tensors[ON_INPUT].item()))
        scales = self.like(SCALES, weight).flatten()
        if len(scales) != weight.shape[axis]:
            sizes = {SCALES: tuple(scales.shape), "the layer": tuple(weight.shape)}
            raise disagree(self.title, sizes, *sizes)
        sizes = [1] * weight.ndim
        sizes[axis] = -1
        return weight * scales.reshape(sizes)

"""Full: ΔW = `diff`, Δb = `diff_b`, stored as they are (LyCORIS). A module may have only one of the two."""

from __future__ import annotations

from ..lazy import torch
from .adapter import BIAS, Adapter, Shape, Shapes, flat

DIFF = "diff"


class Full(Adapter):
    """The family, for weights of any number of dimensions."""

    family, title = "full", "full"
    parts = frozenset((DIFF, BIAS))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        """Nothing can disagree before the layer is known."""

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        return DIFF not in shapes or flat(shapes[DIFF]) == flat(weight)

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        return [] if DIFF in shapes else [f"AUTOMATIC1111 refuses a module that has {BIAS} alone."]

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        if DIFF not in self.tensors:
            return torch.zeros_like(weight)
        return self.like(DIFF, weight).clone().reshape(weight.shape)

"""SVDiff: shifts of a weight's singular values, one vector `delta` per layer (arXiv 2303.11305; svdiff-pytorch)."""

from __future__ import annotations

from ..algebra import svdiff
from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat

DELTA = "delta"


class Svdiff(Adapter):
    """The family; a normalisation's weight (n,) counts as one row and has a single shift."""

    family, title, needs_weight = "svdiff", "SVDiff", True
    parts = frozenset((DELTA,))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        if len(shapes[DELTA]) != 1:
            raise disagree(cls.title, shapes, DELTA)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        return shapes[DELTA] == (min(flat(weight)),)

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        return [*super().notes(shapes), "No WebUI reads spectral shifts."]

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        return svdiff.change(weight, self.like(DELTA, weight))

"""GLoRA: ΔW = scale · (W·A + B) with A (k, k) and B (n, k) of low rank (arXiv 2306.07967, eq. 11; LyCORIS).

LyCORIS since 3.0: A = a1·a2 with `a1.weight` (c, r), `a2.weight` (r, c), B = b1·b2 with `b1.weight` (n, r),
`b2.weight` (r, c[, kh, kw]).  Before, the other way round: A = a2·a1, B = b2·b1 with a1 (r, c), a2 (c, r), b1 (r, c),
b2 (n, r).  The sizes tell which.  For a convolution A mixes input channels: (W·A)[o,j,y,x] = Σ_i W[o,i,y,x]·A[i,j].
"""

from __future__ import annotations

from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, disagree, flat, require, squeezed

A1, A2, B1, B2 = "a1.weight", "a2.weight", "b1.weight", "b2.weight"


class Glora(Adapter):
    """The family. AUTOMATIC1111 knows the old order alone and takes no notice of alpha."""

    family, title, needs_weight = "glora", "GLoRA", True
    parts = frozenset((A1, A2, B1, B2))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, A1, A2, B1, B2)
        if any(len(shapes[name]) < 2 for name in (A1, A2, B1, B2)) or _order(shapes) is None:
            raise disagree(cls.title, shapes, A1, A2, B1, B2)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        order = _order(shapes)
        if order is None:
            return False
        mix_up, _, up, down = (shapes[name] for name in order)
        made = (up[0], *down[1:])
        same = squeezed(made) == squeezed(weight) or (len(down) == 2 and made == flat(weight))
        return same and len(weight) > 1 and mix_up[0] == weight[1]

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        order = _order(shapes) if cls._complete(shapes) else None
        return shapes[order[1]][0] if order else None

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        if _order(shapes) == (A1, A2, B1, B2):
            return [*super().notes(shapes), "AUTOMATIC1111 cannot apply GLoRA as LyCORIS 3 and later write it."]
        if len(shapes[A1]) > 2:
            return [*super().notes(shapes), "AUTOMATIC1111 cannot apply GLoRA to a convolution."]
        return [*super().notes(shapes), "AUTOMATIC1111 takes no notice of a GLoRA's alpha."]

    @classmethod
    def _complete(cls, shapes: Shapes) -> bool:
        return all(len(shapes.get(name, ())) >= 2 for name in (A1, A2, B1, B2))

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        order = _order(self.shapes)
        assert order is not None  # check() came first
        mix_up, mix_down, up, down = (self.like(name, weight).flatten(1) for name in order)
        mixed = torch.einsum("oi...,ir->or...", weight, mix_up)
        mixed = torch.einsum("or...,rj->oj...", mixed, mix_down)
        return (mixed.add_((up @ down).reshape(weight.shape))).mul_(self.scale)


def _order(shapes: Shapes) -> tuple[str, str, str, str] | None:
    """The parts in the order of A = first·second, B = third·fourth; None if they fit neither way.

    Of a square layer both ways fit, one of them for a layer as small as the rank: that one is not meant.
    """
    new, old = (A1, A2, B1, B2), (A2, A1, B2, B1)
    fitting = [order for order in (old, new) if _agree(*(shapes[name] for name in order))]
    if len(fitting) == 2:
        return old if shapes[A1][0] <= shapes[A1][1] else new
    return fitting[0] if fitting else None


def _agree(mix_up: Shape, mix_down: Shape, up: Shape, down: Shape) -> bool:
    ranks = {mix_up[1], mix_down[0], up[1], down[0]}
    channels = {mix_up[0], mix_down[1], down[1]}
    return len(ranks) == len(channels) == 1 and all(len(squeezed(shape)) == 2 for shape in (mix_up, mix_down, up))

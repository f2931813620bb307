"""DoRA: a family's change with the magnitudes learned apart, ΔW = m ∘ V/‖V‖ − W with V = W + ΔW_family.

(Liu et al. 2024, arXiv 2402.09353, eq. 5.)  The magnitudes stand along one of two axes:
 - `dora_scale` (n, 1[, 1, 1]): one per output row, as in the paper's code; LyCORIS since 3.2, OneTrainer on request.
 - `dora_scale` (1, c[, 1, 1]): one per input channel; LyCORIS before, sd-scripts' and OneTrainer's default.
 - `dora_scale` (n,) and PEFT's `lora_magnitude_vector` of whatever shape: one per output row.
PEFT and diffusers normalise as written here; AUTOMATIC1111, ComfyUI and Forge differ for output rows, see notes().
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import ClassVar

from ..algebra import dora
from ..lazy import torch
from .adapter import Adapter, Shape, Shapes, flat

SCALE, PEFT = "dora_scale", "lora_magnitude_vector"
MAGNITUDES = (SCALE, PEFT)


class Dora(Adapter):
    """A family with magnitudes; `over` makes the class for each."""

    family, title, needs_weight = "dora", "DoRA", True
    inner: ClassVar[type[Adapter]]

    @classmethod
    def matches(cls, parts: Collection[str]) -> bool:
        return any(name in parts for name in MAGNITUDES) and cls.inner.matches(without_magnitudes(parts))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        cls.inner.check(cls._inner_shapes(shapes))

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        has_axis = len(weight) > 1 and cls.axis(shapes, weight) is not None
        return has_axis and cls.inner.fits(cls._inner_shapes(shapes), weight)

    @classmethod
    def rank(cls, shapes: Shapes) -> int | None:
        return cls.inner.rank(cls._inner_shapes(shapes))

    @classmethod
    def axis(cls, shapes: Shapes, weight: Shape) -> int | None:
        """dora.OUTPUT or dora.INPUT; None where the magnitudes fit neither."""
        own = shapes.get(SCALE)
        n, c = weight[:2]
        if own is None:
            stored = shapes[PEFT]
            return dora.OUTPUT if sum(size != 1 for size in stored) <= 1 and max(stored) == n else None
        if flat(own) == (n, 1):
            return dora.OUTPUT
        return dora.INPUT if len(own) > 1 and own[0] == 1 and own[1] == c and flat(own) == (1, c) else None

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        notes = cls.inner.notes(cls._inner_shapes(shapes))
        own = shapes.get(SCALE)
        if own is not None and len(own) > 1 and own[0] == 1:
            return notes
        return [
            *notes,
            "The magnitudes are per output row: AUTOMATIC1111 applies them per input channel, ComfyUI and Forge divide "
            "by the norm of the unchanged weight. Merged, or converted to a plain LoRA, it is what was trained.",
        ]

    def __init__(self, tensors: Mapping[str, torch.Tensor], alpha: float | None = None, scale: float | None = None):
        super().__init__(tensors, alpha, scale)
        self.adapter = self.inner(
            {name: tensor for name, tensor in self.tensors.items() if name not in MAGNITUDES}, alpha, scale
        )

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        name = next(name for name in MAGNITUDES if name in self.tensors)
        axis = self.axis(self.shapes, tuple(weight.shape))
        assert axis is not None  # fits() came first
        V = self.adapter.change(weight).add_(weight)
        return dora.recompose(V, self.like(name, weight), axis).sub_(weight)

    def bias_change(self) -> torch.Tensor | None:
        return self.adapter.bias_change()

    @classmethod
    def _inner_shapes(cls, shapes: Shapes) -> Shapes:
        return {name: shape for name, shape in shapes.items() if name not in MAGNITUDES}


def without_magnitudes(parts: Collection[str]) -> list[str]:
    """The part names of the family within."""
    return [part for part in parts if part not in MAGNITUDES]


@cache
def over(inner: type[Adapter]) -> type[Dora]:
    """The class of a family's modules with magnitudes; DoRA itself for LoRA."""
    plain = inner.family == "lora"
    names = {
        "inner": inner,
        "parts": inner.parts.union(MAGNITUDES),
        "family": "dora" if plain else f"dora+{inner.family}",
        "title": "DoRA" if plain else f"DoRA on {inner.title}",
    }
    return type(f"Dora{inner.__name__}", (Dora,), names)

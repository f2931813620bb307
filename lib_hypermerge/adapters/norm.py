"""Changes of normalisation layers and biases, stored as they are (LyCORIS `norm`, `diff_b`)."""

from __future__ import annotations

from collections.abc import Iterator

from ..lazy import torch
from .adapter import BIAS, Adapter, Shape, Shapes, disagree, flat, require

WEIGHT, SHIFT = "w_norm", "b_norm"


class Norm(Adapter):
    """`w_norm` (n,) is added to a normalisation's scale, `b_norm` (n,) to its shift; LyCORIS leaves out b_norm
    where the layer has no shift."""

    family, title = "norm", "norm"
    parts = frozenset((WEIGHT, SHIFT))

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        require(shapes, cls.title, WEIGHT)
        if flat(shapes.get(SHIFT, shapes[WEIGHT])) != flat(shapes[WEIGHT]):
            raise disagree(cls.title, shapes, WEIGHT, SHIFT)

    @classmethod
    def _fits(cls, shapes: Shapes, weight: Shape) -> bool:
        return len(weight) == 1 and flat(shapes[WEIGHT]) == flat(weight)

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        return super().notes(shapes) + ([] if SHIFT in shapes else ["AUTOMATIC1111 refuses w_norm without b_norm."])

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        return self.like(WEIGHT, weight).clone().reshape(weight.shape)

    def bias_change(self) -> torch.Tensor | None:
        return self.tensors[SHIFT].flatten() if SHIFT in self.tensors else super().bias_change()


def tensors(
    name: str, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """A norm's change; A1111 refuses a file in which one of the two is missing."""
    yield f"{name}.{WEIGHT}", weight.flatten().to(dtype)
    yield f"{name}.{SHIFT}", bias.flatten().to(dtype)


def bias_tensor(name: str, bias: torch.Tensor, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """A bias's change, beside the LoRA of the same layer."""
    return f"{name}.{BIAS}", bias.flatten().to(dtype)

"""LoRA with a sparse rest: ΔW = alpha/r · (up·down + S), written by LyCORIS' extract_locon with --use_sparse_bias.

Despite the parts' names S changes the weight, not the bias: `bias_values` (m,) stand in an (n, k) matrix of size
`bias_size` at the rows and columns `bias_indices` (2, m), both 16-bit integers.
"""

from __future__ import annotations

from collections.abc import Collection

from ..algebra.factored import LowRank
from ..lazy import torch
from .adapter import Shapes, disagree, flat, require
from .lora import Lora

INDICES, VALUES, SIZE = "bias_indices", "bias_values", "bias_size"


class SparseLora(Lora):
    """A LoRA beside which the largest entries of what it missed are kept one by one."""

    family, title = "lora+sparse", "LoRA with a sparse rest"
    parts = Lora.parts | {INDICES, VALUES, SIZE}

    @classmethod
    def matches(cls, parts: Collection[str]) -> bool:
        return not (cls.parts - Lora.parts).isdisjoint(parts)

    @classmethod
    def check(cls, shapes: Shapes) -> None:
        super().check(shapes)
        require(shapes, cls.title, INDICES, VALUES, SIZE)
        if flat(shapes[SIZE]) != (2, 1) or shapes[INDICES] != (2, *shapes[VALUES]):
            raise disagree(cls.title, shapes, INDICES, VALUES, SIZE)

    @classmethod
    def notes(cls, shapes: Shapes) -> list[str]:
        return [*super().notes(shapes), "No WebUI reads the sparse rest of this LoRA any more."]

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        return None

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        rows, columns = self.tensors[INDICES].to(weight.device, torch.int64)
        sizes = {SIZE: tuple(self.tensors[SIZE].flatten().tolist()), "the layer": flat(tuple(weight.shape))}
        if sizes[SIZE] != sizes["the layer"]:
            raise disagree(self.title, sizes, *sizes)
        change = super().change(weight).flatten(1)
        change.index_put_((rows, columns), self.scale * self.like(VALUES, weight), accumulate=True)
        return change.reshape(weight.shape)

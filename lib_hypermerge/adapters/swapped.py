"""A module whose file keeps the two halves of a layer's rows in the other order.

diffusers' norm_out of Flux and Stable Diffusion 3 is (scale, shift) where the checkpoints have (shift, scale).
Source: huggingface/diffusers scripts/convert_flux_to_diffusers.py swap_scale_shift.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ..lazy import torch
from .adapter import Adapter, LowRank


def swap(rows: torch.Tensor) -> torch.Tensor:
    """The second half of the rows, then the first; twice it is nothing."""
    return rows.roll(rows.shape[0] // 2, 0)


class Swapped(Adapter):
    """Any family's module, seen in the checkpoint's order of rows; `tensors` stay as the file has them."""

    adapter: Adapter

    @staticmethod
    def of(adapter: Adapter) -> Swapped:
        """Wrap a module."""
        out = _over(type(adapter))(adapter.tensors, adapter.alpha)
        out.adapter = adapter
        return out

    @property
    def scale(self) -> float:
        return self.adapter.scale

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        return swap(self.adapter.change(swap(weight)))

    def bias_change(self) -> torch.Tensor | None:
        change = self.adapter.bias_change()
        return None if change is None else swap(change)

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        low = self.adapter.low_rank(dtype)
        return None if low is None else replace(low, up=swap(low.up))


@cache
def _over(inner: type[Adapter]) -> type[Swapped]:
    """The class for a family: what it knows of shapes is the family's own."""
    return type(f"Swapped{inner.__name__}", (Swapped, inner), {})

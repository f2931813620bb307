"""A module for a layer that has further input channels in the checkpoint at hand.

In-painting models and Flux' tools widen a model's first layer; a LoRA of the plain model changes the channels that it
knows. AUTOMATIC1111 pads the change of a first convolution likewise (extensions-builtin/Lora/networks.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from ..lazy import torch
from .adapter import Adapter, LowRank, Shape


class FirstChannels(Adapter):
    """Any family's module; the change of all but the first `channels` input channels is 0."""

    adapter: Adapter
    channels: int
    weight: Shape

    @staticmethod
    def of(adapter: Adapter, channels: int, weight: Shape) -> FirstChannels:
        """Wrap a module. weight: the size of the layer's weight."""
        out = _over(type(adapter))(adapter.tensors, adapter.alpha)
        out.adapter, out.channels, out.weight = adapter, channels, weight
        return out

    @property
    def scale(self) -> float:
        return self.adapter.scale

    def change(self, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(weight)
        out[:, : self.channels] = self.adapter.change(weight[:, : self.channels].contiguous())
        return out

    def bias_change(self) -> torch.Tensor | None:
        return self.adapter.bias_change()

    def low_rank(self, dtype: torch.dtype | None = None) -> LowRank | None:
        low = self.adapter.low_rank(dtype)
        if low is None:
            return None
        down = low.down.new_zeros(len(low.down), *self.weight[1:])
        down[:, : self.channels] = low.down.reshape(-1, self.channels, *self.weight[2:])
        return replace(low, down=down.flatten(1))


@cache
def _over(inner: type[Adapter]) -> type[FirstChannels]:
    """The class for a family: what it knows of shapes is the family's own."""
    return type(f"FirstChannels{inner.__name__}", (FirstChannels, inner), {})

"""One tensor of a checkpoint with all adapters applied to it."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..adapters.adapter import Adapter, LowRank
from ..algebra.products import times_transposed
from ..files.source import TensorFile, TensorInfo
from .merge_plan import Step

_CHUNK = 1 << 19  # elements computed on at a time; measured: with its product it stays in the second-level cache


def merge_tensor(file: TensorFile, info: TensorInfo, steps: Sequence[Step], dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor after all steps, in dtype; None if a number in it is not finite.

    Computed in float32, or in float64 where dtype is as wide as float32, and rounded once.
    """
    wide = torch.float64 if dtype.itemsize >= 4 else torch.float32
    weight = file.read(info)
    adapters = [step.lora.load(step.entry) for step in steps]
    low = [None if step.bias else adapter.low_rank() for step, adapter in zip(steps, adapters, strict=True)]
    if all(low) and weight.dim() > 1:
        return _add_products(weight, steps, [product for product in low if product], dtype, wide)
    out = weight.to(wide, copy=True)
    for step, adapter in zip(steps, adapters, strict=True):
        rows = out[step.start : step.stop]
        rows.add_(_change(adapter, rows, step.bias).reshape(rows.shape), alpha=step.strength)
    return _finite(out.to(dtype))


def _change(adapter: Adapter, rows: torch.Tensor, bias: bool) -> torch.Tensor:
    if not bias:
        return adapter.change(rows)
    change = adapter.bias_change()
    assert change is not None
    return change.to(rows.dtype)


def _add_products(
    weight: torch.Tensor, steps: Sequence[Step], products: list[LowRank], dtype: torch.dtype, wide: torch.dtype
) -> torch.Tensor | None:
    """Some rows at a time, so that the numbers are converted, added and rounded in the cache."""
    out = torch.empty(weight.shape, dtype=dtype)
    flat, flat_out = weight.flatten(1), out.view(weight.shape[0], -1)
    n, k = flat.shape
    factors = [(p.up.to(wide).contiguous(), p.down.to(wide).mT.contiguous(), p.scale * s.strength)
               for p, s in zip(products, steps, strict=True)]  # fmt: skip
    height = max(1, min(n, _CHUNK // max(1, k)))
    buffer = torch.empty(height, k, dtype=wide)
    for first in range(0, n, height):
        last = min(first + height, n)
        rows = buffer[: last - first].copy_(flat[first:last])
        for step, (up, down_t, scale) in zip(steps, factors, strict=True):
            start, stop = max(first, step.start), min(last, step.stop)
            if start < stop:
                part = up[start - step.start : stop - step.start]
                rows[start - first : stop - first].add_(times_transposed(part, down_t), alpha=scale)
        flat_out[first:last].copy_(rows)
        if _finite(flat_out[first:last]) is None:
            return None
    return out


def _finite(tensor: torch.Tensor) -> torch.Tensor | None:
    # torch has no isfinite for 8-bit floats
    seen = tensor.float() if tensor.dtype.itemsize == 1 else tensor
    return tensor if bool(torch.isfinite(seen).all()) else None

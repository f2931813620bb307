"""Factors stored as they stand, all directions kept: no decomposition, only rounding."""

from __future__ import annotations

from ..lazy import torch
from .factored import LowRank, norm
from .lowrank import Factors, check_range


def rounded(whole: LowRank, dtype: torch.dtype, energy: float | None = None) -> Factors:
    """All directions as they are, in dtype, but for powers of two that bring a column of up and its row of down to
    one size: these round nothing, and fp16 holds both.

    whole: in float64.  energy: its ‖·‖²_F where that is known already.
    error2 is measured as rounded; S is empty, for the directions are in no order.  Raises NumericalError if dtype
    cannot hold the numbers.
    """
    scaled = whole.up if whole.scale == 1 else whole.scale * whole.up
    ups, downs = scaled.square().sum(0), whole.down.square().sum(1)
    ratio = torch.where((ups > 0) & (downs > 0), downs / ups.clamp_min(1e-300), 1.0)
    power = torch.exp2((ratio.log2() / 4).round())
    up, down = scaled * power, whole.down / power[:, None]
    first, second = up.to(dtype).contiguous(), down.to(dtype).contiguous()
    check_range(first, dtype)
    check_range(second, dtype)
    error2 = _missed(up, down, first, second)
    return Factors(first, second, torch.empty(0), error2, norm(whole) ** 2 if energy is None else energy)


def _missed(up: torch.Tensor, down: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> float:
    """‖up·down − first·second‖²_F, as (up − first)·second + up·(down − second): each summand is small by itself, so
    that float32 products are precise enough."""
    of_up, of_down = (up - first.double()).float(), (down - second.double()).float()
    left, right = up.float(), second.float()
    total = _sum(of_up.mT @ of_up, right @ right.mT)
    if of_down.any():  # numbers that were in dtype before, times a power of two, are exact
        total += _sum(left.mT @ left, of_down @ of_down.mT) + 2 * _sum(of_up.mT @ left, right @ of_down.mT)
    return max(total, 0.0)


def _sum(ups: torch.Tensor, downs: torch.Tensor) -> float:
    return float((ups.double() * downs.double()).sum())

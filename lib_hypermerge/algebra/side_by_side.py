"""Factors stored as they stand, all directions kept: no decomposition, only rounding."""

from __future__ import annotations

from ..lazy import torch
from .factored import LowRank, norm, weighted_sum
from .lowrank import Factors, check_range


def rounded(whole: LowRank, dtype: torch.dtype) -> Factors:
    """All directions as they are, in dtype, but for powers of two that bring a column of up and its row of down to
    one size: these round nothing, and fp16 holds both.

    whole: in float64, of scale 1, as `weighted_sum` gives it.  error2 is measured as rounded; S is empty, for the
    directions are in no order.  Raises NumericalError if dtype cannot hold the numbers.
    """
    lengths = whole.up.norm(dim=0), whole.down.norm(dim=1)
    alive = (lengths[0] > 0) & (lengths[1] > 0)
    ratio = torch.where(alive, lengths[1] / lengths[0].clamp_min(1e-300), 1.0)
    power = torch.exp2((ratio.log2() / 2).round())
    up, down = whole.up * power, whole.down / power[:, None]
    first, second = up.to(dtype).contiguous(), down.to(dtype).contiguous()
    check_range(first, dtype)
    check_range(second, dtype)
    # up·down − first·second, each summand small by itself, so that its norm comes out precise
    rest = ((1.0, LowRank(up - first.double(), second)), (1.0, LowRank(up, down - second.double())))
    return Factors(first, second, torch.empty(0), norm(weighted_sum(rest)) ** 2, norm(whole) ** 2)

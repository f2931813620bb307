"""Factors of a higher rank that make the very same change, with room for training to go on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..lazy import torch


def pad(
    up: torch.Tensor, down: torch.Tensor, alpha: torch.Tensor | None, rank: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(up, down, alpha) of a rank not below their own: up gets columns of zeros, down rows, alpha its share.

    up: (n, r) or (n, r, 1, 1), down: (r, c) or (r, c, kh, kw); all keep their dtypes and every number that is there.
    The new rows have length 1 and are orthogonal to the old ones and to each other, but for their rounding; zeros
    where there is no more direction left.  alpha: as `scaled_alpha` has it; None, which means the rank, stays None.
    """
    r = down.shape[0]
    rows = _orthogonal_rows(down.flatten(1), rank - r, seed).to(down.dtype).reshape(rank - r, *down.shape[1:])
    columns = up.new_zeros(up.shape[0], rank - r, *up.shape[2:])
    if alpha is not None:
        alpha = scaled_alpha(alpha, r, rank)
    return torch.cat((up, columns), 1), torch.cat((down, rows)), alpha


def scaled_alpha(alpha: torch.Tensor, r: int, rank: int) -> torch.Tensor:
    """alpha' with alpha'/rank = alpha/r to the last bit, as programs compute it: float64, from the tensor's number.

    In the first dtype that has such a number: its own, float16, float32, float64. Now and then none has, because
    there are more quotients than dividends; then it is the nearest in float64, and alpha' / rank one unit in its last
    place off. Shape as before.
    """
    old = alpha.item()
    if rank == r or not math.isfinite(old):
        return alpha
    for dtype in (alpha.dtype, torch.float16, torch.float32, torch.float64):
        for number in _about(old / r * rank, dtype):
            if number.item() / rank == old / r:
                return number.reshape(alpha.shape)
    return torch.full_like(alpha, old / r * rank, dtype=torch.float64)


def _about(value: float, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """A dtype's number next to a value, and its neighbours."""
    number = torch.tensor(value, dtype=torch.float64).to(dtype)
    yield number
    if number.dtype in (torch.float32, torch.float64):  # half precision knows no nextafter, and needs none
        for end in (math.inf, -math.inf):
            yield torch.nextafter(number, torch.tensor(end, dtype=dtype))


def _orthogonal_rows(down: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(count, k) float64 beside the rows of down (r, k)."""
    k = down.shape[1]
    old = down.mT.double()
    if len(down) + count > k:  # every direction counts: only those that down truly has are taken
        U, S, _ = torch.linalg.svd(old, full_matrices=False)
        old = U[:, S[:1] * max(old.shape) * torch.finfo(torch.float64).eps < S]
    room = min(count, k - old.shape[1])
    new = torch.randn(k, room, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    Q = torch.linalg.qr(torch.cat((old, new.to(old.device)), 1)).Q[:, old.shape[1] :]
    return torch.cat((Q.mT, Q.new_zeros(count - room, k)))

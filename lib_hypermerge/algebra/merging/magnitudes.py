"""The largest entries of a matrix, exactly and the same everywhere, without a sorted copy of it."""

from __future__ import annotations

from collections.abc import Iterator

from ...lazy import torch

_CHUNK = 1 << 18  # entries that are looked at together: they stay in the processor's cache
_SAMPLE = 1 << 13


def slabs(n: int, k: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows (start, stop) of an (n, k) matrix that are worked on together."""
    step = max(1, _CHUNK // max(1, k))
    for start in range(0, n, step):
        yield start, min(start + step, n)


def count_of(density: float, numel: int) -> int:
    """How many of so many entries a density keeps: the nearest number, at least one."""
    return max(1, round(density * numel))


class Largest:
    """A (n, k) with all but its `count` largest entries by magnitude zero, a slab of rows at a time.

    Of entries equally large the first in order of rows are kept, so that there are exactly `count`.
    """

    def __init__(self, A: torch.Tensor, count: int):
        self.A = A.contiguous()
        flat = self.A.view(-1)
        self.bound = bound = 0.0 if count >= len(flat) else kth_largest(flat, count)
        if bound == 0:  # all that is not zero is kept
            return
        above = sum(int(torch.count_nonzero(part.abs() > bound)) for part in flat.split(_CHUNK))
        equal = [
            (part.abs() == bound).nonzero()[:, 0] + start
            for start, part in zip(range(0, len(flat), _CHUNK), flat.split(_CHUNK), strict=True)
        ]
        self.last = int(torch.cat(equal)[count - above - 1])  # the last of those as large as the bound that is kept

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """(stop − start, k), a new tensor or A's own."""
        slab = self.A[start:stop]
        if self.bound == 0:
            return slab
        size, k = slab.abs(), slab.shape[1]
        keep = size > self.bound if self.last < start * k else size >= self.bound
        if start * k <= self.last < stop * k:
            keep.view(-1)[self.last - start * k + 1 :] &= size.view(-1)[self.last - start * k + 1 :] > self.bound
        return slab * keep


def kth_largest(flat: torch.Tensor, count: int) -> float:
    """The count-th largest magnitude among flat's entries, 1 ≤ count ≤ their number.

    A sample tells in between which values it must be; one pass then finds it among the few in between. Several times
    faster than selecting among all, and as exact: where the sample deceives, all are taken.
    """
    size = len(flat)
    sample = flat[:: max(1, size // _SAMPLE) | 1].abs().sort(descending=True).values
    place, spread = count / size * len(sample), 4 * len(sample) ** 0.5 + 2
    low, high = (sample[min(max(0, int(place + side)), len(sample) - 1)] for side in (spread, -spread))
    above, between = 0, []
    for part in flat.split(_CHUNK):
        part = part.abs()
        above += int(torch.count_nonzero(part > high))
        between.append(part[(part >= low) & (part <= high)])
    few = torch.cat(between)
    if not above < count <= above + len(few):
        above, few = 0, flat.abs()
    return float(few.kthvalue(len(few) - (count - above) + 1).values)

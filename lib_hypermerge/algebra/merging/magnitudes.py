"""The largest entries of a matrix, exactly and the same everywhere, without a sorted copy of it."""

from __future__ import annotations

from collections.abc import Iterator

from ...lazy import torch

_CHUNK = 1 << 16  # entries that are looked at together: they stay in the processor's cache
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
        self.A, self.bound, self.last = A.contiguous(), 0.0, A.numel()
        if count >= A.numel():
            return  # a bound of 0 keeps all
        flat = self.A.view(-1)
        self.bound, above, equal = kth_largest(flat, count)
        if self.bound and above + equal > count:
            self.last = int((flat.abs() == self.bound).nonzero()[count - above - 1])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """(stop − start, k), a new tensor or A's own."""
        slab = self.A[start:stop]
        if self.bound == 0:
            return slab
        size, reach = slab.abs(), self.last + 1 - start * slab.shape[1]
        keep = size >= self.bound
        if reach < slab.numel():  # those as large as the bound, but behind the last that is kept
            keep.view(-1)[max(0, reach) :] &= size.view(-1)[max(0, reach) :] > self.bound
        return slab * keep


def kth_largest(flat: torch.Tensor, count: int) -> tuple[float, int, int]:
    """The count-th largest magnitude among flat's entries, how many are larger, and how many equal; count ≥ 1.

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
    bound = few.kthvalue(len(few) - (count - above) + 1).values
    return float(bound), above + int((few > bound).sum()), int((few == bound).sum())

"""DARE and DELLA: entries of a change are dropped at random, and what stays is made up for them."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from .consensus import Rows, agreeing, plain

_WINDOW = 0.2  # between the chances of a row's smallest and largest entry, DELLA's ε


def dare(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float, seed: int, elect: bool = False
) -> torch.Tensor:
    """Σ w·(m ∘ Δ)/p: (n, k) in the dtype of the deltas (n, k), which are left as they are.

    m is 1 with the chance p = density, independently for every entry of every delta, so the expected result is Σ w·Δ.
    elect: TIES' election and mean instead of the sum (see `consensus.agreeing`); then the result lies between mean
    and sum, for where one alone is left it counts in full.
    Yu et al. 2023, arXiv 2311.03099; its p, the drop rate, is 1 − density here.
    """
    parts = [_dropped(delta, density, 0.0, seed, index) for index, delta in enumerate(deltas)]
    return (agreeing if elect else plain)(deltas[0], weights, parts)


def della(
    deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float, seed: int, window: float = _WINDOW
) -> torch.Tensor:
    """As `dare` with election, but an entry's chance p to stay grows with its place by magnitude in its row.

    p runs evenly from density − ε/2 for the smallest to density + ε/2 for the largest, ε = window, narrowed so that
    all lie within density/2 and 1; each entry that stays is divided by its own p.
    Deep et al. 2024, arXiv 2406.11617 (MAGPRUNE, then elect and fuse).
    """
    window = min(window, density, 2 * (1 - density))
    parts = [_dropped(delta, density, window, seed, index) for index, delta in enumerate(deltas)]
    return agreeing(deltas[0], weights, parts)


def _dropped(delta: torch.Tensor, density: float, window: float, seed: int, index: int) -> Rows:
    # Mersenne twister on the CPU: the same numbers on every machine, however many threads. It looks at 32 bits only;
    # odd factors keep the deltas of one seed apart.
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + index * 0x85EBCA77) % (1 << 32))

    def rows(start: int, stop: int) -> torch.Tensor:
        slab = delta[start:stop]
        chance = _chances(slab, density, window) if window > 0 else torch.full((), density)
        keep = torch.rand(slab.shape, generator=generator).to(slab.device) < chance
        return slab * keep / chance

    return rows if density < 1 else lambda start, stop: delta[start:stop]


def _chances(slab: torch.Tensor, density: float, window: float) -> torch.Tensor:
    """(rows, k) float32; of entries equally large the earlier counts as the smaller."""
    k = slab.shape[1]
    steps = torch.linspace(density - window / 2, density + window / 2, k) if k > 1 else torch.full((1,), density)
    order = slab.abs().argsort(dim=1, stable=True)
    return torch.empty(slab.shape, device=slab.device).scatter_(1, order, steps.to(slab.device).expand(slab.shape))

"""Matrices that are given as products: sums, norms, spectra and best approximations without ever forming n×k.

All in float64.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..lazy import torch
from .core import core_of
from .lowrank import Factors
from .lowrank import LowRank as LowRank  # by this name the rest of the house knows it
from .rank import by_energy
from .slabs import cross


def weighted_sum(terms: Iterable[tuple[float, LowRank]]) -> LowRank:
    """Σ w·A exactly: factors side by side, in float64, of as many columns as all terms have together.

    The terms have the same n and k; there is at least one.
    """
    terms = list(terms)
    ups = [weight * term.scale * term.up.double() for weight, term in terms]
    return LowRank(torch.cat(ups, 1), torch.cat([term.down.double() for _, term in terms]))


def inner(a: LowRank, b: LowRank) -> float:
    """⟨A, B⟩ = tr(AᵀB), from r×r products."""
    return a.scale * b.scale * float((cross(a.up, b.up) * cross(a.down.mT, b.down.mT)).sum())


def norm(a: LowRank) -> float:
    """‖A‖_F."""
    return max(inner(a, a), 0.0) ** 0.5


def singular_values(a: LowRank) -> torch.Tensor:
    """All min(r, n, k) of them, (m,) float64 on the CPU, descending; those behind A's rank are rounding noise."""
    return core_of(a).S


def compress(
    a: LowRank, dtype: torch.dtype | None = None, rank: int | None = None, energy: float | None = None
) -> Factors:
    """The best factors of A, balanced and with alpha = rank in mind: A ≈ up·down.

    rank: at most so many directions.  energy: only as many as keep this share of ‖A‖²_F.  Neither: all that are
    not rounding noise.  Never fewer than one.  dtype: of the factors, float32 by default; the second solves
    least squares against the rounded first, so rounding the first costs nothing, and error2 is measured as rounded.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    core = core_of(a)
    if energy is not None:
        enough = by_energy(core.S, core.energy, energy, complete=True) or core.rank
        rank = enough if rank is None else min(rank, enough)
    return core.factors(rank, dtype)

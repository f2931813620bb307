"""How much two changes of one layer have in common, from their factors."""

from __future__ import annotations

from ..factored import LowRank, inner, norm
from .singular import Singular, singular


def cosine(a: LowRank, b: LowRank) -> float:
    """⟨A, B⟩ / (‖A‖·‖B‖), −1 to 1; 0 if one is zero."""
    lengths = norm(a) * norm(b)
    return max(-1.0, min(1.0, inner(a, b) / lengths)) if lengths > 0 else 0.0


def subspace_overlap(a: LowRank, b: LowRank, energy: float | None = None) -> float:
    """The mean over column and row spaces of ‖X_aᵀ·X_b‖²_F / min(r_a, r_b), 0 to 1, X orthonormal bases.

    1 where one's spaces lie within the other's; for random ones about max(r_a, r_b)/n; 0 if one change is zero.
    Strength does not count: energy leaves only the main directions that make up this share of each ‖·‖²_F.
    Hu et al. 2021, arXiv 2106.09685, equation 4.
    """
    return overlap_of(singular(a, energy), singular(b, energy))


def overlap_of(first: Singular, second: Singular) -> float:
    """The same of directions that are known already."""
    r = min(len(first.S), len(second.S))
    if r == 0:
        return 0.0
    sides = ((first.U, second.U), (first.V, second.V))
    return min(1.0, sum(float((X.mT @ Y).square().sum()) for X, Y in sides) / (2 * r))

"""TSV-M: the singular directions of all changes side by side, made orthogonal to each other."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..factored import LowRank
from .singular import polar, singular


def tsv(terms: Sequence[tuple[float, LowRank]], energy: float | None = None) -> LowRank:
    """P([U₁ … U_M])·blockdiag(w₁Σ₁, …)·P([V₁ … V_M])ᵀ with Δ_i = U_i·Σ_i·V_iᵀ and P the polar factor.

    Each Δ_i keeps its share of directions, the first min(n, k)/M (at least one): more could not be orthogonal. LoRAs
    seldom have so many; energy cuts each further, to those that make up this share of ‖Δ_i‖²_F. Directions that
    several share to within 1e-6 stay one: there P is the partial isometry, and equal changes give their mean.
    Rank: the sum of those kept.  float64.
    Gargiulo et al. 2024, arXiv 2412.00081 (TSV-Merge).
    """
    n, k = terms[0][1].up.shape[0], terms[0][1].down.shape[1]
    share = max(1, min(n, k) // len(terms))
    parts = [singular(change, energy).cut(share) for _, change in terms]
    S = torch.cat([weight * part.S for (weight, _), part in zip(terms, parts, strict=True)])
    U, V = polar(torch.cat([part.U for part in parts], 1)), polar(torch.cat([part.V for part in parts], 1))
    return LowRank(U * S, V.mT)

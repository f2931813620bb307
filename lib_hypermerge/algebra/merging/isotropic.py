"""Iso-C and Iso-CTS: every direction of the merged change is made equally strong."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..factored import LowRank, weighted_sum
from .singular import Singular, polar, singular

_COMMON = 0.8  # share of Iso-CTS's directions that come from the sum, the paper's value


def iso_c(terms: Sequence[tuple[float, LowRank]], energy: float | None = None) -> LowRank:
    """σ̄·U·Vᵀ with Σ w·Δ = U·Σ·Vᵀ and σ̄ the mean of Σ.

    The paper's mean runs over all min(n, k) values. A sum of LoRAs has no directions beyond its rank, their values
    are zero, so here it runs over the directions that are not rounding noise; energy: over the first that make up
    this share of the sum's ‖·‖²_F, so that weak ones are not lifted to the strength of the strong.  float64.
    Marczak et al. 2025, arXiv 2502.04959, section 4 (Iso-C).
    """
    return _flat(singular(weighted_sum(terms), energy))


def iso_cts(terms: Sequence[tuple[float, LowRank]], energy: float | None = None) -> LowRank:
    """As `iso_c`, with the sum's weakest directions given up for directions of the single changes.

    Of the sum's r directions the first 0.8·r stay; from what each w·Δ_i has outside their column space come the first
    s = 0.2·r/M, rounded down, and the common ones are as many as make r again; all U and all V together are made
    orthogonal by the polar factor, and all get the mean of their values. Where s is 0 this is `iso_c`.  float64.
    Marczak et al. 2025, arXiv 2502.04959, section 4 (Iso-CTS).
    """
    whole = singular(weighted_sum(terms), energy)
    own = (len(whole.S) - int(_COMMON * len(whole.S))) // len(terms)
    common = whole.cut(len(whole.S) - own * len(terms))
    parts = [common]
    for weight, change in terms if own else ():
        up = change.up.double()
        rest = up - common.U @ (common.U.mT @ up)
        parts.append(singular(LowRank(rest, change.down, weight * change.scale)).cut(own))
    U, V = torch.cat([part.U for part in parts], 1), torch.cat([part.V for part in parts], 1)
    return _flat(Singular(polar(U), torch.cat([part.S for part in parts]), polar(V)))


def _flat(parts: Singular) -> LowRank:
    return LowRank(parts.U * (parts.S.sum() / max(1, len(parts.S))), parts.V.mT)

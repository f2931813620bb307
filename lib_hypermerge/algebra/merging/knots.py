"""KnOTS: changes expressed over one common basis before they are merged entry by entry."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..factored import LowRank
from .singular import singular
from .ties import ties

_NOISE = 1e-13  # of a part's norm: entries below are rounding and have no say about a sign


def knots(terms: Sequence[tuple[float, LowRank]], density: float) -> LowRank:
    """U·T with [Δ₁ … Δ_M] = U·Σ·[V₁ᵀ … V_Mᵀ] and T = TIES of the parts Σ·V_iᵀ; rank at most the sum of all ranks.

    With T = Σ_i w_i·Σ·V_iᵀ instead it would be the weighted sum itself, for U·Σ·V_iᵀ = Δ_i. Trimming and signs are
    decided among the entries over the common basis, so as `ties`, on parts that are thin: (m, k), m ≤ Σr_i.
    The paper writes the merge on V_iᵀ; its published runs trim Σ·V_iᵀ, as is done here, where an entry's size is what
    it adds to the change.  float64.
    Stoica et al. 2024, arXiv 2410.19735, figure 1.
    """
    U, parts = common_basis([change for _, change in terms])
    return LowRank(U, ties(parts, [weight for weight, _ in terms], density))


def common_basis(changes: Sequence[LowRank]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(U (n, m), [Σ·V_iᵀ (m, k), …]) with U·Σ·V_iᵀ = Δ_i for each, from thin factors, float64."""
    up = torch.cat([change.scale * change.up.double() for change in changes], 1)
    # the concatenation is up · blockdiag(downs), and the QR of a block diagonal matrix is that of its blocks
    rights = [torch.linalg.qr(change.down.double().mT) for change in changes]
    whole = singular(LowRank(up, torch.block_diag(*(right.R.mT for right in rights))))
    blocks = whole.V.split([right.R.shape[0] for right in rights])
    parts = [whole.S[:, None] * (right.Q @ V).mT for right, V in zip(rights, blocks, strict=True)]
    return whole.U, [part.where(abs(part) > _NOISE * torch.linalg.matrix_norm(part), 0.0) for part in parts]

"""Averaging of factors: once all point the same way in the space between up and down, ups and downs can be averaged."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..factored import LowRank
from .singular import singular

_PREFERENCE = 1e-8  # pairs directions by size where nothing else pairs them, well above rounding noise


def aligned(terms: Sequence[tuple[float, LowRank]]) -> LowRank:
    """max|w|·B̄·Ā, of the rank of one LoRA: B̄ = Σ ±ω_i·B_i·Q_i, Ā = Σ ω_i·Q_iᵀ·A_i, ω_i = |w_i|/Σ|w|, ± the sign of w_i.

    B_i = U√S and A_i = √S·Vᵀ are the balanced factors of Δ_i at the largest of all ranks, and Q_i is the rotation that
    brings them nearest to the first's: it minimises ‖B_i·Q − B₁‖² + ‖Qᵀ·A_i − A₁‖², so it is the polar factor of
    B_iᵀ·B₁ + A_i·A₁ᵀ (orthogonal Procrustes, Schönemann 1966). How a LoRA happened to be split in factors is of no
    account, and equal changes give themselves. Where changes differ B̄·Ā is not their mean: it has products of one
    LoRA's up with another's down.  float64.
    """
    parts = [singular(change) for _, change in terms]
    r = max(len(part.S) for part in parts)
    total = sum(abs(weight) for weight, _ in terms)
    first, up, down = None, torch.zeros(()), torch.zeros(())
    for (weight, _), part in zip(terms, parts, strict=True):
        B, A = (_padded(side * part.S.sqrt(), r) for side in (part.U, part.V))  # A is turned: (k, r)
        first = first or (B, A)
        Q = _rotation((B, A), first)
        up, down = up + (weight / total) * (B @ Q), down + (abs(weight) / total) * (A @ Q)
    return LowRank(up, down.mT, max(abs(weight) for weight, _ in terms))


def _padded(X: torch.Tensor, r: int) -> torch.Tensor:
    return torch.nn.functional.pad(X, (0, r - X.shape[1]))


def _rotation(part: tuple[torch.Tensor, torch.Tensor], onto: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The orthogonal Q (r, r) that brings the columns of both matrices nearest to the others'."""
    M = part[0].mT @ onto[0] + part[1].mT @ onto[1]
    size = torch.linalg.matrix_norm(part[0]) * torch.linalg.matrix_norm(onto[0])
    U, _, Vh = torch.linalg.svd(M + _PREFERENCE * size * torch.eye(len(M)).to(M))
    return U @ Vh

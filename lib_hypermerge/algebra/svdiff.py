"""Spectral shifts: W' = U·diag(relu(σ + s·δ))·Vᵀ where W = U·diag(σ)·Vᵀ (SVDiff, arXiv 2303.11305, eq. 3).

A weight is a matrix (n, k), a convolution flattened to it, a vector a single row; δ has min(n, k) numbers, in the
order of descending σ. Where values of σ (nearly) coincide the singular vectors are arbitrary, and with them what δ
means: that lies in the method.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..lazy import torch

_SQUARED = 1e-6  # where values below this share of the first are, their squares are rounding noise of float64


@dataclass(frozen=True)
class Spectrum:
    """W = U·diag(S)·Vh, thin: U (n, m), S (m,) descending, Vh (m, k), m = min(n, k), float64."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(n, k) of any weight."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)


def spectrum(weight: torch.Tensor) -> Spectrum:
    """The decomposition of a weight of any number of dimensions and any dtype.

    From the eigenvectors of the short side's Gram matrix, five times faster than torch.linalg.svd for large
    convolutions and in float64 more precise than that in float32; for weights that (nearly) lack a direction from
    torch.linalg.svd itself.
    """
    matrix = as_matrix(weight)
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # MPS has no float64
    wide = matrix.shape[0] <= matrix.shape[1]
    A = matrix if wide else matrix.mT
    w, E = torch.linalg.eigh(A @ A.mT)
    S, left = w.flip(0).clamp_min(0).sqrt(), E.flip(1)
    if S[-1] > _SQUARED * S[0]:
        right = (left.mT @ A) / S[:, None]
    else:
        left, S, right = torch.linalg.svd(A, full_matrices=False)
    parts = (left, S, right) if wide else (right.mT, S, left.mT)
    return Spectrum(*parts)


def gains(S: torch.Tensor, shifts: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """relu(σ + s·δ) − σ, what the shifts add to each singular value."""
    return (S + strength * shifts).relu() - S


def change(weight: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """W' − W in the weight's shape, dtype and device."""
    parts = spectrum(weight)
    up = parts.U * gains(parts.S, shifts.to(parts.S))
    return (up.to(weight) @ parts.Vh.to(weight)).reshape(weight.shape)


def extract(base: torch.Tensor, change: torch.Tensor, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, float]:
    """(δ (m,), ‖ΔW − what δ makes of it‖²_F): the shifts that come nearest to a change ΔW = W' − W.

    dtype: of the shifts, float64 by default.
    δ = diag(Uᵀ·W'·V) − σ = diag(Uᵀ·ΔW·V). Where that makes σ + δ negative relu cuts it off at 0, the nearest too.
    """
    parts = spectrum(base)
    A = as_matrix(change).to(parts.U)
    best = ((parts.U.mT @ A) * parts.Vh).sum(1)
    shifts = best if dtype is None else best.to(dtype)
    gain = gains(parts.S, shifts.double())
    # the part of ΔW off the diagonal of Uᵀ·ΔW·V stays, whatever the shifts are
    off = max(float(torch.linalg.vector_norm(A)) ** 2 - float(best.square().sum()), 0.0)
    return shifts, off + float((best - gain).square().sum())


def to_low_rank(
    weight: torch.Tensor, shifts: torch.Tensor, rank: int, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up (n, r), down (r, k), ‖error‖²_F) of the change: the directions with the largest |relu(σ + s·δ) − σ|.

    That is the best of this rank, because the change has these as its singular values. The factors are balanced and
    in float64.
    """
    parts = spectrum(weight)
    gain = gains(parts.S, shifts.to(parts.S), strength)
    order = gain.abs().argsort(descending=True, stable=True)
    kept, left = order[:rank], order[rank:]
    half = gain[kept].abs().sqrt()
    up, down = parts.U[:, kept] * (half * gain[kept].sign()), parts.Vh[kept] * half[:, None]
    return up, down, float(gain[left].square().sum())

"""Spectral shifts: W' = U·diag(relu(σ + s·δ))·Vᵀ where W = U·diag(σ)·Vᵀ (SVDiff, arXiv 2303.11305, eq. 3).

A weight is a matrix (n, k), a convolution flattened to it, a vector a single row; δ has min(n, k) numbers, in the
order of descending σ. Where values of σ (nearly) coincide the singular vectors are arbitrary, and with them what δ
means: that lies in the method.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Spectrum:
    """W = U·diag(S)·Vh, thin: U (n, m), S (m,) descending, Vh (m, k), m = min(n, k), in W's dtype."""

    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """(n, k) of any weight."""
    return weight[None] if weight.ndim == 1 else weight.flatten(1)


def spectrum(weight: torch.Tensor) -> Spectrum:
    """The decomposition of a weight (float32 or float64) of any number of dimensions."""
    return Spectrum(*torch.linalg.svd(as_matrix(weight), full_matrices=False))


def gains(S: torch.Tensor, shifts: torch.Tensor, strength: float = 1.0) -> torch.Tensor:
    """relu(σ + s·δ) − σ, what the shifts add to each singular value."""
    return (S + strength * shifts).relu() - S


def change(weight: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """W' − W in the weight's shape and dtype."""
    parts = spectrum(weight)
    return ((parts.U * gains(parts.S, shifts.to(parts.S))) @ parts.Vh).reshape(weight.shape)


def extract(base: torch.Tensor, tuned: torch.Tensor) -> torch.Tensor:
    """δ = diag(Uᵀ·W'·V) − σ: the shifts (m,) that bring the base as near to the tuned weight as shifts can.

    Where it makes σ + δ negative relu would cut it off at 0, which is the nearest too.
    """
    parts = spectrum(base)
    return ((parts.U.mT @ as_matrix(tuned)) * parts.Vh).sum(1) - parts.S


def to_low_rank(
    weight: torch.Tensor, shifts: torch.Tensor, rank: int, strength: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """(up (n, r), down (r, k), ‖error‖²_F) of the change: the directions with the largest |relu(σ + s·δ) − σ|.

    That is the best of this rank, because the change has these as its singular values. The factors are balanced.
    """
    parts = spectrum(weight)
    gain = gains(parts.S, shifts.to(parts.S), strength)
    order = gain.abs().argsort(descending=True, stable=True)
    kept, left = order[:rank], order[rank:]
    half = gain[kept].abs().sqrt()
    up, down = parts.U[:, kept] * (half * gain[kept].sign()), parts.Vh[kept] * half[:, None]
    return up, down, float(gain[left].double().square().sum())

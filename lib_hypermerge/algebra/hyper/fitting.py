"""Multipliers of given directions that come nearest to a given change: least squares by their Gram matrix."""

from __future__ import annotations

from ...lazy import torch

# Eigenvalues of the Gram matrix of unit directions below this are nothing: the inner products with a change come
# from float32 sums, and what lies in such a direction is their rounding.
_DEPENDENT = 1e-10


def fit(gram: torch.Tensor, inner: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(λ (K,), rank) of least ‖Δ − Σ_i λ_i D_i‖_F. gram: (K, K) ⟨D_i, D_j⟩, inner: (K,) ⟨Δ, D_i⟩; all float64.

    rank < K: the directions are dependent, and of all best λ these have the smallest Σ_i λ_i² ‖D_i‖²_F. A direction
    that is 0 has λ = 0.
    """
    lengths = gram.diagonal().clamp_min(0).sqrt()
    units = torch.where(lengths > 0, 1 / lengths.clamp_min(1e-300), 0.0)
    values, vectors = torch.linalg.eigh(gram * units[:, None] * units)
    kept = values > _DEPENDENT * values[-1:].clamp_min(0)
    basis = vectors[:, kept]
    return units * (basis @ ((basis.mT @ (units * inner)) / values[kept])), int(kept.sum())


def error2(energy: float, gram: torch.Tensor, inner: torch.Tensor, multipliers: torch.Tensor) -> float:
    """‖Δ − Σ_i λ_i D_i‖²_F of any λ, with ‖Δ‖²_F = energy. A difference of large numbers: near 0 it is as precise
    as energy and inner are."""
    return max(float(energy - 2 * multipliers @ inner + multipliers @ gram @ multipliers), 0.0)

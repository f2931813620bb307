"""The main directions of the models, each cut to its rank: what needs no iterations, for comparison.

Without rank limits the best K LoRAs are Σ_m v_mi Δ_m with v the leading eigenvectors of the Gram matrix; the
multipliers stay these eigenvectors here. They are orthogonal, so cutting each LoRA by its own SVD is the best for
them; what is not the best any more are the eigenvectors themselves, and that is what the joint solver improves.
"""

from __future__ import annotations

from ...lazy import torch


def main_directions(gram: torch.Tensor, count: int) -> torch.Tensor:
    """(M, count) orthonormal eigenvectors, the largest eigenvalue first; zeros behind the Gram matrix' rank."""
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values.flip(0), vectors.flip(1)
    vectors = vectors * (values > 1e-10 * values[0].clamp_min(0))
    found = vectors[:, :count]
    return torch.cat([found, found.new_zeros(len(found), max(0, count - found.shape[1]))], 1)


def independent(gram: torch.Tensor, share: float = 1e-10) -> int:
    """In how many independent directions the models differ, by more than this share of the largest eigenvalue."""
    values = torch.linalg.eigvalsh(gram)
    return int((values > share * values[-1].clamp_min(0)).sum())

"""Orthonormal bases that the changes of all models share, found by random products.

With A the (M·n, k) matrix of all changes Δ_m below each other: rows of V span the range of AᵀA·Ω, one step of
power iteration on A's row space (Halko, Martinsson, Tropp 2011, alg. 4.4), which a single reading of A gives, as
AᵀAΩ is a sum over A's rows. Cores are C_m = Uᵀ·Δ_m·Vᵀ with U for the columns of all Δ_m·Vᵀ side by side.
"""

from __future__ import annotations

from ...lazy import torch
from .. import svd

_BESIDE = 48  # directions that many models get more
_STEPS = 2  # of power iteration for U: on Δ_m·Vᵀ, which is small, they are cheap


def width_for(total_rank: int, n: int, k: int, models: int) -> tuple[int, int]:
    """(p, q): how many directions of columns and of rows the cores keep for LoRAs of that rank together.

    More than twice the rank, so that what the best LoRAs need is within it: the more models, the more of their own
    parts stands before it. As many as there are where that is not much more.
    """
    wanted = 2 * total_rank + 16 + min((models - 2) * total_rank, _BESIDE)
    rows, columns = min(k, models * n), min(n, models * k)
    q = rows if rows <= 1.25 * wanted else wanted
    p = columns if columns <= 1.25 * wanted else wanted
    return min(p, models * q), q


def orthonormal(Z: torch.Tensor) -> torch.Tensor:
    """(q, k) float32: rows that span the columns of Z (k, q), orthonormal to float32's precision.

    By Householder QR, as Z's columns may be far from independent; scaled first, so that nothing under- or overflows.
    """
    scale = float(Z.abs().max()) if Z.numel() else 0.0
    Z = Z / scale if scale > 0 else Z
    if Z.device.type == "mps":  # has no QR
        return torch.linalg.qr(Z.cpu()).Q.mT.contiguous().to(Z.device)
    return torch.linalg.qr(Z).Q.mT.contiguous()


def cores(W: torch.Tensor, p: int, seed: int) -> torch.Tensor:
    """(M, p, q) float32 from W = Δ_m·Vᵀ: (M, n, q) float32; W itself where p is n."""
    M, n, q = W.shape
    if p >= n:
        return W.contiguous()
    mixed = svd.gaussian(p, M * q, seed).mT.to(W.device).view(M, q, p)
    U = orthonormal(torch.bmm(W, mixed).sum(0))
    for _ in range(_STEPS):
        U = orthonormal(torch.bmm(W, (U @ W).mT).sum(0))
    return torch.matmul(U, W)

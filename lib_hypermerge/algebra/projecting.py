"""Factors of a lower rank by chance: a randomised SVD of a product, and random projections of its inner side.

Notation: A = s·B·D with B (n, r), D (r, k); r' the new rank. What is exact, `core.core_of`, needs about as many
operations, as r is small; these are here to be compared with it, and as other tools have them.
"""

from __future__ import annotations

from dataclasses import replace

from ..lazy import torch
from .core import core_of, distance2
from .factored import norm
from .lowrank import Factors, LowRank
from .slabs import cross, times

ACHLIOPTAS = 3.0  # his s of a sparse projection


def randomised(
    a: LowRank, rank: int, dtype: torch.dtype | None = None, seed: int = 0, oversample: int | None = None,
    steps: int = 2,
) -> Factors:  # fmt: skip
    """A's leading directions from a random sketch (Halko, Martinsson, Tropp 2011, alg. 4.4 and 5.1).

    rank: at most so many directions.  oversample: columns of the sketch beyond them; half the rank, but 16, by
    default.  steps: of power iteration.  S: of what was kept; below the true ones.  dtype and errors as of
    Core.factors; error2 and energy are those of A itself.
    """
    width = min(rank + (max(16, rank // 2) if oversample is None else oversample), a.rank, a.up.shape[0])
    X = torch.randn(a.down.shape[1], width, generator=_generator(seed), dtype=torch.float64).to(a.down.device)
    Q = _orthonormal(a.up, cross(a.down.mT, X))
    for _ in range(steps):
        X = _orthonormal(a.down.mT, cross(a.up, Q))
        Q = _orthonormal(a.up, cross(a.down.mT, X))
    rows = times(a.down.mT, cross(a.up, Q), torch.float64)[0].mT  # Qᵀ·B·D
    return _measured(a, LowRank(Q, rows, a.scale), rank, dtype)


def random_projection(
    a: LowRank, rank: int, dtype: torch.dtype | None = None, seed: int = 0, sparse: bool = False,
    s: float | None = None,
) -> Factors:  # fmt: skip
    """s·(B·Rᵀ)·(R·D) with a random R (r', r) of E[RᵀR] = I: A itself in the mean over seeds, but far off each time.

    R: normal numbers of variance 1/r'; or sparse, ±√(s/r') with probability 1/s and else 0, s being √r by default
    (Li, Hastie, Church 2006) or 3 (Achlioptas 2003).  The same change is given by its own singular directions,
    balanced and ordered, and S are its singular values; it has fewer than r' where r is lower.
    dtype and errors as of Core.factors; error2 and energy are those of A itself; `expected_error2` foretells it.
    """
    R = _sparse(rank, a.rank, seed, _sparsity(a, s)) if sparse else _normal(rank, a.rank, seed)
    up, down = (times(X, R.mT, torch.float64)[0] for X in (a.up, a.down.mT))
    return _measured(a, LowRank(up, down.mT, a.scale), rank, dtype)


def expected_error2(a: LowRank, rank: int, sparse: bool = False, s: float | None = None) -> float:
    """The mean of ‖A − A'‖²_F over all seeds of `random_projection`.

    With G = BᵀB and H = D·Dᵀ, and as Cov[(RᵀR)_ij, (RᵀR)_kl] = (δ_ik·δ_jl + δ_il·δ_jk + (s − 3)·δ_ijkl)/r', where
    s − 3 stands for the fourth cumulant and is 0 for normal numbers:
    E‖B·(RᵀR − I)·D‖² = (tr G · tr H + tr(G·H) + (s − 3)·Σ G_ii·H_ii)/r', whose first two are ‖B‖²‖D‖² + ‖B·D‖².
    """
    G, H = cross(a.up), cross(a.down.mT)
    sizes = G.diagonal(), H.diagonal()
    total = float(sizes[0].sum() * sizes[1].sum() + (G * H).sum())
    if sparse:
        total += (_sparsity(a, s) - 3) * float((sizes[0] * sizes[1]).sum())
    return a.scale**2 * total / rank


def _measured(a: LowRank, kept: LowRank, rank: int, dtype: torch.dtype | None) -> Factors:
    """Factors of what was kept, measured against A."""
    made = core_of(kept).factors(rank, dtype)
    return replace(made, error2=distance2(a, LowRank(made.up, made.down)), energy=norm(a) ** 2)


def _orthonormal(X: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """Columns that span those of X·C: (m, p) float64."""
    return torch.linalg.qr(times(X, C, torch.float64)[0]).Q


def _sparsity(a: LowRank, s: float | None) -> float:
    return max(1.0, a.rank**0.5 if s is None else s)


def _normal(rank: int, r: int, seed: int) -> torch.Tensor:
    return torch.randn(rank, r, generator=_generator(seed), dtype=torch.float64) / rank**0.5


def _sparse(rank: int, r: int, seed: int, s: float) -> torch.Tensor:
    dice = torch.rand(rank, r, generator=_generator(seed), dtype=torch.float64)
    signs = (dice < 0.5 / s).double() - (dice >= 1 - 0.5 / s).double()
    return signs * (s / rank) ** 0.5


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

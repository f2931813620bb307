"""Matrices that are given as products: sums, norms, spectra and best approximations without ever forming n×k.

All in float64. With up = Q_B·R_B and downᵀ = Q_A·R_A (QR), up·down = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ: the small core has its
singular values, and cutting the core's SVD is the best approximation of the whole (Eckart and Young).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..lazy import torch
from .lowrank import Factors, check_range, least_squares, signs_of
from .rank import by_energy

_NOISE = 1e-15  # of float64: singular values below this share of the factors' norms are nothing but rounding


@dataclass(frozen=True)
class LowRank:
    """A (n, k) = scale · up · down with up (n, r), down (r, k).

    The two may be of different dtypes: a factor that stands in a file is as stored.
    """

    up: torch.Tensor
    down: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def weighted_sum(terms: Iterable[tuple[float, LowRank]]) -> LowRank:
    """Σ w·A exactly: factors side by side, in float64, of as many columns as all terms have together.

    The terms have the same n and k; there is at least one.
    """
    terms = list(terms)
    ups = [weight * term.scale * term.up.double() for weight, term in terms]
    return LowRank(torch.cat(ups, 1), torch.cat([term.down.double() for _, term in terms]))


def inner(a: LowRank, b: LowRank) -> float:
    """⟨A, B⟩ = tr(AᵀB), from r×r products."""
    ups = a.up.double().mT @ b.up.double()
    downs = a.down.double() @ b.down.double().mT
    return a.scale * b.scale * float((ups * downs).sum())


def norm(a: LowRank) -> float:
    """‖A‖_F."""
    return max(inner(a, a), 0.0) ** 0.5


def singular_values(a: LowRank) -> torch.Tensor:
    """All min(r, n, k) of them, (m,) float64 on the CPU, descending; those behind A's rank are rounding noise."""
    left = torch.linalg.qr(a.up.double(), mode="r").R
    right = torch.linalg.qr(a.down.double().mT, mode="r").R
    return abs(a.scale) * torch.linalg.svdvals(left @ right.mT).cpu()


def compress(
    a: LowRank, dtype: torch.dtype | None = None, rank: int | None = None, energy: float | None = None
) -> Factors:
    """The best factors of A, balanced and with alpha = rank in mind: A ≈ up·down.

    rank: at most so many directions.  energy: only as many as keep this share of ‖A‖²_F.  Neither: all that are
    not rounding noise.  Never fewer than one.  dtype: of the factors, float32 by default; the second solves
    least squares against the rounded first, so rounding the first costs nothing, and error2 is measured as rounded.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    dtype = dtype or torch.float32
    left, RB = torch.linalg.qr(a.up.double())
    right, RA = torch.linalg.qr(a.down.double().mT)
    U, S, Vh = torch.linalg.svd(a.scale * (RB @ RA.mT), full_matrices=False)
    total = float(S.square().sum())
    noise = _NOISE * abs(a.scale) * float(torch.linalg.matrix_norm(RB) * torch.linalg.matrix_norm(RA))
    r = int((noise < S).sum())
    if energy is not None:
        r = min(r, by_energy(S.cpu(), total, energy, complete=True) or r)
    r = max(1, r if rank is None else min(r, rank))
    half = S[:r].sqrt()
    up, down = left @ (U[:, :r] * half), (half[:, None] * Vh[:r]) @ right.mT
    alive = up.to(dtype).any(0)  # not too small for dtype
    r = max(1, int(alive.int().cumprod(0).sum()))
    up, down = up[:, :r], down[:r]
    first, second = _rounded(up, down, dtype)
    tail = LowRank(left @ (U[:, r:] * S[r:]), Vh[r:] @ right.mT)
    # up·down − first·second, each summand small by itself, so that its norm comes out precise
    rest = ((1.0, tail), (1.0, LowRank(up - first.double(), second)), (1.0, LowRank(up, down - second.double())))
    signs = signs_of(first)
    return Factors(
        (first * signs).cpu().contiguous(),
        (second * signs[:, None]).cpu().contiguous(),
        S[:r].cpu(),
        norm(weighted_sum(rest)) ** 2,
        total,
    )


def _rounded(up: torch.Tensor, down: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """up in dtype, and the down in dtype that goes best with it."""
    first = up.to(dtype)
    check_range(first, dtype)
    wide = first.double()
    if dtype != torch.float64 and wide.any():
        down = least_squares(wide.mT @ wide, wide.mT @ up @ down)
    second = down.to(dtype)
    check_range(second, dtype)
    return first, second

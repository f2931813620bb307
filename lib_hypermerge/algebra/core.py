"""The small core of a matrix that is given as a product: its spectrum, and best factors of any rank from thin products.

A = s·B·D with B (n, r) and D (r, k). With B = Q_B·R_B and Dᵀ = Q_D·R_D (QR) the core M = R_B·R_Dᵀ has A's singular
values but for s, M = U·σ·Vᵀ, and cutting it is the best approximation of the whole (Eckart and Young). The Q are never
made: as A·v = S·u, A's factors are B·(R_Dᵀ·V)·s/√S and |s|/√S·(Uᵀ·R_B)·D, S = |s|·σ. Nor need R come from a QR: any
with RᵀR = BᵀB serves, and Cholesky's of the Gram matrix costs a third of the time where B's columns are far from
dependent.

All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import NumericalError
from ..lazy import torch
from .lowrank import Factors, LowRank, check_range, least_squares, signs_of
from .slabs import cross, times

_NOISE = 1e-15  # of float64: singular values below this share of the terms' sizes are nothing but rounding
_SMALL = 1 << 14  # elements of a factor that is not worth a Gram matrix

# Of unit columns the Gram matrix G comes out within about ε·r of the true one (2-norm, ε = 2e-16), so Q = B·R⁻¹ is
# orthonormal but for δ ≤ ε·r·‖G⁻¹‖. A cut of the core then misses the optimum by a factor of 1 + 4δ at most, and S is
# precise to δ/2. r·tr(G⁻¹) below 1e9 keeps 4δ below 1e-6 (measured: 1e-12); beyond, R comes from a QR of the factor.
_WORST = 1e9

# The squared error as a difference of energies is precise to about ε of what is subtracted: to 1e-5, mostly far
# better, where it is above this share of that; below, it is the norm of the difference itself.
_DIFFERENCE = 1e-10


@dataclass(frozen=True)
class Core:
    """What there is to know of A = a.scale·a.up·a.down, to make factors of several ranks from.

    S: its min(r, n, k) singular values, (m,) float64 on the CPU, descending.  rank: how many are more than rounding
    noise, 0 for a product of nothing.  energy: ‖A‖²_F.  gross: the sizes of what adds up to it, more where terms
    cancel.  lift (r, m), drop (m, r): up·lift and drop·down are A's best factors, whose first columns and rows are
    those of every lower rank; on the CPU.
    """

    a: LowRank
    S: torch.Tensor
    rank: int
    energy: float
    gross: float
    lift: torch.Tensor
    drop: torch.Tensor

    def factors(self, rank: int | None = None, dtype: torch.dtype | None = None) -> Factors:
        """The best factors of at most this rank, balanced and with alpha = rank in mind: A ≈ up·down.

        rank: all directions that are not rounding noise by default; never fewer than one.  dtype: float32 by default.
        The second factor solves least squares against the rounded first, so rounding the first costs nothing, and
        error2 is measured as rounded; directions that dtype rounds to zero are left out.
        Raises NumericalError if dtype cannot hold the numbers.
        """
        dtype = dtype or torch.float32
        a, r = self.a, max(1, self.rank if rank is None else min(rank, self.rank))
        first, FF, FB = times(a.up, self.lift[:, :r], dtype)
        lengths2 = FF.diagonal()
        check_range(lengths2, dtype)
        r = max(1, int((lengths2 > 0).int().cumprod(0).sum()))
        first, FF, FB = first[:, :r], FF[:r, :r], FB[:r]
        best = self.drop[:r] if dtype == torch.float64 else a.scale * least_squares(FF, FB)
        second, XX, XD = times(a.down.mT, best.mT, dtype)
        check_range(XX.diagonal(), dtype)
        error2 = self.energy - 2 * a.scale * float((FB * XD).sum()) + float((FF * XX).sum())
        if error2 < _DIFFERENCE * self.gross:
            error2 = _norm2_of_difference(a, LowRank(first, second.mT))
        signs = signs_of(first)
        up, down = first.mul_(signs).cpu().contiguous(), second.mul_(signs).mT.cpu().contiguous()
        return Factors(up, down, self.S[:r].clone(), error2, self.energy)


def core_of(a: LowRank) -> Core:
    """The core of a product of any shape, condition and scale. Raises NumericalError for NaN and Inf."""
    left, right = _triangle(a.up), _triangle(a.down.mT)
    M = left @ right.mT
    if not M.isfinite().all():
        raise NumericalError(
            "A change holds NaN or Inf, or numbers too large to multiply.",
            "The file is damaged, or its training failed.",
            "Get a sound copy of the file.",
        )
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    size, sign = abs(a.scale), -1.0 if a.scale < 0 else 1.0
    lives = size * S > size * _NOISE * float((left.norm(dim=0) * right.norm(dim=0)).sum())
    half = torch.where(lives, (size / S).sqrt(), 0.0)  # what is nothing but noise becomes zero
    return Core(
        a,
        size * S,
        rank=int(lives.sum()),
        energy=float((size * S).square().sum()),
        gross=size**2 * float((left.mT @ left * (right.mT @ right)).abs().sum()),
        lift=right.mT @ (sign * Vh.mT * half),
        drop=half[:, None] * U.mT @ left,
    )


def distance2(a: LowRank, b: LowRank) -> float:
    """‖A − B‖²_F, precise even where it is ε² of theirs."""
    parts = [(x.scale * y.scale, cross(x.up, y.up) * cross(x.down.mT, y.down.mT)) for x, y in ((a, a), (a, b), (b, b))]
    square, both, other = (scale * float(part.sum()) for scale, part in parts)
    error2 = square - 2 * both + other
    if error2 < _DIFFERENCE * sum(abs(scale) * float(part.abs().sum()) for scale, part in parts):
        return _norm2_of_difference(a, b)
    return error2


def _norm2_of_difference(a: LowRank, b: LowRank) -> float:
    left, right = _triangle_exactly(a.up, b.up), _triangle_exactly(a.down.mT, b.down.mT)
    ours, theirs = (scale * left[:, part] @ right[:, part].mT for scale, part in (
        (a.scale, slice(a.rank)), (b.scale, slice(a.rank, None))
    ))  # fmt: skip
    return float(torch.linalg.vector_norm(ours - theirs)) ** 2


def _triangle(X: torch.Tensor) -> torch.Tensor:
    """R (p, r) float64 on the CPU with RᵀR = XᵀX and p ≤ r; X: (m, r)."""
    m, r = X.shape
    R = _cholesky(cross(X)) if m >= r and m * r > _SMALL else None
    return _triangle_exactly(X) if R is None else R


def _cholesky(G: torch.Tensor) -> torch.Tensor | None:
    """R with RᵀR = G, or None where the columns behind G are too nearly dependent for that to be precise."""
    sizes = G.diagonal().sqrt()
    if not (sizes > 0).all():
        return None
    L, failed = torch.linalg.cholesky_ex(G / sizes / sizes[:, None])
    if failed:
        return None
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False)
    trace = float(inverse.square().sum())  # of the inverse of unit columns' G
    return L.mT * sizes if len(L) * trace < _WORST else None


def _triangle_exactly(*parts: torch.Tensor) -> torch.Tensor:
    """R of the parts side by side, each (m, r_i), by QR: of some rows at a time, below the R of those before."""
    width = sum(part.shape[1] for part in parts)
    step, R = max(4 * width, 2048), torch.empty(0, width, dtype=torch.float64, device=parts[0].device)
    for start in range(0, parts[0].shape[0], step):
        rows = torch.cat([part[start : start + step].double() for part in parts], 1)
        R = torch.linalg.qr(torch.cat((R, rows)), mode="r").R
    return R.cpu()

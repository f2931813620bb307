"""Factors up·down of a weight change: stored precisely as they will be read, and measured as stored."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ..errors import NumericalError
from ..lazy import torch
from . import svd
from .products import times_transposed

_PRECISE_BELOW = 1e-3  # relative squared error under which bf16 products, Gram matrices and sums in float32 show
_RELATIVE_RANK = 1e-6  # singular values below this share of the first are rounding noise of float32
_ORDINARY = (1e-20, 1e20)  # energies outside are rescaled: float32 could not hold squares of the entries


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


@dataclass(frozen=True)
class Factors:
    """A ≈ up · down with up (n, r) and down (r, k) in the output's dtype, on the CPU, ordered by S.

    S: (r,) float64.  error2: ‖A − up·down‖²_F of the rounded factors, measured.  energy: ‖A‖²_F.
    """

    up: torch.Tensor
    down: torch.Tensor
    S: torch.Tensor
    error2: float
    energy: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


@dataclass(frozen=True)
class Matrix:
    """A weight change A (n, k) float32, its copy for cheap products, and ‖A‖²_F."""

    A: torch.Tensor
    energy: float
    low: torch.Tensor | None = None

    @property
    def wide(self) -> bool:
        return self.A.shape[0] <= self.A.shape[1]

    def short_first(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.wide:
            return self.A, self.low
        return self.A.mT, None if self.low is None else self.low.mT

    @property
    def unit(self) -> float:
        """A power of two that brings an extreme A to ordinary size; 1 for every other."""
        if self.energy == 0 or _ORDINARY[0] < self.energy < _ORDINARY[1]:
            return 1.0
        return 2.0 ** max(-100, min(100, -round(math.log2(self.energy) / 2)))


def decompose(matrix: Matrix, r: int, method: str = "auto", seed: int = 0) -> svd.Basis:
    """Leading singular vectors and values of a matrix of any orientation, for ranks up to r.

    method: auto, randomised, exact, or spectrum: exact with every singular value precise, as sums of
    them need.  The basis is that of the short-first orientation.
    """
    A, low = matrix.short_first()
    a, b = A.shape
    r = min(r, a)
    if method == "auto":
        method = svd.choose_method(a, b, r, low is not None and low.dtype == torch.bfloat16)
    width, blocks = svd.krylov_size(r)
    short_of_directions = min(width, a) * max(1, min(blocks, a // min(width, a))) < r
    if matrix.unit != 1:
        basis = svd.exact_basis(A * matrix.unit, r)
        return replace(basis, S=basis.S / matrix.unit)
    if method in ("exact", "spectrum") or matrix.energy == 0 or short_of_directions:
        return svd.exact_basis(A, r, precise=method == "spectrum")
    return svd.randomised_basis(A, r, seed=seed, low=low)


def factorise(matrix: Matrix, basis: svd.Basis, r: int, dtype: torch.dtype) -> Factors:
    """The best factors of rank r in dtype, given a basis from `decompose`.

    One factor is the basis, balanced by √S and rounded; the other solves least squares against the
    rounded one, so rounding the first costs nothing. Directions that are only float32 noise, or that
    dtype rounds to zero, are left out, so the rank can come out lower; it is never below 1.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    A, _ = matrix.short_first()
    left, right, S, error2 = _complete(A, matrix.energy, basis, r, dtype)
    if error2 < _PRECISE_BELOW * matrix.energy:
        left, right, S, error2 = _complete(A, matrix.energy, svd.refine(A, basis), r, dtype, precise=True)
    up, down = (left, right) if matrix.wide else (right.mT, left.mT)
    signs = signs_of(up)
    up, down = (up * signs).cpu().contiguous(), (down * signs[:, None]).cpu().contiguous()
    check_range(up, dtype)
    check_range(down, dtype)
    return Factors(up, down, S, error2, matrix.energy)


def check_range(factor: torch.Tensor, dtype: torch.dtype) -> None:
    """NumericalError if dtype could not hold a factor."""
    if not factor.isfinite().all():
        raise NumericalError(
            f"A change is too large for {str(dtype).removeprefix('torch.')}.",
            "Its factors overflow the output's number format.",
            "Choose fp32 or bf16 as the output format.",
        )


def _complete(A: torch.Tensor, energy: float, basis: svd.Basis, r: int, dtype: torch.dtype, precise: bool = False):
    """(left (a, r), right (r, b), S, error²) from a basis of one side; M is A seen from that side.

    precise: float64 sums, and the error from the residual itself rather than as a difference of energies.
    """
    S = basis.S[: min(r, len(basis.rows))]
    S = S[: max(1, int((_RELATIVE_RANK * S[0] < S).sum()))]
    M = A.mT if basis.side == "left" else A  # rows of `first` live in M's row space
    first = basis.rows[: len(S)] * S.sqrt().to(A.device, torch.float32)[:, None]
    first = first.to(dtype).float()
    check_range(first, dtype)
    alive = first.any(1)
    if not alive.all():  # too small for dtype
        alive = alive if alive.any() else torch.arange(len(S), device=A.device) == 0
        first, S = first[alive], S[alive.cpu()]
    if precise:
        P, G = (svd.product64(first, X).cpu() for X in (M.mT, first.mT))  # (r, m), (r, r)
    else:
        P, G = times_transposed(M, first).mT.cpu().double(), (first @ first.mT).cpu().double()
    second = least_squares(G, P).to(dtype).float()  # (r, m)
    if precise:
        error2 = _residual(M, second.to(A.device), first)
    else:
        gram2 = (second @ second.mT).double()
        error2 = max(energy - 2 * float((second.double() * P).sum()) + float((gram2 * G).sum()), 0.0)
    pair = (first.to(dtype), second.to(A.device, dtype))
    left, right = (pair[1].mT, pair[0]) if basis.side == "right" else (pair[0].mT, pair[1])
    return left, right, S, error2


def least_squares(G: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """X that minimises ‖M − Xᵀ·F‖, given G = F·Fᵀ and P = F·Mᵀ, all float64."""
    scale = G.diagonal().clamp_min(1e-300).rsqrt()  # equilibrate: S may span many orders of magnitude
    G = G * scale[:, None] * scale
    G.diagonal().add_(1e-10)  # rows that rounding made equal stay solvable
    return torch.linalg.solve(G, scale[:, None] * P) * scale[:, None]


def signs_of(up: torch.Tensor) -> torch.Tensor:
    """±1 per column, to make each column's largest entry positive, so that equal inputs give equal files."""
    wide = up.float()
    high, low = wide.amax(0), -wide.amin(0)  # in half precision, or with argmax, ten times slower
    signs = torch.where(low > high, -1.0, 1.0).to(up.dtype)
    if (tied := low == high).any():  # the first of the largest decides
        first = wide[:, tied].abs().argmax(0, keepdim=True)
        signs[tied] = torch.where(wide[:, tied].gather(0, first)[0] < 0, -1.0, 1.0).to(up.dtype)
    return signs


def _residual(M: torch.Tensor, second: torch.Tensor, first: torch.Tensor) -> float:
    """‖M − secondᵀ·first‖²_F in float64, a slab of rows at a time; M: (m, w)."""
    if M.device.type == "mps":  # has no float64
        M, second, first = M.cpu(), second.cpu(), first.cpu()
    first, total, step = first.double(), 0.0, max(1, (1 << 20) // max(1, M.shape[1]))
    for start in range(0, M.shape[0], step):
        slab = M[start : start + step].double()
        slab.addmm_(second[:, start : start + step].mT.double(), first, alpha=-1.0)
        total += float(torch.linalg.vector_norm(slab)) ** 2
    return total

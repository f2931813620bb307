"""The Kronecker product nearest to a matrix: A ≈ w1 ⊗ w2.

With its blocks as rows, A becomes R (u·v, p·q), and ‖A − w1 ⊗ w2‖ = ‖R − vec(w1)·vec(w2)ᵀ‖: the best pair is R's
leading singular pair (Van Loan & Pitsianis 1993, "Approximation with Kronecker products", th. 2.1). Where w2 is to be
of low rank, the best w2 for a w1 is the truncation of the best of all (its multiples fill a subspace), and the
best w1 for a w2 a projection; the two are found by turns, which never raises the error.

LoKr's w1 (u, v) and w2 (p, q[, kh, kw]) make a weight (u·p, v·q[, kh, kw]); flattened, w2's columns are q·kh·kw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..lazy import torch
from .lowrank import Factors, Matrix, check_range, decompose, factorise

_TURNS = 4
_SLAB = 1 << 20  # elements that are looked at together
_FACTORS = (2, 4, 8, 16, -1)  # what people ask LyCORIS for; -1: as near to a square as it gets


@dataclass(frozen=True)
class Sizes:
    """w1 is (u, v); w2 (p, w) with w = q·kh·kw, of low rank unless rank is None."""

    u: int
    v: int
    p: int
    w: int
    rank: int | None = None

    @property
    def numbers(self) -> int:
        """How many are stored."""
        second = self.p * self.w if self.rank is None else self.rank * (self.p + self.w)
        return self.u * self.v + second


@dataclass(frozen=True)
class Kronecker:
    """A ≈ w1 ⊗ w2 in the output's dtype, on the CPU; w2 (p, w) whole, or as up (p, r) and down (r, w).

    error2: ‖A − that‖²_F of the rounded numbers, measured.
    """

    w1: torch.Tensor
    w2: torch.Tensor | None
    up: torch.Tensor | None
    down: torch.Tensor | None
    error2: float

    @property
    def numbers(self) -> int:
        """How many are stored."""
        return sum(part.numel() for part in (self.w1, self.w2, self.up, self.down) if part is not None)


def factorisation(size: int, factor: int) -> tuple[int, int]:
    """size = a·b with a ≤ b as LyCORIS splits a layer's side.

    By the factor, where it divides; else a grows from 1 through divisors up to it (-1: without limit) as long as a + b
    falls. So files are of sizes that LyCORIS makes again from the factor alone.
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    best = 1
    for a in range(2, math.isqrt(size) + 1):
        if size % a == 0 and (factor < 0 or a <= factor):
            best = a
    return best, size // best


def choices(n: int, c: int, kernel: int, numbers: int) -> list[Sizes]:
    """The sizes for a weight (n, c, kernel elements) that take at most so many numbers, w2 whole where it fits.

    LyCORIS holds a w2 whole from half its larger side on, so lower ranks only.
    """
    found: dict[tuple[int, int], Sizes] = {}
    for factor in _FACTORS:
        (u, p), (v, q) = factorisation(n, factor), factorisation(c, factor)
        if u * v == 1 or (u, v) in found:
            continue
        sizes = Sizes(u, v, p, q * kernel)
        if sizes.numbers > numbers:
            affordable = (numbers - u * v) // (p + q * kernel)
            sizes = Sizes(u, v, p, q * kernel, min(affordable, (max(p, q) - 1) // 2, min(p, q * kernel)))
        if sizes.rank is None or sizes.rank > 0:
            found[u, v] = sizes
    return list(found.values())


def fit(
    matrix: Matrix,
    choices: list[Sizes],
    dtype: torch.dtype,
    seed: int = 0,
    method: str = "auto",
    target: float | None = None,
) -> Kronecker | None:
    """The nearest product of any of these sizes; None if there is none to choose from, or nothing to fit.

    Work is in float32 with the decompositions' float64 sums.  method: of `decompose`.  target: a squared error to
    reach; None where no product does, but for rounding.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    if matrix.energy == 0:
        return None
    unit = matrix.unit
    scaled = matrix if unit == 1 else Matrix(matrix.A * unit, matrix.energy * unit * unit)
    wholes = [(*_whole(scaled, sizes, seed, method), sizes) for sizes in choices]
    most, best = 0.0 if target is None else scaled.energy - target * unit * unit, None
    for kept, w1, sizes in sorted(wholes, key=lambda found: -found[0]):
        if kept <= most:  # and of low rank it keeps no more
            break
        if sizes.rank is not None:
            kept, w1 = _cut(scaled, sizes, sizes.rank, w1, seed, method)
        if kept > most:
            most, best = kept, (sizes, w1)
    return None if best is None else _rounded(matrix, best[0], best[1] / unit, dtype, seed, method)


def blocks(A: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """R (u·v, p·w): the blocks of A (u·p, v·w) as rows."""
    u, v, p, w = sizes.u, sizes.v, sizes.p, sizes.w
    return A.reshape(u, p, v, w).permute(0, 2, 1, 3).reshape(u * v, p * w)


def _whole(matrix: Matrix, sizes: Sizes, seed: int, method: str) -> tuple[float, torch.Tensor]:
    """(energy that the best product with a whole w2 keeps, its w1 as a unit vector (u·v,))."""
    R = blocks(matrix.A, sizes)
    w1 = _unit(_truncated(Matrix(R, matrix.energy), 1, torch.float32, seed, method).up[:, 0].to(R.device))
    return _energy(w1 @ R), w1


def _cut(
    matrix: Matrix, sizes: Sizes, rank: int, w1: torch.Tensor, seed: int, method: str
) -> tuple[float, torch.Tensor]:
    """The same with a w2 of low rank, by turns from the w1 of a whole one."""
    R, kept, best = blocks(matrix.A, sizes), 0.0, w1
    for _ in range(_TURNS):
        whole = (w1 @ R).reshape(sizes.p, sizes.w)
        factors = _truncated(Matrix(whole, _energy(whole)), rank, torch.float32, seed, method)
        if (now := factors.energy - factors.error2) <= kept:
            break
        kept, best = now, w1
        w1 = _unit(R @ (factors.up @ factors.down).to(R.device).flatten())
    return kept, best


def _truncated(matrix: Matrix, rank: int, dtype: torch.dtype, seed: int, method: str) -> Factors:
    return factorise(matrix, decompose(matrix, rank, method, seed), rank, dtype)


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / torch.linalg.vector_norm(x)


def _rounded(matrix: Matrix, sizes: Sizes, w1: torch.Tensor, dtype: torch.dtype, seed: int, method: str) -> Kronecker:
    """w1 rounded, w2 the best for it; entries of both of about one size, w1's largest positive."""
    R = blocks(matrix.A, sizes)
    whole = w1 @ R / w1.square().sum()
    even = ((whole.square().mean() / w1.square().mean()) ** 0.25).item()
    largest = w1[w1.abs().argmax()]
    first = (w1 * (even if largest > 0 else -even)).to(dtype)
    check_range(first, dtype)
    wide = first.float()
    whole = wide @ R / wide.square().sum()
    w2 = up = down = None
    if sizes.rank is None:
        w2 = whole.to(dtype)
        check_range(w2, dtype)
        second = w2.float()
    else:
        whole = whole.reshape(sizes.p, sizes.w)
        factors = _truncated(Matrix(whole, _energy(whole)), sizes.rank, dtype, seed, method)
        up, down = factors.up, factors.down
        second = (up.to(R.device).float() @ down.to(R.device).float()).flatten()
    error2 = sum(_energy(row - scale * second) for row, scale in zip(R, wide, strict=True))
    return Kronecker(
        first.reshape(sizes.u, sizes.v).cpu(),
        None if w2 is None else w2.reshape(sizes.p, sizes.w).cpu(), up, down, error2,
    )  # fmt: skip


def _energy(x: torch.Tensor) -> float:
    """‖x‖²_F, summed in float64 where the device has it, a slab at a time."""
    flat = x.flatten()
    return sum(_slab(flat[start : start + _SLAB]) for start in range(0, len(flat), _SLAB))


def _slab(x: torch.Tensor) -> float:
    return float((x if x.device.type == "mps" else x.double()).square().sum())

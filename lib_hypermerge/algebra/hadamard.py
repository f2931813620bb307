"""The entrywise product of two low-rank matrices nearest to a matrix: A ≈ (up1·down1) ∘ (up2·down2).

(FedPara, Hyeon-Woo et al. 2021, arXiv 2108.06098, prop. 1; LoHa in LyCORIS.)  By alternating least squares: with three
factors fixed, each row b of the fourth is a small problem of its own, min ‖A_i − (b·down1) ∘ M_i‖ with M = up2·down2,
whose normal matrix G_i = down1·diag(M_i²)·down1ᵀ is linear in the products of pairs of entries of up2_i. So the table
of all pairs of down2's rows against all pairs of down1's serves every row. Each step is proximal: it never
raises the error, however ill-conditioned G_i is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..lazy import torch
from .lowrank import Matrix, check_range, decompose, factorise

_SLAB = 1 << 19  # elements of A that are looked at together
_NUMBERS = 1 << 18  # float64 numbers of small systems that are solved together: a cache full
_PROXIMAL = 1e-6  # of a system's mean diagonal
_TRIAL = 4  # sweeps that every start gets
_MOST = 40  # sweeps of the best one
_AHEAD = 16  # sweeps at the pace of the last, after which a target must be in reach
_WORTH = 5e-4  # a sweep that lessens the squared error by less than this share is the last

Pair = tuple["torch.Tensor", "torch.Tensor"]


@dataclass(frozen=True)
class Hadamard:
    """A ≈ (up1·down1) ∘ (up2·down2), up (n, R) and down (R, k) in the output's dtype, on the CPU.

    error2: ‖A − that‖²_F of the rounded factors, measured.
    """

    up1: torch.Tensor
    down1: torch.Tensor
    up2: torch.Tensor
    down2: torch.Tensor
    error2: float


def fit(
    matrix: Matrix, rank: int, dtype: torch.dtype, seed: int = 0, method: str = "auto", target: float | None = None
) -> Hadamard | None:
    """Factors of rank R for A (n, k), at most as far from it as its best approximation of rank R, but for rounding.

    Two starts: that approximation times ones, and the approximations of sign(A)·√|A| and √|A|, whose product A
    would be. Work is in float32, small systems in float64.  method: of `decompose`.  target: a squared error to
    reach; None as soon as it is out of reach at the pace of the last sweep.
    Raises NumericalError if dtype cannot hold the numbers.
    """
    size = (matrix.energy / max(1, matrix.A.numel())) ** 0.5
    if size == 0:
        return None
    scaled = Matrix(matrix.A / size, float(matrix.A.numel()))
    goal = None if target is None else target / size**2
    best = min((_Fit(scaled.A, *start) for start in _starts(scaled, rank, seed, method)), key=lambda f: f.run(_TRIAL))
    for left in range(_MOST - _TRIAL, 0, -1):
        if goal is not None and best.loss - min(left, _AHEAD) * best.pace > goal:
            return None
        best.run(1)
        if best.pace <= _WORTH * best.loss:
            break
    if goal is not None and best.loss > goal:
        return None
    return _rounded(best, size, dtype)


def _starts(matrix: Matrix, rank: int, seed: int, method: str) -> Iterator[tuple[Pair, Pair]]:
    """The two pairs of each start, up (n, R) and down (R, k) float32."""
    n, k = matrix.A.shape
    up, down = torch.zeros(n, rank), _noise(rank, k, seed)  # noise gives the first sweep something to work on
    up[:, 0], down[0] = 1, 1
    yield _low_rank(matrix, rank, seed, method), (up.to(matrix.A.device), down.to(matrix.A.device))
    root = matrix.A.abs().sqrt_()
    energy = float(root.square().sum())
    sizes = _low_rank(Matrix(root, energy), rank, seed, method)
    yield _low_rank(Matrix(root.mul_(matrix.A.sign()), energy), rank, seed, method), sizes


def _low_rank(matrix: Matrix, rank: int, seed: int, method: str) -> Pair:
    """The best factors of a rank, with zeros and noise for directions that the matrix has not."""
    factors = factorise(matrix, decompose(matrix, rank, method, seed), rank, torch.float32)
    up, down = factors.up, factors.down
    if (lacking := rank - len(down)) > 0:
        up = torch.cat((up, up.new_zeros(len(up), lacking)), 1)
        down = torch.cat((down, _noise(lacking, down.shape[1], seed + 1)))
    return up.to(matrix.A.device), down.to(matrix.A.device)


def _noise(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed % (1 << 32)))


class _Fit:
    """The four factors on their way.  loss: the squared error after the last sweep; pace: how much that gained."""

    def __init__(self, A: torch.Tensor, first: Pair, second: Pair):
        self.A, self.pairs = A, [first, second]
        self.loss = self.pace = float("inf")

    def run(self, sweeps: int) -> float:
        """The loss after so many more sweeps over all four factors."""
        for _ in range(sweeps):
            before = self.loss
            for i in (1, 0):
                (up, down), other = self.pairs[i], self.pairs[1 - i]
                up = _solved(self.A, up, down, other)[0]
                down, self.loss = _solved(self.A.mT, down.mT, up.mT, (other[1].mT, other[0].mT))
                self.pairs[i] = _balanced(up, down.mT)
            self.pace = before - self.loss
        return self.loss


def _balanced(up: torch.Tensor, down: torch.Tensor) -> Pair:
    """Columns of up as long as their rows of down."""
    ratio = (_lengths(down, 1) / _lengths(up, 0)).sqrt()
    return up * ratio, down / ratio[:, None]


def _lengths(factor: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.linalg.vector_norm(factor, dim=dim).clamp_min(1e-20)


def _solved(A: torch.Tensor, up: torch.Tensor, down: torch.Tensor, other: Pair) -> tuple[torch.Tensor, float]:
    """(the up that is best for the rest, its squared error); for a down everything is handed in transposed.

    Both pairs are of one rank.
    """
    n, R = up.shape
    target = _projected(A, down, other)  # (n, R)
    rows, columns = torch.triu_indices(R, R, device=up.device)
    twice = torch.where(rows == columns, 1.0, 2.0).to(up)  # each pair stands for two entries
    place = torch.empty(R, R, dtype=torch.int64, device=up.device)
    place[rows, columns] = place[columns, rows] = torch.arange(len(rows), device=up.device)
    pairs, others = down[rows] * down[columns], other[1][rows] * other[1][columns]  # (T, k)
    few = len(rows) * (n + down.shape[1]) < n * down.shape[1]
    table = others @ pairs.mT if few else None
    made, gained, step = [], 0.0, max(1, _NUMBERS // (R * R))
    for start in range(0, n, step):
        part = slice(start, start + step)
        up2 = other[0][part]
        if table is not None:
            packed = (up2[:, rows] * up2[:, columns] * twice) @ table  # (slab, T)
        else:
            packed = (up2 @ other[1]).square_() @ pairs.mT
        G = _small(packed.index_select(1, place.flatten())).view(-1, R, R)
        new, gain = _proximal(G, _small(target[part]), _small(up[part]))
        made.append(new.to(up))
        gained += gain
    return torch.cat(made), max(A.numel() - gained, 0.0)  # A is scaled to that energy


def _proximal(G: torch.Tensor, target: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, float]:
    """(rows b, Σ of what they take off the energy) from normal matrices G (m, R, R) and right sides (m, R).

    b = old + (G + λI)⁻¹·(target − G·old), which lowers bᵀGb − 2·target·b for every λ > 0; what rounding
    makes worse stays as it was.  G is not kept.
    """
    damping = (_PROXIMAL * G.diagonal(dim1=1, dim2=2).mean(1) + 1e-30)[:, None]
    G.diagonal(dim1=1, dim2=2).add_(damping)

    def times(b: torch.Tensor) -> torch.Tensor:
        return torch.bmm(G, b[..., None])[..., 0] - damping * b

    slope = target - times(old)
    L, bad = torch.linalg.cholesky_ex(G)
    new = old + torch.cholesky_solve(slope[..., None], L)[..., 0]
    before, after = ((b * (2 * target - times(b))).sum(1) for b in (old, new))
    keep = (bad != 0) | ~(after >= before)  # not a number is not better
    return torch.where(keep[:, None], old, new), float(torch.where(keep, before, after).sum())


def _projected(A: torch.Tensor, down: torch.Tensor, other: Pair) -> torch.Tensor:
    """(A ∘ (up2·down2))·downᵀ, (n, R), a slab of A's stored rows at a time."""
    if A.is_contiguous():
        step = max(1, _SLAB // max(1, A.shape[1]))
        parts = (slice(start, start + step) for start in range(0, len(A), step))
        return torch.cat([(other[0][part] @ other[1]).mul_(A[part]) @ down.mT for part in parts])
    out = A.new_zeros(len(A), len(down))
    step = max(1, _SLAB // max(1, len(A)))
    for start in range(0, A.shape[1], step):  # A is stored by columns
        part = slice(start, start + step)
        M = (other[1][:, part].mT @ other[0].mT).mul_(A.mT[part])
        out += M.mT @ down[:, part].mT
    return out


def _small(x: torch.Tensor) -> torch.Tensor:
    return (x.cpu() if x.device.type == "mps" else x).double()  # MPS has no float64


def _rounded(fit: _Fit, size: float, dtype: torch.dtype) -> Hadamard:
    """The factors in dtype, each pair with half of A's size; the last is solved against the rounded others."""
    lengths = [float(torch.linalg.vector_norm(up @ down)) for up, down in fit.pairs]
    even = (lengths[1] / lengths[0]) ** 0.25 if min(lengths) > 0 else 1.0
    unit = size**0.25  # what every factor is short of, as A was divided by size
    pairs = [(_stored(up * (unit * scale), dtype), _stored(down * (unit * scale), dtype))
             for (up, down), scale in zip(fit.pairs, (even, 1 / even), strict=True)]  # fmt: skip
    (up1, down1), (up2, down2) = ((up.float() / unit, down.float() / unit) for up, down in pairs)
    down1 = _solved(fit.A.mT, down1.mT, up1.mT, (down2.mT, up2.mT))[0].mT
    factors = [pairs[0][0], _stored(down1 * unit, dtype), *pairs[1]]
    error2, step = 0.0, max(1, _SLAB // max(1, fit.A.shape[1]))
    up1, down1, up2, down2 = (factor.float() for factor in factors)
    for start in range(0, len(fit.A), step):
        part = slice(start, start + step)
        rest = fit.A[part] * size - (up1[part] @ down1) * (up2[part] @ down2)
        error2 += float(_small(rest).square().sum())
    stored = [factor.cpu().contiguous() for factor in factors]
    return Hadamard(stored[0], stored[1], stored[2], stored[3], error2)


def _stored(factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    check_range(factor.to(dtype), dtype)
    return factor.to(dtype)

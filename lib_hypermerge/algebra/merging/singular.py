"""Singular directions of changes given as products, and orthonormal bases: what the methods for factors are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...lazy import torch
from ..factored import LowRank
from ..lowrank import signs_of
from ..rank import by_energy
from ..svd import product64

_NOISE = 1e-13  # of float64: directions below this share of the factors' norms are nothing but rounding
_NOISE32 = 1e-6  # of float32, as a share of the largest
_ALIKE = 1e-6  # directions that several changes share are one: what sets them apart is below this share


@dataclass(frozen=True)
class Singular:
    """U·diag(S)·Vᵀ: U (n, r), S (r,) descending, V (k, r), float64; r may be 0. The largest of each u is positive."""

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor

    def cut(self, rank: int) -> Singular:
        return Singular(self.U[:, :rank], self.S[:rank], self.V[:, :rank])


def singular(a: LowRank, energy: float | None = None) -> Singular:
    """All directions of A that are not rounding noise; energy: only the first that make up this share of ‖A‖²_F."""
    left, RB = torch.linalg.qr(a.up.double())
    right, RA = torch.linalg.qr(a.down.double().mT)
    U, S, Vh = torch.linalg.svd(a.scale * (RB @ RA.mT), full_matrices=False)
    noise = _NOISE * abs(a.scale) * float(torch.linalg.matrix_norm(RB) * torch.linalg.matrix_norm(RA))
    r = int((noise < S).sum())
    if energy is not None and r:
        r = min(r, by_energy(S.cpu(), float(S.square().sum()), energy, complete=True) or r)
    U, V = left @ U[:, :r], right @ Vh[:r].mT
    signs = signs_of(U) if r else U.new_ones(0)
    return Singular(U * signs, S[:r], V * signs)


def factors_of(matrix: torch.Tensor) -> LowRank:
    """A whole matrix (n, k) float32 as factors, exactly but for directions below 1e-6 of the largest: float32's noise.

    By the eigenvectors of the short side's Gram matrix in float64: n·k·min(n, k) products and an eigenvalue problem
    of that side, half a second for 1280×5120 and minutes for sides of 10000.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    A = matrix if wide else matrix.mT
    w, E = torch.linalg.eigh(product64(A, A.mT))
    first = E[:, _NOISE32**2 * w[-1] < w]
    second = product64(first.mT, A)
    return LowRank(first, second) if wide else LowRank(second.mT, first.mT)


def polar(X: torch.Tensor) -> torch.Tensor:
    """U·Vᵀ of X = U·S·Vᵀ: the nearest matrix to X (n, R) with orthonormal columns (Schönemann 1966).

    Where columns of X depend on each other it is the partial isometry: what they lack is left out, not made up.
    """
    Q, R = torch.linalg.qr(X)
    U, S, Vh = torch.linalg.svd(R, full_matrices=False)
    r = int((_ALIKE * S[:1] < S).sum())
    return Q @ (U[:, :r] @ Vh[:r])


def basis(blocks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Orthonormal columns (n, m) that span those of all blocks, each of orthonormal columns (n, r_i)."""
    Q, R = torch.linalg.qr(torch.cat(list(blocks), 1))
    U, S, _ = torch.linalg.svd(R, full_matrices=False)
    return Q @ U[:, : int((_ALIKE * S[:1] < S).sum())]

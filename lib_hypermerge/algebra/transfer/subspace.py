"""The leading singular directions of weights, and how much those of two weights are alike.

Φ = ‖U_sᵀ·U_t‖²_F / r of two orthonormal bases (n, r) is the mean squared cosine of the principal angles between their
spans (LoRA-X, arXiv 2501.16559): 1 for the same span, and r/n for two spans that have nothing to do with each other.
So it is told from there: (Φ − r/n) / (1 − r/n).
"""

from __future__ import annotations

from dataclasses import dataclass

from ...lazy import torch
from ..products import gram

_NOISE = 16  # units of precision that eigenvalues of a Gram matrix are off by, as shares of the largest
COMPARED = 0.5  # the share of a weight's energy in the directions that are compared


@dataclass(frozen=True)
class Directions:
    """Leading singular vectors of a weight W (n, k).

    U: (n, m) and V: (k, m), orthonormal, in W's dtype.  S: all min(n, k) singular values, float64, descending.
    """

    U: torch.Tensor
    V: torch.Tensor
    S: torch.Tensor

    def count(self, share: float) -> int:
        """The fewest leading directions that hold this share of ‖W‖²_F, of those that are there."""
        return min(_count(self.S, share), self.U.shape[1])

    def first(self, count: int) -> Directions:
        """Only so many of them."""
        return Directions(self.U[:, :count], self.V[:, :count], self.S)


def directions(W: torch.Tensor, share: float) -> Directions:
    """Those of W: (n, k) that hold a share of its energy, or COMPARED if that is more.

    By the Gram matrix of the short side, which blurs what is below about the square root of W's precision (float32:
    1e-3 of the largest singular value): such directions are left out, and of W = 0 all.
    """
    A = W if W.shape[0] <= W.shape[1] else W.mT
    w, E = torch.linalg.eigh(gram(A))  # in W's dtype: the Gram matrix is no more precise, and this half as dear
    S = w.double().flip(0).clamp_min(0).sqrt()
    clear = int(((_NOISE * torch.finfo(W.dtype).eps) ** 0.5 * S[0] < S).sum()) if len(S) else 0
    m = min(_count(S, max(share, COMPARED)), clear)
    short = E.flip(1)[:, :m].contiguous()
    long = A.mT @ short
    long = long / torch.linalg.vector_norm(long, dim=0)
    return Directions(short, long, S) if A is W else Directions(long, short, S)


def similarity(a: Directions, b: Directions) -> float | None:
    """The mean of both sides' Φ, told from chance: 1 the same spans, about 0 unrelated ones.

    A side on which the two weights differ in size, or whose whole space is spanned, says nothing; None if neither
    says anything.
    """
    r = min(a.count(COMPARED), b.count(COMPARED))
    sides = [(a.U, b.U), (a.V, b.V)]
    found = [_likeness(x[:, :r], y[:, :r]) for x, y in sides if len(x) == len(y) and 0 < r < len(x)]
    return sum(found) / len(found) if found else None


def _likeness(x: torch.Tensor, y: torch.Tensor) -> float:
    n, r = x.shape
    phi = float((x.mT @ y).double().square().sum()) / r
    return (phi - r / n) / (1 - r / n)


def _count(S: torch.Tensor, share: float) -> int:
    sums = S.square().cumsum(0)
    return min(int((sums < share * sums[-1] * (1 - 1e-12)).sum()) + 1, len(S)) if len(S) else 0

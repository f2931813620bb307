"""What the algebra should give, by the plainest float64 means: full decompositions, whole products, no shortcuts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch

from lib_hypermerge.algebra.lowrank import Factors, Matrix


def matrix_of(n: int, k: int, spectrum: Sequence[float] | np.ndarray, seed: int = 0) -> torch.Tensor:
    """(n, k) float32 with these singular values and random singular vectors."""
    S = np.asarray(spectrum, dtype=np.float64)
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((size, len(S))))[0] for size in (n, k))
    return torch.from_numpy(((U * S) @ V.T).astype(np.float32))


def prepared(A: torch.Tensor, low: torch.dtype | None = None) -> Matrix:
    """A as a job hands it over."""
    return Matrix(A, energy(A), None if low is None else A.to(low))


def energy(A: torch.Tensor) -> float:
    return float(np.square(A.numpy().astype(np.float64)).sum())


def singular_values(A: torch.Tensor) -> np.ndarray:
    return np.linalg.svd(A.numpy().astype(np.float64), compute_uv=False)


def squared_singular_values(A: torch.Tensor) -> np.ndarray:
    """The same squared, for large matrices: as eigenvalues of A·Aᵀ, good to 1e-15 of the first."""
    X = A.numpy().astype(np.float64)
    return np.linalg.eigvalsh(X @ X.T if len(X) <= X.shape[1] else X.T @ X)[::-1].clip(0)


def optimal_error(A: torch.Tensor, rank: int) -> float:
    """‖A − A_r‖_F of the best approximation of this rank (Eckart and Young)."""
    return float(np.sqrt(np.square(singular_values(A)[rank:]).sum()))


def delta(factors: Factors, rank: int | None = None) -> np.ndarray:
    """up · down as stored, or of their first columns and rows only."""
    up, down = factors.up.double().numpy(), factors.down.double().numpy()
    return up[:, :rank] @ down[:rank]


def error(A: torch.Tensor, factors: Factors, rank: int | None = None) -> float:
    """‖A − up · down‖_F of the stored numbers."""
    return float(np.linalg.norm(A.numpy().astype(np.float64) - delta(factors, rank)))


def excess(A: torch.Tensor, factors: Factors, rank: int, precision: float = 0.0) -> float:
    """How far above the best error of this rank the stored factors are, as a share; precision·‖A‖ comes free."""
    best = optimal_error(A, rank)
    allowance = precision * energy(A) ** 0.5
    return error(A, factors) / (best**2 + allowance**2) ** 0.5 - 1


def best_allocation(squares: list[list[float]], costs: list[int], bounds: list[tuple[int, int]], budget: int) -> float:
    """The most energy that any choice of ranks keeps within a budget, by trying all; −1 if none fits."""
    best = -1.0
    for ranks in itertools.product(*(range(least, most + 1) for least, most in bounds)):
        if sum(r * c for r, c in zip(ranks, costs, strict=True)) <= budget:
            best = max(best, sum(sum(s[:r]) for s, r in zip(squares, ranks, strict=True)))
    return best

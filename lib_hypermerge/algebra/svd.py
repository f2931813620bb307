"""Truncated singular value decompositions of one weight change, randomised or exact.

Notation: A is (a, b) float32 with a ≤ b (callers transpose); r the rank; S descending singular values.

Randomised: block Golub–Kahan bidiagonalisation with full reorthogonalisation — a randomised block
Krylov method (Musco & Musco 2015, arXiv 1504.05477, alg. 2; Halko, Martinsson, Tropp 2011 for the
start). It needs the products of power iteration but keeps every block, so narrow blocks suffice.
Exact: the eigenvectors of A·Aᵀ. Squares the condition number, which truncation to the top tolerates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from ..lazy import torch
from .processor import native_bf16 as native_bf16  # decides what `low` is worth
from .products import gram

# Seconds per operation, measured on one x86-64 core; only their ratios matter, to choose a method.
_FP32, _BF16, _EIGH, _FIXED = 1 / 68e9, 1 / 250e9, 1.8e-10, 3e-3


@dataclass(frozen=True)
class Basis:
    """Leading singular vectors of A on one side.

    rows: (m, a) for side "left", (m, b) for side "right", orthonormal (nearly so, if low precision made them).
    S: (m,) float64 on the CPU, descending.  exact: whether S is the full spectrum.
    """

    side: str
    rows: torch.Tensor
    S: torch.Tensor
    exact: bool


def krylov_size(r: int) -> tuple[int, int]:
    """(block width, number of blocks) for rank r.

    4r directions up to rank 48 and 2.5r above keep the error within a fraction of a percent of the
    optimum on slowly decaying spectra; tests hold it to that.
    """
    if r <= 48:
        return max(16, r), 4
    return max(32, (r + 1) // 2), 5


def cost(a: int, b: int, r: int, low_precision: bool, method: str = "auto") -> float:
    """Seconds on one core of the machine that the constants were measured on, about."""
    width, blocks = krylov_size(r)
    randomised = 4.0 * a * b * width * blocks * (_BF16 if low_precision else _FP32) + _FIXED
    exact = 2.0 * a * a * b * _FP32 + _EIGH * a**3
    if width * blocks > 0.7 * a or method == "exact":  # blocks would fill the space
        return exact
    finish = 2.0 * a * b * r * _FP32
    return finish + (randomised if method == "randomised" else min(randomised, exact))


def choose_method(a: int, b: int, r: int, low_precision: bool) -> str:
    """The cheaper of "randomised" and "exact" for an (a, b) matrix."""
    exact, randomised = (cost(a, b, r, low_precision, method) for method in ("exact", "randomised"))
    return "randomised" if randomised < exact else "exact"


def exact_basis(A: torch.Tensor, r: int, precise: bool = False) -> Basis:
    """Left singular vectors from the Gram matrix of the short side; A: (a, b) with a ≤ b.

    precise: sum in float64, for rules that depend on the small singular values.
    """
    w, E = torch.linalg.eigh(_to_small(product64(A, A.mT) if precise else gram(A)))
    S = w.flip(0).clamp_min(0).sqrt()
    rows = E.flip(1)[:, :r].mT.contiguous().to(A.device, torch.float32)
    return Basis("left", rows, S, exact=True)


def randomised_basis(A: torch.Tensor, r: int, *, seed: int = 0, low: torch.Tensor | None = None) -> Basis:
    """Right singular vectors of A: (a, b) from a Krylov space; low: A in a cheaper dtype, for the products.

    Returns r + a few values; those behind r are Ritz values, below the true ones.
    """
    a, b = A.shape
    width, blocks = krylov_size(r)
    width = min(width, a)
    blocks = max(1, min(blocks, a // width))
    low = A if low is None else low
    X = gaussian(width, b, seed).to(low.device, low.dtype)
    Q = torch.empty(0, a, device=A.device)
    B = torch.empty(blocks * width, b, device=A.device)
    for i in range(blocks):
        Y = _orthonormal_beside(Q, (low @ X.mT).mT.float())  # (width, a), or fewer rows once A's rank is used up
        Z = B[len(Q) : len(Q) + len(Y)].copy_(Y.to(low.dtype) @ low)
        Q = torch.cat((Q, Y))
        if not len(Y):
            break
        if i + 1 < blocks:
            X = _orthonormal_rows(Z)[0].to(low.dtype)
    B = B[: len(Q)]
    w, E = torch.linalg.eigh(_to_small(B @ B.mT))  # B = Qᵀ·A up to rounding, so its Gram matrix is projected A·Aᵀ
    S = w.flip(0).clamp_min(0).sqrt()
    m = min(len(S), r)
    W = (E.flip(1)[:, :m] / S[:m].clamp_min(1e-6 * float(S[0]) + 1e-30)).mT
    # as orthonormal as the products are precise: whoever needs more solves least squares against the rows
    return Basis("right", W.to(A.device, torch.float32) @ B, S, exact=False)


def refine(A: torch.Tensor, basis: Basis) -> Basis:
    """One power step with float64 sums and without squaring: for changes (nearly) of low rank.

    The Gram matrices above blur singular values below about 1e-3·S[0]; here those down to 1e-6·S[0] come out.
    """
    rows = basis.rows if basis.side == "right" else _orthonormal_rows_exactly(basis.rows @ A)
    Q = _orthonormal_rows_exactly(rows @ A.mT)  # (m, a)
    V, R = torch.linalg.qr(product64(Q, A).mT)
    U, S, _ = torch.linalg.svd(R.cpu())
    return Basis("right", (V @ U.to(V.device)).mT.to(A.device, torch.float32), S, exact=False)


def product64(X: torch.Tensor, A: torch.Tensor) -> torch.Tensor:
    """X·A in float64, a slab of A's rows at a time; on the CPU where the device has no float64."""
    if A.device.type == "mps":
        X, A = X.cpu(), A.cpu()
    out = torch.zeros(X.shape[0], A.shape[1], dtype=torch.float64, device=A.device)
    step = max(1, (1 << 20) // max(1, A.shape[1]))
    for start in range(0, A.shape[0], step):
        out += X[:, start : start + step].double() @ A[start : start + step].double()
    return out


_ROWS = 16  # of normals that are made at once: the narrowest block of the Krylov space


@lru_cache(maxsize=32)  # 64 MiB at most; wider spaces are dear enough for fresh numbers not to show
def _normals(block: int, length: int, seed: int) -> torch.Tensor:
    # torch's generator looks at 32 bits only; odd factors keep the blocks of one seed apart
    generator = torch.Generator().manual_seed((seed * 0x9E3779B1 + block * 0x85EBCA77) % (1 << 32))
    return torch.randn(_ROWS, length, generator=generator)


def gaussian(width: int, length: int, seed: int) -> torch.Tensor:
    """(width, length) standard normals, the same for the same seed on every device and thread.

    Made and kept in blocks of rows, so that layers of many different ranks share them: a row's numbers depend
    on the seed and its place alone.
    """
    size = max(1 << max(length - 1, 1).bit_length(), 1 << 15)
    blocks = [_normals(block, size, seed)[:, :length] for block in range(-(-width // _ROWS))]
    return torch.cat(blocks)[:width]


def _to_small(G: torch.Tensor) -> torch.Tensor:
    # small matrices go to the CPU: MPS has no float64, and a GPU gains nothing on them
    return G.cpu().double()


def _orthonormal_beside(Q: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """Rows that with Q's rows span those of Y too, orthonormal to these and to each other.

    Two passes suffice unless Y lies almost within Q, as it does once A's rank is used up: then each further
    pass lifts what is new by about 1e3. What no pass makes new, as where A has zero rows, is left out.
    """
    for done in range(6):
        Y = Y - (Y @ Q.mT) @ Q
        Y, was_orthonormal = _orthonormal_rows(Y)
        if done and was_orthonormal:
            return Y
    Y = Y - (Y @ Q.mT) @ Q
    w, E = torch.linalg.eigh(_to_small(Y @ Y.mT))
    new = w > 0.25
    return (E[:, new] * w[new].rsqrt()).mT.to(Y.device, torch.float32) @ Y


def _orthonormal_rows(Y: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Rows spanning those of Y, nearly orthonormal, by shifted Cholesky QR (Fukaya et al. 2020); whether Y's were."""
    G = _to_small(Y @ Y.mT)
    G.diagonal().add_(1e-6 * G.trace() + 1e-30)
    L = torch.linalg.cholesky(G)
    inverse = torch.linalg.solve_triangular(L, torch.eye(len(L), dtype=L.dtype), upper=False)
    return inverse.to(Y.device, torch.float32) @ Y, bool((L.diagonal() - 1).abs().max() < 0.1)


def _orthonormal_rows_exactly(Y: torch.Tensor) -> torch.Tensor:
    """As _orthonormal_rows to float32, keeping directions in order; zero rows become arbitrary ones."""
    if Y.device.type == "mps":  # has no QR
        return torch.linalg.qr(Y.mT.cpu()).Q.mT.to(Y.device)
    return torch.linalg.qr(Y.mT).Q.mT

"""What the methods of merging should give, written from their definitions: whole float64 matrices and full SVDs."""

from __future__ import annotations

import numpy as np

Terms = list[tuple[float, np.ndarray]]


def svd(A: np.ndarray, energy: float | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S, V of the directions above 1e-10 of the largest, or only of those that reach the share of energy."""
    U, S, Vh = np.linalg.svd(A, full_matrices=False)
    r = int((1e-10 * S.max(initial=0) < S).sum())
    if energy is not None:
        r = next(i for i in range(r + 1) if (S[:i] ** 2).sum() >= energy * (S**2).sum() * (1 - 1e-11) or i == r)
    return U[:, :r], S[:r], Vh[:r].T


def polar(X: np.ndarray) -> np.ndarray:
    U, S, Vh = np.linalg.svd(X, full_matrices=False)
    r = int((1e-6 * S.max(initial=0) < S).sum())
    return U[:, :r] @ Vh[:r]


def trimmed(A: np.ndarray, count: int) -> np.ndarray:
    flat = A.reshape(-1)
    order = sorted(range(flat.size), key=lambda i: (-abs(flat[i]), i))
    out = np.zeros_like(flat)
    out[order[:count]] = flat[order[:count]]
    return out.reshape(A.shape)


def agreeing(terms: Terms) -> np.ndarray:
    out = np.zeros_like(terms[0][1])
    for place in np.ndindex(out.shape):
        sign = np.sign(sum(w * A[place] for w, A in terms))
        agree = [(w, A[place]) for w, A in terms if sign and np.sign(w * A[place]) == sign]
        if agree:
            share = sum(abs(w) for w, _ in agree) / max(abs(w) for w, _ in agree)
            out[place] = sum(w * a for w, a in agree) / share
    return out


def summed(terms: Terms) -> np.ndarray:
    return sum((w * A for w, A in terms), np.zeros_like(terms[0][1]))


def ties(terms: Terms, density: float) -> np.ndarray:
    return agreeing([(w, trimmed(A, max(1, round(density * A.size)))) for w, A in terms])


def breadcrumbs(terms: Terms, density: float) -> np.ndarray:
    kept = []
    for w, A in terms:
        count = max(1, round(density * A.size))
        outliers = min(A.size // 100, A.size - count)
        kept.append((w, trimmed(A, count + outliers) - trimmed(A, outliers)))
    return summed(kept)


def chances(A: np.ndarray, density: float, window: float) -> np.ndarray:
    """DELLA's: each entry's chance to stay."""
    window = min(window, density, 2 * (1 - density))
    out = np.full(A.shape, density)
    for row, magnitudes in zip(out, abs(A), strict=True):
        order = sorted(range(len(row)), key=lambda i: (magnitudes[i], i))
        for place, i in enumerate(order):
            if len(row) > 1:
                row[i] = density + window * (place / (len(row) - 1) - 0.5)
    return out


def uniform(shape: tuple[int, int], seed: int, index: int) -> np.ndarray:
    """24 bits of each number of the Mersenne twister (Matsumoto and Nishimura 1998), seeded for delta `index`."""
    twister = np.random.RandomState((seed * 0x9E3779B1 + index * 0x85EBCA77) % (1 << 32))
    words = np.frombuffer(twister.bytes(4 * shape[0] * shape[1]), dtype="<u4")
    return (words & 0xFFFFFF).reshape(shape) / (1 << 24)


def dropped(terms: Terms, density: float, seed: int, window: float = 0.0) -> Terms:
    out = []
    for index, (w, A) in enumerate(terms):
        stay = chances(A, density, window)
        out.append((w, np.where(uniform(A.shape, seed, index) < stay.astype(np.float32), A / stay, 0.0)))
    return out if density < 1 else terms


def dare(terms: Terms, density: float, seed: int) -> np.ndarray:
    return summed(dropped(terms, density, seed))


def dare_ties(terms: Terms, density: float, seed: int) -> np.ndarray:
    return agreeing(dropped(terms, density, seed))


def della(terms: Terms, density: float, seed: int) -> np.ndarray:
    return agreeing(dropped(terms, density, seed, window=0.2))


def knots(terms: Terms, density: float) -> np.ndarray:
    U, S, V = svd(np.concatenate([A for _, A in terms], 1))
    parts = np.split(S[:, None] * V.T, len(terms), 1)
    parts = [np.where(abs(part) > 1e-13 * np.linalg.norm(part), part, 0) for part in parts]  # no noise
    return U @ ties([(w, part) for (w, _), part in zip(terms, parts, strict=True)], density)


def tsv(terms: Terms, energy: float | None) -> np.ndarray:
    n, k = terms[0][1].shape
    share = max(1, min(n, k) // len(terms))
    parts = [tuple(X[..., :share] for X in svd(A, energy)) for _, A in terms]
    U, V = (polar(np.concatenate([part[side] for part in parts], 1)) for side in (0, 2))
    S = np.concatenate([w * part[1] for (w, _), part in zip(terms, parts, strict=True)])
    return U @ np.diag(S) @ V.T


def iso_c(terms: Terms, energy: float | None) -> np.ndarray:
    U, S, V = svd(summed(terms), energy)
    return S.mean() * U @ V.T if len(S) else summed(terms)


def iso_cts(terms: Terms, energy: float | None) -> np.ndarray:
    U, S, V = svd(summed(terms), energy)
    own = (len(S) - int(0.8 * len(S))) // len(terms)
    common = len(S) - own * len(terms)
    U, S, V = U[:, :common], S[:common], V[:, :common]
    outside = np.eye(len(U)) - U @ U.T
    for w, A in terms:
        parts = svd(outside @ (w * A))
        U, S, V = (np.concatenate([X, part[..., :own]], -1) for X, part in zip((U, S, V), parts, strict=True))
    return S.mean() * polar(U) @ polar(V).T


def aligned(terms: Terms) -> np.ndarray:
    total = sum(abs(w) for w, _ in terms)
    parts = [svd(A) for _, A in terms]
    r = max(len(S) for _, S, _ in parts)
    factors = []
    for U, S, V in parts:
        signs = np.sign(U[abs(U).argmax(0), range(len(S))])  # the largest entry of each column is positive
        U, V = U * signs, V * signs
        B, C = np.zeros((len(U), r)), np.zeros((len(V), r))
        B[:, : len(S)], C[:, : len(S)] = U * np.sqrt(S), V * np.sqrt(S)
        factors.append((B, C))
    up = down = 0
    for (w, _), (B, C) in zip(terms, factors, strict=True):
        # where nothing else pairs two directions, their place by size does
        nearly = 1e-8 * np.linalg.norm(B) * np.linalg.norm(factors[0][0]) * np.eye(r)
        U, _, Vh = np.linalg.svd(B.T @ factors[0][0] + C.T @ factors[0][1] + nearly)
        up, down = up + w / total * B @ U @ Vh, down + abs(w) / total * C @ U @ Vh
    return max(abs(w) for w, _ in terms) * up @ down.T


def projectors(others: list[np.ndarray], energy: float | None) -> tuple[np.ndarray, np.ndarray]:
    """On the column spaces of all others, and on their row spaces."""
    cut = [(U * S) @ V.T for U, S, V in (svd(A, energy) for A in others)]
    columns, rows = np.concatenate(cut, 1), np.concatenate(cut, 0)
    return columns @ np.linalg.pinv(columns, 1e-10), np.linalg.pinv(rows, 1e-10) @ rows


def without(terms: Terms, energy: float | None) -> np.ndarray:
    P, Q = projectors([A for _, A in terms[1:]], energy)
    A = terms[0][0] * terms[0][1]
    return A - P @ A - A @ Q + P @ A @ Q


def shared(terms: Terms, energy: float | None) -> np.ndarray:
    P, Q = projectors([A for _, A in terms[1:]], energy)
    return P @ (terms[0][0] * terms[0][1]) @ Q

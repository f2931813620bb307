"""From terms to a solution: scaled multipliers, and per layer factors in the order of their singular values."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...lazy import torch
from .sweep import Fixed

_NOISE = 1e-7  # singular values below this share of a layer's first are rounding
_NOTHING = 1e-6  # likewise of the first of all LoRAs: what is left once the others have taken a whole layer


def unit_scale(multipliers: torch.Tensor) -> float:
    """What to divide λ by, and multiply the LoRA by, so that the largest |λ| is 1 and positive; 1 if all are 0."""
    sizes = multipliers.abs()
    largest = float(sizes.max())
    first = int((sizes >= largest * (1 - 1e-6)).nonzero()[0])  # of those that rounding alone tells apart
    return math.copysign(largest, float(multipliers[first])) if largest else 1.0


def balanced(ups: torch.Tensor, downs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(ups (l, p, r), downs (l, r, q)) of the same products, as U√S and √S·Vᵀ of their SVDs.

    By eigenvectors of the factors' Gram matrices in float64, so neither factor has to be orthonormal. Of each
    left singular vector the entry of largest size is positive. Singular values that are rounding become 0.
    """
    U, A = ups.cpu().double(), downs.cpu().double()
    s, W = torch.linalg.eigh(A @ A.mT)
    s = torch.where(s > 1e-15 * s.amax(1, keepdim=True), s, torch.zeros_like(s))
    X = U @ (W * s.sqrt()[:, None, :])  # against orthonormal rows s^-½·Wᵀ·A
    square, Z = torch.linalg.eigh(X.mT @ X)
    sigma, Z = square.clamp_min(0).sqrt().flip(1), Z.flip(2)
    there = sigma > _NOISE * sigma[:, :1]
    root = torch.where(there, sigma, torch.zeros_like(sigma)).sqrt()
    up = X @ Z * _safe_inverse(root)[:, None, :]
    down = root[:, :, None] * (Z.mT @ (_safe_inverse(s.sqrt())[:, :, None] * (W.mT @ A)))
    largest = up.gather(1, up.abs().argmax(1, keepdim=True))
    signs = torch.where(largest < 0, -1.0, 1.0).double()
    up, down = up * signs, down * signs.mT
    return up.to(ups), down.to(downs)


def _safe_inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1 / x.clamp_min(1e-300), torch.zeros_like(x))


def assemble(
    fixed: Sequence[Fixed], rooms: Sequence[int]
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """(multipliers, ups, downs, ranks) of a Solution; rooms: rows that each LoRA has."""
    scales = [unit_scale(term.multipliers) for term in fixed]
    multipliers = torch.stack([term.multipliers / scale for term, scale in zip(fixed, scales, strict=True)], 1)
    all_ups, all_downs, all_ranks = [], [], []
    for g in range(len(fixed[0].ups)):
        layers, p, _ = fixed[0].ups[g].shape
        q = fixed[0].downs[g].shape[2]
        ups = fixed[0].ups[g].new_zeros(layers, p, sum(rooms))
        downs = fixed[0].downs[g].new_zeros(layers, sum(rooms), q)
        for i, (term, scale) in enumerate(zip(fixed, scales, strict=True)):
            start = sum(rooms[:i])
            part = slice(start, start + term.ups[g].shape[2])
            step = max(1, (32 << 20) // (8 * (p + q) * max(1, rooms[i])))
            for a in range(0, layers, step):
                rows = slice(a, a + step)
                ups[rows, :, part], downs[rows, part] = balanced(term.ups[g][rows] * scale, term.downs[g][rows])
        sizes = downs.square().sum(2)  # as factors are balanced, singular values
        there = sizes > _NOTHING * sizes.amax(1, keepdim=True)
        ups *= there[:, None, :]
        downs *= there[:, :, None]
        own = torch.stack([part.sum(1) for part in there.cpu().split(list(rooms), dim=1)], 1)
        all_ups.append(ups)
        all_downs.append(downs)
        all_ranks.append(own)
    return multipliers, all_ups, all_downs, all_ranks

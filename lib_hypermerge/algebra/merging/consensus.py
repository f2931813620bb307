"""Sums of matrices whose entries are first thinned out, plain or over those that agree on a sign; in slabs of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...lazy import torch
from .magnitudes import slabs

Rows = Callable[[int, int], "torch.Tensor"]  # rows start to stop of one thinned-out matrix; asked once each, in order


def plain(like: torch.Tensor, weights: Sequence[float], parts: Sequence[Rows]) -> torch.Tensor:
    """Σ w_i·τ_i; a new matrix in the shape and dtype of like (n, k)."""
    out = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for start, stop in slabs(*like.shape):
        for weight, part in zip(weights, parts, strict=True):
            out[start:stop].add_(part(start, stop), alpha=weight)
    return out


def agreeing(like: torch.Tensor, weights: Sequence[float], parts: Sequence[Rows]) -> torch.Tensor:
    """The mean of w_i·τ_i over those whose sign is that of Σ w_i·τ_i, entry by entry; shape and dtype of like.

    Elect and disjoint merge of TIES (Yadav et al. 2023, arXiv 2306.01708, algorithm 1). There all weights are equal
    and the mean divides by how many agree; here each counts by its weight, relative to the heaviest that agrees:
    Σ w_i·τ_i · max|w_i| / Σ|w_i|, no weight zero. So a single term gives w·τ, equal terms of equal weight give w·τ, a
    light term hardly changes what a heavy one says, and all weights times c give c times the result. Where Σ w_i·τ_i
    is zero, nobody is elected and the result is zero.
    """
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    for start, stop in slabs(*like.shape):
        terms = [weight * part(start, stop) for weight, part in zip(weights, parts, strict=True)]
        sign = torch.stack(terms).sum(0).sign_()
        total, shares, heaviest = (torch.zeros_like(sign) for _ in range(3))
        for weight, term in zip(weights, terms, strict=True):
            agree = (term * sign).clamp_(min=0)  # its magnitude where it agrees
            total += agree
            agree.sign_().mul_(abs(weight))
            shares += agree
            torch.maximum(heaviest, agree, out=heaviest)
        shares.clamp_(min=min(map(abs, weights)))  # where nobody agrees
        torch.mul(total.mul_(heaviest).div_(shares), sign, out=out[start:stop])
    return out

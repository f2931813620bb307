"""A scale multiplied into numbers so that it can be taken out again without the loss of a bit."""

from __future__ import annotations

from ..lazy import torch


def fold(X: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale · X in dtype."""
    return (X.to(_wide(X.dtype, scale)) * scale).to(dtype)


def unfold(Y: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """Y / scale in dtype; scale is not 0."""
    return (Y.to(_wide(dtype, scale)) / scale).to(dtype)


def _wide(dtype: torch.dtype, scale: float) -> torch.dtype:
    """Where 16-bit numbers are scaled: float32 holds them twice over, if it holds the scale itself."""
    held = torch.tensor(scale, dtype=torch.float32).item() == scale
    return torch.float32 if dtype.itemsize == 2 and held else torch.float64


def is_invertible(X: torch.Tensor, scale: float, dtype: torch.dtype) -> bool:
    """Whether unfold(fold(X)) gives X's very bits back.

    In X's own dtype for powers of two that neither under- nor overflow; for 16-bit numbers in float32 always, as
    float32 holds twice their digits: the error of the product, 2⁻²⁴ of it, is too small to reach another number.
    """
    if scale == 0:
        return not X.any()
    return same_bits(unfold(fold(X, scale, dtype), scale, X.dtype), X)


def same_bits(X: torch.Tensor, Y: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same bits; −0 is not 0, and NaN may be itself."""
    if X.shape != Y.shape or X.dtype != Y.dtype:
        return False
    return torch.equal(X.contiguous().reshape(-1).view(torch.uint8), Y.contiguous().reshape(-1).view(torch.uint8))

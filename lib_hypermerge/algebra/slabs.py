"""Products with tall thin factors in float64, a slab of rows at a time: their float64 copies are never whole.

The factors are (m, r) of any dtype and stride, such as a LoRA's up, or its down transposed.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..lazy import torch

_ELEMENTS = 1 << 17  # of a slab: 1 MiB, which stays in a core's cache
_LEAST = 64  # rows of a slab, however long they are


def slabs(X: torch.Tensor, *beside: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The same rows of X, and of what lies beside it, in float64."""
    step = max(_LEAST, _ELEMENTS // max(1, X.shape[1]))
    for start in range(0, X.shape[0], step):
        yield tuple(_double(Y[start : start + step]) for Y in (X, *beside))


def cross(X: torch.Tensor, Y: torch.Tensor | None = None) -> torch.Tensor:
    """XᵀY, or XᵀX: (r, q) float64 on the CPU, for X (m, r) and Y (m, q)."""
    out = torch.zeros(X.shape[1], (X if Y is None else Y).shape[1], dtype=torch.float64, device=X.device)
    for first, *more in slabs(X) if Y is None else slabs(X, Y):
        out.addmm_(first.mT, more[0] if more else first)
    return out.cpu()


def times(X: torch.Tensor, C: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y = X·C (m, p) in dtype, and of Y as rounded YᵀY (p, p) and YᵀX (p, r), float64 on the CPU; C (r, p): float64."""
    (m, r), p, C = X.shape, C.shape[1], C.to(X.device)
    Y = torch.empty(m, p, dtype=dtype, device=X.device)
    YY, YX = (torch.zeros(p, size, dtype=torch.float64, device=X.device) for size in (p, r))
    start = 0
    for (slab,) in slabs(X):
        rounded = Y[start : start + len(slab)].copy_(slab @ C)
        start += len(slab)
        wide = _double(rounded)
        YY.addmm_(wide.mT, wide)
        YX.addmm_(wide.mT, slab)
    return Y, YY.cpu(), YX.cpu()


def _double(X: torch.Tensor) -> torch.Tensor:
    # torch widens half precision to double in one step at a third of the speed of two
    return (X.float() if X.dtype.itemsize < 4 else X).double()

"""Matrix products in float32 on the CPU, by whichever of torch's two libraries is faster.

torch multiplies float32 matrices by MKL, which runs at a third of its speed on processors that are
not Intel's; oneDNN, which torch brings too, does not mind.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

from ..lazy import torch

_BLOCK = 320  # rows of a Gram matrix at a time; smaller ones lose more speed than their symmetry saves


@lru_cache(maxsize=1)
def _onednn() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
    """x·wᵀ by oneDNN; None where this torch has no such operator or it does not answer as expected."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if operator is None:
        return None

    def linear(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return operator(x, w, None, "none", [], "")

    x, w = torch.arange(12.0).reshape(3, 4), torch.arange(8.0).reshape(2, 4) - 3
    try:
        return linear if torch.equal(linear(x, w), x @ w.mT) else None
    except (RuntimeError, TypeError, NotImplementedError):  # not built in, or another signature
        return None


def times_transposed(X: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """X·Wᵀ for X: (m, k) and W: (n, k), in their dtype."""
    # for some views oneDNN has only its reference loops, a thousand times slower
    plain = X.device.type == "cpu" and X.dtype == W.dtype == torch.float32 and X.is_contiguous() and W.is_contiguous()
    linear = _onednn() if plain else None
    return X @ W.mT if linear is None else linear(X, W)


def gram(A: torch.Tensor) -> torch.Tensor:
    """A·Aᵀ for A: (a, b); only blocks on and below the diagonal are computed."""
    a = A.shape[0]
    if a < 2 * _BLOCK:
        return A @ A.mT
    G = A.new_empty(a, a)
    for i in range(0, a, _BLOCK):
        stop = min(i + _BLOCK, a)
        torch.mm(A[i:stop], A[:stop].mT, out=G[i:stop, :stop])
        G[:i, i:stop] = G[i:stop, :i].mT
    return G

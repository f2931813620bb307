"""Weights split into magnitude and direction: W' = m ∘ V/‖V‖ (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable

from ..lazy import torch

OUTPUT, INPUT = 0, 1  # the axis along which the magnitudes stand: one per output row, or one per input channel


def norms(V: torch.Tensor, axis: int) -> torch.Tensor:
    """The norms of V's output rows (n, 1, …) or of its input channels (1, c, …), kernel included; V's dtype."""
    return torch.linalg.vector_norm(V, dim=_others(V, axis), keepdim=True)


def recompose(V: torch.Tensor, magnitudes: torch.Tensor, axis: int) -> torch.Tensor:
    """m ∘ V/‖V‖ for V: (n, c[, kh, kw]) and as many magnitudes as V has rows or channels; all in V's dtype.

    What V leaves at zero stays so: it has no direction.
    """
    sizes = [1] * V.ndim
    sizes[axis] = -1
    return V * (magnitudes.reshape(sizes) / _nonzero(norms(V, axis)))


def magnitudes(V: torch.Tensor, tuned: torch.Tensor, axis: int) -> torch.Tensor:
    """The m that bring m ∘ V/‖V‖ nearest to a weight: m_j = ⟨W'_j, V_j⟩/‖V_j‖, in recompose's shape."""
    return (tuned * V).sum(_others(V, axis), keepdim=True) / _nonzero(norms(V, axis))


def fit(
    base: torch.Tensor,
    tuned: torch.Tensor,
    approximate: Callable[[torch.Tensor], torch.Tensor],
    axis: int,
    steps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(ΔV, m) with m ∘ V/‖V‖ near the tuned weight, V = base + ΔV, where ΔV is what `approximate` can make.

    base, tuned: (n, c[, kh, kw]).  approximate: the best change of the wanted kind for one that is given, such as
    its truncation to a rank.  By turns, V = base + approximate(W' ∘ c − base) with c = ‖V‖/m, and the best m for
    that V.  The best of all rounds is given back; the first is the plain change with magnitudes of its own, so the
    result is never worse than the change without them.
    """
    best, error = None, float("inf")
    aim = tuned
    for _ in range(1 + steps):
        change = approximate(aim - base)
        V = base + change
        m = magnitudes(V, tuned, axis)
        miss = float((tuned - recompose(V, m, axis)).double().square().sum())
        if best is None or miss < error:
            best, error = (change, m), miss
        aim = tuned * torch.where(m > 0, norms(V, axis) / _nonzero(m), torch.ones_like(m))
    assert best is not None
    return best


def _others(V: torch.Tensor, axis: int) -> list[int]:
    return [d for d in range(V.ndim) if d != axis]


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return values.where(values != 0, torch.ones_like(values))

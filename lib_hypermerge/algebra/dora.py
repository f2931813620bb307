"""Weights split into magnitude and direction: W' = m ∘ V/‖V‖ (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..lazy import torch

_SLAB = 1 << 20  # elements that are looked at together
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


@dataclass(frozen=True)
class Fit:
    """ΔV and the magnitudes that go with it; turn: which call of `approximate` made ΔV.  error2: ‖W' − m∘V/‖V‖‖²_F."""

    change: torch.Tensor
    magnitudes: torch.Tensor
    turn: int
    error2: float


def fit(
    base: torch.Tensor,
    tuned: torch.Tensor,
    approximate: Callable[[torch.Tensor], torch.Tensor],
    axis: int,
    steps: int = 4,
    worth: float = 0.0,
) -> Fit:
    """ΔV and m with m ∘ V/‖V‖ near the tuned weight, V = base + ΔV, where ΔV is what `approximate` can make.

    base, tuned: (n, c[, kh, kw]).  approximate: the best change of the wanted kind for one that is given, such as
    its truncation to a rank.  By turns, V = base + approximate(W' ∘ c − base) with c = ‖V‖/m, and the best m for
    that V.  The best of all rounds is given back; the first is the plain change with magnitudes of its own, so the
    result is never worse than the change without them.  worth: if not 0, stop after a round that lessens the squared
    error by no more than this share.
    """
    best = None
    aim = tuned
    for turn in range(1 + steps):
        change = approximate(aim - base)
        V = base + change
        m = magnitudes(V, tuned, axis)
        error2 = missed(V, m, tuned, axis)
        before = best
        if best is None or error2 < best.error2:
            best = Fit(change, m, turn, error2)
        if worth and before is not None and error2 >= (1 - worth) * before.error2:
            break
        aim = tuned * torch.where(m > 0, norms(V, axis) / _nonzero(m), torch.ones_like(m))
    assert best is not None
    return best


def missed(V: torch.Tensor, magnitudes: torch.Tensor, tuned: torch.Tensor, axis: int) -> float:
    """‖W' − m ∘ V/‖V‖‖²_F, summed in float64 a slab of rows at a time."""
    sizes = [1] * V.ndim
    sizes[axis] = -1
    factor = magnitudes.reshape(sizes) / _nonzero(norms(V, axis))
    step, total = max(1, _SLAB // max(1, V[0].numel())), 0.0
    for start in range(0, len(V), step):
        rows = slice(start, start + step)
        rest = tuned[rows] - V[rows] * (factor[rows] if axis == OUTPUT else factor)
        total += float((rest if rest.device.type == "mps" else rest.double()).square().sum())
    return total


def _others(V: torch.Tensor, axis: int) -> list[int]:
    return [d for d in range(V.ndim) if d != axis]


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return values.where(values != 0, torch.ones_like(values))

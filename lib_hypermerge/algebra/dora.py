"""Weights split into magnitude and direction: W' = m ∘ V/‖V‖ (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ..lazy import torch

_SLAB = 1 << 18  # elements that are looked at together
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
    """m ∘ V/‖V‖ near a weight W'.  turn: which call of `approximate` made V.  error2: ‖W' − m ∘ V/‖V‖‖²_F."""

    V: torch.Tensor
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
    target: float | None = None,
) -> Fit | None:
    """V = base + ΔV and m with m ∘ V/‖V‖ near the tuned weight, where ΔV is what `approximate` can make.

    base, tuned: (n, c[, kh, kw]).  approximate: the best change of the wanted kind for one that is given, such as
    its truncation to a rank; a new tensor.  By turns, V = base + approximate(W' ∘ c − base) with c = ‖V‖/m, and the
    best m for that V.  The best of all rounds is given back; the first is the plain change with magnitudes of its own,
    so the result is never worse than the change without them.  worth: if not 0, stop after a round that lessens the
    squared error by no more than this share.  target: a squared error to reach; None where it was not, or where the
    first magnitudes bring less than a third of what it asks of them (later rounds add about as much again).
    """
    best = None
    wanted = tuned - base
    for turn in range(1 + steps):
        V = approximate(wanted).add_(base)
        m, error2, plain2 = _best_magnitudes(V, tuned, axis)
        before = best
        if best is None or error2 < best.error2:
            best = Fit(V, m, turn, error2)
        if before is None and target is not None and plain2 - error2 < (plain2 - target) / 3:
            return None
        if worth and before is not None and error2 >= (1 - worth) * before.error2:
            break
        if turn < steps:
            ratio = torch.where(m > 0, norms(V, axis) / _nonzero(m), torch.ones_like(m))
            torch.mul(tuned, ratio, out=wanted).sub_(base)
    assert best is not None
    return best if target is None or best.error2 <= target else None


def missed(V: torch.Tensor, magnitudes: torch.Tensor, tuned: torch.Tensor, axis: int) -> float:
    """‖W' − m ∘ V/‖V‖‖²_F, summed in float64 a slab of rows at a time."""
    sizes = [1] * V.ndim
    sizes[axis] = -1
    factor, total = magnitudes.reshape(sizes) / _nonzero(norms(V, axis)), 0.0
    for rows in _slabs(V):
        rest = tuned[rows] - V[rows] * (factor[rows] if axis == OUTPUT else factor)
        total += float(_wide(rest).square().sum())
    return total


def _best_magnitudes(V: torch.Tensor, tuned: torch.Tensor, axis: int) -> tuple[torch.Tensor, float, float]:
    """(m as of `magnitudes`, ‖W' − m ∘ V/‖V‖‖²_F, ‖W' − V‖²_F) in one pass with sums in float64."""
    sums = []
    for rows in _slabs(V):
        v, w = _wide(V[rows]), _wide(tuned[rows])
        sums.append([(a * b).sum(_others(V, axis), keepdim=True) for a, b in ((v, v), (v, w), (w, w))])
    parts = ([part[i] for part in sums] for i in range(3))
    square, inner, whole = (torch.cat(p) if axis == OUTPUT else torch.stack(p).sum(0) for p in parts)
    m = inner / _nonzero(square).sqrt()
    error2 = max(float((whole - m * m).sum()), 0.0)
    return m.to(V), error2, max(float((whole - 2 * inner + square).sum()), 0.0)


def _slabs(V: torch.Tensor) -> Iterator[slice]:
    step = max(1, _SLAB // max(1, V[0].numel()))
    return (slice(start, start + step) for start in range(0, len(V), step))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.device.type == "mps" else x.double()  # MPS has no float64


def _others(V: torch.Tensor, axis: int) -> list[int]:
    return [d for d in range(V.ndim) if d != axis]


def _nonzero(values: torch.Tensor) -> torch.Tensor:
    return values.where(values != 0, torch.ones_like(values))

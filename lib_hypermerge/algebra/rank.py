"""How many directions to keep: per layer by its spectrum, or over all layers by a size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..lazy import torch


@dataclass(frozen=True)
class Bounds:
    """A layer's least and largest rank; the largest never exceeds the layer's short side."""

    least: int
    most: int

    def clamp(self, rank: int) -> int:
        return max(self.least, min(rank, self.most))


def by_ratio(S: torch.Tensor, target: float, complete: bool) -> int | None:
    """Values of at least target·S[0]. A target above 1 means S[0]/S[i] ≤ target, as sd-scripts' sv_ratio."""
    share = 1 / target if target > 1 else target
    rank = int((share * S[0] <= S).sum())
    return None if rank == len(S) and not complete else rank


def by_energy(S: torch.Tensor, energy: float, target: float, complete: bool) -> int | None:
    """The fewest values whose squares make up the share target of energy = ‖ΔW‖²_F."""
    return _reach(S.square(), target * energy, complete)


def by_cumulative(S: torch.Tensor, target: float) -> int | None:
    """The fewest values whose sum is the share target of the sum of all. S must be complete."""
    return _reach(S, target * float(S.sum()), True)


def _reach(values: torch.Tensor, goal: float, complete: bool) -> int | None:
    sums = values.cumsum(0)
    rank = int((sums < goal * (1 - 1e-12)).sum()) + 1
    if rank > len(values):
        return len(values) if complete else None
    return rank


def allocate(
    squares: Sequence[torch.Tensor], costs: Sequence[int], bounds: Sequence[Bounds], budget: int
) -> list[int] | None:
    """Ranks over all layers that keep the most energy within a budget of bytes.

    squares[l]: σ² of layer l, descending.  costs[l]: bytes per unit of rank.  Takes directions by σ²/cost,
    the largest first, and then what still fits. None if the least ranks alone exceed the budget.
    """
    ranks = [b.least for b in bounds]
    left = budget - sum(r * c for r, c in zip(ranks, costs, strict=True))
    if left < 0:
        return None
    gains, layers = [], []
    for index, (square, cost, bound) in enumerate(zip(squares, costs, bounds, strict=True)):
        open_directions = square[bound.least : bound.most] / cost
        gains.append(open_directions)
        layers.append(torch.full((len(open_directions),), index))
    order = torch.argsort(torch.cat(gains), descending=True, stable=True)
    full: set[int] = set()
    for layer in torch.cat(layers)[order].tolist():
        if layer in full:
            continue
        if costs[layer] > left:
            full.add(layer)  # directions of one layer are taken in order, so its later ones wait too
            continue
        ranks[layer] += 1
        left -= costs[layer]
    return ranks

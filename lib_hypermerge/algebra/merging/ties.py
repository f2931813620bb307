"""TIES: trim each change to its largest entries, elect a sign per entry, average those that have it."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from .consensus import agreeing
from .magnitudes import Largest, count_of


def ties(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """(n, k) in the dtype of the deltas (n, k), which are left as they are; weights may be negative.

    density: the share of entries that each delta keeps, its largest by magnitude, counted per layer (the paper counts
    over the whole model).  Sign and mean as in `consensus.agreeing`: the result is a mean, about as strong as one
    of the deltas times its weight, where a sum would be as strong as all together; the paper's λ is a common
    factor of all weights.
    Yadav et al. 2023, arXiv 2306.01708, algorithm 1.
    """
    kept = [Largest(delta, count_of(density, delta.numel())) for delta in deltas]
    return agreeing(deltas[0], weights, [part.rows for part in kept])

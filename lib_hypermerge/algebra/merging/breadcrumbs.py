"""Model Breadcrumbs: neither the smallest entries of a change nor its few largest."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from .consensus import Rows, plain
from .magnitudes import Largest, count_of

_OUTLIERS = 0.01  # share of the largest entries that are left out: the paper's γ of 99 %


def breadcrumbs(deltas: Sequence[torch.Tensor], weights: Sequence[float], density: float) -> torch.Tensor:
    """Σ w·(m ∘ Δ): (n, k) in the dtype of the deltas (n, k), which are left as they are.

    m keeps a share `density` of each delta's entries, the largest by magnitude but for 1 % of outliers above them
    (fewer if the density leaves no room for as many). Nothing is rescaled: what is left out is missing from the sum.
    Davari and Belilovsky 2023, arXiv 2312.06795, whose percentiles are each layer's own as well.
    """
    return plain(deltas[0], weights, [_middle(delta, density) for delta in deltas])


def _middle(delta: torch.Tensor, density: float) -> Rows:
    kept = count_of(density, delta.numel())
    outliers = min(int(_OUTLIERS * delta.numel()), delta.numel() - kept)
    with_outliers = Largest(delta, kept + outliers)
    if not outliers:
        return with_outliers.rows
    largest = Largest(delta, outliers)
    return lambda start, stop: with_outliers.rows(start, stop) - largest.rows(start, stop)

"""Weights split into magnitude and direction: W' = m ∘ V/‖V‖ (DoRA, Liu et al. 2024, arXiv 2402.09353, eq. 5)."""

from __future__ import annotations

import torch

OUTPUT, INPUT = 0, 1  # the axis along which the magnitudes stand: one per output row, or one per input channel


def norms(V: torch.Tensor, axis: int) -> torch.Tensor:
    """The norms of V's output rows (n, 1, …) or of its input channels (1, c, …), kernel included; V's dtype."""
    return torch.linalg.vector_norm(V, dim=[d for d in range(V.ndim) if d != axis], keepdim=True)


def recompose(V: torch.Tensor, magnitudes: torch.Tensor, axis: int) -> torch.Tensor:
    """m ∘ V/‖V‖ for V: (n, c[, kh, kw]) and as many magnitudes as V has rows or channels; all in V's dtype.

    What V leaves at zero stays so: it has no direction.
    """
    sizes = [1] * V.ndim
    sizes[axis] = -1
    lengths = norms(V, axis)
    return V * (magnitudes.reshape(sizes) / lengths.where(lengths != 0, torch.ones_like(lengths)))

"""One entry for all methods of `methods.METHODS`: several changes of one layer in, one change out."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import NumericalError, SpecError
from ...lazy import torch
from ..factored import LowRank, weighted_sum
from .methods import METHODS


def merge(
    method: str,
    terms: Sequence[tuple[float, LowRank | torch.Tensor]],
    *,
    density: float = 1.0,
    seed: int = 0,
    energy: float | None = None,
) -> LowRank | torch.Tensor:
    """One change of the layer from its terms (weight, change), at least one, all of the same n and k.

    A change is a LowRank or a whole matrix (n, k) float32, which is left as it was.  Returns a LowRank in float64, or
    a matrix (n, k) float32 where the method or a term needs one.
    Raises SpecError for an unknown method, NumericalError for numbers that are not finite.
    """
    if method not in METHODS:
        raise SpecError(f"There is no method {method!r}.", hint=f"Methods are {', '.join(METHODS)}.")
    for weight, change in terms:
        _check(weight, change)
    return linear(terms)


def linear(terms: Sequence[tuple[float, LowRank | torch.Tensor]]) -> LowRank | torch.Tensor:
    """Σ w·Δ: factors side by side; a whole matrix as soon as one term is one."""
    low = [(weight, change) for weight, change in terms if isinstance(change, LowRank)]
    if len(low) == len(terms):
        return weighted_sum(low)
    whole = [(weight, change) for weight, change in terms if not isinstance(change, LowRank)]
    total = whole[0][0] * whole[0][1]
    for weight, change in whole[1:]:
        total.add_(change, alpha=weight)
    for weight, change in low:
        total.addmm_(change.up.float(), change.down.float(), alpha=weight * change.scale)
    return total


def _check(weight: float, change: LowRank | torch.Tensor) -> None:
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    if not all(bool(part.isfinite().all()) for part in parts):
        raise NumericalError(
            "A LoRA holds numbers that are not finite.",
            "Its training diverged, or its file is damaged.",
            "Leave this LoRA out.",
        )

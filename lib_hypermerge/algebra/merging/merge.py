"""One entry for all methods of `methods.METHODS`: several changes of one layer in, one change out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import NumericalError, SpecError
from ...lazy import torch
from ..factored import LowRank, weighted_sum
from .aligned import aligned
from .breadcrumbs import breadcrumbs
from .dropping import dare, della
from .isotropic import iso_c, iso_cts
from .knots import knots
from .methods import FACTORED, METHODS
from .projection import shared, without
from .singular import factors_of
from .ties import ties
from .tsv import tsv


@dataclass(frozen=True)
class _Options:
    density: float
    seed: int
    energy: float | None


def _projected(project: Callable[..., LowRank], terms: list[tuple[float, LowRank]], energy: float | None) -> LowRank:
    weight, first = terms[0]
    return weighted_sum([(weight, project(first, [change for _, change in terms[1:]], energy))])


_FACTORED: dict[str, Callable[[list[tuple[float, LowRank]], _Options], LowRank]] = {
    "knots": lambda terms, use: knots(terms, use.density),
    "tsv": lambda terms, use: tsv(terms, use.energy),
    "iso-c": lambda terms, use: iso_c(terms, use.energy),
    "iso-cts": lambda terms, use: iso_cts(terms, use.energy),
    "aligned": lambda terms, use: aligned(terms),
    "without": lambda terms, use: _projected(without, terms, use.energy),
    "shared": lambda terms, use: _projected(shared, terms, use.energy),
}
_DENSE: dict[str, Callable[[list[torch.Tensor], list[float], _Options], torch.Tensor]] = {
    "ties": lambda deltas, weights, use: ties(deltas, weights, use.density),
    "dare": lambda deltas, weights, use: dare(deltas, weights, use.density, use.seed),
    "dare-ties": lambda deltas, weights, use: dare(deltas, weights, use.density, use.seed, elect=True),
    "della": lambda deltas, weights, use: della(deltas, weights, use.density, use.seed),
    "breadcrumbs": lambda deltas, weights, use: breadcrumbs(deltas, weights, use.density),
}


def merge(
    method: str,
    terms: Sequence[tuple[float, LowRank | torch.Tensor]],
    *,
    density: float = 1.0,
    seed: int = 0,
    energy: float | None = None,
) -> LowRank | torch.Tensor:
    """One change of the layer from its terms (weight, change), at least one, all of the same n and k.

    A change is a LowRank or a whole matrix (n, k) float32, which is left as it was; a method for factors makes factors
    of it (`singular.factors_of` says at what cost), one for whole matrices multiplies a LowRank out. The weighted sum
    has use for both.  density and energy: above 0 and up to 1.  seed: the layer's own.
    Returns a LowRank in float64 of at least one column, or a matrix (n, k) float32.
    Raises SpecError for a method or parameter that is not one, NumericalError for numbers that are not finite.
    """
    _check(method, density, energy)
    for weight, change in terms:
        _check_finite(weight, change)
    first = terms[0]
    kept = [term for term in terms if term[0] != 0]
    if not kept or (METHODS[method].first_is_special and first[0] == 0):
        return _zero(first[1])
    if method == "linear":
        return linear(kept)
    options = _Options(density, seed, energy)
    if METHODS[method].kind == FACTORED:
        low = [(weight, change if isinstance(change, LowRank) else factors_of(change)) for weight, change in kept]
        result = _FACTORED[method](low, options)
        return result if result.rank else _zero(result)
    whole = [_whole(change) if isinstance(change, LowRank) else change for _, change in kept]
    return _DENSE[method](whole, [weight for weight, _ in kept], options)


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


def _whole(change: LowRank) -> torch.Tensor:
    return (change.up.float() * change.scale) @ change.down.float()


def _zero(change: LowRank | torch.Tensor) -> LowRank | torch.Tensor:
    if not isinstance(change, LowRank):
        return torch.zeros_like(change)
    up, down = change.up, change.down
    return LowRank(up.new_zeros(up.shape[0], 1).double(), down.new_zeros(1, down.shape[1]).double())


def _check(method: str, density: float, energy: float | None) -> None:
    if method not in METHODS:
        raise SpecError(f"There is no method {method!r}.", hint=f"Methods are {', '.join(METHODS)}.")
    for name, value in (("density", density), ("energy", energy)):
        if value is not None and not 0 < value <= 1:
            raise SpecError(f"The {name} is {value}.", "It is a share.", "Choose one above 0 and up to 1.")


def _check_finite(weight: float, change: LowRank | torch.Tensor) -> None:
    parts = (change.up, change.down) if isinstance(change, LowRank) else (change,)
    if not math.isfinite(weight) or not all(bool(part.isfinite().all()) for part in parts):
        raise NumericalError(
            "A change to be merged holds numbers that are not finite.",
            "Its training diverged, or its file is damaged.",
            "Leave it out.",
        )

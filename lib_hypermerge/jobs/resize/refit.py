"""A DoRA of a lower rank: its directions, and the magnitudes that go best with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...adapters.dora import MAGNITUDES, Dora
from ...algebra import dora
from ...algebra.core import core_of
from ...algebra.lowrank import Factors, Matrix, decompose, factorise
from ...errors import NumericalError


@dataclass(frozen=True)
class Refitted:
    """magnitudes: in the shape and the number format of the file's.  error2: ‖W' − m∘V/‖V‖‖²_F, as rounded."""

    factors: Factors
    magnitudes: torch.Tensor
    error2: float


def refit(adapter: Dora, W: torch.Tensor, goal: torch.Tensor, rank: int, dtype: torch.dtype) -> Refitted:
    """goal: the weight that the whole DoRA makes of W, both (n, c[, kh, kw]) float64.  dtype: of the factors.

    Tried are the file's own directions and those of the alternating fit (algebra/dora.py), both with magnitudes of
    their own; the better is kept, so it is never further off than the file's directions with the file's magnitudes.
    Raises NumericalError if the fit is not finite.
    """
    axis, low = adapter.axis(adapter.shapes, tuple(W.shape)), adapter.adapter.low_rank(torch.float64)
    assert axis is not None and low is not None
    stored = next(adapter.tensors[name] for name in MAGNITUDES if name in adapter.tensors)
    made = [core_of(low).factors(rank, dtype)]

    def truncate(change: torch.Tensor) -> torch.Tensor:
        A = change.flatten(1).float()
        matrix = Matrix(A, float(A.double().square().sum()))
        made.append(factorise(matrix, decompose(matrix, rank), rank, dtype))
        return _change(made[-1], W.shape)

    fit = dora.fit(W, goal, truncate, axis)
    assert fit is not None  # there is no target
    results = []
    for factors, V in ((made[0], W + _change(made[0], W.shape)), (made[1 + fit.turn], fit.V)):
        m = dora.magnitudes(V, goal, axis).to(stored.dtype)
        results.append(Refitted(factors, m, dora.missed(V, m.to(W.dtype), goal, axis)))
    best = min(results, key=lambda one: one.error2)
    if not best.magnitudes.isfinite().all():
        raise NumericalError("The magnitudes of a DoRA cannot be fitted.", "They come out as NaN or Inf.",
                             "The LoRA or the checkpoint is damaged: get a sound copy.")  # fmt: skip
    return best


def _change(factors: Factors, shape: torch.Size) -> torch.Tensor:
    return (factors.up.double() @ factors.down.double()).reshape(shape)

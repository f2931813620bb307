"""The rank rule "size": all spectra first, then ranks over all layers at once for a file of so many MiB."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from ..adapters.lora import tensor_bytes
from ..algebra import rank as rank_rules
from ..errors import SpecError
from .extract_layers import LayerResult, LayerWork
from .extract_plan import ExtractPlan
from .pairing import Pair

Results = dict[str, LayerResult]
# (function, items) → results in order, with progress
Run = Callable[[Callable[[Pair], LayerResult], list[Pair]], Iterator[LayerResult]]


def spectra(plan: ExtractPlan, work: LayerWork, run: Run) -> tuple[Results, list[str]]:
    """Singular values of every changed layer, and the keys of layers with NaN or Inf.

    Four times the uniform rank of the target's size is known of each; `allot` asks for more where it needs it.
    """
    found, nonfinite = {}, []
    cap = _cap(plan, plan.layers)
    for result in run(lambda pair: work.spectrum(pair, cap), plan.layers):
        if result.status == "written":
            found[result.pair.key] = result
        elif result.status == "nonfinite":
            nonfinite.append(result.pair.key)
    return found, nonfinite


def allot(plan: ExtractPlan, work: LayerWork, run: Run, found: Results, overhead: int) -> dict[str, int]:
    """Ranks by layer key; found is completed where more singular values are needed. SpecError if too small."""
    if not found:
        return {}
    pairs = [result.pair for result in found.values()]
    costs = [tensor_bytes(1, *pair.tuned.matrix_shape, plan.itemsize) for pair in pairs]
    budget = int((plan.spec.rank_target or 0) * 2**20) - overhead
    while True:
        bounds = [
            rank_rules.Bounds(
                min(plan.spec.min_rank, plan.largest_rank(pair)), min(_known(found, pair), plan.largest_rank(pair))
            )
            for pair in pairs
        ]
        squares = [result.S.square() for result in found.values() if result.S is not None]
        ranks = rank_rules.allocate(squares, costs, bounds, budget)
        if ranks is None:
            least = overhead + sum(b.least * cost for b, cost in zip(bounds, costs, strict=True))
            raise SpecError(
                f"A file of {plan.spec.rank_target:g} MiB is too small.",
                f"The least rank in each of the {len(pairs)} changed layers takes {least / 2**20:.2f} MiB.",
                "Ask for more, or include fewer layers.",
            )
        short = [p for p, rank in zip(pairs, ranks, strict=True) if rank == _known(found, p) < plan.largest_rank(p)]
        if not short:
            return {pair.key: rank for pair, rank in zip(pairs, ranks, strict=True)}
        known = {pair.key: _known(found, pair) for pair in short}
        for result in run(lambda pair: work.spectrum(pair, 2 * known[pair.key]), short):  # noqa: B023 - used at once
            found[result.pair.key] = result


def _cap(plan: ExtractPlan, pairs: list[Pair]) -> int:
    per_rank = sum(tensor_bytes(1, *pair.tuned.matrix_shape, plan.itemsize) for pair in pairs)
    return max(16, math.ceil(4 * (plan.spec.rank_target or 0) * 2**20 / per_rank))


def _known(found: Results, pair: Pair) -> int:
    result = found[pair.key]
    assert result.S is not None
    return min(pair.tuned.matrix_shape) if result.complete else len(result.S)

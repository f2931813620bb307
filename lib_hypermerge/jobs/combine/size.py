"""A file of a size: spectra of all layers first, then ranks over all of them at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ...adapters.lora import tensor_bytes
from ...algebra import rank as rank_rules
from ...errors import SpecError
from .layers import Layer
from .plan import CombinePlan
from .work import Spectrum

# (layers, cap) → their spectra in order, of at least so many values unless a layer has fewer
Spectra = Callable[[Sequence[Layer], Callable[[Layer], int]], Iterator[Spectrum]]


def allot(plan: CombinePlan, spectra: Spectra, overhead: Callable[[dict[str, int]], int]) -> dict[str, int]:
    """Ranks by the layers' names; layers without one change nothing.

    overhead: bytes besides factors in a file of these ranks, an upper bound.  SpecError if the size is too small.
    """
    layers = [layer for layer in plan.layers if layer.changes_weight and not layer.is_norm]
    goal = int((plan.spec.size or 0) * 2**20)
    per_rank = sum(_cost(plan, layer) for layer in layers)
    cap = max(16, math.ceil(4 * goal / max(1, per_rank)))
    found = {one.layer.name: one for one in spectra(layers, lambda layer: cap) if len(one.S)}
    layers = [layer for layer in layers if layer.name in found]
    if not layers:
        return {}
    costs = [_cost(plan, layer) for layer in layers]
    most = {layer.name: 9999 for layer in layers}
    budget = goal - overhead(most)
    while True:
        known = [len(found[layer.name].S) for layer in layers]
        bounds = [rank_rules.Bounds(1, min(count, *layer.size)) for count, layer in zip(known, layers, strict=True)]
        squares = [found[layer.name].S.square() for layer in layers]
        ranks = rank_rules.allocate(squares, costs, bounds, budget)
        if ranks is None:
            least = goal - budget + sum(costs)
            raise SpecError(
                f"A file of {plan.spec.size:g} MiB is too small.",
                f"One direction in each of the {len(layers)} changed layers takes {least / 2**20:.2f} MiB.",
                "Ask for more.",
            )
        short = [
            layer for layer, rank, count in zip(layers, ranks, known, strict=True)
            if rank == count < min(layer.size) and not found[layer.name].complete
        ]  # fmt: skip
        if not short:
            return {layer.name: rank for layer, rank in zip(layers, ranks, strict=True)}
        for one in spectra(short, lambda layer: 2 * len(found[layer.name].S)):
            found[one.layer.name] = one


def _cost(plan: CombinePlan, layer: Layer) -> int:
    return tensor_bytes(1, *layer.size, plan.itemsize)

"""How long layers take in each family: roughly, for forecasts, and to draw a sample that is worth its time.

In seconds on the core that the constants of algebra.svd were measured on.
"""

from __future__ import annotations

from collections.abc import Callable

from .extract_spec import BEST, DORA, LOHA, LOKR, LORA, RIVALS
from .pairing import Pair

# family → (decompositions to a rank, seconds for each weight, the same for each weight and unit of rank).
# Measured with changes of steep spectra; what fits better takes longer, DoRA up to three times, LoHa twice as long.
_TIMES = {LORA: (1.0, 0.0, 0.0), DORA: (2.0, 1.5e-8, 0.0), LOHA: (1.0, 0.0, 8e-9), LOKR: (1.0, 3.5e-8, 0.0)}

# Of what is drawn to find the best family: weights × rank, and layers however large they are.
SAMPLE, LEAST_LAYERS = 4e9, 16


def drawn(pair: Pair, rank: int) -> float:
    """What a layer takes of SAMPLE."""
    n, k = pair.tuned.matrix_shape
    return float(n * k * rank)


def seconds(
    family: str, layers: list[Pair], rank_of: Callable[[Pair], int], decomposition: Callable[[Pair, int], float]
) -> float:
    """Of all layers.  decomposition: seconds of one to a rank."""
    if family != BEST:
        return sum(_layer(family, pair, rank_of(pair), decomposition) for pair in layers)
    all_of_them = sum(_layer(other, pair, rank_of(pair), decomposition) for pair in layers for other in RIVALS)
    share = min(1.0, SAMPLE / max(1.0, sum(drawn(pair, rank_of(pair)) for pair in layers)))
    return share * all_of_them + seconds(LORA, layers, rank_of, decomposition)


def _layer(family: str, pair: Pair, rank: int, decomposition: Callable[[Pair, int], float]) -> float:
    times, each, each_rank = _TIMES[family]
    n, k = pair.tuned.matrix_shape
    return times * decomposition(pair, rank) + n * k * (each + rank * each_rank)

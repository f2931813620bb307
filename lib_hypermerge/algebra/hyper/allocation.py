"""Where rank serves most: over the layers of each LoRA at equal size, and over LoRAs within a size."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..rank import Bounds, allocate
from .blocks import spectra
from .directions import independent
from .joint import Run, begin, carry_on, start_directions
from .problem import Cores, Problem, Settings
from .sample import sample
from .sweep import Fixed, View

_MOST = 4  # times its mean rank is what a layer gets at most: wider ones make all layers' tensors wide
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
_WORTH = 0.02  # of the loss: fewer LoRAs are preferred to this
_QUICK = 25  # sweeps
_NUMBERS = 1_000_000  # of cores, for a quick solve
_NOISE = 1e-7  # of the energy: float32 tells no losses apart below it


def layer_ranks(view: View, found: Sequence[Fixed], ranks: Sequence[int]) -> list[torch.Tensor]:
    """Per group (L, K): ranks by Σ_m λ_mi² σ² / (n + k); each LoRA takes no more numbers than with one rank.

    A layer keeps 1 at least, and no layer gets more than its core or its matrices have.
    """
    sizes = [len(cores.values) for cores in view.groups]
    costs = torch.cat([cores.costs for cores in view.groups]).tolist()
    columns = []
    for i, rank in enumerate(ranks):
        squares = [row for group in spectra(view, found, i) for row in group]
        most = [min(m, *cores.values.shape[2:], _MOST * rank) for cores in view.groups for m in cores.most.tolist()]
        bounds = [Bounds(1, m) for m in most]
        budget = sum(min(rank, m) * cost for m, cost in zip(most, costs, strict=True))
        chosen = allocate(squares, costs, bounds, budget)
        assert chosen is not None  # one each fits where rank ≥ 1 each did
        columns.append(torch.tensor(chosen))
    return list(torch.stack(columns, 1).split(sizes))


def plan_ranks(
    problem: Problem, numbers: int, count: int | None, settings: Settings, *, beside: int = 0,
    stored: Sequence[Cores] | None = None,
) -> tuple[int, ...]:  # fmt: skip
    """Ranks, one for each LoRA, descending, that take at most numbers stored numbers: Σ_i Σ_l min(r_i, most_l)(n + k).

    count: of LoRAs; None: the fewest that come close to what more would reach, never more than there are independent
    directions. Tried by quick solves on a sample of the layers. At least one LoRA of rank 1 comes out, and no rank
    that no layer has room for.
    beside: numbers that each LoRA takes besides, such as its header.  stored: the layers that are stored, if they are
    more than the problem's.
    """
    prices = _prices(stored or problem.groups)
    view = sample(View(problem.groups), _NUMBERS).view
    limit = max(1, min(_COUNTS[-1], numbers // max(1, prices[0] + beside)))
    if count is None:
        limit = min(limit, max(1, independent(problem.gram, _NOISE)))
        counts = sorted({limit, *(k for k in _COUNTS if k < limit)})
    else:
        counts = [min(count, limit)]
    found: dict[tuple[int, ...], float] = {}
    for k in counts:
        for ranks in sorted(_splits(problem.gram, numbers - k * beside, k, prices)):
            found[ranks] = _quick_loss(view, problem.gram, ranks, settings)
    best = min(found.values())
    bound = best * (1 + _WORTH) + _NOISE * view.energy
    close = [ranks for ranks, loss in found.items() if loss <= bound] or list(found)
    fewest = min(len(ranks) for ranks in close)
    return min((ranks for ranks in close if len(ranks) == fewest), key=lambda ranks: (found[ranks], ranks))


def _prices(groups: Sequence[Cores]) -> list[int]:
    """Numbers that each further rank of a LoRA takes, in the layers that still have room for it."""
    costs, most = torch.cat([cores.costs for cores in groups]), torch.cat([cores.most for cores in groups])
    return [int(costs[most >= rank].sum()) for rank in range(1, max(1, int(most.max())) + 1)]


def _splits(gram: torch.Tensor, numbers: int, count: int, prices: Sequence[int]) -> set[tuple[int, ...]]:
    """Ways to share numbers: evenly, halving, by what the main directions weigh and by its root."""
    values = torch.linalg.eigvalsh(gram).flip(0)[:count].clamp_min(0).tolist()
    largest = values[0] or 1.0
    values = [max(v, 1e-3 * largest) for v in values] + [1e-3 * largest] * max(0, count - len(values))
    shapes = [
        [1.0] * count,
        [2.0**-i for i in range(count)],
        values,
        [v**0.5 for v in values],
    ]
    return {_share(numbers, weights, prices) for weights in shapes}


def _share(numbers: int, weights: Sequence[float], prices: Sequence[int]) -> tuple[int, ...]:
    """Ranks from 1 on, in these proportions, descending, that take numbers or less, as long as prices has some more."""
    ranks = [1] * len(weights)
    left = numbers - prices[0] * len(weights)
    while True:
        room = [i for i, rank in enumerate(ranks) if rank < len(prices) and prices[rank] <= left]
        if not room:
            return tuple(sorted(ranks, reverse=True))
        best = max(room, key=lambda i: weights[i] / (ranks[i] + 0.5))
        left -= prices[ranks[best]]
        ranks[best] += 1


def _quick_loss(view: View, gram: torch.Tensor, ranks: tuple[int, ...], settings: Settings) -> float:
    own = [torch.tensor(ranks).clamp_max(min(c.values.shape[2:])).expand(len(c.values), -1) for c in view.groups]
    start = begin(view, start_directions(gram, len(ranks), settings.seed), own, settings.seed)
    settings.check(0.0)
    return carry_on(view, Run(start, []), settings.tolerance, _QUICK, lambda: None).loss

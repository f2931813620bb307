"""Where rank serves most: over the layers of each LoRA at equal size, and over LoRAs within a size."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..rank import Bounds, allocate
from .blocks import spectra
from .joint import Run, begin, carry_on, start_directions
from .problem import Problem, Settings
from .sample import sample
from .sweep import Fixed, View

_MOST = 4  # times its mean rank is what a layer gets at most: wider ones make all layers' tensors wide
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)
_WORTH = 0.02  # of the loss: fewer LoRAs are preferred to this
_QUICK = 25  # sweeps
_NUMBERS = 1_000_000  # of cores, for a quick solve


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


def plan_ranks(problem: Problem, numbers: int, count: int | None, settings: Settings) -> tuple[int, ...]:
    """Ranks, one for each LoRA, descending, that take at most numbers stored numbers: Σ_i r_i Σ_l (n + k).

    count: of LoRAs; None: the fewest that come close to what more would reach. Tried by quick solves on a sample of
    the layers. At least one LoRA of rank 1 comes out; a rank never exceeds what the largest core allows.
    """
    cost = sum(int(cores.costs.sum()) for cores in problem.groups)
    most = max(min(cores.values.shape[2:]) for cores in problem.groups)
    total = max(1, numbers // max(1, cost))
    view = sample(View(problem.groups), _NUMBERS).view
    limit = min(total, _COUNTS[-1])
    counts = [min(count, limit)] if count is not None else [k for k in _COUNTS if k <= limit]
    found: dict[tuple[int, ...], float] = {}
    for k in counts:
        for ranks in sorted(_splits(problem.gram, total, k, most)):
            found[ranks] = _quick_loss(view, problem.gram, ranks, settings)
    best = min(found.values())
    close = [ranks for ranks, loss in found.items() if loss <= best * (1 + _WORTH)]
    fewest = min(len(ranks) for ranks in close)
    return min((ranks for ranks in close if len(ranks) == fewest), key=lambda ranks: (found[ranks], ranks))


def _splits(gram: torch.Tensor, total: int, count: int, most: int) -> set[tuple[int, ...]]:
    """Ways to share a sum of ranks: evenly, halving, by what the main directions weigh and by its root."""
    values = torch.linalg.eigvalsh(gram).flip(0)[:count].clamp_min(0).tolist()
    largest = values[0] or 1.0
    values = [max(v, 1e-3 * largest) for v in values] + [1e-3 * largest] * max(0, count - len(values))
    shapes = [
        [1.0] * count,
        [2.0**-i for i in range(count)],
        values,
        [v**0.5 for v in values],
    ]
    return {_share(total, weights, most) for weights in shapes}


def _share(total: int, weights: Sequence[float], most: int) -> tuple[int, ...]:
    """Whole numbers from 1 to most in these proportions, descending, of sum total or as near below as most allows."""
    ranks = [1] * len(weights)
    for _ in range(total - len(weights)):
        room = [i for i, rank in enumerate(ranks) if rank < most]
        if not room:
            break
        ranks[max(room, key=lambda i: weights[i] / (ranks[i] + 0.5))] += 1
    return tuple(sorted(ranks, reverse=True))


def _quick_loss(view: View, gram: torch.Tensor, ranks: tuple[int, ...], settings: Settings) -> float:
    own = [torch.tensor(ranks).clamp_max(min(c.values.shape[2:])).expand(len(c.values), -1) for c in view.groups]
    start = begin(view, start_directions(gram, len(ranks), settings.seed), own, settings.seed)
    settings.check(0.0)
    return carry_on(view, Run(start, []), settings.tolerance, _QUICK, lambda: None).loss

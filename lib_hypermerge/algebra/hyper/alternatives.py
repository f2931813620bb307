"""What else the bytes of K shared LoRAs would buy, measured on the cores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ...lazy import torch
from .container import SharedCores, chunks, shared_cores
from .problem import Problem, Settings
from .solve import GREEDY, solve

AVERAGE, OWN, CONTAINER = "average", "own", "container"
_NARROW = 64  # sides up to here are decomposed whole
_BESIDE, _STEPS = 12, 3  # directions beside those asked for, and power steps, of the randomised spectra


@dataclass(frozen=True)
class Alternative:
    """kind: average, own, greedy or container.  numbers: stored besides the hyper-model.  share: what is left."""

    kind: str
    numbers: int
    share: float


def joined(problems: Sequence[Problem]) -> Problem:
    """Several problems as one, for what knows no multipliers: text encoders and UNet apart need not stay so."""
    groups = [group for problem in problems for group in problem.groups]
    gram = torch.stack([problem.gram for problem in problems]).sum(0)
    return Problem(groups, gram, math.fsum(problem.total for problem in problems))


def numbers_of(problem: Problem, ranks: Sequence[int]) -> int:
    """Stored numbers of LoRAs of these ranks, each as far as a layer allows."""
    return sum(
        int(group.costs[group.most == most].sum()) * sum(min(rank, int(most)) for rank in ranks)
        for group in problem.groups
        for most in group.most.unique()
    )


def alternatives(
    problems: Sequence[Problem], ranks: Sequence[int], settings: Settings, *, numbers: int | None = None,
    allocate: bool = False, greedy: float | None = None, container: SharedCores | None = None,
) -> list[Alternative]:  # fmt: skip
    """What the plain average leaves, and at the size of LoRAs of these ranks: own LoRAs, greedy ones, a container.

    problems: solved independently of each other, such as the UNet's and the text encoders'; shares are of all their
    totals.  numbers: the size to compare at, by default that of LoRAs of these ranks.  allocate: layers' ranks of
    own and greedy LoRAs follow what they gain; a container's always do.  greedy: its share, container: what it is,
    where they are known.
    Raises what settings.check raises.
    """
    whole = joined(problems)
    size = sum(numbers_of(problem, ranks) for problem in problems) if numbers is None else numbers
    if greedy is None:
        found = [solve(problem, ranks, GREEDY, settings, allocate).loss[-1] * problem.total for problem in problems]
        greedy = _share(math.fsum(found), whole.total)
    container = container or shared_cores(whole, size, settings)
    return [
        Alternative(AVERAGE, 0, _share(whole.energy, whole.total)),
        Alternative(OWN, size, own_loras(whole, size, settings, allocate)),
        Alternative(GREEDY, size, greedy),
        Alternative(CONTAINER, container.numbers, container.share),
    ]


def own_loras(problem: Problem, numbers: int, settings: Settings, allocate: bool = False) -> float:
    """The share left by a LoRA of its own for each model, all of them together of that many numbers.

    All layers and models have one rank; what is left of `numbers` buys one more for a part of them, and the part
    counts by its average.  allocate: the largest σ² per number first, over all layers and models.  Narrow cores
    are decomposed whole, wide ones by randomised subspace iteration, which understates what is kept by parts in a
    thousand.
    """
    M = len(problem.gram)
    per_rank = M * sum(int(group.costs.sum()) for group in problem.groups)
    rank = numbers / max(1, per_rank)
    needed = math.ceil(rank if not allocate else 4 * rank + 8)
    gains, costs, kept = [], [], 0.0
    done, layers = 0, sum(len(group.values) for group in problem.groups)
    for group in problem.groups:
        for index, C in chunks(group):
            squares = _spectra(C, min(needed, min(C.shape[2:])), settings.seed).cpu().double()  # (B, M, s)
            if allocate:
                price = group.costs[index].cpu().double()[:, None, None].expand_as(squares)
                gains.append(squares.flatten())
                costs.append(price.flatten())
            else:
                kept += float((squares * (rank - torch.arange(squares.shape[2])).clamp(0, 1)).sum())
            done += len(index)
            settings.check(done / layers)
    if allocate and gains:
        gain, cost = torch.cat(gains), torch.cat(costs)
        order = (gain / cost).argsort(descending=True, stable=True)
        fits = cost[order].cumsum(0) <= numbers
        kept = float(gain[order][fits].sum())
    return _share(max(problem.energy - kept, 0.0), problem.total)


def _spectra(C: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(B, M, count) squared singular values of C (B, M, p, q), descending."""
    X = C if C.shape[2] <= C.shape[3] else C.mT
    width = count + _BESIDE
    if X.shape[2] > max(_NARROW, 3 * width):
        generator = torch.Generator().manual_seed(seed)
        Q = X @ torch.randn(X.shape[3], width, generator=generator).to(X)
        for _ in range(_STEPS):
            Q = X @ (X.mT @ torch.linalg.qr(Q).Q)
        X = torch.linalg.qr(Q).Q.mT @ X
    return torch.linalg.eigvalsh(X @ X.mT).flip(-1)[..., :count].clamp_min(0)


def better(loras: float, container: float) -> tuple[str, float]:
    """Which of the two leaves less at equal size, "loras" or "container", and the share of the other's it saves."""
    kind, least, most = (CONTAINER, container, loras) if container < loras else ("loras", loras, container)
    return kind, 1 - least / most if most > 0 else 0.0


def _share(error: float, total: float) -> float:
    return error / total if total > 0 else 0.0

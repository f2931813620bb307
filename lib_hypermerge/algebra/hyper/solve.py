"""K shared low-rank changes and a multiplier for each model: the problem on cores, by one of three methods."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ...lazy import torch
from .balance import assemble
from .directions import main_directions
from .greedy import greedy, settle
from .joint import Run, begin, carry_on, joint
from .problem import Problem, Settings, Solution
from .sweep import Fixed, Layout, Terms, View

JOINT, GREEDY, DIRECTIONS = "joint", "greedy", "directions"


def solve(problem: Problem, ranks: Sequence[int], method: str, settings: Settings, allocate: bool = False) -> Solution:
    """The LoRAs of these ranks and the multipliers that leave least of problem.

    method: "joint", "greedy" or "directions". Joint starts from greedy's result too, so it is never worse.
    allocate: layers get ranks of their own where that lowers the loss; each LoRA keeps its size.
    A layer's rank is at most min(p, q). Raises ValueError for another method or no ranks.
    """
    if method not in (JOINT, GREEDY, DIRECTIONS):
        raise ValueError(f"unknown method {method!r}")
    if not ranks or min(ranks) < 1:
        raise ValueError("ranks of 1 or more are needed")
    view = View(problem.groups)
    outside = max(0.0, problem.energy - view.energy)
    own = uniform(problem, ranks)
    progress = _Progress(settings)
    if method == DIRECTIONS:
        terms = begin(view, main_directions(problem.gram, len(ranks)), own, settings.seed)
        run = carry_on(view, Run(terms, []), settings.tolerance, settings.iterations, progress, free=False)
        fixed, losses = settle(view, run.terms, free=False)[0], run.losses
    else:
        fixed, losses = greedy(view, problem.gram, own, settings, progress)
        if method == JOINT:
            run = joint(view, problem.gram, own, [_together(fixed)], settings, progress)
            closer, loss = settle(view, run.terms)
            if loss <= losses[-1]:
                fixed, losses = closer, [*run.losses, loss]
    return _solution(view, fixed, ranks, losses, outside, problem.total, _notes(problem, ranks))


def uniform(problem: Problem, ranks: Sequence[int]) -> list[torch.Tensor]:
    """Per group (L, K): every layer the given ranks, as far as its core allows."""
    return [
        torch.tensor(ranks).clamp_max(min(cores.values.shape[2:])).expand(len(cores.values), -1)
        for cores in problem.groups
    ]


def _together(fixed: Sequence[Fixed]) -> Terms:
    """LoRAs that were found one after another, as one start."""
    downs = [torch.cat([term.downs[g] for term in fixed], 1) for g in range(len(fixed[0].downs))]
    layouts = [Layout(tuple(term.downs[g].shape[1] for term in fixed)) for g in range(len(downs))]
    return Terms(torch.stack([term.multipliers for term in fixed], 1), downs, layouts)


def _solution(
    view: View, fixed: list[Fixed], ranks: Sequence[int], losses: list[float], outside: float, total: float,
    notes: list[str],
) -> Solution:  # fmt: skip
    multipliers, ups, downs, own = assemble(fixed, ranks)
    left = _measured(view, multipliers, ups, downs, ranks)
    losses = list(accumulate([left, *reversed(losses)], max))[::-1]  # what was lower was so by rounding alone
    shares = [(loss + outside) / total if total else 0.0 for loss in losses]
    empty = [i + 1 for i in range(len(ranks)) if not multipliers[:, i].any()]
    if empty:
        notes.append(f"LoRA {', '.join(map(str, empty))} is empty: the others leave nothing to it.")
    return Solution(multipliers, downs, ups, own, shares, tuple(ranks), notes)


def _measured(
    view: View, multipliers: torch.Tensor, ups: list[torch.Tensor], downs: list[torch.Tensor], ranks: Sequence[int]
) -> float:
    """Σ_m ‖C_m − Σ_i λ_mi U_i A_i‖² of the factors as they are handed out, summed in float64."""
    total = 0.0
    slices = Layout(tuple(ranks)).slices
    for g, part, C in view.chunks():
        D = torch.stack([(ups[g][part, :, rows] @ downs[g][part, rows]).flatten(1) for rows in slices], 1)
        rest = C.flatten(2) - multipliers.to(C) @ D
        total += float(rest.square().sum((1, 2)).cpu().double().sum())
    return total


def _notes(problem: Problem, ranks: Sequence[int]) -> list[str]:
    values = torch.linalg.eigvalsh(problem.gram)
    free = int((values > 1e-10 * values[-1].clamp_min(0)).sum())
    if len(ranks) > free:
        return [
            f"{len(ranks)} LoRAs for models that differ in {free} independent directions: "
            "the multipliers depend on each other."
        ]
    return []


class _Progress:
    """Passes on a rough share of the work done, growing ever more slowly towards 1."""

    def __init__(self, settings: Settings):
        self.settings, self.done = settings, 0

    def __call__(self) -> None:
        self.done += 1
        self.settings.check(self.done / (self.done + self.settings.iterations))

"""K shared low-rank changes and a multiplier for each model: the problem on cores, by one of three methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ...lazy import torch
from .allocation import layer_ranks
from .balance import assemble
from .blocks import polish
from .directions import independent, main_directions
from .greedy import greedy, settle
from .joint import Run, begin, carry_on, joint
from .problem import Problem, Settings, Solution
from .sweep import Fixed, Layout, Terms, View

JOINT, GREEDY, DIRECTIONS = "joint", "greedy", "directions"
_POLISH = 2  # sweeps of exact steps at the end
_ALLOCATIONS = 3  # rounds of ranks and a solution with them


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
    task = _Task(View(problem.groups), problem.gram, tuple(ranks), settings, _Progress(settings))
    outside = max(0.0, problem.energy - task.view.energy)
    if method == DIRECTIONS:
        found = task.directions()
    elif method == GREEDY:
        found = task.greedy(task.uniform)
        found = task.allocated(found, task.greedy)[0] if allocate else found
    else:
        first = task.greedy(task.uniform)
        found = task.joint(task.uniform, first)
        if allocate:
            first, own = task.allocated(first, task.greedy)
            found = task.lower(task.allocated(found, task.joint)[0], task.joint(own, first))
    return _solution(task.view, found, ranks, outside, problem)


Found = tuple[list[Fixed], list[float]]


@dataclass(frozen=True)
class _Task:
    view: View
    gram: torch.Tensor
    ranks: tuple[int, ...]
    settings: Settings
    check: Callable[[], None]

    @property
    def uniform(self) -> list[torch.Tensor]:
        """Per group (L, K): every layer the given ranks, as far as its core allows."""
        return [
            torch.tensor(self.ranks).clamp_max(min(cores.values.shape[2:])).expand(len(cores.values), -1)
            for cores in self.view.groups
        ]

    def directions(self) -> Found:
        start = begin(self.view, main_directions(self.gram, len(self.ranks)), self.uniform, self.settings.seed)
        run = carry_on(
            self.view, Run(start, []), self.settings.tolerance, self.settings.iterations, self.check, free=False
        )
        fixed, loss = settle(self.view, run.terms, free=False)
        return fixed, [*run.losses, loss]

    def greedy(self, own: list[torch.Tensor]) -> Found:
        return greedy(self.view, self.gram, own, self.settings, self.check)

    def joint(self, own: list[torch.Tensor], first: Found | None = None) -> Found:
        """No worse than first, whose ranks are own."""
        begun = [] if first is None else [_together(first[0])]
        run = joint(self.view, self.gram, own, begun, self.settings, self.check)
        fixed, loss = settle(self.view, run.terms)
        losses = [*run.losses, loss]
        for _ in range(_POLISH):
            fixed, loss = polish(self.view, fixed, self.check)
            losses.append(loss)
        return (fixed, losses) if first is None else self.lower(first, (fixed, losses))

    def allocated(self, found: Found, again: Callable[[list[torch.Tensor]], Found]) -> tuple[Found, list[torch.Tensor]]:
        """With ranks of the layers' own by what the last solution would gain from them, while that helps; and these."""
        own = self.uniform
        for _ in range(_ALLOCATIONS):
            ranks = layer_ranks(self.view, found[0], self.ranks)
            other = again(ranks)
            if not other[1][-1] < found[1][-1]:
                break
            found, own = other, ranks
        return found, own

    def lower(self, first: Found, second: Found) -> Found:
        """By what they leave itself: as a difference of energies it is float32's to 1e-7 of the whole only."""
        left = [View(self.view.groups, tuple(found[0])).energy for found in (first, second)]
        return second if left[1] < left[0] else first


def _together(fixed: Sequence[Fixed]) -> Terms:
    """LoRAs that were found one after another, as one start."""
    downs = [torch.cat([term.downs[g] for term in fixed], 1) for g in range(len(fixed[0].downs))]
    layouts = [Layout(tuple(term.downs[g].shape[1] for term in fixed)) for g in range(len(downs))]
    return Terms(torch.stack([term.multipliers for term in fixed], 1), downs, layouts)


def _solution(view: View, found: Found, ranks: Sequence[int], outside: float, problem: Problem) -> Solution:
    fixed, losses = found
    widest = [max(A.shape[1] for A in term.downs) for term in fixed]
    rooms = tuple(map(max, ranks, widest))
    multipliers, ups, downs, own = assemble(fixed, rooms)
    left = _measured(view, multipliers, ups, downs, rooms)
    losses = list(accumulate([left, *reversed(losses)], max))[::-1]  # what was lower was so by rounding alone
    shares = [(loss + outside) / problem.total if problem.total else 0.0 for loss in losses]
    return Solution(multipliers, downs, ups, own, shares, rooms, _notes(problem.gram, multipliers))


def _measured(
    view: View, multipliers: torch.Tensor, ups: list[torch.Tensor], downs: list[torch.Tensor], ranks: Sequence[int]
) -> float:
    """Σ_m ‖C_m − Σ_i λ_mi U_i A_i‖² of the factors as they are handed out, summed in float64."""
    slices = Layout(tuple(ranks)).slices

    def missed(g: int, part: slice, C: torch.Tensor) -> float:
        D = torch.stack([(ups[g][part, :, rows] @ downs[g][part, rows]).flatten(1) for rows in slices], 1)
        rest = C.flatten(2) - multipliers.to(C) @ D
        return float(rest.square().sum((1, 2)).cpu().double().sum())

    return sum(view.each(missed))


def _notes(gram: torch.Tensor, multipliers: torch.Tensor) -> list[str]:
    free = independent(gram)
    if not free:
        return ["The models do not differ in any layer that a LoRA reaches: the LoRAs are empty."]
    notes = []
    if multipliers.shape[1] > free:
        ways = "one direction" if free == 1 else f"{free} independent directions"
        notes.append(f"{multipliers.shape[1]} LoRAs for models that differ in {ways}: the multipliers are not unique.")
    empty = [str(i + 1) for i in range(multipliers.shape[1]) if not multipliers[:, i].any()]
    if empty:
        which = f"LoRA {empty[0]} is" if len(empty) == 1 else f"LoRAs {', '.join(empty)} are"
        notes.append(f"{which} empty: the others leave nothing.")
    return notes


class _Progress:
    """Passes on a rough share of the work done, growing ever more slowly towards 1."""

    def __init__(self, settings: Settings):
        self.settings, self.done = settings, 0

    def __call__(self) -> None:
        self.done += 1
        self.settings.check(self.done / (self.done + self.settings.iterations))

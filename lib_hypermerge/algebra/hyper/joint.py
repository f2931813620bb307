"""All LoRAs and multipliers together: several starts, the best carried on by extrapolated alternating least squares.

Plain alternating least squares creeps along narrow valleys. Each sweep here starts from where the last two point to,
as in Nesterov's method with restarts (Mitchell, Ye, De Sterck 2020, Numer. Linear Algebra Appl. 27(6)); a sweep that
raises the loss is thrown away, so it never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...lazy import torch
from .directions import main_directions
from .problem import Settings
from .sample import sample
from .sweep import Layout, Terms, View, combine, normalised, sweep

RIDGE = 1e-5
_BRIEF = 12  # sweeps after which starts are compared
_STEP, _LONGEST = 0.5, 4.0  # extrapolation by this many times the last change, at first and at most
_LONGER, _SHORTER = 1.1, 0.5
_OVER = 3  # sweeps over which the change of the loss is judged


@dataclass
class Run:
    """A start and how far it has come. losses: Σ of squares after each sweep."""

    terms: Terms
    losses: list[float]

    @property
    def loss(self) -> float:
        return self.losses[-1] if self.losses else float("inf")


def begin(view: View, multipliers: torch.Tensor, ranks: Sequence[torch.Tensor], seed: int) -> Terms:
    """Terms with these multipliers, (M, K), and random combinations of Σ_m λ_mi C_m's rows for downs.

    ranks: per group (L, K), of each layer and LoRA.
    """
    layouts = [Layout(tuple(group.amax(0).tolist())) for group in ranks]
    downs = [
        torch.empty(c.values.shape[0], layout.total, c.values.shape[3], device=c.values.device)
        for c, layout in zip(view.groups, layouts, strict=True)
    ]
    generator = torch.Generator().manual_seed(seed)
    sketches = [
        torch.randn(layout.total, c.values.shape[2], generator=generator).to(c.values.device)
        for c, layout in zip(view.groups, layouts, strict=True)
    ]

    def fill(g: int, part: slice, C: torch.Tensor) -> None:
        S, layout = combine(multipliers, C), layouts[g]
        for i, rows in enumerate(layout.slices):
            there = torch.arange(layout.ranks[i])[:, None] < ranks[g][part, i, None, None]
            downs[g][part, rows] = (sketches[g][rows] @ S[:, i]) * there.to(C)

    for _ in view.each(fill):
        pass
    return Terms(multipliers.clone(), downs, layouts)


def carry_on(
    view: View, run: Run, tolerance: float, iterations: int, check: Callable[[], None], *, free: bool = True
) -> Run:
    """Sweeps until they lower the loss by less than tolerance of it each, or iterations are used up."""
    terms, trial = run.terms, run.terms.copy()
    step = longest = _STEP
    done = 0
    while done < iterations:
        check()
        done += 1
        loss = sweep(view, trial, RIDGE, free=free)
        if not loss < run.loss and step == 0:
            break  # what a plain sweep adds is rounding
        if not loss < run.loss:
            longest, step = step * _SHORTER, 0.0
            trial.go_back_to(terms)
            continue
        run.losses.append(loss)
        extrapolate(terms, trial, step)
        longest = min(longest * _LONGER, _LONGEST)
        step = longest
        recent = run.losses[-_OVER - 1 :]
        if len(recent) > _OVER and recent[0] - recent[-1] <= _OVER * tolerance * recent[0]:
            break
    return run


def extrapolate(terms: Terms, trial: Terms, step: float) -> None:
    """terms become trial; trial goes on in the direction from the one to the other."""
    for old, new in zip(terms.downs, trial.downs, strict=True):
        old.sub_(new).mul_(-step).add_(new)
    terms.downs, trial.downs = trial.downs, terms.downs
    new = normalised(trial.multipliers)
    trial.multipliers = new + step * (new - normalised(terms.multipliers))
    terms.multipliers = new


def random_multipliers(gram: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(M, count): random combinations that lie where the models differ."""
    generator = torch.Generator().manual_seed(seed % (1 << 32))
    mixed = gram @ torch.randn(len(gram), count, generator=generator, dtype=torch.float64)
    return mixed / mixed.norm(dim=0).clamp_min(1e-300)


def start_directions(gram: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(M, count): the main directions, and behind the last of them random ones."""
    main = main_directions(gram, count)
    empty = main.norm(dim=0) == 0
    main[:, empty] = random_multipliers(gram, int(empty.sum()), seed)
    return main


def joint(
    view: View,
    gram: torch.Tensor,
    ranks: Sequence[torch.Tensor],
    begun: Sequence[Terms],
    settings: Settings,
    check: Callable[[], None],
) -> Run:
    """The best of several starts: those begun, the main directions, and random multipliers.

    Tried on a sample of the layers; the best goes on with all of them, beside those begun. ranks: per group (L, K).
    """
    part = sample(view)
    own, count = part.ranks(ranks), ranks[0].shape[1]
    main = start_directions(gram, count, settings.seed)
    starts = [*map(part.terms, begun), begin(part.view, main, own, settings.seed)]
    for i in range(settings.starts):
        seed = (settings.seed + 104729 * (i + 1)) % (1 << 32)
        starts.append(begin(part.view, random_multipliers(gram, count, seed), own, seed))
    found = _best(part.view, [Run(terms, []) for terms in starts], settings, check)
    if part.picked is None:
        return found
    starts = [begin(view, found.terms.multipliers, ranks, settings.seed), *(terms.copy() for terms in begun)]
    return _best(view, [Run(terms, []) for terms in starts], settings, check, last=1)


def _best(view: View, runs: list[Run], settings: Settings, check: Callable[[], None], last: int = 2) -> Run:
    """All runs briefly, then the best ones (last many) to the end."""
    for run in runs:
        carry_on(view, run, settings.tolerance, _BRIEF, check)
    runs = sorted(runs, key=lambda run: run.loss)[:last]
    for run in runs:
        carry_on(view, run, settings.tolerance, settings.iterations - _BRIEF, check)
    return min(runs, key=lambda run: run.loss)

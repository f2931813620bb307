"""All LoRAs and multipliers together: alternating least squares from several starts, the best carried on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...lazy import torch
from .directions import main_directions
from .problem import Settings
from .sweep import Layout, Terms, View, combine, sweep

RIDGE = 1e-5
_BRIEF = 8  # sweeps after which starts are compared


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
    for g, part, C in view.chunks():
        S, layout = combine(multipliers, C), layouts[g]
        for i, rows in enumerate(layout.slices):
            there = torch.arange(layout.ranks[i])[:, None] < ranks[g][part, i, None, None]
            downs[g][part, rows] = (sketches[g][rows] @ S[:, i]) * there.to(C)
    return Terms(multipliers.clone(), downs, layouts)


def carry_on(
    view: View, run: Run, tolerance: float, iterations: int, check: Callable[[], None], *, free: bool = True
) -> Run:
    """Sweeps until one lowers the loss by less than tolerance of it, or iterations are used up."""
    for _ in range(iterations):
        check()
        before = run.loss
        loss = sweep(view, run.terms, RIDGE, 2, free=free)
        run.losses.append(min(loss, before))  # what lies above is rounding
        if len(run.losses) > 1 and before - loss <= tolerance * before:
            break
    return run


def random_multipliers(gram: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """(M, count): random combinations that lie where the models differ."""
    generator = torch.Generator().manual_seed(seed % (1 << 32))
    mixed = gram @ torch.randn(len(gram), count, generator=generator, dtype=torch.float64)
    return mixed / mixed.norm(dim=0).clamp_min(1e-300)


def joint(
    view: View,
    gram: torch.Tensor,
    ranks: Sequence[torch.Tensor],
    begun: Sequence[Terms],
    settings: Settings,
    check: Callable[[], None],
) -> Run:
    """The best of several starts: those begun, the main directions, and random multipliers.

    ranks: per group (L, K).
    """
    count = ranks[0].shape[1]
    main = main_directions(gram, count)
    empty = main.norm(dim=0) == 0
    main[:, empty] = random_multipliers(gram, int(empty.sum()), settings.seed)
    starts = [terms.copy() for terms in begun]
    starts.append(begin(view, main, ranks, settings.seed))
    for i in range(settings.starts):
        seed = (settings.seed + 104729 * (i + 1)) % (1 << 32)
        starts.append(begin(view, random_multipliers(gram, count, seed), ranks, seed))
    runs = [carry_on(view, Run(terms, []), settings.tolerance, _BRIEF, check) for terms in starts]
    best = sorted(runs, key=lambda run: run.loss)[:2]
    for run in best:
        carry_on(view, run, settings.tolerance, settings.iterations, check)
    return min(best, key=lambda run: run.loss)

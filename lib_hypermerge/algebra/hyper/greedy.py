"""One LoRA after another, each on what the former left: the published loop, made sound.

`D ← SVD_r(Σ_m λ_m E_m / Σ_m λ_m²)`, `λ_m ← ⟨E_m, D⟩ / ‖D‖²`, from seeded random λ instead of the published 1, which
on centred differences starts from rounding noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...lazy import torch
from .blocks import polish
from .joint import Run, begin, carry_on, random_multipliers
from .problem import Settings
from .sample import sample
from .sweep import Fixed, Terms, View, sweep

_LAST_RIDGE = 1e-6  # keeps LoRAs small whose multipliers depend on each other; what it costs is its square


def greedy(
    view: View, gram: torch.Tensor, ranks: Sequence[torch.Tensor], settings: Settings, check: Callable[[], None]
) -> tuple[list[Fixed], list[float]]:
    """The LoRAs in order, and the loss after each sweep. ranks: per group (L, K)."""
    part = sample(view)
    trial = part.view
    found: list[Fixed] = []
    losses: list[float] = []
    for i in range(ranks[0].shape[1]):
        own = [group[:, i : i + 1] for group in ranks]
        runs = []
        for start in range(settings.starts):
            seed = (settings.seed + 7919 * (i + 1) + 104729 * start) % (1 << 32)
            terms = begin(trial, random_multipliers(gram, 1, seed), part.ranks(own), seed)
            runs.append(carry_on(trial, Run(terms, []), 1e-3, 10, check))
        best = min(runs, key=lambda run: run.loss)
        if part.picked is not None:
            carry_on(trial, best, settings.tolerance, settings.iterations, check)
            best = Run(begin(view, best.terms.multipliers, own, settings.seed), [])
        carry_on(view, best, settings.tolerance, settings.iterations, check)
        (term,), loss = polish(view, settle(view, best.terms)[0], check)
        found.append(term)
        losses += [*best.losses, loss]
        view = view.less(term)
        trial = view if part.picked is None else trial.less(part.fixed(term))
    return found, losses


def settle(view: View, terms: Terms, *, free: bool = True) -> tuple[list[Fixed], float]:
    """The terms as factors, after one more sweep with hardly any ridge; and the loss."""
    ups = [
        torch.empty(len(A), c.values.shape[2], A.shape[1], device=A.device)
        for c, A in zip(view.groups, terms.downs, strict=True)
    ]
    loss = sweep(view, terms, _LAST_RIDGE, free=free, ups=ups)
    fixed = []
    for i in range(terms.multipliers.shape[1]):
        rows = [layout.slices[i] for layout in terms.layouts]
        fixed.append(
            Fixed(
                terms.multipliers[:, i],
                [U[:, :, r] for U, r in zip(ups, rows, strict=True)],
                [A[:, r] for A, r in zip(terms.downs, rows, strict=True)],
            )
        )
    return fixed, loss

"""A part of the layers, small enough to try many starts on: multipliers found there are good ones for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...lazy import torch
from .problem import Cores
from .sweep import Fixed, Terms, View

NUMBERS = 3_000_000  # of cores that all starts go through
_LEAST = 4  # layers of a group


@dataclass(frozen=True)
class Sample:
    """view: of the layers picked.  picked: per group their indices; None if they are all."""

    view: View
    picked: list[torch.Tensor] | None

    def terms(self, terms: Terms) -> Terms:
        downs = [self._of(A, g) for g, A in enumerate(terms.downs)]
        return Terms(terms.multipliers.clone(), downs, terms.layouts)

    def fixed(self, fixed: Fixed) -> Fixed:
        ups = [self._of(U, g) for g, U in enumerate(fixed.ups)]
        return Fixed(fixed.multipliers, ups, [self._of(A, g) for g, A in enumerate(fixed.downs)])

    def ranks(self, ranks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [self._of(group, g) for g, group in enumerate(ranks)]

    def _of(self, values: torch.Tensor, g: int) -> torch.Tensor:
        return values.clone() if self.picked is None else values[self.picked[g].to(values.device)]


def sample(view: View, numbers: int = NUMBERS) -> Sample:
    """Layers at even distances, of every group in proportion; all of them if they are no more than numbers."""
    total = sum(cores.values.numel() for cores in view.groups)
    if total <= numbers:
        return Sample(view, None)
    picked, groups = [], []
    for cores in view.groups:
        layers = len(cores.values)
        count = min(layers, max(_LEAST, round(layers * numbers / total)))
        index = ((torch.arange(count) + 0.5) * layers / count).long()
        device = cores.values.device
        values = torch.stack([cores.values[i] for i in index.tolist()])  # row by row: the rest may lie on a disk
        groups.append(Cores(values.to(device), cores.costs[index], cores.most[index]))
        picked.append(index)
    return Sample(View(groups), picked)

"""What a hyper-merge measured: how close each model comes, where, and what each LoRA is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...algebra.hyper.fitting import fit
from .finish import Finished
from .plan import HyperPlan
from .rest_values import RestValue
from .solving import UNET, Seen, changes, from_origin


@dataclass
class Measures:
    """Sums in float64 over finished layers. seen: by the layers' indices.  separate: text encoders have multipliers of
    their own."""

    plan: HyperPlan
    seen: Sequence[Seen]
    count: int  # LoRAs
    separate: bool
    errors: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)  # (component, block) → (M,)
    before: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    sums: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    boxed: torch.Tensor | float = 0.0  # (M,) of the container
    rest_errors: torch.Tensor | float = 0.0  # (M,) of what lies outside the layers
    rest_changes: torch.Tensor | float = 0.0
    fell_back: int = 0

    def add(self, done: Finished) -> None:
        """Take note of a finished layer."""
        module, index = done.job.layer.module, done.job.index
        place = module.component, module.block
        self.errors[place] = self.errors.get(place, 0) + done.errors
        self.before[place] = self.before.get(place, 0) + changes(self.plan, self.seen[index].gram)
        side = UNET if module.component == UNET else "te"
        if side not in self.sums:
            M, K = self.plan.models, self.count
            self.sums[side] = tuple(torch.zeros(s, dtype=torch.float64) for s in ((M,), (M, K), (K, K)))  # type: ignore[assignment]
        for total, own in zip(self.sums[side], (done.energies, done.inner, done.gram), strict=True):
            total += own
        self.boxed = self.boxed + (done.energies if done.box is None else done.box.errors)
        self.fell_back += done.fell_back

    def add_rest(self, value: RestValue) -> None:
        """Take note of a tensor outside the layers."""
        self.rest_errors = self.rest_errors + value.errors
        self.rest_changes = self.rest_changes + value.changes

    @property
    def rest_share(self) -> float:
        """Of the whole squared change, what lies outside the layers."""
        change = float(torch.as_tensor(self.rest_changes).sum())
        return _share(change, change + self.total)

    def rest_error2(self, m: int) -> float:
        """A model's squared error outside the layers."""
        errors = torch.as_tensor(self.rest_errors)
        return float(errors[m]) if errors.dim() else 0.0

    def rest_error(self, m: int) -> float | None:
        """A model's relative error outside the layers; None if it is as the mean (or base) there."""
        changes, errors = torch.as_tensor(self.rest_changes), torch.as_tensor(self.rest_errors)
        return _ratio(errors[m], changes[m]) if changes.dim() and float(changes[m]) > 0 else None

    def container(self) -> tuple[float, dict[str, float]]:
        """The container's residual share, and each model's relative error."""
        before = sum(self.before.values())
        errors = torch.as_tensor(self.boxed)
        models = {label: _ratio(errors[m], before[m]) for m, label in enumerate(self.plan.inputs.labels)}  # type: ignore[index]
        return _share(float(errors.sum()), self.total), models

    @property
    def total(self) -> float:
        """Σ‖W_m − mean‖² (or base)."""
        return math.fsum(float(b.sum()) for b in self.before.values())

    @property
    def residual_share(self) -> float:
        return _share(math.fsum(float(e.sum()) for e in self.errors.values()), self.total)

    def models(self) -> dict[str, float]:
        """label → ‖W_m − (hyper + Σλ·LoRA)‖ / ‖W_m − mean‖ (or base)."""
        errors, before = sum(self.errors.values()), sum(self.before.values())
        return {label: _ratio(errors[m], before[m]) for m, label in enumerate(self.plan.inputs.labels)}  # type: ignore[index]

    def by_component(self, m: int) -> dict[str, Any]:
        """One model's errors by component and block."""
        out: dict[str, Any] = {}
        for component in dict.fromkeys(c for c, _ in self.errors):
            places = [place for place in self.errors if place[0] == component]
            own = [(block, self.errors[c, block][m], self.before[c, block][m]) for c, block in places]
            out[component] = {
                "relative_error": _ratio(sum(e for _, e, _ in own), sum(b for _, _, b in own)),
                "blocks": {block: _ratio(e, b) for block, e, b in sorted(own, key=lambda item: item[0])},
            }
        return out

    def curve(self, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """The residual share with the first LoRAs alone, multipliers fitted to these; sizes: bytes of each LoRA."""
        points = []
        for k in range(len(sizes) + 1):
            left = 0.0
            for energies, inner, gram in self._problems():
                for m in range(len(energies)):
                    weights, _ = fit(gram[:k, :k], inner[m, :k]) if k else (inner[m, :0], 0)
                    left += max(float(energies[m] - weights @ inner[m, :k]), 0.0)
            points.append({"loras": k, "bytes": sum(sizes[:k]), "residual_share": _share(left, self.total)})
        return points

    def alone(self) -> list[float]:
        """Per LoRA: the share of what all are to carry, the models' distance to the hyper-model, that it takes away
        by itself."""
        shares = []
        for i in range(self.count):
            gain = whole = 0.0
            for energies, inner, gram in self._problems():
                whole += float(energies.sum())
                if float(gram[i, i]) > 0:
                    gain += float(inner[:, i].square().sum() / gram[i, i])
            shares.append(_share(gain, whole))
        return shares

    def _problems(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(energies, inner, gram) of what shares multipliers."""
        if self.separate:
            return list(self.sums.values())
        return [tuple(sum(s[i] for s in self.sums.values()) for i in range(3))]  # type: ignore[list-item]


def similarity(plan: HyperPlan, seen: Sequence[Seen]) -> dict[str, Any]:
    """Cosines between the models' changes of the mean (or base), over all layers."""
    gram = sum(s.gram for s in seen)
    assert isinstance(gram, torch.Tensor)
    gram = from_origin(plan, gram)
    lengths = gram.diagonal().clamp_min(0).sqrt()
    cosines = gram / (lengths[:, None] * lengths).clamp_min(1e-300)
    cosines.fill_diagonal_(1.0)
    return {"labels": plan.inputs.labels, "cosines": cosines.clamp(-1, 1).tolist()}


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0


def _ratio(error2: Any, energy: Any) -> float:
    error2, energy = float(error2), float(energy)
    if energy <= 0:
        return 0.0
    return math.sqrt(max(error2, 0.0) / energy)

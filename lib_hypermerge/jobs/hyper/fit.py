"""Fit: how near a hyper-model's LoRAs come to a checkpoint that was not merged, and the prompt for it."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from ...algebra.hyper.fitting import error2, fit
from ...errors import NumericalError
from ..difference import Difference
from ..host import Context, Host
from ..pairing import Pair
from ..report import Report
from ..workers import map_in_order, plan_workers
from .fit_layers import LayerFit, Sums
from .fit_plan import FitPlan, make_plan
from .fit_spec import FitSpec
from .recipe import snippet

__all__ = ["FitSpec", "make_plan", "run"]

# Below this share of the change, squared, an error out of float32 products is more rounding than error.
_PRECISE_BELOW = 1e-3

_Blocks = dict[tuple[str, str], Sums]  # (component, block) → sums


def run(plan: FitPlan, host: Host, context: Context) -> Report:
    """Carry out a plan; nothing is written. Raises Cancelled, NumericalError or InputChangedError."""
    return _Fit(plan, host, context).run()


class _Fit:
    def __init__(self, plan: FitPlan, host: Host, context: Context):
        self.plan, self.context = plan, context
        self.workers, self.threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
        self.warnings = list(plan.warnings)

    def run(self) -> Report:
        self.context.progress(0.0, "comparing")
        blocks = self._blocks(wide=False)
        chosen = _multipliers(blocks, self.plan.separate_te, len(self.plan.loras))
        energy = sum(sums.energy for sums in blocks.values())
        if energy > 0 and _error2(blocks, chosen) < _PRECISE_BELOW * energy:
            blocks = self._blocks(wide=True)
            chosen = _multipliers(blocks, self.plan.separate_te, len(self.plan.loras))
        rest = self._rest_energy()
        self.plan.check_unchanged()
        return self._report(blocks, chosen, rest)

    def _blocks(self, wide: bool) -> _Blocks:
        plan, done, whole = self.plan, 0, self.plan.numbers or 1
        work = LayerFit(plan.model.file, plan.hyper.file, len(plan.loras), wide)
        out: _Blocks = defaultdict(lambda: Sums.zero(len(plan.loras)))
        sums = self._map(lambda layer: (layer, work.sums(layer, plan.uses.get(layer.key, ()))), plan.layers)
        for layer, found in sums:
            if not found.is_finite:
                raise self._not_finite(layer)
            out[layer.base.component, layer.base.block].add(found)
            done += math.prod(layer.base.matrix_shape)
            text = "once more, in double precision" if wide else f"{layer.base.component} {layer.base.block}"
            self.context.progress(0.95 * done / whole, text)
        return dict(out)

    def _map(self, function, items) -> Iterator:
        return map_in_order(function, items, self.workers, self.threads, self.context.check)

    def _not_finite(self, layer: Pair) -> NumericalError:
        plan = self.plan
        plan.check_unchanged()
        parts = [
            (use.lora.file.file, info) for use in plan.uses.get(layer.key, ()) for info in use.entry.parts.values()
        ]
        for file, info in [(plan.model.file, layer.tuned.weight), (plan.hyper.file, layer.base.weight), *parts]:
            if info is not None and not file.read(info).float().isfinite().all():
                return NumericalError(
                    f"{info.name} in {file.path.name} holds NaN or Inf.", "The file is damaged.", "Get a sound copy."
                )
        return NumericalError(f"{layer.key}: the numbers are too large to be compared.")

    def _rest_energy(self) -> float:
        """‖Δ‖² of what no LoRA layer holds: norms, biases, embeddings."""
        rest = self.plan.pairing.rest
        difference = Difference(self.plan.model.file, self.plan.hyper.file, 1.0, 1.0)
        energies = list(self._map(lambda item: difference.energy(item.tuned, item.base), rest))
        bad = [item.label for item, energy in zip(rest, energies, strict=True) if not math.isfinite(energy)]
        if bad:
            self.warnings.append(f"{len(bad)} tensors outside LoRA layers hold NaN or Inf, such as {bad[0]}.")
        return math.fsum(energy for energy in energies if math.isfinite(energy))

    # --- report -----------------------------------------------------------------------------------

    def _report(self, blocks: _Blocks, chosen: dict[str, torch.Tensor], rest: float) -> Report:
        plan, energy = self.plan, sum(sums.energy for sums in blocks.values())
        count, error = len(plan.loras), _error2(blocks, chosen)
        weights = _by_name(plan.labels, chosen["unet"])
        te = _by_name(plan.labels, chosen["te"]) if plan.separate_te else None
        if energy == 0:
            self.warnings.append("The model equals the hyper-model in every layer that a LoRA reaches: all are 0.")
        elif error > 0.999 * energy:
            self.warnings.append("The LoRAs have next to nothing in common with this model's change.")
        rank = min(fit(_sum(part, count).gram, _sum(part, count).inner)[1] for part in self._parts(blocks))
        if rank < count:
            self.warnings.append(
                f"The {count} LoRAs are linearly dependent, of rank {rank}: other multipliers would do as well. "
                "These are the smallest."
            )
        details: dict[str, Any] = {
            "architecture": plan.hyper.title,
            "hyper": plan.hyper.file.path.name,
            "model": plan.model.file.path.stem,
            "loras": [
                {
                    "name": lora.path.stem, "modules": len(lora.resolution.targets), "families": lora.counts,
                    "unmatched": len(lora.resolution.unmatched),
                }
                for lora in plan.loras
            ],
            "multipliers": weights,
            "te_multipliers": te,
            "as_in_recipe": plan.as_in_recipe,
            "residual_share": error / energy if energy else 0.0,
            "rank": rank,
            "components": _by_component(blocks, chosen, energy),
            "rest_share": rest / (energy + rest) if rest else 0.0,
            "prompt": snippet(weights, te),
            "device": "cpu",
            "threads": self.workers * self.threads,
        }  # fmt: skip
        unmatched = sum(len(lora.resolution.unmatched) for lora in plan.loras)
        return Report(
            "fit", [], math.sqrt(error / energy) if energy else 0.0, len(plan.pairing.layers),
            sum(plan.idle.values()), unmatched, self.warnings, time.perf_counter() - plan.begun, details,
        )  # fmt: skip

    def _parts(self, blocks: _Blocks) -> list[list[Sums]]:
        """The sums that have multipliers of their own, as far as a LoRA reaches them."""
        parts = [list(blocks.values())]
        if self.plan.separate_te:
            parts = [[s for key, s in blocks.items() if (key[0] == "unet") == unet] for unet in (True, False)]
        return [part for part in parts if any(s.gram.any() for s in part)]


def _multipliers(blocks: _Blocks, separate: bool, count: int) -> dict[str, torch.Tensor]:
    """λ (K,) for "unet", and for "te": the same, unless they are to be separate."""
    unet = [sums for (component, _), sums in blocks.items() if component == "unet" or not separate]
    first, _ = fit(_sum(unet, count).gram, _sum(unet, count).inner)
    if not separate:
        return {"unet": first, "te": first}
    te = [sums for (component, _), sums in blocks.items() if component != "unet"]
    return {"unet": first, "te": fit(_sum(te, count).gram, _sum(te, count).inner)[0]}


def _sum(parts: list[Sums], count: int) -> Sums:
    out = Sums.zero(count)
    for part in parts:
        out.add(part)
    return out


def _error2(blocks: _Blocks, chosen: dict[str, torch.Tensor]) -> float:
    return math.fsum(
        error2(sums.energy, sums.gram, sums.inner, _of(chosen, component)) for (component, _), sums in blocks.items()
    )


def _of(chosen: dict[str, torch.Tensor], component: str) -> torch.Tensor:
    return chosen["unet" if component == "unet" else "te"]


def _by_name(labels: list[str], weights: torch.Tensor) -> dict[str, float]:
    return dict(zip(labels, weights.tolist(), strict=True))


def _by_component(blocks: _Blocks, chosen: dict[str, torch.Tensor], whole: float) -> dict[str, Any]:
    """Relative errors by component and block; of what did not change 0."""

    def share(part: list[tuple[str, Sums]], component: str) -> float:
        energy = math.fsum(sums.energy for _, sums in part)
        error = math.fsum(error2(s.energy, s.gram, s.inner, _of(chosen, component)) for _, s in part)
        return math.sqrt(error / energy) if energy else 0.0

    out: dict[str, Any] = {}
    for component in dict.fromkeys(component for component, _ in blocks):
        parts = sorted((block, sums) for (c, block), sums in blocks.items() if c == component)
        energy = math.fsum(sums.energy for _, sums in parts)
        out[component] = {
            "relative_error": share(parts, component),
            "share_of_change": energy / whole if whole else 0.0,
            "blocks": {block: share([(block, sums)], component) for block, sums in parts},
        }
    return out

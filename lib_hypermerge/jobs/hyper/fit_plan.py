"""What a fit will read; made from headers, and where every refusal happens."""

from __future__ import annotations

import math
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import LayoutError, SpecError
from ...layouts.module import Model
from ...layouts.opening import open_checkpoint
from ..adapter_inputs import LoraInput, open_lora
from ..host import Host
from ..pairing import Pair, Pairing, pair
from .finding import find_loras, find_recipe
from .fit_layers import BIAS_PARTS, Use
from .fit_spec import FitSpec

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_MARKERS = {"v_pred": "v-prediction", "ztsnr": "zero terminal SNR"}


@dataclass
class FitPlan:
    """Holds all files open; use as a context or close() it.

    uses: layer → the modules that change it.  idle: modules that take no part, by reason.  as_in_recipe: whether
    text encoders have multipliers of their own for the recipe's sake.
    """

    spec: FitSpec
    hyper: Model
    model: Model
    pairing: Pairing
    loras: list[LoraInput] = field(default_factory=list)
    uses: dict[str, list[Use]] = field(default_factory=lambda: defaultdict(list))
    idle: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    warnings: list[str] = field(default_factory=list)
    as_in_recipe: bool = False
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> FitPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.hyper.file.close()
        self.model.file.close()
        for lora in self.loras:
            lora.close()

    @property
    def separate_te(self) -> bool:
        """Whether text encoders have multipliers of their own."""
        return self.spec.separate_te or self.as_in_recipe

    @property
    def labels(self) -> list[str]:
        """What prompts call the LoRAs."""
        return [lora.path.stem for lora in self.loras]

    @property
    def layers(self) -> list[Pair]:
        """Largest first, so that no worker is left with one at the end."""
        return sorted(self.pairing.layers, key=lambda p: (-math.prod(p.base.matrix_shape), p.key))

    @property
    def numbers(self) -> int:
        return sum(math.prod(p.base.matrix_shape) for p in self.pairing.layers)

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds: a piece of the layer, the LoRAs' factors, and changes that are formed whole."""
        most = 0
        for layer in self.pairing.layers:
            held, numel = 32 << 20, math.prod(layer.base.matrix_shape)
            for use in self.uses.get(layer.key, ()):
                factors = sum(math.prod(shape) for shape in use.entry.shapes.values())
                held += 16 * (factors if use.is_factored else 2 * numel)
            most = max(most, held)
        return most

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in (self.hyper.file, self.model.file, *(lora.file.file for lora in self.loras)):
            file.check_unchanged()

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        threads = max(1, min(host.threads() or os.cpu_count() or 1, 8))
        infos = [info for p in self.pairing.layers for info in (p.base.weight, p.tuned.weight) if info]
        to_read = sum(info.nbytes for info in infos)
        return {
            "verb": "fit",
            "architecture": self.hyper.title,
            "modules": len(self.pairing.layers),
            "loras": self.labels,
            "bytes_to_read": to_read,
            "expected_seconds": round(1.5 + (to_read / 1e9 + self.numbers / 6e7) / threads, 1),
            "expected_memory": _PROCESS_BYTES + threads * self.bytes_per_worker,
            "warnings": self.warnings,
        }


def make_plan(spec: FitSpec, host: Host) -> FitPlan:
    """Open and check everything. Raises SpecError, FormatError or LayoutError."""
    hyper = open_checkpoint(host.resolve_checkpoint(spec.hyper))
    try:
        model = open_checkpoint(host.resolve_checkpoint(spec.model))
    except BaseException:
        hyper.file.close()
        raise
    plan = FitPlan(spec, hyper, model, Pairing())
    try:
        plan.pairing = _pair(plan)
        for path in _lora_paths(plan, host):
            plan.loras.append(open_lora(path, hyper))
        _refuse_namesakes(plan)
        _plan_uses(plan)
        _gather_warnings(plan)
    except BaseException:
        plan.close()
        raise
    return plan


def _pair(plan: FitPlan) -> Pairing:
    hyper, model = plan.hyper, plan.model
    if not hyper.is_kind_of(model):
        raise LayoutError(
            f"{model.file.path.name} is of another kind than the hyper-model.",
            f"It is {model.title}, and {hyper.file.path.name} is {hyper.title}.",
            "Choose a model of the same family.",
        )
    return pair(hyper, model, [table.id for table in hyper.architecture.components if table.id in hyper.components])


def _lora_paths(plan: FitPlan, host: Host) -> list[Path]:
    spec, file = plan.spec, plan.hyper.file
    if spec.loras:
        return [host.resolve_lora(name) for name in spec.loras]
    found = find_recipe(spec.recipe, file, host)
    if found.path != file.path and found.recipe.hyper != file.path.name:
        plan.warnings.append(f"The recipe is of {found.recipe.hyper}; here it is used with {file.path.name}.")
    plan.as_in_recipe = found.recipe.te_multipliers is not None and not plan.spec.separate_te
    if not found.recipe.loras:
        raise SpecError(
            f"The recipe in {found.path.name} has no LoRAs.", "Its models are in a container.",
            "Make LoRAs of the container by Restore, or name the LoRAs.",
        )  # fmt: skip
    return list(find_loras(found.recipe.loras, host, (found.folder, file.path.parent)).values())


def _refuse_namesakes(plan: FitPlan) -> None:
    labels = plan.labels
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise SpecError(f"Two LoRAs are called {twice}.", "A prompt could not tell them apart.", "Name each once.")


def _plan_uses(plan: FitPlan) -> None:
    layers = {p.key for p in plan.pairing.layers}
    for index, lora in enumerate(plan.loras):
        for entry, target in lora.resolution.targets:
            key = f"{target.module.component}.{target.module.path}"
            if entry.key in lora.idle:
                plan.idle["alpha 0"] += 1
            elif not set(entry.shapes) - BIAS_PARTS or key not in layers:
                plan.idle["no layer of both models"] += 1
            else:
                plan.uses[key].append(Use(index, lora, entry, target))
    if not plan.uses:
        raise LayoutError(
            "The LoRAs change no layer that both models have.",
            f"They are {', '.join(plan.labels)}.",
            "Choose the hyper-model that they belong to.",
        )


def _gather_warnings(plan: FitPlan) -> None:
    for lora in plan.loras:
        plan.warnings += lora.warnings
    others = sum(
        bool(BIAS_PARTS & set(use.entry.shapes)) for uses in plan.uses.values() for use in uses
    ) + plan.idle.get("no layer of both models", 0)  # fmt: skip
    if others:
        plan.warnings.append(
            f"{others} modules of the LoRAs change norms, biases or layers that the models do not share; "
            "multipliers and errors are of the layers' weights alone."
        )
    for marker, meaning in _MARKERS.items():
        if (marker in plan.hyper.file.tensors) != (marker in plan.model.file.tensors):
            which = "hyper-model" if marker in plan.hyper.file.tensors else "model"
            plan.warnings.append(f"Only the {which} is marked for {meaning}; no LoRA carries that.")
    for component in plan.pairing.absent:
        plan.warnings.append(f"{component}: the model brings none along, so it is left out.")
    for side, whose in (("base", "hyper-model"), ("tuned", "model")):
        names = plan.pairing.only_in[side]
        if names:
            plan.warnings.append(f"{len(names)} layers are only in the {whose}, such as {names[0]}: left out.")

"""What a restoration will read and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...errors import SpecError, UnchangedError
from ...files.source import TensorFile
from ...layouts.opening import open_checkpoint
from .. import merge_plan
from ..checkpoint_formats import KEEP
from ..host import Host
from ..merge_plan import MergePlan
from ..merge_spec import MergeSpec
from ..outputs import RECIPE
from ..spec import WeightedLora
from .finding import Found, find_loras, find_recipe
from .recipe import as_said
from .restore_lora import JoinPlan, plan_join
from .restore_spec import AS_LORA, RestoreSpec, Weights, weights_of


@dataclass(frozen=True)
class Wanted:
    """What is to be restored. weights: by the LoRAs' stems, as a prompt says them.  paths: of all files, in order.

    error: how far the model is from this, as the recipe has it.
    """

    label: str | None
    weights: Weights
    remainder: str | None = None
    error: float | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def terms(self) -> list[WeightedLora]:
        """As a prompt has them: a weight of 0 is left out."""
        terms = [WeightedLora(stem, unet, te) for stem, (te, unet) in self.weights.items() if te or unet]
        return terms + ([WeightedLora(self.remainder)] if self.remainder else [])

    @property
    def is_separate(self) -> bool:
        return any(te != unet for te, unet in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """Of the report and the new file's own recipe."""
        return {
            "model": self.label,
            "multipliers": {stem: unet for stem, (_, unet) in self.weights.items()},
            "te_multipliers": {stem: te for stem, (te, _) in self.weights.items()} if self.is_separate else None,
            "remainder": self.remainder,
            "expected_error": self.error,
        }


@dataclass
class RestorePlan:
    """Holds all files open; use as a context or close() it. inner: of the checkpoint, or of the one LoRA."""

    spec: RestoreSpec
    wanted: Wanted
    inner: MergePlan | JoinPlan

    def __enter__(self) -> RestorePlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.inner.close()

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        table = self.inner.to_json(host)
        told = {key: value for key, value in self.wanted.to_json().items() if value is not None}
        return {**table, "verb": "restore", **told, "warnings": [*self.wanted.warnings, *table["warnings"]]}


def make_plan(spec: RestoreSpec, host: Host) -> RestorePlan:
    """Open everything and check it. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError."""
    assert spec.hyper is not None
    with open_checkpoint(host.resolve_checkpoint(spec.hyper)).file as file:
        wanted = _wanted(spec, file, host)
    paths = [wanted.paths[term.lora] for term in wanted.terms]
    if spec.kind == AS_LORA:
        if not paths:
            raise UnchangedError(
                "Every multiplier is 0.", "That is the hyper-model itself, for which no LoRA is needed.",
                "Choose other multipliers.",
            )  # fmt: skip
        return RestorePlan(spec, wanted, plan_join(spec, wanted.terms, paths, host, _own_recipe(spec, wanted)))
    return RestorePlan(spec, wanted, _plan_merge(spec, wanted, paths, host))


def _plan_merge(spec: RestoreSpec, wanted: Wanted, paths: Sequence[Path], host: Host) -> MergePlan:
    assert spec.hyper is not None
    formats = {} if spec.dtype == KEEP else dict.fromkeys(("dtype", "te_dtype", "vae_dtype"), spec.dtype)
    merge = MergeSpec(spec.hyper, tuple(wanted.terms), spec.out, overwrite=spec.overwrite, **formats)
    plan = merge_plan.make_plan(merge, host, paths)
    made = json.loads(plan.metadata[RECIPE])
    plan.metadata[RECIPE] = json.dumps({**made, **_own_recipe(spec, wanted)}, ensure_ascii=False)
    return plan


def _own_recipe(spec: RestoreSpec, wanted: Wanted) -> dict[str, Any]:
    """What the new file says of how it was made."""
    told = {key: value for key, value in wanted.to_json().items() if value is not None}
    return {"job": "restore", "parameters": {**told, "rank": spec.rank, "dtype": spec.dtype}}


def _wanted(spec: RestoreSpec, file: TensorFile, host: Host) -> Wanted:
    if spec.loras and spec.multipliers is not None and spec.recipe is None:
        stems = [host.resolve_lora(name).stem for name in spec.loras]
        weights = weights_of(spec.multipliers, list(dict.fromkeys(stems)))
        return Wanted(None, weights, paths=find_loras(stems, host, (), spec.loras))
    found = find_recipe(spec.recipe, file, host)
    recipe = found.recipe
    wanted = _by_recipe(spec, found)
    needed = [term.lora for term in wanted.terms]
    wanted.paths.update(find_loras(needed, host, (found.folder, file.path.parent), spec.loras))
    if found.path != file.path and recipe.hyper != file.path.name:
        wanted.warnings.append(f"The recipe is of {recipe.hyper}; here it is used with {file.path.name}.")
    return wanted


def _by_recipe(spec: RestoreSpec, found: Found) -> Wanted:
    recipe = found.recipe
    if not recipe.loras:
        raise SpecError(f"The recipe in {found.path.name} has no LoRAs.", hint="Name its container.")
    if spec.model is None:
        assert spec.multipliers is not None
        return Wanted(None, weights_of(spec.multipliers, recipe.loras))
    label = find_label(spec.model, list(recipe.multipliers))
    unet = recipe.multipliers[label]
    te = unet if recipe.te_multipliers is None else recipe.te_multipliers[label]
    weights = {stem: (as_said(te[stem]), as_said(unet[stem])) for stem in recipe.loras}
    return Wanted(label, weights, recipe.remainders.get(label), recipe.models.get(label))


def find_label(name: str, labels: Sequence[str]) -> str:
    """The model of that name, or of that file. SpecError lists those there are."""
    for wanted in (name, PurePath(name).stem):
        if wanted in labels:
            return wanted
    raise SpecError(f"There is no model {name!r} in the recipe.", hint=f"There are: {', '.join(labels)}.")

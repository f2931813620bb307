"""What a restoration will read and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from ...errors import SpecError, UnchangedError
from ...files.source import TensorFile
from ...layouts.adapter_file import AdapterFile, read_adapter
from ...layouts.opening import open_checkpoint
from .. import merge_plan
from ..checkpoint_formats import KEEP
from ..host import Host
from ..merge_plan import MergePlan
from ..merge_spec import MergeSpec
from ..outputs import RECIPE
from ..spec import WeightedLora
from .container import Container, open_container
from .container_lora import ContainerLora
from .finding import Found, find_file, find_loras, find_recipe
from .recipe import as_said
from .restore_container import ContainerPlan, plan_container
from .restore_join import JoinPlan, plan_join
from .restore_spec import AS_LORA, RestoreSpec, Weights, weights_of


@dataclass(frozen=True)
class Wanted:
    """What is to be restored. weights: by the LoRAs' stems, as a prompt says them; of a container, the models' shares.

    paths: of the LoRAs and the remainder, by stem.  error: how far the model is from this, as the recipe has it.
    """

    label: str | None
    weights: Weights
    remainder: str | None = None
    error: float | None = None
    paths: dict[str, Path] = field(default_factory=dict)
    container: Path | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def terms(self) -> list[WeightedLora]:
        """As a prompt has them: a weight of 0 is left out."""
        terms = [WeightedLora(stem, unet, te) for stem, (te, unet) in self.weights.items() if te or unet]
        if self.container is not None:  # the shares are in its cores
            terms = [WeightedLora(self.container.stem)] if terms else []
        return terms + ([WeightedLora(self.remainder)] if self.remainder else [])

    @property
    def te(self) -> dict[str, float]:
        return {name: te for name, (te, _) in self.weights.items()}

    @property
    def unet(self) -> dict[str, float]:
        return {name: unet for name, (_, unet) in self.weights.items()}

    @property
    def is_separate(self) -> bool:
        return any(te != unet for te, unet in self.weights.values())

    def to_json(self) -> dict[str, Any]:
        """Of the report and the new file's own recipe."""
        return {
            "model": self.label,
            "container": None if self.container is None else self.container.name,
            "multipliers": self.unet,
            "te_multipliers": self.te if self.is_separate else None,
            "remainder": self.remainder,
            "expected_error": self.error,
        }


@dataclass
class RestorePlan:
    """Holds all files open; use as a context or close() it.

    inner: of the checkpoint, of one LoRA out of several, or of one out of a container.
    """

    spec: RestoreSpec
    wanted: Wanted
    inner: MergePlan | JoinPlan | ContainerPlan

    def __enter__(self) -> RestorePlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.inner.close()

    @property
    def components(self) -> dict[str, int]:
        """How many modules of each component are changed; one that several LoRAs change counts once."""
        if not isinstance(self.inner, MergePlan):
            return self.inner.components
        changed = {
            (target.module.component, target.module.path)
            for lora, term in zip(self.inner.loras, self.inner.spec.loras, strict=True)
            for entry, target in lora.resolution.targets
            if entry.key not in lora.idle and _strength(term, target.module.component)
        }
        found = Counter(component for component, _ in changed)
        return {component: found[component] for component in self.inner.applied}

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        components = self.components
        table = {**self.inner.to_json(host), "modules": sum(components.values()), "components": components}
        told = {key: value for key, value in self.wanted.to_json().items() if value is not None}
        return {**table, "verb": "restore", **told, "warnings": [*self.wanted.warnings, *table["warnings"]]}


def _strength(term: WeightedLora, component: str) -> float:
    return term.weight if component == "unet" or term.te_weight is None else term.te_weight


def make_plan(spec: RestoreSpec, host: Host) -> RestorePlan:
    """Open everything and check it. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError."""
    if spec.hyper is None:
        wanted = _wanted(spec, None, host)
    else:
        with open_checkpoint(host.resolve_checkpoint(spec.hyper)).file as file:
            wanted = _wanted(spec, file, host)
    if wanted.container is not None:
        return RestorePlan(spec, wanted, _plan_of_container(spec, wanted, wanted.container, host))
    paths = [wanted.paths[term.lora] for term in wanted.terms]
    if spec.kind != AS_LORA:
        return RestorePlan(spec, wanted, _plan_merge(spec, wanted, paths, host))
    if not paths:
        raise UnchangedError(
            "Every multiplier is 0.", "That is the hyper-model itself, for which no LoRA is needed.",
            "Choose other multipliers.",
        )  # fmt: skip
    return RestorePlan(spec, wanted, plan_join(spec, wanted.terms, paths, host, _own_recipe(spec, wanted)))


def _plan_of_container(spec: RestoreSpec, wanted: Wanted, path: Path, host: Host) -> MergePlan | ContainerPlan:
    container = open_container(path)
    try:
        if spec.kind == AS_LORA:
            if wanted.remainder:
                wanted.warnings.append(f"The prompt has the remainder {wanted.remainder} beside the LoRA.")
            return plan_container(spec, container, wanted.te, wanted.unet, host, _own_recipe(spec, wanted))
        sources: list[Path | AdapterFile] = [wanted.paths[stem] for stem in filter(None, [wanted.remainder])]
        if any(te or unet for te, unet in wanted.weights.values()):
            sources.insert(0, read_adapter(ContainerLora(container, wanted.te, wanted.unet)))
        return _plan_merge(spec, wanted, sources, host)
    except BaseException:
        container.close()
        raise


def _plan_merge(spec: RestoreSpec, wanted: Wanted, sources: Sequence[Path | AdapterFile], host: Host) -> MergePlan:
    assert spec.hyper is not None
    formats = {} if spec.dtype == KEEP else dict.fromkeys(("dtype", "te_dtype", "vae_dtype"), spec.dtype)
    merge = MergeSpec(spec.hyper, tuple(wanted.terms), spec.out, overwrite=spec.overwrite, **formats)
    plan = merge_plan.make_plan(merge, host, sources)
    made = json.loads(plan.metadata[RECIPE])
    plan.metadata[RECIPE] = json.dumps({**made, **_own_recipe(spec, wanted)}, ensure_ascii=False)
    return plan


def _own_recipe(spec: RestoreSpec, wanted: Wanted) -> dict[str, Any]:
    """What the new file says of how it was made."""
    told = {key: value for key, value in wanted.to_json().items() if value is not None}
    return {"job": "restore", "parameters": {**told, "rank": spec.rank, "dtype": spec.dtype}}


# --- what belongs together --------------------------------------------------------------------------------------


def _wanted(spec: RestoreSpec, file: TensorFile | None, host: Host) -> Wanted:
    if spec.container is not None:
        return _of_container(spec, find_file(spec.container, file, host), file, host)
    if spec.loras and spec.multipliers is not None and spec.recipe is None:
        stems = [host.resolve_lora(name).stem for name in spec.loras]
        weights = weights_of(spec.multipliers, list(dict.fromkeys(stems)))
        return Wanted(None, weights, paths=find_loras(stems, host, (), spec.loras))
    found = find_recipe(spec.recipe, file, host)
    assert file is not None  # the spec asks for one where no container is named
    if not found.recipe.loras:
        return _of_container(spec, _container_of(found, file), file, host)
    wanted = _by_recipe(spec, found)
    needed = [term.lora for term in wanted.terms]
    wanted.paths.update(find_loras(needed, host, (found.folder, file.path.parent), spec.loras))
    if found.path != file.path and found.recipe.hyper != file.path.name:
        wanted.warnings.append(f"The recipe is of {found.recipe.hyper}; here it is used with {file.path.name}.")
    return wanted


def _by_recipe(spec: RestoreSpec, found: Found) -> Wanted:
    recipe = found.recipe
    if spec.model is None:
        assert spec.multipliers is not None
        return Wanted(None, weights_of(spec.multipliers, recipe.loras))
    label = find_label(spec.model, list(recipe.multipliers))
    unet = recipe.multipliers[label]
    te = unet if recipe.te_multipliers is None else recipe.te_multipliers[label]
    weights = {stem: (as_said(te[stem]), as_said(unet[stem])) for stem in recipe.loras}
    return Wanted(label, weights, recipe.remainders.get(label), recipe.models.get(label))


def _container_of(found: Found, file: TensorFile) -> Path:
    """The recipe's, beside it or beside the model."""
    name = found.recipe.container
    if not name:
        raise SpecError(f"The recipe in {found.path.name} has no LoRAs.", "Nor does it have a container.")
    plain = PurePath(name).name
    path = next((f / plain for f in (found.folder, file.path.parent) if (f / plain).is_file()), None)
    if path is None:
        raise SpecError(f"The container {plain} is missing.", f"It is not in {found.folder}.", "Put it there.")
    return path


def _of_container(spec: RestoreSpec, path: Path, file: TensorFile | None, host: Host) -> Wanted:
    with open_container(path) as container:
        labels, hyper = list(container.labels), container.stated.hyper
        if spec.model is None:
            assert spec.multipliers is not None
            wanted = Wanted(None, weights_of(spec.multipliers, labels), container=path)
        else:
            label = find_label(spec.model, labels)
            rest, error = _told(container, label)
            wanted = Wanted(label, {label: (1.0, 1.0)}, rest, error, container=path)
    if wanted.remainder:
        folders = (path.parent, *([file.path.parent] if file is not None else ()))
        wanted.paths.update(find_loras([wanted.remainder], host, folders, spec.loras))
    if file is not None and file.path.name != hyper:
        wanted.warnings.append(f"The container is of {hyper}; here it is used with {file.path.name}.")
    return wanted


def _told(container: Container, label: str) -> tuple[str | None, float | None]:
    """(remainder, relative error) of a model by the container's own recipe; the error is that of the container."""
    recipe = container.recipe
    errors = recipe.models if not recipe.loras else recipe.container_models or {}
    return recipe.remainders.get(label), errors.get(label)


def find_label(name: str, labels: Sequence[str]) -> str:
    """The model of that name, or of that file. SpecError lists those there are."""
    for wanted in (name, PurePath(name).stem):
        if wanted in labels:
            return wanted
    raise SpecError(f"There is no model {name!r} here.", hint=f"There are: {', '.join(labels)}.")

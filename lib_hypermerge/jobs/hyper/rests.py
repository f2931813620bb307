"""What a hyper-model holds besides the layers that LoRAs reach: of each tensor, which models it comes from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ...errors import SpecError
from ...files.checkpoint_writer import TensorPlan
from ...files.dtypes import FLOATS
from ...files.source import TensorFile, TensorInfo
from ...layouts import module as modules
from ...layouts.module import LORA_KINDS, Model, Module
from ..checkpoint_formats import KEEP, check_formats, format_of
from ..host import Host
from ..outputs import is_same
from .inputs import CheckpointSource, Inputs
from .spec import HyperSpec

# kinds; only the first five are part of what is measured
NORM, BIAS, EMBEDDING, LAYER, PARAMETER, VAE, COPY, FIXED = (
    "norm", "bias", "embedding", "layer", "parameter", "vae", "copy", "fixed",
)  # fmt: skip
MEASURED = frozenset((NORM, BIAS, EMBEDDING, LAYER, PARAMETER))
_EMA = "model_ema."


@dataclass(frozen=True)
class Origin:
    """A tensor in one of the files."""

    file: TensorFile
    info: TensorInfo


@dataclass(frozen=True)
class Rest:
    """A tensor of the template that is no layer.

    label: for messages.  kind: norm, bias, embedding, layer (one that not all models have), parameter; vae; copy (of
    the moving average); fixed (whole numbers, schedules, marks: never a mean).  module: that it belongs to.
    parts: by the number of a source, its own; of a LoRA, the base's.  taken: what is written instead of their mean.
    centre: what changes count from, the base's own; None for the mean.
    """

    info: TensorInfo
    label: str
    kind: str
    dtype: str
    module: Module | None
    parts: dict[int, Origin]
    taken: Origin | None
    centre: Origin | None

    @property
    def name(self) -> str:
        return self.info.name


def plan_rests(inputs: Inputs, spec: HyperSpec, host: Host) -> list[Rest]:
    """Every tensor of the template that no layer covers, in the order of its file.

    Where LoRAs alone are written, they stand on the base: its own is what models are compared with.
    SpecError if a model named for the rest, or for the VAE, is none of them, or has no such VAE.
    """
    rest_from = _named(spec.rest_from, inputs, spec, host, "Norms, biases and embeddings")
    vae_from = _named(spec.vae_from, inputs, spec, host, "The VAE")
    if vae_from is not None:
        _check_vae(inputs.template, vae_from)
    if spec.loras_only:  # the base is the hyper-model
        rest_from = vae_from = inputs.base
    layers, places = _covered(inputs), _places(inputs.template)
    formats = tensor_plans(inputs, spec)
    out = []
    for info in ordered(inputs.template):
        if info.name in layers:
            continue
        place = places.get(info.name)
        kind = _kind(info, place)
        parts = {
            m: Origin(model.file, own)
            for m, model in enumerate(_models(inputs, kind))
            if model is not None and (own := _find(model, info, place, kind)) is not None
        }
        chosen = vae_from if kind == VAE else rest_from if kind in MEASURED else None
        out.append(
            Rest(
                info, info.name if place is None else place.label, kind, formats[info.name].dtype,
                None if place is None else place.module, parts, _origin(chosen, info, place, kind),
                _origin(inputs.base, info, place, kind),
            )
        )  # fmt: skip
    return out


def tensor_plans(inputs: Inputs, spec: HyperSpec) -> dict[str, TensorPlan]:
    """What the hyper-model will hold: the template's tensors in the order of its file. SpecError for a format that
    torch lacks."""
    check_formats([spec.model_dtype])
    places, first = _places(inputs.template), next(iter(inputs.models), None)
    kept = inputs.template if inputs.base is not None or first is None else first  # whose formats may be kept
    out = {}
    for info in ordered(inputs.template):
        place = places.get(info.name)
        kind = _kind(info, place)
        dtype = format_of(_find(kept, info, place, kind) or info, KEEP if kind == FIXED else spec.model_dtype)
        out[info.name] = TensorPlan(dtype, info.shape)
    return out


def ordered(template: Model) -> list[TensorInfo]:
    """A checkpoint's tensors as they lie in its file."""
    return sorted(template.file.tensors.values(), key=lambda info: (info.offset, info.name))


@dataclass(frozen=True)
class _Place:
    """Where a tensor of the template belongs; of a fused one, its first part."""

    module: Module | None  # None: in the VAE
    attribute: str  # "weight", "bias"; in the VAE its key

    @property
    def label(self) -> str:
        if self.module is None:
            return f"vae.{self.attribute}"
        path = self.module.path if self.module.part is None else self.module.fused
        suffix = ".bias" if self.attribute == "bias" else ""
        return f"{self.module.component}.{path}{suffix}"


def _places(model: Model) -> dict[str, _Place]:
    out: dict[str, _Place] = {}
    for own in model.components.values():
        for module in own.values():
            for attribute in ("weight", "bias"):
                info: TensorInfo | None = getattr(module, attribute)
                if info is not None:
                    out.setdefault(info.name, _Place(module, attribute))
    for key, info in model.vae.items():
        out.setdefault(info.name, _Place(None, key))
    return out


def _kind(info: TensorInfo, place: _Place | None) -> str:
    if info.dtype not in FLOATS or (place is None and not info.name.startswith(_EMA)):
        return FIXED
    if place is None:
        return COPY
    if place.module is None:
        return VAE
    kind = place.module.kind
    if kind == modules.NORM:
        return NORM
    if place.attribute == "bias":
        return BIAS
    if kind == modules.EMBEDDING:
        return EMBEDDING
    return LAYER if kind in LORA_KINDS else PARAMETER


def _covered(inputs: Inputs) -> set[str]:
    """Names of the tensors that consist of layers."""
    numbers: Counter[str] = Counter()
    for layer in inputs.layers:
        assert layer.module.weight is not None
        numbers[layer.module.weight.name] += layer.module.weight.numel
    tensors = inputs.template.file.tensors
    return {name for name, count in numbers.items() if count == tensors[name].numel}


def _models(inputs: Inputs, kind: str) -> list[Model | None]:
    """Whose tensors count, by source: beside its layers a LoRA's model is its base; it has no VAE of its own."""
    return [
        source.model if isinstance(source, CheckpointSource) else inputs.base if kind in MEASURED else None
        for source in inputs.sources
    ]


def _origin(model: Model | None, info: TensorInfo, place: _Place | None, kind: str) -> Origin | None:
    own = None if model is None else _find(model, info, place, kind)
    return None if model is None or own is None else Origin(model.file, own)


def _find(model: Model, info: TensorInfo, place: _Place | None, kind: str) -> TensorInfo | None:
    """The same tensor of another model, whole; None if it has none of this shape, or one that is never a mean."""
    if kind == FIXED:
        return None
    own: Any
    if place is None:
        own = model.file.tensors.get(info.name)
    elif place.module is None:
        own = model.vae.get(place.attribute)
    else:
        module = model.components.get(place.module.component, {}).get(place.module.path)
        part = None if module is None else getattr(module, place.attribute)
        own = None if part is None else model.file.tensors[part.name]
    return own if own is not None and own.shape == info.shape and own.dtype in FLOATS else None


def _check_vae(template: Model, model: Model) -> None:
    if not template.vae:
        raise SpecError(
            f"{template.file.path.name} has no VAE, so the hyper-model has none either.",
            hint="Leave out where the VAE comes from, or choose a model, or a base, that is whole.",
        )
    missing = [
        key for key, info in template.vae.items() if (own := model.vae.get(key)) is None or own.shape != info.shape
    ]
    if missing:
        raise SpecError(
            f"{model.file.path.name} has no VAE of the same kind.",
            f"{len(missing)} of its {len(template.vae)} tensors are missing or of another size, such as {missing[0]}.",
            "Take the VAE from another model.",
        )


def _named(name: str | None, inputs: Inputs, spec: HyperSpec, host: Host, what: str) -> Model | None:
    """The model that is called so in the parameters."""
    if name is None:
        return None
    by_name = dict(zip(spec.models, inputs.sources, strict=True))
    found = by_name.get(name) or next((source for source in inputs.sources if source.label == name), None)
    if isinstance(found, CheckpointSource):
        return found.model
    path = host.resolve_checkpoint(name)
    known = [*inputs.models, *([] if inputs.base is None else [inputs.base])]
    model = next((model for model in known if is_same(model.file.path, path)), None)
    if model is None:
        raise SpecError(
            f"{what} cannot be taken from {path.name}: it is none of the models.",
            hint="Name one of the models" + (", or the base." if inputs.base is not None else "."),
        )
    return model

"""What headers tell of models that should be merged with each other: what to refuse, and what a person should know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...errors import LayoutError
from ...files.dtypes import EIGHT_BITS, OUTPUT_DTYPES
from ...layouts.reference import reference_model
from ...layouts.resolve import said_architecture
from . import prediction
from .align import few, file_names
from .lora_source import LoraSource
from .sources import CheckpointSource
from .spec import HyperSpec, full_count, ranks_of
from .template import lacking

if TYPE_CHECKING:
    from .inputs import Inputs

_ALWAYS_SMALL = 2  # layers: a UNet's first and last convolution have few channels
_FORMATS = {stored: name for name, stored in (OUTPUT_DTYPES | EIGHT_BITS).items()}
_ZERO_SNR = "ztsnr"
_TIMES = {2: "twice"}


def refuse(inputs: Inputs) -> None:
    """LayoutError for LoRAs of another architecture by their own word, and for v-prediction beside epsilon."""
    for source in inputs.sources:
        if not isinstance(source, LoraSource):
            continue
        said = said_architecture(source.lora.file.metadata)
        if said is not None and said != inputs.template.architecture.id:
            raise LayoutError(
                f"{source.path.name} says that it was trained on {reference_model(said).architecture.title}.",
                f"{inputs.template.file.path.name} is {inputs.template.title}.",
                "Name the base that the LoRA was trained on.",
            )
    models, loras = _predictions(inputs)
    v, epsilon = (_of_kind(wanted, models | loras) for wanted in (prediction.V, prediction.EPSILON))
    if not epsilon and _of_kind(prediction.V, models) and _counts_as_epsilon(inputs):
        epsilon = _of_kind("", models)
    if v and epsilon:
        raise LayoutError(
            f"{few(v)}: v-prediction; {few(epsilon)}: epsilon.",
            "What they compute is not comparable: a mean of both gives noise."
            + (" A file without a mark counts as epsilon." if _counts_as_epsilon(inputs) else ""),
            "Merge models of one kind of prediction only.",
        )


def _predictions(inputs: Inputs) -> tuple[dict[str, str], dict[str, str]]:
    """What the base and all checkpoints predict, "" where they do not say it, and those LoRAs that do; by file name."""
    models = ([] if inputs.base is None else [inputs.base]) + inputs.models
    names = file_names([model.file.path for model in models])
    said = {name: prediction.of_model(model) for name, model in zip(names, models, strict=True)}
    loras = (source for source in inputs.sources if isinstance(source, LoraSource))
    kinds = {lora.path.name: prediction.of_lora(lora.lora.file.metadata) for lora in loras}
    return said, {name: kind for name, kind in kinds.items() if kind}


def _of_kind(kind: str, said: dict[str, str]) -> list[str]:
    return [name for name, own in said.items() if own == kind]


def _counts_as_epsilon(inputs: Inputs) -> bool:
    return inputs.template.architecture.id in prediction.USUALLY_EPSILON


def warnings(inputs: Inputs, spec: HyperSpec) -> list[str]:
    """One sentence each."""
    return [
        *_repeated(inputs),
        *_incomplete(inputs, spec),
        *_members(inputs),
        *_mixed_formats(inputs),
        *_other_bases(inputs),
        *_too_many(inputs, spec),
        *_too_high(inputs, spec),
    ]


def _independent(inputs: Inputs) -> int:
    """How many changes can be independent: of the files that differ all, but one for their mean, or the base."""
    files = [] if inputs.base is None else [inputs.base.file]
    for source in inputs.sources:
        if not any(source.file.is_same(file) for file in files):
            files.append(source.file)
    return len(files) - 1


def _repeated(inputs: Inputs) -> list[str]:
    """Models that are one file, or the base; each is told once. Where all are one, that is told."""
    if _independent(inputs) == 0:
        what = "the base itself" if inputs.base is not None else "the same file"
        return [f"All models are {what}: all multipliers are 0."]
    out, left = [], list(inputs.sources)
    if inputs.base is not None:
        same = [source.label for source in left if source.file.is_same(inputs.base.file)]
        if len(same) == 1:
            out.append(f"{same[0]} is the base itself: it changes nothing, and its multipliers are 0.")
        elif same:
            out.append(f"{' and '.join(same)} are the base itself: they change nothing, and their multipliers are 0.")
        left = [source for source in left if source.label not in same]
    while left:
        same = [source for source in left if source.file.is_same(left[0].file)]
        if len(same) > 1:
            labels, times = " and ".join(source.label for source in same), _TIMES.get(len(same), f"{len(same)} times")
            counts = f", and it counts {times} in the mean" if inputs.base is None else ""
            out.append(f"{labels} are the same file: their multipliers are the same{counts}.")
        left = [source for source in left if source not in same]
    return out


def _incomplete(inputs: Inputs, spec: HyperSpec) -> list[str]:
    """A hyper-model that no WebUI loads by itself."""
    lacks = lacking(inputs.template)
    if not lacks or spec.loras_only or not inputs.models:
        return []
    name, which = inputs.template.file.path.name, "the base" if inputs.base is not None else "the most complete model"
    return [f"The hyper-model will have no {' and no '.join(lacks)}, as {name}, {which}, has none: a WebUI does not "
            "load it by itself."]  # fmt: skip


def _members(inputs: Inputs) -> list[str]:
    """Models that can be merged and yet differ in kind."""
    models = ([] if inputs.base is None else [inputs.base]) + inputs.models
    out = []
    titles = dict.fromkeys(model.title for model in models)
    if len(titles) > 1:
        out.append(f"The models are of several kinds whose layers are alike: {', '.join(titles)}.")
    marked = [model.file.path.name for model in models if _ZERO_SNR in model.file.tensors]
    if 0 < len(marked) < len(models):
        marked = list(dict.fromkeys(marked))
        out.append(f"Only {few(marked)} is marked for zero terminal SNR; no LoRA carries that.")
    return out + _unsaid_predictions(inputs)


def _unsaid_predictions(inputs: Inputs) -> list[str]:
    models, loras = _predictions(inputs)
    unsaid, v = _of_kind("", models), _of_kind(prediction.V, loras)
    if unsaid and inputs.template.architecture.id in prediction.UNTOLD:
        return [f"{few(unsaid)}: the file does not say whether the model predicts v or epsilon; merging one kind with "
                "the other gives noise."]  # fmt: skip
    return (
        [f"{few(v)}: trained on a model of v-prediction, which {few(unsaid)} is not marked as."] if unsaid and v else []
    )


def _mixed_formats(inputs: Inputs) -> list[str]:
    found: dict[str, list[str]] = {}
    for source in inputs.sources:
        if isinstance(source, CheckpointSource):
            formats = {source.info(layer).dtype for layer in inputs.layers}
            found.setdefault(" and ".join(sorted(_FORMATS.get(f, f) for f in formats)), []).append(source.label)
    if len(found) < 2:
        return []
    shown = "; ".join(f"{', '.join(labels)}: {formats}" for formats, labels in found.items())
    return [
        f"The models are stored in different number formats ({shown}): the coarser one's rounding counts as change."
    ]


def _other_bases(inputs: Inputs) -> list[str]:
    """LoRAs that name another model than the base as theirs. Names say little: a file is renamed easily."""
    if inputs.base is None:
        return []
    own = inputs.base.file.path
    named = {
        source.label: source.lora.file.metadata.get("ss_sd_model_name", "").replace("\\", "/").rsplit("/", 1)[-1]
        for source in inputs.sources
        if isinstance(source, LoraSource)
    }
    others = {label: name for label, name in named.items() if name and _stem(name) not in (_stem(own.name), own.name)}
    if not others:
        return []
    shown = [f"{label} on {name}" for label, name in others.items()]
    return [f"LoRAs say that they were trained on other models than {own.name}: {few(shown)}; "
            "their changes are taken as changes of the base all the same."]  # fmt: skip


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0].casefold()


def _too_many(inputs: Inputs, spec: HyperSpec) -> list[str]:
    most = _independent(inputs)
    count = spec.count if spec.size is not None else len(ranks_of(spec.ranks)) or full_count(spec.ranks)
    if count is None or count <= most or most == 0:  # that nothing differs is told already
        return []
    return [f"{count} LoRAs for {len(inputs.sources)} models: the multipliers of more than {most} depend on each "
            "other; the smallest are taken (pseudo-inverse)."]  # fmt: skip


def _too_high(inputs: Inputs, spec: HyperSpec) -> list[str]:
    rank = max(ranks_of(spec.ranks), default=0)
    small = [layer.key for layer in inputs.layers if min(layer.shape) < rank]
    if spec.size is not None or len(small) <= _ALWAYS_SMALL:
        return []
    return [f"Rank {rank} is more than {len(small)} of {len(inputs.layers)} layers have room for "
            f"({few(small)}): limited to their size there."]  # fmt: skip

"""The models of a hyper-merge, open and laid beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import LayoutError, SpecError
from ...layouts.module import Model
from ...layouts.opening import open_checkpoint
from ..host import Host
from ..inspect_open import find, open_model
from . import checks
from .align import align
from .lora_source import LoraSource, open_source
from .sources import CheckpointSource, Layer, Source
from .spec import HyperSpec
from .template import most_complete

__all__ = ["CheckpointSource", "Inputs", "Layer", "LoraSource", "Source", "blame", "open_inputs"]

_SLAB = 1 << 20  # numbers at a time


@dataclass
class Inputs:
    """Holds all files open; close() it.

    template: the base if there is one, else the most complete checkpoint; its names are those of the hyper-model.
    models: those of the sources that are checkpoints, in order.  layers: every weight that a LoRA reaches and that
    all models have, in the order of the template's file; of LoRAs alone, what one of them changes.
    """

    template: Model
    base: Model | None
    sources: list[Source]
    layers: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def models(self) -> list[Model]:
        return [source.model for source in self.sources if isinstance(source, CheckpointSource)]

    @property
    def labels(self) -> list[str]:
        return [source.label for source in self.sources]

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in [self.template.file, *(source.file for source in self.sources)]:
            file.check_unchanged()

    def close(self) -> None:
        if self.base is not None:
            self.base.file.close()
        for source in self.sources:
            source.close()


def open_inputs(spec: HyperSpec, host: Host) -> Inputs:
    """Open everything and check what headers tell. Raises SpecError, FormatError or LayoutError."""
    base = open_checkpoint(host.resolve_checkpoint(spec.base)) if spec.base else None
    sources: list[Source] = []
    try:
        for name in spec.models:
            sources.append(_open_one(name, host, base))
        for source, label in zip(sources, unique_labels([_stem(source.path) for source in sources]), strict=True):
            source.label = label
        template = base or most_complete([s.model for s in sources if isinstance(s, CheckpointSource)])
        out = Inputs(template, base, sources)
        found = align([template, *(model for model in out.models if model is not template)])
        out.layers, out.warnings = found.layers, found.warnings
        checks.refuse(out)
        _settle_loras(out)
        out.warnings += checks.warnings(out, spec)
        return out
    except BaseException:
        for source in sources:
            source.close()
        if base is not None:
            base.file.close()
        raise


def blame(inputs: Inputs, layer: Layer) -> list[str]:
    """The labels of the models (and the base) whose numbers in a layer are NaN or Inf."""
    sources = [*inputs.sources]
    if inputs.base is not None:
        sources.append(CheckpointSource(inputs.base.file.path.name, inputs.base))
    return list(dict.fromkeys(source.label for source in sources if not _is_finite(source, layer)))


def _is_finite(source: Source, layer: Layer) -> bool:
    n, k = layer.shape
    height = max(1, _SLAB // max(1, k))
    for start in range(0, n, height):
        rows = torch.empty(min(height, n - start), k)
        source.rows_into(layer, start, start + len(rows), rows)
        if not bool(torch.isfinite(rows).all()):
            return False
    return True


def unique_labels(stems: Sequence[str]) -> list[str]:
    """Each stem once: the second of a kind is called "a (2)". Case does not tell names apart, as in Windows."""
    out: list[str] = []
    taken = {stem.casefold() for stem in stems}
    seen: set[str] = set()
    for stem in stems:
        label, number = stem, 1
        while label.casefold() in seen or (number > 1 and label.casefold() in taken):
            number += 1
            label = f"{stem} ({number})"
        seen.add(label.casefold())
        out.append(label)
    return out


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name.removesuffix(".index.json").rsplit(".", 1)[0]


def _open_one(name: str, host: Host, base: Model | None) -> Source:
    """A name of either list; where both have it, the first that is a model of any kind."""
    paths, errors = find(name, host), []
    for path in paths:
        try:
            model = open_model(path)
        except (LayoutError, SpecError) as error:
            errors.append(error)
            continue
        if isinstance(model, Model):
            return CheckpointSource(path.name, model)
        model.close()
        if base is None:
            raise SpecError(
                f"{path.name} is a LoRA: what it changes is known only beside its base.",
                hint="Name the base that the LoRAs were trained on, or choose checkpoints.",
            )
        return open_source(path, base)
    raise errors[0]


def _settle_loras(inputs: Inputs) -> None:
    """Where only LoRAs go in, what none of them changes needs no look; what they cannot bring is told."""
    loras = [source for source in inputs.sources if isinstance(source, LoraSource)]
    shared = {layer.key for layer in inputs.layers}
    for lora in loras:
        inputs.warnings += lora.settle(shared, len(loras))
    if loras and len(loras) == len(inputs.sources):
        reached = set().union(*(lora.reached for lora in loras))
        inputs.layers = [layer for layer in inputs.layers if layer.key in reached]
        if not inputs.layers:
            raise LayoutError("None of the LoRAs changes a layer that LoRAs can share.", "They change norms, biases "
                              "or embeddings only.", "Merge them into a checkpoint instead.")  # fmt: skip

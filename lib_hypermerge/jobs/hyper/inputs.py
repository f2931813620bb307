"""The models of a hyper-merge, open and laid beside each other."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...files.source import TensorFile, TensorInfo
from ...layouts.module import LORA_KINDS, Model, Module
from ...layouts.opening import open_checkpoint
from ..host import Host
from .spec import HyperSpec


@dataclass(frozen=True)
class Layer:
    """A weight that a LoRA reaches, as the template spells it."""

    module: Module

    @property
    def key(self) -> str:
        return f"{self.module.component}.{self.module.path}"

    @property
    def shape(self) -> tuple[int, int]:
        """(n, k) of the flattened weight."""
        return self.module.matrix_shape


class Source(ABC):
    """One of the M inputs.  label: its name in reports, unique.  relative: rows are the change of the base."""

    label: str
    path: Path
    file: TensorFile
    relative: bool = False

    @abstractmethod
    def rows_into(self, layer: Layer, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill out (stop − start, k) float32 with those rows of the layer's weight. Thread-safe."""

    def close(self) -> None:
        self.file.close()


class CheckpointSource(Source):
    """A whole model."""

    def __init__(self, label: str, model: Model):
        self.label, self.model, self.file, self.path = label, model, model.file, model.file.path

    def info(self, layer: Layer) -> TensorInfo:
        weight = self.model.components[layer.module.component][layer.module.path].weight
        assert weight is not None
        return weight

    def rows_into(self, layer: Layer, start: int, stop: int, out: torch.Tensor) -> None:
        info = self.info(layer)
        rows = self.file.read(info.rows(start, stop) if info.stride is None else info)
        out.copy_(rows.reshape(-1, out.shape[1]) if info.stride is None else rows.flatten(1)[start:stop])


@dataclass
class Inputs:
    """Holds all files open; close() it.

    template: the base if there is one, else the first checkpoint; its names are those of the hyper-model.
    models: those of the sources that are checkpoints, in order.  layers: every weight that a LoRA reaches.
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
    """Open everything and check what headers tell. Raises SpecError, FormatError, LayoutError or UnchangedError."""
    base = open_checkpoint(host.resolve_checkpoint(spec.base)) if spec.base else None
    sources: list[Source] = []
    for name in spec.models:
        model = open_checkpoint(host.resolve_checkpoint(name))
        sources.append(CheckpointSource(model.file.path.stem, model))
    first = sources[0]
    assert isinstance(first, CheckpointSource)
    template = base or first.model
    layers = [
        Layer(module)
        for modules in template.components.values()
        for module in modules.values()
        if module.kind in LORA_KINDS and module.name is not None and module.weight is not None
    ]
    return Inputs(template, base, sources, layers)

"""One of the models of a hyper-merge, read in rows of a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...files.dtypes import ITEMSIZE, torch_dtype
from ...files.source import TensorFile, TensorInfo
from ...layouts.module import Model, Module
from ..buffers import Buffers

_PIECE = 1 << 18  # numbers that are read and converted at a time: they fit the second-level cache
_raw = Buffers()  # of all sources together, so that a layer's models take turns in one piece of cache


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
        """Where this model has the layer; for a part of a fused weight, those rows of it."""
        weight = self.model.components[layer.module.component][layer.module.path].weight
        assert weight is not None
        return weight

    def rows_into(self, layer: Layer, start: int, stop: int, out: torch.Tensor) -> None:
        read_rows(self.file, self.info(layer), start, stop, out)


def read_rows(file: TensorFile, info: TensorInfo, start: int, stop: int, out: torch.Tensor) -> None:
    """Fill out (stop − start, k) with rows of a flattened weight, converted to out's dtype, in no fresh memory."""
    if out.numel() == 0:
        return
    if info.stride is not None:
        out.copy_(file.read(info.rows(start, stop)).reshape(out.shape))
        return
    k, itemsize = out.shape[1], ITEMSIZE[info.dtype]
    if info.dtype == "F32" and out.dtype == torch.float32 and out.device.type == "cpu" and out.is_contiguous():
        file.read_into(info.offset + start * k * itemsize, as_bytes(out))
        return
    dtype, height = torch_dtype(info.dtype), max(1, _PIECE // k)
    for a in range(start, stop, height):
        b = min(a + height, stop)
        raw = _raw.get("rows", (b - a) * k * itemsize, torch.uint8)
        file.read_into(info.offset + a * k * itemsize, raw.numpy().data)
        out[a - start : b - start].copy_(raw.view(dtype).view(b - a, k))


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be read or written."""
    array: np.ndarray = tensor.numpy()
    return array.reshape(-1).view(np.uint8).data

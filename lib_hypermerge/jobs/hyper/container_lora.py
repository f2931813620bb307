"""A container seen as the LoRA file of one of its models, or of a blend: factors are made when they are read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import replace

import torch

from ...adapters.lora import DOWN, UP
from ...files.source import TensorFile, TensorInfo
from .container import Container

ALPHA = "alpha"


def component_of(name: str) -> str:
    """unet, te, te1 … of a kohya name."""
    return name.split("_", 2)[1]


class ContainerLora(TensorFile):
    """te, unet: the models' shares, of text encoders and of the rest. Owns the container: closing it closes that.

    up is float64 and not rounded, down as stored.
    """

    def __init__(self, container: Container, te: Mapping[str, float], unet: Mapping[str, float]):
        self.container, self.path, self.size = container, container.file.path, container.file.size
        self.te, self.unet = te, unet
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._starts: list[int] = []
        for name, shape in container.modules.items():
            if any(self.shares(name).values()):
                down = container.file.tensors[f"{name}.down"]
                ones = (1,) * (len(shape) - 2)
                self._add(TensorInfo(f"{name}.{UP}", "F64", (shape[0], down.shape[0], *ones), 0))
                self._add(replace(down, name=f"{name}.{DOWN}"))
                self._add(TensorInfo(f"{name}.{ALPHA}", "F32", (), 0))

    def _add(self, info: TensorInfo) -> None:
        last = next(reversed(self.tensors.values()), None)
        start = 0 if last is None else last.offset + last.nbytes
        self._starts.append(start)
        self.tensors[info.name] = replace(info, offset=start, stride=None)

    def shares(self, name: str) -> Mapping[str, float]:
        """Of the models, in a module."""
        return self.unet if component_of(name) == "unet" else self.te

    def close(self) -> None:
        self.container.close()

    def is_same(self, other: TensorFile) -> bool:
        return self.container.file.is_same(other)

    def check_unchanged(self) -> None:
        self.container.file.check_unchanged()

    def read(self, info: TensorInfo) -> torch.Tensor:
        name, part = info.name.split(".", 1)
        down = self.tensors[f"{name}.{DOWN}"]
        if part == ALPHA:
            return torch.tensor(float(down.shape[0]))
        change = self.container.change(name, self.shares(name))
        return (change.up if part == UP else change.down).reshape(info.shape)

    def read_into(self, offset: int, view: memoryview) -> None:
        info = list(self.tensors.values())[bisect_right(self._starts, offset) - 1]
        raw = self.read(info).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        first = offset - info.offset
        view[:] = raw[first : first + len(view)]

"""An adapter file seen as modules: which dialect it speaks, and which part of which module each tensor is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..files.source import TensorFile, TensorInfo
from .module import Module


@dataclass(frozen=True)
class Entry:
    """The tensors of one module in an adapter file.

    key: the module's name as the file spells it.  name: the same with the dialect's dress taken off: underscores
    for dots and, if the file says it, the component before: `unet_down_blocks_0_…`, `te2_text_model_…`.
    parts: by kohya's and LyCORIS' part names, whatever the dialect (`lora_A.weight` is `lora_down.weight`).
    alpha: from a configuration; None where there is none or the parts hold one.
    """

    key: str
    name: str
    parts: Mapping[str, TensorInfo]
    alpha: float | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parts but alpha and the like, which are no matrices."""
        return {part: info.shape for part, info in self.parts.items() if part not in ("alpha", "scale")}


@dataclass
class AdapterFile:
    """An open adapter file (or PEFT folder). dialect: kohya, diffusers, diffusers-old, peft, cloneofsimo, …"""

    file: TensorFile
    dialect: str
    entries: dict[str, Entry] = field(default_factory=dict)  # by key
    embeddings: dict[str, TensorInfo] = field(default_factory=dict)  # bundled ones, by tensor name
    unknown: list[str] = field(default_factory=list)  # tensors that are no part of any module

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.metadata

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class Target:
    """What a module of an adapter file changes: a layer of a checkpoint, or some of its rows where the
    checkpoint fuses what the file keeps apart. start, stop: rows within module.weight."""

    module: Module
    start: int
    stop: int


@dataclass
class Resolution:
    """An adapter file laid over a checkpoint."""

    targets: list[tuple[Entry, Target]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)  # keys of entries that no layer of the checkpoint answers to

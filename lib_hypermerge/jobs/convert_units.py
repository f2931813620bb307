"""The layers that a conversion works on: which modules of the input, under which names in the output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..adapters.adapter import Adapter, Shape
from ..layouts.adapter_file import Entry
from ..layouts.dialects import diffusers
from ..layouts.dialects.diffusers_transformers import Piece
from ..layouts.module import LORA_KINDS, Module
from .convert_spec import KOHYA

CARRY, PLAIN, AXIS, REFIT = "carry", "plain", "axis", "refit"
_ABSENT = {"sd2": "transformer.resblocks.23."}  # diffusers drops SD2's last text layer, which no image depends on
NEVER_RUN = "text layer 23"


@dataclass(frozen=True)
class Source:
    """A module of the input: rows start…stop of a layer, in the model that was laid under it.

    shape: of the weight's rows that it changes, as the input has them.
    """

    entry: Entry
    family: type[Adapter]
    start: int
    stop: int
    swapped: bool
    shape: Shape


@dataclass(frozen=True)
class Out:
    """A module of the output, with the name of its component before a dotted path."""

    name: str
    start: int
    stop: int
    swapped: bool = False


@dataclass(frozen=True)
class Unit:
    """One layer. how: carried over, turned into a plain LoRA, given magnitudes along the other axis, or magnitudes
    that fit a smaller LoRA."""

    module: Module
    sources: tuple[Source, ...]
    outs: tuple[Out, ...]
    how: str

    @property
    def numel(self) -> int:
        """Of the weight that its sources change."""
        return sum(math.prod(source.shape) for source in self.sources)

    @property
    def written(self) -> list[Out]:
        """The outputs that a source has rows of; a LoRA need not have all parts of a fused layer."""
        return [out for out in self.outs if any(s.start < out.stop and out.start < s.stop for s in self.sources)]

    @property
    def is_one_to_one(self) -> bool:
        ours = [(source.start, source.stop) for source in self.sources]
        theirs = [(out.start, out.stop) for out in self.outs]
        return all(rows in theirs for rows in ours)


def is_absent(architecture: str, module: Module) -> bool:
    """Whether diffusers' models lack a text encoder's layer that the checkpoints have."""
    absent = _ABSENT.get(architecture)
    return module.component != "unet" and absent is not None and module.path.startswith(absent)


def diffusers_names(architecture: str, module: Module) -> list[tuple[str, Piece]]:
    """diffusers' names of a layer; none for what its models lack."""
    if is_absent(architecture, module):
        return []
    if module.component not in diffusers.COMPONENTS.get(architecture, {}):
        return []
    return diffusers.names(architecture, module)


def outs(to: str, architecture: str, module: Module, own: str | None, noted: Mapping[str, str]) -> list[Out]:
    """What a layer is called in the output; none where that has no name for it.

    own: the name it goes by in kohya's spelling now.  noted: names it once had there, by diffusers' name.
    """
    assert module.weight is not None
    rows = module.weight.shape[0]
    pieces = diffusers_names(architecture, module)
    if to == KOHYA:
        name = own or next((noted[name] for name, _ in pieces if name in noted), None) or module.name
        return [Out(name, 0, rows)] if name else []
    if module.kind not in LORA_KINDS:
        return []
    return [Out(name, piece.start, piece.stop, piece.swapped) for name, piece in pieces]

"""What a job needs from its surroundings. The standalone page, the command line and the WebUI each have one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..errors import Cancelled
from ..files.source import TensorInfo
from ..layouts.module import Module


@dataclass
class Context:
    """A running job's ties to the outside: where progress goes, and whether somebody wants it to stop."""

    on_progress: Callable[[float, str], None] = lambda fraction, text: None
    interrupted: Callable[[], bool] = lambda: False
    fraction: float = field(default=0.0, init=False)

    def check(self) -> None:
        """Raise Cancelled if the job was interrupted."""
        if self.interrupted():
            raise Cancelled

    def progress(self, fraction: float, text: str) -> None:
        self.fraction = fraction
        self.on_progress(fraction, text)
        self.check()


@dataclass(frozen=True)
class Part:
    """Rows start…stop of a checkpoint's tensor, which are the weight or the bias of a module."""

    module: Module
    start: int
    stop: int
    bias: bool = False


@dataclass(frozen=True)
class Spot:
    """Rows start…stop of a checkpoint's tensor, which are all of one parameter of a model in memory."""

    parameter: str  # the host's name for it
    start: int
    stop: int


class ModelInMemory(Protocol):
    """The model that a WebUI generates with: its own weights, apart from what a prompt's LoRAs add to them."""

    checkpoint: Path

    def is_of(self, model: object) -> bool:
        """Whether this is about that object of the host's."""
        ...

    def is_there(self) -> bool:
        """Whether the host still holds it; not so if it was thrown away."""
        ...

    def spots(self, tensors: Mapping[TensorInfo, list[Part]]) -> dict[str, list[Spot]]:
        """Where the tensors of a checkpoint stand, by their names. LayoutError if one is nowhere, or of another
        shape there."""
        ...

    def settle(self) -> None:
        """Take a prompt's LoRAs off, so that the parameters are the model's own; the next generation adds them."""
        ...

    def tensors(self, parameter: str) -> list[Any]:
        """A parameter, and the copies that the host keeps of it in another number format, as torch tensors."""
        ...

    def forget_results(self) -> None:
        """The weights were changed: what the host remembers of computing with others is void."""
        ...


class Host(Protocol):
    """Names are what a person picks from a list; paths are where the files are."""

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, as the host lists them."""
        ...

    def resolve_checkpoint(self, name: str) -> Path:
        """The file of a name, however the host spells it by now. SpecError if there is none."""
        ...

    def loras(self) -> list[str]:
        """Names of the LoRA files, as the host lists them."""
        ...

    def resolve_lora(self, name: str) -> Path:
        """The file (or PEFT folder) of a name. SpecError if there is none."""
        ...

    def find_loras(self, pattern: str) -> dict[str, Path]:
        """Name → file of all LoRAs in a folder, or that match a pattern with * or ?; empty if it is neither."""
        ...

    def checkpoint_output(self, name: str) -> Path:
        """Where a new checkpoint of that name goes. SpecError if the name is none."""
        ...

    def loaded_checkpoint(self) -> Path | None:
        """The file whose model the host has in memory at the moment, if any."""
        ...

    def lora_output(self, name: str) -> Path:
        """Where a new LoRA of that name goes. SpecError if the name is none."""
        ...

    def refresh(self) -> None:
        """Look for new files, so that lists and prompts know them."""
        ...

    def device(self) -> str:
        """The torch device that "auto" means, or "auto" if the host has no opinion."""
        ...

    def threads(self) -> int:
        """CPU threads a job may use; 0 for torch's own number."""
        ...

    def running(self, job_id: str, on_wait: Callable[[], None]) -> AbstractContextManager[Context]:
        """Take the host's turn, tell it of the job, hand out a Context, and always end it again."""
        ...

    def forget(self, job_id: str) -> None:
        """The job was refused before it began: whoever watches its progress may stop."""
        ...

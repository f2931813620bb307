"""What a job needs from its surroundings. The standalone page, the command line and the WebUI each have one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..errors import Cancelled


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

"""What an inspection will look at: every file is opened and understood from its header."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import HypermergeError
from ..layouts.adapter_file import AdapterFile
from ..layouts.module import Model
from ..layouts.opening import open_checkpoint
from .host import Host
from .inspect_open import find, open_any
from .inspect_other import Other
from .inspect_spec import InspectSpec

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_WORK_BYTES = 512 << 20  # layers in the hands of workers, at most about


@dataclass
class Item:
    """A file that was asked about: open, or the reason why it could not be read."""

    name: str
    path: Path | None = None
    content: Model | AdapterFile | Other | None = None
    error: HypermergeError | None = None

    @property
    def bytes(self) -> int:
        return 0 if self.content is None else self.content.file.size


@dataclass
class InspectPlan:
    """Holds all files open; use as a context or close() it."""

    spec: InspectSpec
    items: list[Item] = field(default_factory=list)
    base: Model | None = None
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> InspectPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for item in self.items:
            if item.content is not None:
                item.content.file.close()
        if self.base is not None:
            self.base.file.close()

    @property
    def adapters(self) -> list[Item]:
        return [item for item in self.items if isinstance(item.content, AdapterFile)]

    @property
    def checkpoints(self) -> list[Item]:
        return [item for item in self.items if isinstance(item.content, Model)]

    @property
    def compares(self) -> bool:
        return self.spec.similarity != "none" and max(len(self.adapters), len(self.checkpoints)) > 1

    @property
    def bytes_to_read(self) -> int:
        """Beyond the headers, about."""
        total = 0
        if self.spec.hashes:
            total += sum(item.bytes for item in self.items)
        if self.spec.measures:
            total += sum(item.bytes for item in self.items)
        if self.compares and len(self.adapters) > 1:
            total += sum(item.bytes for item in self.adapters)
        if self.compares and len(self.checkpoints) > 1:
            whole = self.spec.similarity == "full"
            total += sum(item.bytes if whole else min(item.bytes, 256 << 20) for item in self.checkpoints)
        return total

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        return {
            "verb": "inspect",
            "files": [str(item.path or item.name) for item in self.items],
            "checkpoints": len(self.checkpoints),
            "loras": len(self.adapters),
            "others": sum(isinstance(item.content, Other) for item in self.items),
            "bytes_to_read": self.bytes_to_read,
            "expected_seconds": round(0.5 + self.bytes_to_read / 2e8 * (3 if self.spec.spectra else 1), 1),
            "expected_memory": _PROCESS_BYTES + (_WORK_BYTES if self.bytes_to_read else 0),
            "warnings": [f"{item.name}: {item.error}" for item in self.items if item.error],
        }


def make_plan(spec: InspectSpec, host: Host) -> InspectPlan:
    """Open everything. Raises what is wrong with a file if none can be read, SpecError and the like of the base."""
    plan = InspectPlan(spec)
    try:
        if spec.base is not None:
            plan.base = open_checkpoint(host.resolve_checkpoint(spec.base))
        for name in spec.files:
            plan.items += _open(name, host)
        errors = [item.error for item in plan.items if item.error is not None]
        if len(errors) == len(plan.items):
            raise errors[0]
    except BaseException:
        plan.close()
        raise
    return plan


def _open(name: str, host: Host) -> list[Item]:
    """One item, or two if a checkpoint and a LoRA are called the same."""
    try:
        paths = find(name, host)
    except HypermergeError as error:
        return [Item(name, error=error)]
    items = []
    for path in paths:
        try:
            items.append(Item(name, path, open_any(path)))
        except HypermergeError as error:
            items.append(Item(name, path, error=error))
    return items

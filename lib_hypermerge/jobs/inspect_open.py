"""Open a model file of any kind; what it is is found out, never asked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import HypermergeError, LayoutError, SpecError
from ..layouts.adapter_file import AdapterFile, open_adapter
from ..layouts.module import Model
from ..layouts.opening import open_checkpoint
from .host import Host
from .inspect_other import Other, open_other


def find(name: str, host: Host) -> list[Path]:
    """The files of a name among the host's checkpoints and LoRAs; two where both have it. SpecError if none has."""
    found: list[Path] = []
    for resolve in (host.resolve_checkpoint, host.resolve_lora):
        try:
            path = resolve(name)
        except SpecError:
            continue
        if path not in found:
            found.append(path)
    if not found:
        raise SpecError(
            f"There is no model {name!r}.", "Neither a checkpoint nor a LoRA goes by this name.",
            "Refresh the list and choose one of it.",
        )  # fmt: skip
    return found


def open_any(path: Path) -> Model | AdapterFile | Other:
    """A checkpoint, an adapter or another file of tensors, open. Errors name the file.

    Raises SpecError (nothing there), FormatError (broken) or LayoutError (no tensors).
    """
    try:
        return open_model(path)
    except LayoutError as error:
        other = open_other(path, error)
        if other is None:
            raise
        return other


def open_model(path: Path) -> Model | AdapterFile:
    """A checkpoint or an adapter, open. Raises SpecError, FormatError or LayoutError (neither), which name the file."""
    try:
        return open_checkpoint(path)
    except (LayoutError, SpecError) as error:
        not_a_checkpoint = error
    try:
        return open_adapter(path)
    except (LayoutError, SpecError) as error:
        raise _neither(path, not_a_checkpoint, error) from None


def _neither(path: Path, first: HypermergeError, second: HypermergeError) -> HypermergeError:
    """The error that says most, of what a checkpoint and what an adapter would have to be."""
    if not isinstance(second, LayoutError) or "is a LoRA" in first.what or "none of its factors" in second.why:
        return second
    if path.is_dir():
        return LayoutError(
            f"{path.name} is a folder without a model.", f"{first.why} {second.why}",
            "Name a file, or a folder that diffusers or PEFT saved.",
        )  # fmt: skip
    if not isinstance(first, LayoutError) or "quantised" in first.what:
        return first
    why = f"{second.what} {first.why}"
    return LayoutError(f"{path.name} is neither a checkpoint nor a LoRA that is known here.", why, first.hint)

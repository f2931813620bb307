"""The LoRAs of a request, open and laid over one model: a checkpoint, or the names of an architecture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import LayoutError
from ...layouts.adapter_file import open_adapter
from ...layouts.module import Model
from ...layouts.resolve import lay_over
from ..adapter_alone import open_alone
from ..adapter_inputs import LoraInput, open_lora


def open_all(paths: Sequence[Path], checkpoint: Model | None) -> tuple[list[LoraInput], Model]:
    """All files over one model; without a checkpoint over that member of their architecture which fits them best.

    Raises SpecError, FormatError, or LayoutError if they are not for one architecture.
    """
    if checkpoint is not None:
        return _open(paths, lambda path: open_lora(path, checkpoint)), checkpoint
    models: list[Model] = []

    def open_one(path: Path) -> LoraInput:
        lora, model = open_alone(path)
        models.append(model)
        if model.architecture is not models[0].architecture:
            lora.close()
            raise _mixed(paths[0], models[0], path, model)
        return lora

    loras = _open(paths, open_one)
    members = list({id(model): model for model in models}.values())
    if len(members) == 1:
        return loras, members[0]
    for lora in loras:
        lora.close()
    member = max(members, key=lambda model: _matched(paths, model))
    return _open(paths, lambda path: open_alone(path, member)[0]), member


def _open(paths: Sequence[Path], open_one: Callable[[Path], LoraInput]) -> list[LoraInput]:
    loras: list[LoraInput] = []
    try:
        for path in paths:
            loras.append(open_one(path))
    except BaseException:
        for lora in loras:
            lora.close()
        raise
    return loras


def _matched(paths: Sequence[Path], model: Model) -> int:
    """How many modules of all files have a layer in a model: members of an architecture share most names."""
    total = 0
    for path in paths:
        with open_adapter(path) as file:
            total += len(lay_over(file, model).targets)
    return total


def _mixed(first: Path, of_first: Model, other: Path, of_other: Model) -> LayoutError:
    return LayoutError(
        f"{first.name} and {other.name} are for different models.",
        f"{first.name} is a LoRA for {of_first.architecture.title}, {other.name} one for "
        f"{of_other.architecture.title}.",
        "Combine LoRAs of one kind.",
    )

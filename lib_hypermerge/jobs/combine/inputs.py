"""The LoRAs of a request, open and laid over one model: a checkpoint, or the names of an architecture alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import LayoutError
from ...layouts.adapter_file import open_adapter
from ...layouts.module import Model
from ...layouts.resolve import lay_over
from ..adapter_alone import open_alone, open_over
from ..adapter_inputs import LoraInput, family_of, open_lora
from .names import told_apart


def open_all(paths: Sequence[Path], checkpoint: Model | None) -> tuple[list[LoraInput], Model]:
    """All files over one model; without a checkpoint over the one that fits each as well as any other does.

    Raises SpecError, FormatError, or LayoutError if they are not for one architecture.
    """
    if checkpoint is not None:
        return _open(paths, lambda path: open_lora(path, checkpoint)), checkpoint
    models: list[Model] = []

    def open_one(path: Path) -> LoraInput:
        lora, model = open_alone(path)
        models.append(model)
        return lora

    loras = _open(paths, open_one)
    candidates = list({id(model): model for model in models}.values())
    if len(candidates) == 1:
        return loras, models[0]
    for lora in loras:
        lora.close()
    # a small LoRA may be for one of several models, or members of a family, and only the others tell for which
    common = next((model for model in candidates if _fits_all(paths, models, model)), None)
    if common is None:
        raise _mixed(paths, models)
    return _open(paths, lambda path: open_over(path, common)), common


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


def _fits_all(paths: Sequence[Path], models: Sequence[Model], model: Model) -> bool:
    return all(own is model or _fit(path, model) >= _fit(path, own) for path, own in zip(paths, models, strict=True))


def _fit(path: Path, model: Model) -> tuple[int, int]:
    """How many modules of a file have a layer in a model, and how many of these one of their size."""
    with open_adapter(path) as file:
        targets = lay_over(file, model).targets
        fitting = sum(family_of(file, entry).fits(entry.shapes, target.shape) for entry, target in targets)
    return len(targets), fitting


def _mixed(paths: Sequence[Path], models: Sequence[Model]) -> LayoutError:
    other = next(index for index, model in enumerate(models) if model is not models[0])
    first, second = told_apart([paths[0], paths[other]])
    return LayoutError(
        f"{first} and {second} are for different models.",
        f"{first} is a LoRA for {models[0].title}, {second} one for {models[other].title}.",
        "Combine LoRAs of one kind.",
    )

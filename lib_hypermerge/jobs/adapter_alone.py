"""A LoRA without the checkpoint that it is for: what its names and sizes tell of the layers that it changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..adapters import families, loha, lokr
from ..adapters.adapter import Shape
from ..adapters.full import DIFF
from ..adapters.lora import DOWN, MID, UP
from ..errors import FormatError, LayoutError
from ..layouts.adapter_file import AdapterFile, open_adapter
from ..layouts.module import Model
from ..layouts.resolve import nearest, resolve
from .adapter_inputs import LoraInput, family_of, find_idle


def open_alone(path: Path, model: Model | None = None) -> tuple[LoraInput, Model]:
    """A LoRA laid over the architecture that its names tell, without weights.

    model: one without weights that an earlier file was laid over; it serves again if it is of this architecture.
    Raises SpecError, FormatError, or LayoutError if the names tell no architecture.
    """
    file = open_adapter(path)
    try:
        found, share = nearest(file)
        if found is not None:
            model = found if model is None or model.architecture is not found.architecture else model
        else:
            shown = ", ".join(list(file.entries)[:3])
            raise LayoutError(
                f"{path.name} is a LoRA for an architecture that Hypermerge does not know.",
                f"Of its modules, such as {shown}, {share:.0%} have a layer in the nearest one.",
                "Use LoRAs for Stable Diffusion 1, 2, XL, 3 and Flux.",
            )
        return _over(file, model), model
    except BaseException:
        file.close()
        raise


def open_over(path: Path, model: Model) -> LoraInput:
    """The same over a model that the caller knows it to be for. Raises SpecError, FormatError or LayoutError."""
    file = open_adapter(path)
    try:
        return _over(file, model)
    except BaseException:
        file.close()
        raise


def _over(file: AdapterFile, model: Model) -> LoraInput:
    lora = LoraInput(file, resolve(file, model))
    for entry, _ in lora.resolution.targets:
        lora.families[entry.key] = family_of(file, entry)
    refuse_misfits(lora, model)
    find_idle(lora)
    return lora


def refuse_misfits(lora: LoraInput, model: Model) -> None:
    """FormatError for two modules of one layer; LayoutError where some, but few, are not of their layer's size.

    Many that are not mean a model of another width, whose sizes are not known: then the names alone count.
    """
    claimed: dict[tuple[str, str, int], str] = {}
    misfits = []
    for entry, target in lora.resolution.targets:
        other = claimed.setdefault((target.module.component, target.module.path, target.start), entry.key)
        if other != entry.key:
            raise FormatError(
                f"{lora.path.name} names the same layer twice.",
                f"{other} and {entry.key} are both {target.module.component}.{target.module.path}.",
                "It mixes LoRAs, perhaps of two architectures: use them one by one.",
            )
        weight = target.module.weight
        assert weight is not None
        if not lora.families[entry.key].fits(entry.shapes, (target.stop - target.start, *weight.shape[1:])):
            misfits.append(entry)
    if misfits and 2 * len(misfits) < len(lora.resolution.targets):
        sizes = ", ".join(f"{part} {list(shape)}" for part, shape in misfits[0].shapes.items())
        raise LayoutError(
            f"{len(misfits)} modules of {lora.path.name} are not of the size of their layers in {model.title}.",
            f"{misfits[0].key} has {sizes}.",
            "The file is damaged, or for another model: name the checkpoint that it was trained on.",
        )


def told_shape(shapes: Mapping[str, Shape], axes: int) -> Shape | None:
    """The weight that a module's factors, or a full change, are for; None where it takes the layer to know.

    axes: of the layer's weight. Factors that are flattened tell its rows, and its columns all in one.
    """
    if UP in shapes and DOWN in shapes:
        shape = (shapes[UP][0], *shapes[DOWN][1:]) if MID not in shapes else (
            shapes[UP][0], shapes[DOWN][1], *shapes[MID][2:]
        )  # fmt: skip
    elif DIFF in shapes:
        shape = shapes[DIFF]
    else:
        family = families.find(shapes)
        made = {"loha": loha.made, "lokr": lokr.made}.get(family.family if family else "", lambda shapes: None)
        shape = made(shapes)
    if shape is None:
        return None
    return shape if len(shape) == axes or axes != 4 else (*shape, 1, 1)

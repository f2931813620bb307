"""Lay several models of one kind beside each other: which layers all of them have, in one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import LayoutError
from ...layouts.module import LORA_KINDS, Model, Module
from .sources import Layer

_HINT = "Choose models that were tuned from one base."
_FEW = 3


@dataclass
class Alignment:
    """layers: of the first model, as they lie in its file; the parts of a fused tensor in the order of their rows."""

    layers: list[Layer] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def align(models: Sequence[Model]) -> Alignment:
    """The layers that a LoRA reaches and that all models have; the first one's names and order count.

    What is in some only is left out and told. LayoutError if they are of different kinds or sizes, if one has no
    denoiser, or if more is left out than remains.
    """
    refuse_kinds(models)
    names = file_names([model.file.path for model in models])
    out, clashes, alone = Alignment(), [], []
    for table in models[0].architecture.components:
        having = [model for model in models if model.components.get(table.id)]
        if not having:
            continue
        without = (name for name, model in zip(names, models, strict=True) if model not in having)
        lacking = list(dict.fromkeys(without))  # a model may be the base too
        if lacking and table is models[0].architecture.components[0]:
            raise LayoutError(
                f"{lacking[0]} has no {table.title}.", "The others have one.", "Choose whole checkpoints."
            )
        if lacking:
            out.warnings.append(f"{table.id}: {_have(lacking)} none, so no LoRA carries it.")
            continue
        found, missing, foreign = _common(table.id, models, names, clashes)
        out.layers += found
        alone += missing + foreign
        out.warnings += _left_out(missing, foreign, names[0])
    if clashes:
        raise LayoutError(
            f"{len(clashes)} tensors have different shapes in these models.",
            f"{few(clashes)}.", _HINT,
        )  # fmt: skip
    if len(alone) > len(out.layers) or not out.layers:
        shown = few(sorted(alone))
        raise LayoutError(
            f"{few(names)} have too little in common.",
            f"{len(alone)} layers are in only some of them: {shown}." if alone else "There is no layer in them.", _HINT,
        )  # fmt: skip
    tensors = models[0].file.tensors
    whole = [tensors[layer.module.weight.name] for layer in out.layers if layer.module.weight is not None]
    order = sorted(range(len(whole)), key=lambda i: (whole[i].offset, whole[i].name))
    out.layers = [out.layers[i] for i in order]
    return out


def refuse_kinds(models: Sequence[Model]) -> None:
    """LayoutError unless all have the same layers."""
    first = models[0]
    for other in models[1:]:
        if first.is_kind_of(other):
            continue
        names = file_names([first.file.path, other.file.path])
        why = f"{names[0]} is {first.title}, {names[1]} is {other.title}."
        if first.architecture is other.architecture and "inpainting" in (first.variant, other.variant):
            inside, outside = names if first.variant == "inpainting" else reversed(names)
            raise LayoutError(
                f"{inside} is an in-painting model, {outside} is not.", f"{why} Their first layers differ in size.",
                "Merge in-painting models with each other, plain models with each other.",
            )  # fmt: skip
        raise LayoutError("The models are of different kinds.", why, _HINT)


def file_names(paths: Sequence[Path]) -> list[str]:
    """What messages call files: their names, or whole paths where two have one name."""

    def is_alone(path: Path) -> bool:
        return all(other == path for other in paths if other.name == path.name)

    return [path.name if is_alone(path) else str(path) for path in paths]


def few(names: Sequence[str]) -> str:
    """The first of a long list of names."""
    shown = [*names[:_FEW], *([f"{len(names) - _FEW} more"] if len(names) > _FEW else [])]
    return " and ".join(filter(None, (", ".join(shown[:-1]), *shown[-1:])))


def _common(
    component: str, models: Sequence[Model], names: list[str], clashes: list[str]
) -> tuple[list[Layer], list[str], list[str]]:
    """(layers that all have, what the first has and others lack, what others have and the first lacks)."""
    first, *others = (model.components[component] for model in models)
    layers, missing = [], []
    for path, module in first.items():
        if not all(path in modules for modules in others):
            missing.append(f"{component}.{path}")
            continue
        sizes = [_sizes(modules[path]) for modules in (first, *others)]
        odd = next((i for i, size in enumerate(sizes) if not _agree(size, sizes[0])), None)
        if odd is not None:
            clashes.append(
                f"{component}.{path} is {_shown(sizes[0])} in {names[0]} and {_shown(sizes[odd])} in {names[odd]}"
            )
        elif module.kind in LORA_KINDS and module.name is not None and module.weight is not None:
            layers.append(Layer(module))
    foreign = dict.fromkeys(f"{component}.{path}" for modules in others for path in modules if path not in first)
    return layers, missing, list(foreign)


def _sizes(module: Module) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    return (
        None if module.weight is None else module.weight.shape,
        None if module.bias is None else module.bias.shape,
    )


def _agree(a: tuple, b: tuple) -> bool:
    """A bias that only one of the two has is no contradiction."""
    return all(x == y or None in (x, y) for x, y in zip(a, b, strict=True))


def _shown(sizes: tuple) -> str:
    return " with a bias of ".join(str(list(size)) for size in sizes if size is not None)


def _have(names: list[str]) -> str:
    return f"{few(names)} {'has' if len(names) == 1 else 'have'}"


def _left_out(missing: list[str], foreign: list[str], first: str) -> list[str]:
    out = []
    if missing:
        out.append(f"{len(missing)} layers are not in all models ({few(missing)}): no LoRA "
                   "carries them; the hyper-model has the mean of the models that have them.")  # fmt: skip
    if foreign:
        out.append(f"{len(foreign)} layers are not in {first} ({few(foreign)}): left out.")
    return out

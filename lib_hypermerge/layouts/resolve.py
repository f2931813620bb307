"""Lay an adapter over a checkpoint: which module of the one changes which layer of the other.

A checkpoint's layer answers to every name it has in any dialect, so nothing needs to be known of the adapter's:
kohya's name, the checkpoint's own path, diffusers' path, each after the component or, where a file does not say the
component, alone. Text encoders' layers may be spelled by Hugging Face's names whatever the checkpoint uses.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

from ..errors import LayoutError
from .adapter_file import AdapterFile, Entry, Resolution, Target
from .dialects import cloneofsimo, diffusers
from .module import LORA_KINDS, Model, Module
from .reference import IDS, reference_model, reference_models

# components as names say them, besides their own id
_SPOKEN = {"te": ("te", "te1"), "te1": ("te1", "te"), "te3": ("te3", "te2")}


def addresses(model: Model) -> dict[str, Target]:
    """Every name that a module of an adapter may have (Entry.name) → what it changes in this model."""
    out: dict[str, Target] = {}
    for component, modules in model.components.items():
        spoken = (*(f"{name}_" for name in _SPOKEN.get(component, (component,))), "")
        for module in modules.values():
            for name, target in _names(model.architecture.id, module):
                for before in spoken:
                    out.setdefault(before + name, target)
    return out


def _names(architecture: str, module: Module) -> Iterable[tuple[str, Target]]:
    """(name without its component, target) of a layer."""
    if module.weight is None or not module.weight.shape:
        return
    whole = Target(module, 0, module.weight.shape[0])
    if module.name is not None:
        yield module.name.split("_", 2)[2], whole
    yield module.path.replace(".", "_"), whole
    for piece in diffusers.pieces(architecture, module):
        name, target = piece.path.replace(".", "_"), Target(module, piece.start, piece.stop, piece.swapped)
        yield name, target
        if name.endswith("_to_out_0"):
            yield name.removesuffix("_0"), target


def resolve(adapter: AdapterFile, model: Model) -> Resolution:
    """Lay one over the other. LayoutError if less than half of the adapter's modules have a layer here.

    Modules of a text encoder that this checkpoint does not bring along count as neither.
    """
    out = lay_over(adapter, model)
    counted = len(out.targets) + len(out.unmatched)
    if 2 * len(out.targets) < counted or not out.targets:
        raise _mismatch(adapter, model, out)
    return out


def lay_over(adapter: AdapterFile, model: Model) -> Resolution:
    """resolve() without its judgement."""
    names = addresses(model) | _numbered(adapter, model)
    out = Resolution()
    homeless: list[Entry] = []
    for entry in adapter.entries.values():
        target = names.get(entry.name)
        if target is None:
            homeless.append(entry)
        else:
            out.targets.append((entry, target))
    missing = {table.id for table in model.architecture.components} - model.components.keys()
    whole: dict[str, Target] = {}
    if homeless and missing:
        reference = reference_model(model.architecture.id)
        whole = addresses(reference) | _numbered(adapter, reference)
    for entry in homeless:
        target = whole.get(entry.name)
        if target is not None and target.module.component in missing:
            out.absent.setdefault(target.module.component, []).append(entry.key)
        else:
            out.unmatched.append(entry.key)
    return out


def _numbered(adapter: AdapterFile, model: Model) -> dict[str, Target]:
    """The names of a dialect that counts layers instead of naming them; see dialects/cloneofsimo.py."""
    out: dict[str, Target] = {}
    for component, counted in adapter.order.items():
        ours = "unet" if component == "unet" else next((c for c in ("te", "te1") if c in model.components), "")
        layers = {
            piece.path: Target(module, piece.start, piece.stop, piece.swapped)
            for module in model.components.get(ours, {}).values()
            if module.kind in LORA_KINDS
            for piece in diffusers.pieces(model.architecture.id, module)
        }
        possible = [
            {f"{component}:{i}": layers[path] for i, path in enumerate(order)}
            for order in cloneofsimo.orders(layers, counted)
        ]
        out |= max(possible, key=lambda names: _fitting(adapter, names))
    return out


def _fitting(adapter: AdapterFile, names: dict[str, Target]) -> int:
    return sum(_has_size_of(adapter.entries[key], target) for key, target in names.items() if key in adapter.entries)


def _has_size_of(entry: Entry, target: Target) -> bool:
    """Whether a module's outer sizes are those of the layer, as far as they are plain to see."""
    shapes, weight = entry.shapes, target.module.weight
    up, down = shapes.get("lora_up.weight"), shapes.get("lora_down.weight")
    if not up or not down or len(down) < 2 or weight is None or len(weight.shape) < 2:
        return False
    kernel = len(down) == len(weight.shape)
    return kernel and up[0] == target.stop - target.start and down[1] == weight.shape[1]


def identify(adapter: AdapterFile) -> tuple[str | None, float]:
    """(the architecture that an adapter was made for, None if it cannot be told; the share of its modules found there).

    By names first; where two architectures share them, by the sizes of a full-width model, by what the metadata says,
    and by what is a convolution in only one of them.
    """
    model, share = nearest(adapter)
    return None if model is None else model.architecture.id, share


@functools.cache
def _references(architecture: str) -> tuple[tuple[Model, dict[str, Target]], ...]:
    return tuple((model, addresses(model)) for model in reference_models(architecture))


def nearest(adapter: AdapterFile) -> tuple[Model | None, float]:
    """identify(), with the member of the architecture that fits best: a model without numbers."""
    best, best_score, said = None, (0, 0, False, 0), said_architecture(adapter.metadata)
    for architecture in IDS:
        for model, own in _references(architecture):
            names = own | _numbered(adapter, model) if adapter.order else own
            found = [(entry, names[entry.name]) for entry in adapter.entries.values() if entry.name in names]
            fitting, axes = (sum(test(*pair) for pair in found) for test in (_has_size_of, _same_axes))
            score = (len(found), fitting, architecture == said, axes)
            if score > best_score:
                best, best_score = model, score
    share = best_score[0] / max(1, len(adapter.entries))
    return (best if 2 * share >= 1 else None), share


def _same_axes(entry: Entry, target: Target) -> bool:
    down, weight = entry.shapes.get("lora_down.weight"), target.module.weight
    return down is not None and weight is not None and len(down) == len(weight.shape)


def said_architecture(metadata: dict[str, str]) -> str | None:
    """The architecture that a file's metadata names."""
    said = metadata.get("ss_base_model_version", "") + " " + metadata.get("modelspec.architecture", "")
    if metadata.get("ss_v2") == "True" or "sd_v2" in said or "stable-diffusion-v2" in said:
        return "sd2"
    marks = {"sdxl": "sdxl", "stable-diffusion-xl": "sdxl", "flux": "flux", "sd3": "sd3", "stable-diffusion-3": "sd3",
             "sd_v1": "sd1", "stable-diffusion-v1": "sd1"}  # fmt: skip
    return next((architecture for mark, architecture in marks.items() if mark in said.lower()), None)


def _mismatch(adapter: AdapterFile, model: Model, found: Resolution) -> LayoutError:
    name, keys = adapter.file.path.name, found.unmatched or [key for keys in found.absent.values() for key in keys]
    architecture, _ = identify(adapter)
    if architecture is not None and architecture != model.architecture.id:
        why = f"It is a LoRA for {reference_model(architecture).architecture.title}."
        hint = "Choose a checkpoint of that kind, or another LoRA."
    elif found.absent and not found.unmatched:
        why = f"It changes only {' and '.join(sorted(found.absent))}, which this checkpoint does not bring along."
        hint = "Choose a checkpoint with its text encoders."
    else:
        why = f"Nothing in it is called {', '.join(keys[:3])}."
        hint = "Choose the kind of checkpoint that the LoRA was trained on."
    return LayoutError(
        f"{len(keys)} of {len(adapter.entries)} modules of {name} have no layer in {model.file.path.name}, "
        f"a {model.title} checkpoint.", why, hint,
    )  # fmt: skip

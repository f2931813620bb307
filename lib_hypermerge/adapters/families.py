"""All families. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ..errors import FormatError
from .adapter import Adapter, Shapes
from .lora import Lora

FAMILIES: tuple[type[Adapter], ...] = (Lora,)

ALPHA = "alpha"


def find(parts: Collection[str]) -> type[Adapter] | None:
    """The family of a module with these part names."""
    return next((family for family in FAMILIES if family.matches(parts)), None)


def family_of(shapes: Shapes) -> type[Adapter]:
    """The family of a module, complete and consistent. FormatError says what is wrong otherwise."""
    family = find(shapes)
    if family is None:
        raise FormatError(f"No family of adapters has the parts {', '.join(sorted(shapes))}.")
    family.check(shapes)
    return family


def build(tensors: Mapping[str, torch.Tensor], alpha: float | None = None) -> Adapter:
    """The adapter of a module from its tensors by part name.

    alpha: from a configuration beside the file; a tensor `alpha` among the tensors goes before it.
    """
    tensors = dict(tensors)
    own = tensors.pop(ALPHA, None)
    family = family_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return family(tensors, float(own) if own is not None else alpha)

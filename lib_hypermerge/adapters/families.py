"""All families. A new one is one file and one row here."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import FormatError
from ..lazy import torch
from . import dora
from .adapter import BIAS, Adapter, Shapes
from .full import Full
from .glora import Glora
from .ia3 import Ia3
from .loha import Loha
from .lokr import Lokr
from .lora import Lora
from .lora_sparse import SparseLora
from .norm import Norm
from .oft import Oft
from .svdiff import Svdiff

# The first that matches: SparseLora before what it extends, Full last because a bias may stand beside any.
FAMILIES: tuple[type[Adapter], ...] = (SparseLora, Lora, Loha, Lokr, Oft, Glora, Ia3, Norm, Svdiff, Full)

ALPHA, SCALE = "alpha", "scale"


def find(parts: Collection[str]) -> type[Adapter] | None:
    """The family of a module with these part names; with DoRA's magnitudes among them, DoRA on that family."""
    within = dora.without_magnitudes(parts)
    family = next((family for family in FAMILIES if family.matches(within)), None)
    return dora.over(family) if family is not None and len(within) < len(parts) else family


def family_of(shapes: Shapes) -> type[Adapter]:
    """The family of a module, complete and consistent. FormatError says what is wrong otherwise.

    The single numbers alpha and scale may be among the shapes or not.
    """
    family = find(shapes)
    if family is None:
        raise FormatError(f"No family of adapters has the parts {', '.join(sorted(shapes))}.")
    strange = sorted(shapes.keys() - family.parts - {ALPHA, SCALE, BIAS})
    if strange:
        raise FormatError(
            f"A module ({family.title}) has parts of another family: {', '.join(strange)}.",
            "What the two mean together is defined nowhere.",
        )
    family.check(shapes)
    return family


def build(tensors: Mapping[str, torch.Tensor], alpha: float | None = None) -> Adapter:
    """The adapter of a module from its tensors by part name.

    alpha: from a configuration beside the file; a tensor `alpha` among the tensors goes before it, and a tensor
    `scale` before alpha / rank.
    """
    tensors = dict(tensors)
    own, scale = tensors.pop(ALPHA, None), tensors.pop(SCALE, None)
    family = family_of({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    return family(tensors, alpha if own is None else own.item(), None if scale is None else scale.item())

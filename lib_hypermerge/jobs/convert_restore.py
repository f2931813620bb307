"""Notes in a file's metadata of what its dialect cannot say, so that the way back gives the very bits.

diffusers files have no alphas: the scale alpha/r is multiplied into up, and all modules of a component have one rank.
PEFT has alphas, but not their number formats. What a module was in kohya's spelling is noted under `restore` in the
recipe, by the module's name in diffusers; modules of the same kind share one entry.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field
from typing import Any

import torch

from ..adapters.dora import MAGNITUDES, SCALE
from ..adapters.lora import DOWN, UP
from ..algebra import folding
from ..files.dtypes import FLOATS, name_of, torch_dtype

ALPHA = "alpha"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Kind:
    """A LoRA module as kohya files hold it. alpha: None where there was none, with its number format and axes.

    up, down, magnitudes: number formats, the last "" where there are none.  up_axes, down_axes: 2, or 4 as for
    convolutions.
    """

    rank: int
    alpha: float | None
    alpha_dtype: str
    alpha_axes: int
    up: str
    down: str
    up_axes: int
    down_axes: int
    magnitudes: str = ""

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank


def kind_of(tensors: Tensors) -> Kind:
    """What there is to note of a module's tensors."""
    up, down, alpha = tensors[UP], tensors[DOWN], tensors.get(ALPHA)
    own = (None, "", 0) if alpha is None else (float(alpha.item()), name_of(alpha.dtype), alpha.dim())
    magnitudes = name_of(tensors[SCALE].dtype) if SCALE in tensors else ""
    return Kind(len(down), *own, name_of(up.dtype), name_of(down.dtype), up.dim(), down.dim(), magnitudes)


@dataclass
class Notes:
    """kinds: by the module's name in diffusers.  names: the key in kohya's spelling where that was not the usual."""

    kinds: dict[str, Kind] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The most frequent kind stands first and goes without a list of its modules."""
        order = [kind for kind, _ in Counter(self.kinds.values()).most_common()]
        others = {str(i): [n for n, k in self.kinds.items() if k == kind] for i, kind in enumerate(order) if i}
        return {"kinds": [list(astuple(kind)) for kind in order], "others": others, "names": self.names}


def read(recipe: Mapping[str, Any], names: list[str]) -> Notes:
    """The notes in a recipe for modules of these names; empty where there are none, or none that make sense."""
    table = recipe.get("restore")
    try:
        assert isinstance(table, dict)
        kinds = [Kind(*values) for values in table["kinds"]]
        if not all(map(_is_sound, kinds)):
            return Notes()
        place = {name: int(i) for i, own in table["others"].items() for name in own}
        spelled = {str(name): str(key) for name, key in table["names"].items() if re.fullmatch(r"\w+", str(key))}
        return Notes({name: kinds[place.get(name, 0)] for name in names}, spelled) if kinds else Notes()
    except (AssertionError, KeyError, IndexError, TypeError, ValueError, AttributeError):  # somebody else's
        return Notes()


def _is_sound(kind: Kind) -> bool:
    """Whether a note that came out of a file can be what kind_of() made."""
    types = [(int,), (int, float, type(None)), (str,), (int,), (str,), (str,), (int,), (int,), (str,)]
    if not all(isinstance(value, t) for value, t in zip(astuple(kind), types, strict=True)):
        return False
    formats = {kind.up, kind.down} | {kind.alpha_dtype} - {""} | {kind.magnitudes} - {""}
    alpha = kind.alpha is None or (math.isfinite(kind.alpha) and kind.alpha_dtype != "")
    axes = {kind.up_axes, kind.down_axes} <= {2, 3, 4} and 0 <= kind.alpha_axes <= 4
    return kind.rank > 0 and alpha and axes and formats <= FLOATS


def restored(tensors: Tensors, kind: Kind | None, alpha: float | None) -> Tensors:
    """A module's tensors as they once were; as they are where they are not what the note is about.

    alpha: what the file says beside the tensors, None for a scale of 1.
    """
    if kind is None or UP not in tensors or DOWN not in tensors or ALPHA in tensors:
        return tensors
    up, down = tensors[UP], tensors[DOWN]
    padded = len(down)
    if kind.rank > padded or up[:, kind.rank :].any() or down[kind.rank :].any():
        return tensors
    up, down = up[:, : kind.rank], down[: kind.rank]
    factor = kind.scale / (1.0 if alpha is None else alpha / padded) if alpha != 0 else 1.0
    if factor == 0:
        return tensors
    old_up, old_down = folding.unfold(up, factor, torch_dtype(kind.up)), down.to(torch_dtype(kind.down))
    again = folding.fold(old_up, factor, up.dtype)
    slack = 4 * torch.finfo(up.dtype).eps * up.abs().float() if kind.up == name_of(up.dtype) else 0
    if bool(((again.float() - up.float()).abs() > slack).any()) or not torch.equal(old_down.to(down.dtype), down):
        return tensors  # it was changed since
    out = dict(tensors)
    out[UP], out[DOWN] = _with_axes(old_up, kind.up_axes), _with_axes(old_down, kind.down_axes)
    for name in MAGNITUDES:
        if kind.magnitudes and name in out:
            narrow = out[name].to(torch_dtype(kind.magnitudes))
            out[name] = narrow if torch.equal(narrow.to(out[name].dtype), out[name]) else out[name]
    if kind.alpha is not None:
        made = torch.tensor(kind.alpha, dtype=torch_dtype(kind.alpha_dtype))
        out[ALPHA] = made.reshape([1] * kind.alpha_axes)
    return out


def _with_axes(X: torch.Tensor, axes: int) -> torch.Tensor:
    """Axes of size 1 at the end put on or taken off; another number of axes means one flattened."""
    while X.dim() < axes:
        X = X[..., None]
    return X if X.dim() == axes else X.reshape(*X.shape[: axes - 1], -1)

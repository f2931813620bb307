"""What AUTOMATIC1111 1.10 makes of an adapter file, told from names and shapes (extensions-builtin/Lora).

A tensor's name up to the first dot is a module, the rest a part. Modules whose layer is not found are passed over
without a word; one that is found but not understood keeps the whole file from being loaded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from .inspect_a1111_names import ATTENTION, CONTAINER, CONV, DEAF, LINEAR, Finder, Shape, Shapes, layers_of

TITLE = "AUTOMATIC1111 1.10"
KNOWN = ("sd1", "sd2", "sdxl", "sd3")

# why tensors whose names it does not know are left out
_BUNDLED, _DOTTED, _NAMELESS = "an embedding, loaded as such", "dotted names are never found", "no layer of that name"
UNNAMED = frozenset((_BUNDLED, _DOTTED, _NAMELESS))

_COMMON = frozenset(("alpha", "scale", "bias", "dora_scale"))


@dataclass(frozen=True)
class _Family:
    """What the host asks of a module's parts, in the order in which it asks; parts: all that it reads."""

    name: str
    needs: tuple[frozenset[str], ...]  # any of these sets
    parts: frozenset[str]

    def takes(self, parts: frozenset[str]) -> bool:
        return any(need <= parts for need in self.needs)


def _family(name: str, *needs: str, more: str = "") -> _Family:
    sets = tuple(frozenset(need.split()) for need in needs)
    return _Family(name, sets, frozenset().union(*sets, more.split()))


_FAMILIES = (
    _family("LoRA", "lora_up.weight lora_down.weight", more="lora_mid.weight"),
    _family("LoRA", "lora_A.weight lora_B.weight"),
    _family("LoHa", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", more="hada_t1 hada_t2"),
    _family("IA3", "weight", more="on_input"),
    _family("LoKr", *(f"{one} {two}" for one in ("lokr_w1", "lokr_w1_a lokr_w1_b")
                      for two in ("lokr_w2", "lokr_w2_a lokr_w2_b")), more="lokr_t2"),
    _family("full", "diff", more="diff_b"),
    _family("norm", "w_norm b_norm"),
    _family("GLoRA", "a1.weight a2.weight alpha b1.weight b2.weight"),
    _family("OFT", "oft_blocks", "oft_diag", more="rescale"),
)  # fmt: skip


@dataclass
class Reach:
    """applied: names of tensors that take effect.  ignored: tensor → why not.  refused: why nothing is loaded."""

    applied: list[str] = field(default_factory=list)
    modules: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    refused: str = ""


def reach(
    tensors: Shapes, checkpoint: Shapes, architecture: str, misfits: Collection[str] = (),
    damage: Mapping[str, str] | None = None,
) -> Reach:  # fmt: skip
    """Which tensors of an adapter file take effect on a checkpoint. tensors, checkpoint: by the files' own names.

    misfits: tensors of modules that have not the size of their layer.  damage: tensors of damaged modules → how.
    """
    if architecture not in KNOWN:
        return Reach(refused="It does not know this architecture.")
    layers = layers_of(checkpoint)
    finder = Finder(layers, architecture)
    result = Reach()
    groups: dict[str, dict[str, str]] = {}  # the host's key → part → tensor
    for tensor in tensors:
        split = _split(tensor, architecture)
        if split is None:
            result.refused = f"The name {tensor} has too few dots: on SD3 it takes the last two for the part."
            return result
        module, part = split
        key = finder.find(module)
        if key is None:
            result.ignored[tensor] = _why_unmatched(module, tensor)
        else:
            groups.setdefault(key, {})[part] = tensor
    for key, parts in groups.items():
        result.refused = _refusal(parts, finder.layer(key))
        if result.refused:
            return result
    unfit = dict.fromkeys(misfits, "a size that is not the layer's") | dict(damage or {})
    _apply(groups, finder, tensors, unfit, result)
    return result


def _why_unmatched(module: str, tensor: str) -> str:
    if module == "bundle_emb":
        return _BUNDLED
    return _DOTTED if tensor.count(".") > 2 else _NAMELESS


def _split(tensor: str, architecture: str) -> tuple[str, str] | None:
    if architecture != "sd3":
        module, _, part = tensor.partition(".")
        return module, part
    parts = tensor.rsplit(".", 2)
    return (parts[0], ".".join(parts[1:])) if len(parts) == 3 else None


def _refusal(parts: dict[str, str], layer: str) -> str:
    """Why the host gives up on the whole file at this module; "" if it does not."""
    names, first = frozenset(parts), next(iter(parts.values()))
    if layer == CONTAINER:
        return f"{first} names a group of layers, on which it stumbles."
    family = next((family for family in _FAMILIES if family.takes(names)), None)
    if family is None:
        return f"It knows no family with only the parts {', '.join(sorted(names))} ({first})."
    if family.name == "LoRA" and layer not in (LINEAR, CONV, ATTENTION):
        return f"{first}: its layer is a {layer}, which it cannot apply a LoRA to."
    if family.name == "OFT" and layer not in (LINEAR, CONV, ATTENTION):
        return f"{first}: its layer is a {layer}, which it cannot apply OFT to."
    if family.name == "IA3" and "on_input" not in names:
        return f"{first}: IA3 without on_input."
    return ""


def _apply(
    groups: dict[str, dict[str, str]], finder: Finder, tensors: Shapes, unfit: Mapping[str, str], result: Reach
) -> None:
    for key, parts in groups.items():
        layer = finder.layer(key)
        why = finder.all_or_none(key, groups)
        if layer == DEAF:
            why = "norms of open_clip are never changed"
        elif finder.is_wide_input(key, parts, tensors):
            why = "it pads every LoRA of an in-painting model's first layer by five channels"
        elif any(tensor in unfit for tensor in parts.values()):
            why = next(unfit[tensor] for tensor in parts.values() if tensor in unfit)
        family = next(family for family in _FAMILIES if family.takes(frozenset(parts)))
        why = why or _unfit(family.name, layer, {part: tensors[tensor] for part, tensor in parts.items()})
        if not why:
            result.modules += 1
        for part, tensor in parts.items():
            if why:
                result.ignored[tensor] = why
            elif part in family.parts | _COMMON:
                result.applied.append(tensor)
            else:
                result.ignored[tensor] = f"not read beside {family.name}"


def _unfit(family: str, layer: str, shapes: dict[str, Shape]) -> str:
    """Why a module that was loaded fails when it is applied; "" if it does not."""
    if family == "OFT" and layer == ATTENTION:
        return "OFT of a fused attention"
    if family == "IA3" and layer == CONV and len(shapes["weight"]) < 4:
        return "IA3 of a convolution"
    if family == "GLoRA" and layer == CONV:
        return "GLoRA of a convolution"
    if family == "GLoRA" and shapes["a2.weight"][0] < shapes["a2.weight"][-1]:
        return "GLoRA as LyCORIS 3 and later write it"
    return ""

"""Lay a tuned checkpoint beside its base: which layers correspond, which are missing, which do not fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..errors import LayoutError
from ..files.source import TensorInfo
from ..layouts.module import LORA_KINDS, NORM, Model, Module


@dataclass(frozen=True)
class Pair:
    """The same layer in both files."""

    tuned: Module
    base: Module

    @property
    def key(self) -> str:
        return f"{self.tuned.component}.{self.tuned.path}"


@dataclass(frozen=True)
class Rest:
    """A tensor that no LoRA module carries by itself: a norm, bias, embedding or other parameter."""

    label: str
    component: str
    owner: Module
    what: str  # "norm", "bias", "other"
    tuned: TensorInfo
    base: TensorInfo


@dataclass
class Pairing:
    """layers: what LoRA modules can carry; rest: what they cannot; only_in: names found in one file alone."""

    layers: list[Pair] = field(default_factory=list)
    rest: list[Rest] = field(default_factory=list)
    only_in: dict[str, list[str]] = field(default_factory=lambda: {"base": [], "tuned": []})
    vae: list[tuple[TensorInfo, TensorInfo]] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)  # components that one file lacks


def pair(base: Model, tuned: Model, components: Iterable[str]) -> Pairing:
    """Match two models. LayoutError if they are of different architectures or shapes."""
    if not base.is_kind_of(tuned):
        raise LayoutError(
            "Base and fine-tune are of different kinds.",
            f"{base.file.path.name} is {base.title}, {tuned.file.path.name} is {tuned.title}.",
            "Choose the base that the fine-tune was trained from.",
        )
    out, clashes = Pairing(), []
    for component in components:
        mine, theirs = tuned.components.get(component), base.components.get(component)
        if not mine or not theirs:
            out.absent.append(component)
            continue
        out.only_in["tuned"] += [f"{component}.{p}" for p in mine if p not in theirs]
        out.only_in["base"] += [f"{component}.{p}" for p in theirs if p not in mine]
        for path, module in mine.items():
            if path in theirs:
                clashes += _add(out, Pair(module, theirs[path]))
    if clashes:
        shown = "; ".join(clashes[:3]) + (f"; and {len(clashes) - 3} more" if len(clashes) > 3 else "")
        raise LayoutError(
            f"{len(clashes)} tensors have different shapes in base and fine-tune.",
            f"{shown}.",
            "Choose the base that the fine-tune was trained from.",
        )
    _check_overlap(out)
    out.vae = [
        (info, base.vae[k]) for k, info in tuned.vae.items() if k in base.vae and base.vae[k].shape == info.shape
    ]
    return out


def _add(out: Pairing, pair: Pair) -> list[str]:
    tuned, base = pair.tuned, pair.base
    if tuned.weight is None or base.weight is None:
        return []
    if tuned.weight.shape != base.weight.shape:
        return [f"{pair.key} is {list(base.weight.shape)} in the base and {list(tuned.weight.shape)} in the fine-tune"]
    if tuned.kind in LORA_KINDS and tuned.name is not None:
        out.layers.append(pair)
    else:
        what = "norm" if tuned.kind == NORM else "other"
        out.rest.append(Rest(pair.key, tuned.component, tuned, what, tuned.weight, base.weight))
    if (tuned.bias is None) != (base.bias is None):
        out.only_in["base" if tuned.bias is None else "tuned"].append(f"{pair.key}.bias")
    elif tuned.bias is not None and base.bias is not None:
        if tuned.bias.shape != base.bias.shape:
            return [f"the bias of {pair.key} has another shape"]
        what = "norm" if tuned.kind == NORM else "bias"
        out.rest.append(Rest(f"{pair.key}.bias", tuned.component, tuned, what, tuned.bias, base.bias))
    return []


def _check_overlap(out: Pairing) -> None:
    alone = len(out.only_in["tuned"]) + len(out.only_in["base"])
    if not out.layers:
        raise LayoutError(
            "Base and fine-tune have none of the chosen components in common.",
            f"Missing: {', '.join(out.absent)}." if out.absent else "",
            "Choose other components, or complete checkpoints.",
        )
    if alone > len(out.layers):
        names = ", ".join((out.only_in["tuned"] + out.only_in["base"])[:3])
        raise LayoutError(
            "Base and fine-tune have too little in common.",
            f"{alone} layers are in only one of them, such as {names}.",
            "Choose the base that the fine-tune was trained from.",
        )

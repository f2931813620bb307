"""The layers that several LoRAs change, as one file names them: which module of which LoRA changes which rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ...adapters.adapter import BIAS, Adapter, Shape, flat
from ...adapters.lora import MID, UP_BIAS
from ...adapters.norm import SHIFT, WEIGHT
from ...errors import LayoutError, SpecError
from ...layouts.adapter_file import Entry, Target
from ...layouts.module import LORA_KINDS, NORM, Model, Module
from ...layouts.reference import reference_model
from .. import block_weights
from ..adapter_alone import told_shape
from ..adapter_inputs import LoraInput, load
from .names import Wanted, told_apart

BIAS_PARTS = frozenset((BIAS, SHIFT, UP_BIAS))


@dataclass(frozen=True)
class Part:
    """A module of a LoRA. index: the LoRA's, in the order of the request.  strength: its weight in this layer.

    shape: of the weight that it changes, as far as its file or the checkpoint tells.  dyn: see Wanted.
    """

    index: int
    lora: LoraInput
    entry: Entry
    target: Target
    strength: float
    shape: Shape
    dyn: int | None = None

    @property
    def family(self) -> type[Adapter]:
        return self.lora.families[self.entry.key]

    @property
    def changes_weight(self) -> bool:
        return bool(self.entry.shapes.keys() - BIAS_PARTS)

    @property
    def changes_bias(self) -> bool:
        return bool(self.entry.parts.keys() & BIAS_PARTS)

    @property
    def rank(self) -> int | None:
        """The rank of its factors, which are exact; None where it has none, by sizes alone."""
        if self.family.needs_weight or not self.changes_weight or len(self.shape) < 2:
            return None
        tensors = {part: torch.empty(shape, device="meta") for part, shape in self.entry.shapes.items()}
        low = self.family(tensors, 1.0).low_rank()
        if low is None:
            return None
        return min(low.rank, self.dyn or low.rank) if self.is_cut else low.rank

    @property
    def is_cut(self) -> bool:
        """Whether A1111 cuts it by dyn, which it does to a plain LoRA's factors without a third between."""
        return self.dyn is not None and self.family.family == "lora" and MID not in self.entry.parts

    def load(self) -> Adapter:
        """Read it; of a layer that the checkpoint has widened it changes the channels that it knows."""
        return load(self.lora.file, self.entry) if self.target.channels is not None else self.lora.load(self.entry)


@dataclass
class Layer:
    """A layer of the result. name: its module's, in kohya's spelling.  parts: in the order of the LoRAs, then of rows.

    shape: of the whole weight that all parts together change.
    """

    name: str
    module: Module
    shape: Shape = ()
    parts: list[Part] = field(default_factory=list)

    @property
    def is_norm(self) -> bool:
        return self.module.kind == NORM

    @property
    def changes_weight(self) -> bool:
        return any(part.changes_weight for part in self.parts)

    @property
    def changes_bias(self) -> bool:
        return any(part.changes_bias for part in self.parts)

    @property
    def needs_weight(self) -> bool:
        return any(part.family.needs_weight for part in self.parts)

    @property
    def size(self) -> tuple[int, int]:
        """(n, k)."""
        return flat(self.shape)

    @property
    def has_factors(self) -> bool:
        """Whether all changes of its weight are products of factors, so that their sum is one."""
        return all(part.rank is not None for part in self.parts if part.changes_weight)

    @property
    def rank(self) -> int:
        """Of all LoRAs side by side, no more than the layer has; those without factors count in full."""
        most = min(self.size)
        return min(most, sum(part.rank or most for part in self.parts if part.changes_weight))

    def rows(self, part: Part) -> slice:
        """The rows of the whole weight that a part changes; narrow models have other widths than the names' own."""
        assert self.module.weight is not None
        whole, n = self.module.weight.shape[0], self.shape[0]
        return slice(part.target.start * n // whole, part.target.stop * n // whole)


@dataclass
class Found:
    """layers: in the model's order.  left_out: modules that the result lacks, by reason."""

    layers: list[Layer]
    left_out: Counter[str]


def find(
    wanted: Sequence[Wanted], loras: Sequence[LoraInput], model: Model, has_weights: bool, first_is_special: bool
) -> Found:
    """Group the modules of all LoRAs by layer. first_is_special: see Method.

    Raises SpecError for block weights or dyn that cannot be, LayoutError for LoRAs of models of different widths.
    """
    layers: dict[tuple[str, str], Layer] = {}
    left_out: Counter[str] = Counter()
    for index, (want, lora) in enumerate(zip(wanted, loras, strict=True)):
        blocks = block_weights.parse(want.item.blocks, model.architecture.id)
        for entry, target in lora.resolution.targets:
            module = target.module
            strength = strength_of(want, blocks, module)
            if first_is_special and index:  # weights are of no account, but where block weights are 0 it stays out
                strength = float(blocks.of(module.component, module.block) != 0)
            name = _name(module, target, model)
            if strength == 0 or entry.key in lora.idle:
                left_out["weight 0" if strength == 0 else "alpha 0"] += 1
            elif name is None:
                left_out["no name in a LoRA file"] += 1
            else:
                part = Part(index, lora, entry, target, strength, _shape(lora, entry, target, has_weights), want.dyn)
                _check_dyn(part)
                layers.setdefault((module.component, module.path), Layer(name, module)).parts.append(part)
    for layer in layers.values():
        layer.parts.sort(key=lambda part: (part.index, part.target.start))
        layer.shape = _whole_shape(layer)
    return Found(list(_in_order(layers, model)), left_out)


def strength_of(want: Wanted, blocks: block_weights.BlockWeights, module: Module) -> float:
    """A LoRA's weight in a layer."""
    item = want.item
    weight = item.weight if module.component == "unet" or item.te_weight is None else item.te_weight
    return weight * blocks.of(module.component, module.block)


def _name(module: Module, target: Target, model: Model) -> str | None:
    """In kohya's spelling. A first layer that the checkpoint has widened goes by its name in the plain model."""
    if module.kind not in LORA_KINDS and module.kind != NORM:
        return None
    if module.name is None and target.channels is not None:
        plain = reference_model(model.architecture.id).components[module.component].get(module.path)
        return None if plain is None else plain.name
    return module.name


def _shape(lora: LoraInput, entry: Entry, target: Target, has_weights: bool) -> Shape:
    wanted, shapes = target.shape, entry.shapes
    if has_weights or lora.families[entry.key].fits(shapes, wanted):
        return wanted
    told = told_shape(shapes, len(wanted))
    if told is None:  # a norm, or a bias alone
        vector = next((shapes[part] for part in (WEIGHT, BIAS) if part in shapes), None)
        return wanted if vector is None else (flat(vector)[0], *wanted[1:])
    return told


def _check_dyn(part: Part) -> None:
    if part.dyn is not None and "dora" in part.family.family:
        raise SpecError(
            f"{part.lora.path.name} is a DoRA, of which dyn={part.dyn} cannot be taken here.",
            f"One of its modules is {part.entry.key}.", "Resize it first, and leave dyn out.",
        )  # fmt: skip


def _whole_shape(layer: Layer) -> Shape:
    """Of the weight that all parts change. LayoutError if they do not agree."""
    weight = layer.module.weight
    assert weight is not None
    whole = weight.shape[0]
    found: dict[tuple[int, int], Part] = {}
    for part in layer.parts:
        rows = part.target.stop - part.target.start
        n, k = flat(part.shape)
        k = k if part.changes_weight and len(part.shape) > 1 else 0
        found.setdefault((n * whole // rows, k), part)
    sizes = {size for size in found if size[1]} or set(found)
    if len(sizes) > 1:
        (size, part), (other, another) = list(found.items())[:2]
        first, second = told_apart([part.lora.path, another.lora.path])
        raise LayoutError(
            f"{first} and {second} are for models of different widths.",
            f"{part.entry.key} is for a weight of {list(size)}, {another.entry.key} for one of {list(other)}.",
            "Combine LoRAs of one kind of model.",
        )  # fmt: skip
    n, k = sizes.pop()
    if len(weight.shape) < 2:
        return (n,)
    kernel = weight.shape[2:]
    around = 1
    for side in kernel:
        around *= side
    return (n, k // around, *kernel) if k and k % around == 0 else (n, *weight.shape[1:])


def _in_order(layers: dict[tuple[str, str], Layer], model: Model) -> Iterator[Layer]:
    """In the model's; A1111 applies q, k, v and out of a fused attention all or none, so that none may be missing."""
    fused = {(component, layer.module.fused): layer for (component, _), layer in layers.items() if layer.module.fused}
    for component, modules in model.components.items():
        for path, module in modules.items():
            if (component, path) in layers:
                yield layers[component, path]
            elif module.fused and (component, module.fused) in fused and module.name is not None:
                like = fused[component, module.fused]
                yield Layer(module.name, module, like.shape)

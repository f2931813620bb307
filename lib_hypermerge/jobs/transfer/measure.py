"""What a transfer measured: similarity by component, block and layer, and what arrived of each LoRA."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

from .layers import COPIED, MAPPED, PROJECTED, Carried, Moved
from .plan import key_of

WRITTEN = (COPIED, PROJECTED, MAPPED)


@dataclass
class Sums:
    """Squared norms. whole: of all that the LoRA changes.  energy, kept, error2, apart: of what was carried over."""

    whole: float = 0.0
    energy: float = 0.0
    kept: float = 0.0
    error2: float = 0.0
    apart: float = 0.0
    comparable: float = 0.0  # the energy of layers of which `apart` is known

    def add(self, moved: Moved) -> None:
        self.whole += moved.energy
        if moved.action in WRITTEN:
            self.energy += moved.energy
            self.kept += max(moved.kept - moved.error2, 0.0)
            self.error2 += moved.error2
        if moved.action in WRITTEN and moved.apart is not None:
            self.apart += moved.apart
            self.comparable += moved.energy

    @property
    def relative_error(self) -> float | None:
        """What rank and rounding took, relative to the change that was carried over: √(Σ error²/Σ ‖ΔW_s‖²)."""
        return root(ratio(self.error2, self.energy))

    def to_json(self) -> dict[str, float | None]:
        """retained: ‖ΔW_t‖²/‖ΔW_s‖² of the layers that were carried over.  arrived: the same of all that the LoRA
        changes.  apart: ‖ΔW_t − ΔW_s‖/‖ΔW_s‖, how far it is from a copy, where sizes agree."""
        return {
            "retained": ratio(self.kept, self.energy),
            "arrived": ratio(self.kept, self.whole),
            "apart": root(ratio(self.apart, self.comparable)),
        }


@dataclass
class OfLora:
    """One LoRA's."""

    actions: Counter[str] = field(default_factory=Counter)
    total: Sums = field(default_factory=Sums)
    components: dict[str, Sums] = field(default_factory=lambda: defaultdict(Sums))
    blocks: dict[tuple[str, str], Sums] = field(default_factory=lambda: defaultdict(Sums))
    lost_biases: int = 0
    zeros: int = 0  # modules that change nothing in the source
    became_plain: Counter[str] = field(default_factory=Counter)  # by what they were
    largest_rank: int = 0  # of those

    def add(self, component: str, block: str, moved: Moved) -> None:
        self.actions[moved.action] += 1
        self.lost_biases += moved.lost_bias
        self.zeros += moved.is_zero
        if moved.was is not None:
            self.became_plain[moved.was] += 1
            self.largest_rank = max(self.largest_rank, moved.rank)
        for sums in (self.total, self.components[component], self.blocks[component, block]):
            sums.add(moved)

    def lose(self, component: str, moved: Moved) -> None:
        """A change that has no layer in the target."""
        self.actions[moved.action] += 1
        self.zeros += moved.is_zero
        for sums in (self.total, self.components[component]):
            sums.add(moved)

    @property
    def is_zero(self) -> bool:
        """Whether nothing of it changes anything."""
        return self.zeros == sum(self.actions.values())

    @property
    def modules(self) -> int:
        return sum(self.actions[action] for action in WRITTEN)


class Measures:
    """loras: by number."""

    def __init__(self, count: int):
        self.loras = [OfLora() for _ in range(count)]
        self._layers: list[dict[str, Any]] = []
        self._actions: list[dict[int, str]] = []  # for each of these, by the LoRA's number

    def drop(self, number: int) -> None:
        """Forget a LoRA that failed, and the layers that no other changes."""
        self.loras[number] = OfLora()
        for actions in self._actions:
            actions.pop(number, None)
        kept = [bool(actions) for actions in self._actions]
        self._layers = list(compress(self._layers, kept))
        self._actions = list(compress(self._actions, kept))

    def add(self, carried: Carried, dropped: Container[int] = ()) -> None:
        """Take note of a layer, of all LoRAs but those that were dropped."""
        partner = carried.task.partner
        target = partner.target
        own = {i: moved for i, moved in carried.moved.items() if i not in dropped}
        for i, moved in own.items():
            self.loras[i].add(target.component, target.block, moved)
        if not own or target.weight is None or len(target.weight.shape) < 2:
            return
        self._actions.append({i: moved.action for i, moved in own.items()})
        self._layers.append({
            "layer": key_of(target), "block": target.block, "component": target.component,
            "source": key_of(partner.source), "paired_by": partner.how,
            "similarity": None if carried.similarity is None else round(carried.similarity, 4),
            "equal": carried.equal,
        })  # fmt: skip

    @property
    def layers(self) -> list[dict[str, Any]]:
        """What there is to tell of each; action: what was done, of several LoRAs the first of WRITTEN."""
        return [layer | {"action": _first(set(own.values()))}
                for layer, own in zip(self._layers, self._actions, strict=True)]  # fmt: skip

    @property
    def known(self) -> list[float]:
        """All similarities that are known."""
        return [layer["similarity"] for layer in self._layers if layer["similarity"] is not None]

    @property
    def similarity(self) -> float | None:
        """Their mean."""
        return math.fsum(self.known) / len(self.known) if self.known else None

    def components(self) -> dict[str, Any]:
        """component → its similarity and layers, and the same per block."""
        out: dict[str, Any] = {}
        for component in dict.fromkeys(layer["component"] for layer in self._layers):
            own = [layer for layer in self._layers if layer["component"] == component]
            blocks = sorted({layer["block"] for layer in own})
            out[component] = _of(own) | {
                "blocks": {block: _of([layer for layer in own if layer["block"] == block]) for block in blocks}
            }
        return out

    def of_lora(self, number: int) -> dict[str, Any]:
        """What arrived of one LoRA."""
        lora = self.loras[number]
        written = {action: lora.actions[action] for action in WRITTEN if lora.actions[action]}
        skipped = {why: count for why, count in lora.actions.items() if why not in WRITTEN}
        components = {}
        for component, sums in sorted(lora.components.items(), reverse=True):
            own = {block: s for (c, block), s in sorted(lora.blocks.items()) if c == component}
            components[component] = sums.to_json() | {"blocks": {block: s.to_json() for block, s in own.items()}}
        return {
            "modules": lora.modules, "actions": written, "skipped_because": skipped, **lora.total.to_json(),
            "relative_error": lora.total.relative_error, "components": components,
            "became_plain": dict(lora.became_plain),
        }  # fmt: skip


def _first(actions: set[str]) -> str:
    return next(action for action in (*WRITTEN, *sorted(actions)) if action in actions)


def _of(layers: list[dict[str, Any]]) -> dict[str, Any]:
    known = [layer["similarity"] for layer in layers if layer["similarity"] is not None]
    return {
        "layers": len(layers), "compared": len(known), "similarity": math.fsum(known) / len(known) if known else None,
        "least": min(known, default=None),
    }  # fmt: skip


def ratio(part: float, whole: float) -> float | None:
    """None where there is nothing to be a part of."""
    return part / whole if whole > 0 else None


def root(square: float | None) -> float | None:
    return None if square is None else math.sqrt(max(square, 0.0))

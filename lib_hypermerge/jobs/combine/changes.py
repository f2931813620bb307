"""What each LoRA changes in a layer at strength 1: a product of factors, or a whole matrix; norms and biases."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...adapters.adapter import Adapter
from ...algebra.factored import LowRank
from ...algebra.folding import same_bits
from ...errors import NumericalError
from ...files.source import TensorFile
from ..convert_checkpoint import is_finite
from .layers import Layer, Part

Change = LowRank | torch.Tensor


@dataclass(frozen=True)
class Term:
    """A LoRA's change of a whole layer, (n, k): factors as they are stored, or a matrix in float32."""

    index: int
    strength: float
    change: Change


class Changes:
    """Reads the layers' changes. file: the checkpoint's, None where its numbers are not needed.

    in_turn: each LoRA is applied to the weight that those before it have changed, as hosts do; else each to the
    checkpoint's own. It matters only where a change depends on the weight.  wide: float64 for these, not float32.
    only_first: of norms and biases the first LoRA's, for a method that works on that.
    Thread-safe.
    """

    def __init__(self, file: TensorFile | None, in_turn: bool, wide: bool, only_first: bool):
        self.file, self.in_turn, self.only_first = file, in_turn, only_first
        self.dtype = torch.float64 if wide else torch.float32

    def of_weight(self, layer: Layer) -> list[Term]:
        """Of a layer's matrix, one term for each LoRA that changes it. NumericalError for NaN and Inf."""
        weight = self._weight(layer)
        terms = []
        parts = (part for part in layer.parts if part.changes_weight)
        for index, own in itertools.groupby(parts, lambda part: part.index):
            pieces, strength = [], 1.0
            for part in own:
                strength = part.strength
                pieces.append((layer.rows(part), self._piece(part, layer, weight)))
            term = Term(index, strength, joined(pieces, *layer.size))
            if weight is not None and self.in_turn:
                weight.add_(whole(term.change).to(weight.dtype).reshape(weight.shape), alpha=strength)
            terms.append(term)
        return terms

    def of_norm(self, layer: Layer) -> torch.Tensor:
        """Of a normalisation's scale, (n,) float64: the sum over all LoRAs."""
        weight = self._weight(layer)
        total = torch.zeros(layer.shape[0], dtype=torch.float64)
        for part in self._adding(layer):
            if part.changes_weight:
                own = torch.zeros(part.shape, dtype=torch.float64) if weight is None else weight[layer.rows(part)]
                change = part.strength * _loaded(part).change(own.double()).flatten()
                _check_finite(part, change)
                total[layer.rows(part)] += change
                if weight is not None and self.in_turn:
                    own.add_(change.to(own.dtype))
        return total

    def of_bias(self, layer: Layer) -> torch.Tensor:
        """Of a layer's bias, or a normalisation's shift, (n,) float64: the sum over all LoRAs."""
        total = torch.zeros(layer.shape[0], dtype=torch.float64)
        for part in self._adding(layer):
            change = part.load().bias_change() if part.changes_bias else None
            if change is not None:
                _check_finite(part, change)
                total[layer.rows(part)] += part.strength * change.double()
        return total

    def _adding(self, layer: Layer) -> list[Part]:
        """Those whose vectors are added up."""
        return [part for part in layer.parts if part.index == 0 or not self.only_first]

    def _weight(self, layer: Layer) -> torch.Tensor | None:
        """The checkpoint's numbers, where a part of the layer asks for them."""
        if self.file is None or not layer.needs_weight:
            return None
        info = layer.module.weight
        assert info is not None
        weight = self.file.read(info).to(self.dtype)
        return weight[:, : layer.shape[1]].contiguous() if weight.dim() > 1 else weight

    def _piece(self, part: Part, layer: Layer, weight: torch.Tensor | None) -> Change:
        adapter = _loaded(part)
        low = None if part.family.needs_weight else adapter.low_rank(torch.float64)
        if low is not None:
            if part.is_cut:
                low = replace(low, up=low.up[:, : part.dyn], down=low.down[: part.dyn])
            return replace(low, up=_readable(low.up), down=_readable(low.down))
        own = torch.zeros(part.shape, dtype=self.dtype) if weight is None else weight[layer.rows(part)]
        change = adapter.change(own).flatten(1).float()
        _check_finite(part, change)
        return change


def joined(pieces: Sequence[tuple[slice, Change]], n: int, k: int) -> Change:
    """(n, k) of changes of some of its rows each: factors where all are, side by side or, of one down, as one."""
    (rows, first), *others = pieces
    if not others and (rows.start, rows.stop) == (0, n):
        return first
    lows = [(rows, change) for rows, change in pieces if isinstance(change, LowRank)]
    if len(lows) < len(pieces):
        out = torch.zeros(n, k)
        for rows, change in pieces:
            out[rows] = whole(change)
        return out
    downs: list[torch.Tensor] = []  # those that differ
    places = []
    for _, low in lows:
        place = next((i for i, down in enumerate(downs) if same_bits(down, low.down)), len(downs))
        downs += [low.down] if place == len(downs) else []
        places.append(place)
    starts = [0, *itertools.accumulate(len(down) for down in downs)]
    up = torch.zeros(n, starts[-1], dtype=torch.float64)
    for (rows, low), place in zip(lows, places, strict=True):
        up[rows, starts[place] : starts[place + 1]] = low.scale * low.up.double()
    return LowRank(up, torch.cat([down.double() for down in downs]))


def whole(change: Change) -> torch.Tensor:
    """(n, k) float32."""
    return change.scale * (change.up.float() @ change.down.float()) if isinstance(change, LowRank) else change


def _loaded(part: Part) -> Adapter:
    adapter = part.load()
    for name, tensor in adapter.tensors.items():
        if tensor.is_floating_point() and not is_finite(_readable(tensor)):
            raise _damaged(part, name)
    return adapter


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """8-bit floats cannot be asked, nor multiplied."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor


def _check_finite(part: Part, change: torch.Tensor) -> None:
    if not is_finite(change):
        raise _damaged(part, "its change")


def _damaged(part: Part, what: str) -> NumericalError:
    return NumericalError(
        f"{part.entry.key} in {part.lora.path.name} holds NaN or Inf.", f"It is in {what}.", "Get a sound copy."
    )

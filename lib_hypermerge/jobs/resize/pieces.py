"""The changes that a layer's modules make, cut or joined as the output names them, before they get another rank."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...adapters.adapter import BIAS, Adapter, Shape
from ...adapters.lora import MID, UP
from ...adapters.swapped import swap
from ...algebra.factored import LowRank
from ..convert_restore import ALPHA, Tensors
from ..convert_units import Out, Source, Unit


@dataclass
class Piece:
    """A module of the output. shape: of the rows of the weight that it changes.  change: factors, or (n, k) float32.

    dtype: of the numbers in the file that it comes from.  stored: the tensors that it has already, where it is a plain
    LoRA under a name of its own.  beside: what goes along as it is, such as a bias.
    """

    out: Out
    shape: Shape
    change: LowRank | torch.Tensor
    dtype: torch.dtype
    stored: Tensors | None = None
    beside: Tensors = field(default_factory=dict)

    @property
    def own_rank(self) -> int:
        """The directions that the change can have, by sizes alone."""
        return min(*self.size, self.change.rank) if isinstance(self.change, LowRank) else min(self.size)

    @property
    def size(self) -> tuple[int, int]:
        """(n, k)."""
        change = self.change
        return (len(change.up), change.down.shape[1]) if isinstance(change, LowRank) else (len(change), change.shape[1])


@dataclass(frozen=True)
class Told:
    """A module of the input: its tensors and the change of its own rows."""

    source: Source
    tensors: Tensors
    change: LowRank | torch.Tensor

    @property
    def dtype(self) -> torch.dtype:
        return stored_dtype(self.tensors)


def stored_dtype(tensors: Tensors) -> torch.dtype:
    """The widest 16- or 32-bit number format among a module's tensors but alpha; float32 where there is none."""
    found = [t.dtype for part, t in tensors.items() if part not in (ALPHA, "scale") and t.is_floating_point()]
    return max((dtype for dtype in found if dtype.itemsize in (2, 4)), key=lambda d: d.itemsize, default=torch.float32)


def told(source: Source, tensors: Tensors, adapter: Adapter, weight: torch.Tensor) -> Told:
    """weight: the rows that are changed, zeros where their numbers do not matter."""
    low = None if source.family.needs_weight else adapter.low_rank(torch.float64)
    if low is None:
        return Told(source, tensors, adapter.change(weight).flatten(1))
    return Told(source, tensors, LowRank(low.up, low.down, low.scale))


def arrange(unit: Unit, made: list[Told]) -> list[Piece]:
    """The output's modules. Narrow models have other widths than the names' own: rows count in proportion."""
    out = []
    for wanted in unit.written:
        own = [one for one in made if one.source.start < wanted.stop and wanted.start < one.source.stop]
        first = own[0]
        alone = len(own) == 1 and (first.source.start, first.source.stop) == (wanted.start, wanted.stop)
        if alone and first.source.swapped == wanted.swapped:
            beside = {BIAS: first.tensors[BIAS]} if BIAS in first.tensors else {}
            plain = UP in first.tensors and MID not in first.tensors and first.source.family.family == "lora"
            stored = first.tensors if plain else None
            out.append(Piece(wanted, first.source.shape, first.change, first.dtype, stored, beside))
        else:
            out.append(_joined(own, wanted))
    return out


def _joined(own: list[Told], wanted: Out) -> Piece:
    """Rows of one or several modules; rows that none of them has stay as they are."""
    first = own[0]
    rows, span = first.source.shape[0], first.source.stop - first.source.start
    n = (wanted.stop - wanted.start) * rows // span
    parts, biases = [], []
    for one in own:
        height = one.source.shape[0]
        scale = height / (one.source.stop - one.source.start)
        begin, end = max(one.source.start, wanted.start), min(one.source.stop, wanted.stop)
        within = slice(round((begin - one.source.start) * scale), round((end - one.source.start) * scale))
        goal = slice(round((begin - wanted.start) * scale), round((end - wanted.start) * scale))
        change = one.change
        if one.source.swapped:
            change = _swapped(change)
        parts.append((goal, _rows(change, within)))
        if BIAS in one.tensors:
            bias = one.tensors[BIAS].flatten()
            biases.append((goal, (swap(bias) if one.source.swapped else bias)[within]))
    change = _assembled(parts, n)
    beside = {}
    if biases:
        whole = biases[0][1].new_zeros(n)
        for goal, bias in biases:
            whole[goal] = bias
        beside = {BIAS: swap(whole) if wanted.swapped else whole}
    dtype = max((one.dtype for one in own), key=lambda d: d.itemsize)
    change = _swapped(change) if wanted.swapped else change
    return Piece(wanted, (n, *first.source.shape[1:]), change, dtype, None, beside)


def _assembled(parts: list[tuple[slice, LowRank | torch.Tensor]], n: int) -> LowRank | torch.Tensor:
    """(n, k) of its parts: factors side by side where all are factors."""
    lows = [(goal, change) for goal, change in parts if isinstance(change, LowRank)]
    if len(lows) < len(parts):
        columns = next(c.down.shape[1] if isinstance(c, LowRank) else c.shape[1] for _, c in parts)
        out = torch.zeros(n, columns)
        for goal, change in parts:
            out[goal] = multiplied(change) if isinstance(change, LowRank) else change
        return out
    if len(lows) == 1:
        goal, low = lows[0]
        up = low.up.new_zeros(n, low.rank)
        up[goal] = low.up
        return LowRank(up, low.down, low.scale)
    down = torch.cat([low.down.double() for _, low in lows])
    up, column = torch.zeros(n, len(down), dtype=torch.float64), 0
    for goal, low in lows:
        up[goal, column : column + low.rank] = low.scale * low.up.double()
        column += low.rank
    return LowRank(up, down)


def multiplied(low: LowRank) -> torch.Tensor:
    """(n, k) float32."""
    return low.scale * (low.up.float() @ low.down.float())


def _rows(change: LowRank | torch.Tensor, rows: slice) -> LowRank | torch.Tensor:
    return LowRank(change.up[rows], change.down, change.scale) if isinstance(change, LowRank) else change[rows]


def _swapped(change: LowRank | torch.Tensor) -> LowRank | torch.Tensor:
    return LowRank(swap(change.up), change.down, change.scale) if isinstance(change, LowRank) else swap(change)

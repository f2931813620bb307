"""The change that a module of an adapter file makes, as a product of factors where it is one, else as a matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..adapters.families import build
from ..algebra.factored import LowRank
from ..files.source import TensorInfo
from ..layouts.adapter_file import Target
from .inspect_adapter import Piece, Seen, shape_of


@dataclass(frozen=True)
class Change:
    """ΔW of some rows of a layer, flattened: factored, or dense (n, k) float32. bias: ‖Δb‖², 0 without."""

    low: LowRank | None
    dense: torch.Tensor | None
    bias: float = 0.0


class Unreadable(Exception):
    """Why a module's change cannot be told; counted, never raised out of an inspection."""


def read_change(seen: Seen, piece: Piece) -> Change:
    """Raises Unreadable: it depends on weights that are not there, or holds NaN or Inf."""
    file = seen.file.file
    tensors = {part: file.read(info) for part, info in piece.entry.parts.items()}
    # 8-bit floats cannot be asked
    if any(not tensor.float().isfinite().all() for tensor in tensors.values() if tensor.is_floating_point()):
        raise Unreadable("NaN or Inf")
    adapter = build(tensors, piece.entry.alpha)
    bias = adapter.bias_change()
    bias2 = 0.0 if bias is None else float(bias.double().square().sum())
    swapped = piece.target is not None and piece.target.swapped
    low = None if piece.family.needs_weight else adapter.low_rank(torch.float64)
    if low is not None:
        low = LowRank(low.up.double(), low.down.double(), low.scale)
        return Change(replace(low, up=swap(low.up)) if swapped else low, None, bias2)
    weight = _weight(seen, piece)
    dense = adapter.change(weight).flatten(1) if weight.ndim > 1 else adapter.change(weight)[:, None]
    if not dense.isfinite().all():
        raise Unreadable("NaN or Inf")
    return Change(None, swap(dense) if swapped else dense, bias2)


def _weight(seen: Seen, piece: Piece) -> torch.Tensor:
    """The rows that are changed, in float32; zeros where their numbers do not matter."""
    target = piece.target
    if target is None or target.module.weight is None:
        raise Unreadable("no layer")
    if not piece.fits:
        raise Unreadable("a size that is not the layer's")
    if not piece.family.needs_weight:
        return torch.zeros(shape_of(target))
    if not seen.has_numbers:
        raise Unreadable("a change that depends on the weight")
    assert seen.model is not None
    rows = seen.model.file.read(rows_of(target)).float()
    return swap(rows) if target.swapped else rows


def rows_of(target: Target) -> TensorInfo:
    assert target.module.weight is not None
    return target.module.weight.rows(target.start, target.stop)


def swap(rows: torch.Tensor) -> torch.Tensor:
    """The other half first."""
    return torch.cat(rows.chunk(2)[::-1])

"""A checkpoint's numbers, read once: the norm of each component, and which tensors hold NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..files.dtypes import FLOATS
from ..files.source import TensorInfo
from ..layouts.module import Model
from .inspect_common import shown
from .workers import map_in_order, plan_workers

_PIECE = 1 << 22  # values read at a time


def measure_values(
    model: Model, threads: int, on_bytes: Callable[[int], None], check: Callable[[], None]
) -> dict[str, Any]:
    """JSON-ready; EMA copies and other tensors count as the component "others". check may raise to stop.

    on_bytes is told how many bytes are done.  Norms are over the finite values.
    """
    owner = {
        info.name: component
        for component, modules in model.components.items()
        for module in modules.values()
        for info in (module.weight, module.bias)
        if info is not None
    } | dict.fromkeys((info.name for info in model.vae.values()), "vae")

    def work(piece: TensorInfo) -> tuple[TensorInfo, float, int]:
        values = model.file.read(piece).double()
        finite = values.isfinite()
        bad = values.numel() - int(finite.sum())
        return piece, float(torch.where(finite, values, 0.0).square().sum()), bad

    squares: dict[str, float] = {}
    nonfinite: dict[str, int] = {}
    done = 0
    floats = [info for info in model.file.tensors.values() if info.dtype in FLOATS and info.numel]
    workers, each = plan_workers(threads, "cpu", 24 * _PIECE)
    for piece, square, bad in map_in_order(work, (p for i in floats for p in _pieces(i)), workers, each, check):
        component = owner.get(piece.name, "others")
        squares[component] = squares.get(component, 0.0) + square
        if bad:
            nonfinite[piece.name] = nonfinite.get(piece.name, 0) + bad
        done += piece.nbytes
        on_bytes(done)
    return {
        "components": {component: {"norm": math.sqrt(square)} for component, square in squares.items()},
        "nonfinite": {"count": len(nonfinite), "names": shown(sorted(nonfinite)), "values": sum(nonfinite.values())},
    }


def _pieces(info: TensorInfo) -> Iterator[TensorInfo]:
    """Rows of a tensor that are read at a time."""
    if not info.shape:
        yield info
        return
    step = max(1, _PIECE * info.shape[0] // info.numel)
    for start in range(0, info.shape[0], step):
        yield info.rows(start, min(start + step, info.shape[0]))

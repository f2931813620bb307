"""A file's numbers, read once: the norm of each component, and which tensors hold NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..files.dtypes import FLOATS
from ..files.source import TensorFile, TensorInfo
from ..layouts.module import Model
from .inspect_common import shown
from .workers import map_in_order, plan_workers

_PIECE = 1 << 22  # values read at a time


def components_of(model: Model) -> dict[str, str]:
    """A checkpoint's tensors → the component that they belong to."""
    return {
        info.name: component
        for component, modules in model.components.items()
        for module in modules.values()
        for info in (module.weight, module.bias)
        if info is not None
    } | dict.fromkeys((info.name for info in model.vae.values()), "vae")


def measure_values(
    file: TensorFile, owner: Mapping[str, str], threads: int, on_bytes: Callable[[int], None],
    check: Callable[[], None],
) -> dict[str, Any]:  # fmt: skip
    """JSON-ready. owner: tensor → component; those of none count as "others", EMA copies among them.

    on_bytes is told how many bytes are done; check may raise to stop.  Norms are over the finite values.
    """

    def work(piece: TensorInfo) -> tuple[TensorInfo, float, int]:
        values = file.read(piece).double()
        finite = values.isfinite()
        bad = values.numel() - int(finite.sum())
        return piece, float(torch.where(finite, values, 0.0).square().sum()), bad

    squares: dict[str, float] = {}
    nonfinite: dict[str, int] = {}
    done = 0
    floats = [info for info in file.tensors.values() if info.dtype in FLOATS and info.numel]
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

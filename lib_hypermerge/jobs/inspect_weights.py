"""How alike checkpoints are: sums of products over the values they share, streamed, of all or of a sample."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from ..files.dtypes import FLOATS
from ..files.source import TensorInfo
from ..layouts.module import Model
from .workers import map_in_order, plan_workers

_SAMPLE = 1 << 26  # values of a checkpoint that a sample holds, about
_WHOLE = 1 << 12  # a tensor as small as this is read whole
_RUNS = 4  # places in a tensor from which a sample's rows are taken
_PIECE = 1 << 21  # values read at a time


@dataclass(frozen=True)
class _Piece:
    """The same rows of one tensor in every file. weight: how many values of the tensor one of them stands for."""

    component: str
    weight: float
    infos: tuple[TensorInfo, ...]


@dataclass
class Products:
    """Sums over the values that m checkpoints share, by component.

    gram: (m, m) float64, Σ x_i·x_j, estimated from a sample of every tensor where not all is read; of changes
    x_i − x_base where there is a base.  values: how many were read, of all.
    """

    gram: dict[str, torch.Tensor] = field(default_factory=dict)
    values: int = 0
    all_values: int = 0
    nonfinite: int = 0


def shared(models: list[Model]) -> dict[tuple[str, str], tuple[TensorInfo, ...]]:
    """(component, path) → the tensor in every model, where all have it in one shape."""
    tables = [_tensors(model) for model in models]
    out = {}
    for key in tables[0]:
        infos = tuple(table[key] for table in tables if key in table)
        if len(infos) == len(models) and len({info.shape for info in infos}) == 1 and infos[0].numel:
            out[key] = infos
    return out


def _tensors(model: Model) -> dict[tuple[str, str], TensorInfo]:
    out = {}
    for component, modules in model.components.items():
        for path, module in modules.items():
            for ending, info in (("weight", module.weight), ("bias", module.bias)):
                if info is not None and info.dtype in FLOATS:
                    out[component, f"{path}.{ending}"] = info
    return out


def products(
    models: list[Model], base: Model | None, full: bool, threads: int, on_values: Callable[[int, int], None],
    check: Callable[[], None],
) -> Products:  # fmt: skip
    """Of at least two models. on_values(done, all) is told the progress; check may raise to stop."""
    everything = [*models, base] if base is not None else models
    tensors = shared(everything)
    result = Products(all_values=sum(infos[0].numel for infos in tensors.values()))
    share = 1.0 if full else min(1.0, _SAMPLE / max(1, result.all_values))
    pieces = [p for (component, _), infos in tensors.items() for p in _pieces(component, infos, share)]
    total = sum(piece.infos[0].numel for piece in pieces)
    files = [model.file for model in everything]

    def work(piece: _Piece) -> tuple[_Piece, torch.Tensor, int]:
        rows = [file.read(info).flatten().double() for file, info in zip(files, piece.infos, strict=True)]
        X = torch.stack(rows)
        finite = X.isfinite().all(0)
        bad = int((~finite).sum())
        if bad:
            X = X[:, finite]
        if base is not None:
            X = X[:-1] - X[-1]
        return piece, X @ X.mT, bad

    workers, each = plan_workers(threads, "cpu", 16 * _PIECE * len(everything))
    for piece, gram, bad in map_in_order(work, pieces, workers, each, check):
        known = result.gram.get(piece.component)
        gram *= piece.weight
        result.gram[piece.component] = gram if known is None else known + gram
        result.values += piece.infos[0].numel
        result.nonfinite += bad
        on_values(result.values, total)
    return result


def _pieces(component: str, infos: tuple[TensorInfo, ...], share: float) -> Iterator[_Piece]:
    """Runs of rows, evenly spaced, that hold a share of the tensor."""
    shape = infos[0].shape
    if not shape:
        yield _Piece(component, 1.0, infos)
        return
    rows, width = shape[0], math.prod(shape[1:])
    wanted = rows if rows * width <= _WHOLE else max(1, round(rows * share))
    runs = 1 if wanted == rows else min(_RUNS, wanted)
    step = max(1, _PIECE // max(1, width))
    for run in range(runs):
        count = wanted // runs + (run < wanted % runs)
        start = (rows - count) // 2 if runs == 1 else run * (rows - count) // (runs - 1)
        for first in range(start, start + count, step):
            last = min(first + step, start + count)
            yield _Piece(component, rows / wanted, tuple(info.rows(first, last) for info in infos))


def matrices(products: Products) -> dict[str, Any]:
    """Cosines and relative distances, over all and by component, JSON-ready; None where a norm is 0."""
    whole = sum(products.gram.values(), torch.zeros(()))
    return {
        "cosine": cosines(whole),
        "distance": distances(whole),
        "components": {
            component: {"cosine": cosines(gram), "distance": distances(gram)}
            for component, gram in products.gram.items()
        },
    }


def cosines(gram: torch.Tensor) -> list[list[float | None]]:
    """g_ij / √(g_ii·g_jj), kept from rounding beyond ±1."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    return [
        [min(1.0, max(-1.0, float(g / (a * b)))) if a > 0 and b > 0 else None for g, b in zip(row, norms, strict=True)]
        for row, a in zip(gram, norms, strict=True)
    ]


def distances(gram: torch.Tensor) -> list[list[float | None]]:
    """‖x_i − x_j‖ as a share of the geometric mean of both norms."""
    squares = gram.diagonal()
    out = []
    for i, a in enumerate(squares):
        apart = [max(float(a + b - 2 * gram[i, j]), 0.0) for j, b in enumerate(squares)]
        means = [float(a * b) ** 0.5 for b in squares]
        out.append([(d / mean) ** 0.5 if mean > 0 else None for d, mean in zip(apart, means, strict=True)])
    return out

"""How alike adapters are: the cosine ⟨ΔA, ΔB⟩ / (‖ΔA‖·‖ΔB‖) of their changes, exactly, from factors.

Modules are matched by the layers that they change, so neither dialect nor family matters. Where one file keeps apart
what the other fuses, the rows that both change are compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..algebra import factored
from .inspect_adapter import Piece, Seen
from .inspect_change import Change, Unreadable, read_change
from .inspect_weights import cosines
from .workers import map_in_order, plan_workers

_LAYER_BYTES = 256 << 20

# (component, path) → for each file the pieces that change this layer
_Layers = dict[tuple[str, str], list[list[Piece]]]


@dataclass(frozen=True)
class _Rows:
    """A change of the rows start…stop of a layer."""

    start: int
    stop: int
    change: Change


def similarity(
    files: list[Seen], threads: int, on_layer: Callable[[int, int], None], check: Callable[[], None]
) -> dict[str, Any]:
    """Matrices over files of one architecture, JSON-ready. on_layer is told (done, all); check may raise to stop.

    What cannot be measured counts as no change of that file, and is counted.
    """
    layers = _layers(files)

    def work(item: tuple[tuple[str, str], list[list[Piece]]]):
        (component, _), by_file = item
        left_out: Counter[str] = Counter()
        rows = [[r for piece in pieces if (r := _read(seen, piece, left_out)) is not None]
                for seen, pieces in zip(files, by_file, strict=True)]  # fmt: skip
        gram = torch.zeros(len(files), len(files), dtype=torch.float64)
        for i, mine in enumerate(rows):
            for j, others in enumerate(rows[: i + 1]):
                gram[i, j] = gram[j, i] = sum(_inner(a, b) for a in mine for b in others)
        return component, gram, [bool(mine) for mine in rows], left_out

    grams: dict[str, torch.Tensor] = {}
    both = torch.zeros(len(files), len(files), dtype=torch.int64)
    left_out: Counter[str] = Counter()
    workers, each = plan_workers(threads, "cpu", _LAYER_BYTES)
    for done, (component, gram, there, why) in enumerate(
        map_in_order(work, layers.items(), workers, each, check), start=1
    ):
        grams[component] = gram + grams.get(component, 0)
        here = torch.tensor(there, dtype=torch.int64)
        both += here[:, None] * here
        left_out += why
        on_layer(done, len(layers))
    whole = sum(grams.values(), torch.zeros(len(files), len(files), dtype=torch.float64))
    return {
        "cosine": cosines(whole),
        "components": {component: {"cosine": cosines(gram)} for component, gram in grams.items()},
        "shared_layers": both.tolist(),
        "left_out": dict(left_out),
    }


def _layers(files: list[Seen]) -> _Layers:
    out: _Layers = {}
    for index, seen in enumerate(files):
        for piece in seen.pieces:
            if piece.target is not None:
                module = piece.target.module
                # the q, k and v of a fused weight are layers of their own in some models
                layer = out.setdefault((module.component, module.path), [[] for _ in files])
                layer[index].append(piece)
    return out


def _read(seen: Seen, piece: Piece, left_out: Counter[str]) -> _Rows | None:
    assert piece.target is not None and piece.target.module.weight is not None
    is_part = piece.target.stop - piece.target.start < piece.target.module.weight.shape[0]
    if is_part and not piece.fits:  # of another width: which rows these are cannot be told
        left_out["a size that is not the layer's"] += 1
        return None
    try:
        return _Rows(piece.target.start, piece.target.stop, read_change(seen, piece))
    except Unreadable as error:
        left_out[str(error)] += 1
        return None


def _inner(a: _Rows, b: _Rows) -> float:
    """⟨A, B⟩ over the rows that both change; 0 if they are of different sizes."""
    start, stop = max(a.start, b.start), min(a.stop, b.stop)
    if start >= stop:
        return 0.0
    A, B = _part(a, start, stop), _part(b, start, stop)
    if A is None or B is None or _columns(A) != _columns(B):
        return 0.0
    if A.low is not None and B.low is not None:
        return factored.inner(A.low, B.low)
    if A.low is not None:
        A, B = B, A
    if A.dense is None:
        return 0.0
    if B.dense is not None:
        return float((A.dense.double() * B.dense.double()).sum())
    assert B.low is not None  # ⟨A, s·U·D⟩ = s·⟨A·Dᵀ, U⟩
    return B.low.scale * float((A.dense.double() @ B.low.down.double().mT * B.low.up.double()).sum())


def _columns(change: Change) -> int:
    if change.low is not None:
        return change.low.down.shape[1]
    return change.dense.shape[1] if change.dense is not None else 0


def _part(rows: _Rows, start: int, stop: int) -> Change | None:
    """Some of the rows; None if the change has not as many as its layer."""
    first, last = start - rows.start, stop - rows.start
    change = rows.change
    if change.low is not None:
        if len(change.low.up) == rows.stop - rows.start:
            return replace(change, low=replace(change.low, up=change.low.up[first:last]))
        # of another width than the model that it was laid over: whole, or not at all
        return change if (first, last) == (0, rows.stop - rows.start) else None
    assert change.dense is not None
    return replace(change, dense=change.dense[first:last])

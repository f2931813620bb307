"""How much an adapter changes where, and along how many directions: norms and spectra of its changes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..algebra import factored
from ..algebra.lowrank import Matrix, decompose
from .inspect_adapter import Piece, Seen, blocks_of, titles_of
from .inspect_change import Change, Unreadable, read_change
from .inspect_common import MOST_NAMES, shown
from .workers import map_in_order, plan_workers

_MODULE_BYTES = 256 << 20  # what a worker may hold: the largest layers in float32, and their Gram matrix
_POINTS = 40  # of a curve
_ZERO = 1e-12  # singular values below this share of the first count as none


@dataclass(frozen=True)
class Measured:
    """One module. norm2: ‖ΔW‖²_F.  S: its singular values, where they were asked for.  why: it cannot be measured."""

    piece: Piece
    norm2: float = 0.0
    bias2: float = 0.0
    S: torch.Tensor | None = None
    why: str = ""


def measure(
    seen: Seen, spectra: bool, threads: int, on_module: Callable[[int], None], check: Callable[[], None]
) -> dict[str, Any]:
    """JSON-ready. on_module is told how many modules are done; check may raise to stop."""

    def work(piece: Piece) -> Measured:
        try:
            change = read_change(seen, piece)
        except Unreadable as error:
            return Measured(piece, why=str(error))
        S = _singular_values(change) if spectra else None
        norm2 = _norm2(change) if S is None else float(S.square().sum())
        return Measured(piece, norm2, change.bias, S)

    workers, each = plan_workers(threads, "cpu", _MODULE_BYTES)
    found = []
    for result in map_in_order(work, seen.pieces, workers, each, check):
        found.append(result)
        on_module(len(found))
    return _facts(seen, found, spectra)


def _norm2(change: Change) -> float:
    if change.low is not None:
        return factored.norm(change.low) ** 2
    assert change.dense is not None
    return float(change.dense.double().square().sum())


def _singular_values(change: Change) -> torch.Tensor:
    """(m,) float64, descending."""
    if change.low is not None:
        return factored.singular_values(change.low)
    A = change.dense
    assert A is not None
    if min(A.shape) == 1:
        return torch.linalg.vector_norm(A.double())[None]
    energy = float(A.double().square().sum())
    return decompose(Matrix(A, energy), min(A.shape), "spectrum").S


def _facts(seen: Seen, found: list[Measured], spectra: bool) -> dict[str, Any]:
    good = [m for m in found if not m.why]
    left_out = Counter(m.why for m in found if m.why)
    broken = [m.piece.entry.key for m in found if m.why == "NaN or Inf"]
    out: dict[str, Any] = {
        "norm": _root(m.norm2 for m in good),
        "bias_norm": _root(m.bias2 for m in good),
        "modules": len(good),
        "left_out": dict(left_out),
        "nonfinite": {"count": len(broken), "names": shown(broken)},
        "components": {},
        "strongest": [_row(seen, m) for m in sorted(good, key=lambda m: -m.norm2)[:MOST_NAMES]],
    }
    for component in seen.model.components if seen.model else ():
        own = [m for m in good if seen.component_of(m.piece) == component]
        if own and seen.model:
            title, norm = titles_of(seen.model)[component], _root(m.norm2 for m in own)
            part: dict[str, Any] = {"title": title, "norm": norm, "modules": len(own), "blocks": {}}
            for block in blocks_of(seen.model, component):
                inside = [m.norm2 for m in own if m.piece.target and m.piece.target.module.block == block]
                if inside:
                    part["blocks"][block] = {"norm": _root(inside), "modules": len(inside)}
            if spectra:
                part["spectrum"] = _spectrum([m.S for m in own if m.S is not None])
            out["components"][component] = part
    return out


def _root(squares: Any) -> float:
    return math.sqrt(sum(squares))


def _row(seen: Seen, m: Measured) -> dict[str, Any]:
    target = m.piece.target
    row: dict[str, Any] = {
        "module": m.piece.entry.key,
        "component": seen.component_of(m.piece),
        "block": target.module.block if target else "",
        "norm": math.sqrt(m.norm2),
    }
    if m.S is not None and len(m.S) and m.S[0] > 0:
        row |= {
            "largest": float(m.S[0]),
            "stable_rank": float(m.S.square().sum() / m.S[0] ** 2),
            "rank_for_90": _rank_for(m.S, 0.90),
            "rank_for_99": _rank_for(m.S, 0.99),
            "numerical_rank": int((_ZERO * m.S[0] < m.S).sum()),
        }
    return row


def _rank_for(S: torch.Tensor, share: float) -> int:
    """Directions that hold this share of the squared norm."""
    held = S.square().cumsum(0)
    return int((held < share * (1 - 1e-12) * held[-1]).sum()) + 1


def _spectrum(values: list[torch.Tensor]) -> dict[str, Any]:
    """Over a component's matrices: σ_i/σ_1 by quantiles of the layers, and the directions for a share of energy."""
    spectra = [S for S in values if len(S) > 1 and S[0] > 0]
    if not spectra:
        return {"layers": 0, "curve": []}
    longest = max(len(S) for S in spectra)
    indices = sorted({round(longest ** (i / (_POINTS - 1))) for i in range(_POINTS)})
    quantiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    curve = []
    for index in indices:
        shares = torch.stack([S[index - 1] / S[0] for S in spectra if len(S) >= index])
        low, median, high = (float(q) for q in shares.quantile(quantiles))
        curve.append({"index": index, "low": low, "median": median, "high": high, "layers": len(shares)})
    return {
        "layers": len(spectra),
        "curve": curve,
        "rank_for_90": _quantiles([_rank_for(S, 0.90) for S in spectra]),
        "rank_for_99": _quantiles([_rank_for(S, 0.99) for S in spectra]),
    }


def _quantiles(ranks: list[int]) -> dict[str, int]:
    ranks = sorted(ranks)
    return {"least": ranks[0], "median": ranks[len(ranks) // 2], "most": ranks[-1]}

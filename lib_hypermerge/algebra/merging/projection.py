"""One change without what it shares with others, or only that: projections on the others' directions."""

from __future__ import annotations

from collections.abc import Sequence

from ...lazy import torch
from ..factored import LowRank, norm
from .singular import basis, singular

_NOTHING = 1e-12  # share of a change below which what a projection leaves of it is rounding


def without(a: LowRank, others: Sequence[LowRank], energy: float | None = None) -> LowRank:
    """(I − U·Uᵀ)·A·(I − V·Vᵀ), with orthonormal U, V of all columns and all rows that the others have; A's rank.

    What is left reads nothing of what the others read and writes nothing of what they write.
    energy: of each other only its main directions, those that make up this share of its ‖·‖²_F.  float64.
    """
    U, V = _bases(a, others, energy)
    up, down = a.up.double(), a.down.double()
    for _ in range(2):  # the second time takes out what rounding left the first time
        up, down = up - U @ (U.mT @ up), down - (down @ V) @ V.mT
    return _clean(LowRank(up, down, a.scale), norm(a))


def shared(a: LowRank, others: Sequence[LowRank], energy: float | None = None) -> LowRank:
    """U·Uᵀ·A·V·Vᵀ, with U and V as in `without`: what A does within the others' directions; A's rank.

    The two do not add up to A: what A writes within U but reads outside V, or the other way, is in neither.
    """
    U, V = _bases(a, others, energy)
    part = LowRank(U @ (U.mT @ a.up.double()), (a.down.double() @ V) @ V.mT, a.scale)
    return _clean(part, norm(a))


def _bases(a: LowRank, others: Sequence[LowRank], energy: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [singular(other, energy) for other in others]
    if not parts:
        return a.up.new_zeros(a.up.shape[0], 0).double(), a.up.new_zeros(a.down.shape[1], 0).double()
    return basis([part.U for part in parts]), basis([part.V for part in parts])


def _clean(part: LowRank, whole: float) -> LowRank:
    if norm(part) > _NOTHING * whole:
        return part
    return LowRank(torch.zeros_like(part.up[:, :1]), torch.zeros_like(part.down[:1]))

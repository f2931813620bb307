"""What a change of a weight W_s becomes beside another weight W_t. All in factored form: nothing n×k is formed.

Of a basis U its projection is P = U·Uᵀ, and Q = I − P that of what is left. A basis that spans the whole space has
P = I: then every method below is copying, and callers leave the numbers alone.
"""

from __future__ import annotations

from ...lazy import torch
from ..factored import LowRank
from .subspace import Directions


def lora_x(change: LowRank, target: Directions) -> LowRank:
    """ΔW_t = P_t·ΔW_s·P_t on either side: what lies in the target's leading directions (arXiv 2501.16559).

    Of all changes within these directions it is the nearest to ΔW_s. What lies outside is lost.
    """
    up, down = _like(change, target)
    return LowRank(_project(target.U, up), _project(target.V, down.mT).mT, change.scale)


def prolora(change: LowRank, source: Directions, target: Directions) -> LowRank:
    """ΔW_t = (P_t·P_s + Q_t·Q_s)·ΔW_s·(P_s·P_t + Q_s·Q_t), each side with its own projections.

    What lies in the source's leading directions goes to the target's, and the rest to the rest, as in ProLoRA (arXiv
    2506.04244). The published form keeps the blocks P·ΔW·P and Q·ΔW·Q; this one the two mixed ones too, so that
    models with the same directions give the very LoRA. P_t·P_s + Q_t·Q_s turns the source's span into the target's
    and shortens by the cosines of the angles between them.
    """
    up, down = _like(change, target)
    return LowRank(_carry(source.U, target.U, up), _carry(source.V, target.V, down.mT).mT, change.scale)


def cross(change: LowRank, source: Directions, target: Directions) -> LowRank:
    """ΔW_t = U_t·(U_sᵀ·ΔW_s·V_s)·V_tᵀ for weights of unequal size (Cross-LoRA, arXiv 2508.05232, and LoRA-X).

    The directions correspond by their order. As many are used as both have. On a side of equal size the change is
    projected instead, as in lora_x; and there the two bases tell which of the target's directions are which of the
    source's: the other side's are turned by the orthogonal matrix nearest to U_sᵀ·U_t, which settles signs and the
    order of directions of nearly equal singular values. Where both sides differ nothing tells; signs are then set
    so that the cubes of a pair's entries sum up to a positive number. That is a guess.
    """
    up, down = _like(change, target)
    m = min(source.U.shape[1], target.U.shape[1])
    source, target = source.first(m), target.first(m)
    same_left, same_right = len(source.U) == len(target.U), len(source.V) == len(target.V)
    if same_left and same_right:
        return lora_x(change, target)
    if same_left:
        turn = _rotation(source.U, target.U)
    elif same_right:
        turn = _rotation(source.V, target.V)
    else:
        turn = torch.diag(_signs(source) * _signs(target))
    up = _project(target.U, up) if same_left else target.U @ (turn.mT @ (source.U.mT @ up))
    down_t = down.mT
    down_t = _project(target.V, down_t) if same_right else target.V @ (turn.mT @ (source.V.mT @ down_t))
    return LowRank(up, down_t.mT, change.scale)


def _like(change: LowRank, target: Directions) -> tuple[torch.Tensor, torch.Tensor]:
    return change.up.to(target.U.dtype), change.down.to(target.U.dtype)


def _project(U: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    return U @ (U.mT @ X)


def _carry(source: torch.Tensor, target: torch.Tensor, X: torch.Tensor) -> torch.Tensor:
    """(P_t·P_s + Q_t·Q_s)·X."""
    inside = _project(source, X)
    rest = X - inside
    return _project(target, inside) + rest - _project(target, rest)


def _rotation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The orthogonal matrix nearest to aᵀ·b."""
    U, _, Vh = torch.linalg.svd((a.mT @ b).double(), full_matrices=False)
    return (U @ Vh).to(a.dtype)


def _signs(d: Directions) -> torch.Tensor:
    """±1 per pair (u_i, v_i), whose signs are free only together."""
    # the cubes of a unit vector's entries are of the size of 1/√n: brought to one size, both have a say
    lean = (d.U**3).sum(0) * len(d.U) ** 0.5 + (d.V**3).sum(0) * len(d.V) ** 0.5
    return torch.where(lean < 0, -1.0, 1.0).to(d.U.dtype)

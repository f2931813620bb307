"""Shared bases with small free cores: Δ_ml ≈ U_l·C_ml·V_lᵀ, U_l and V_l the same for all models.

A Tucker-2 decomposition of each layer's stack of models by higher-order orthogonal iteration (De Lathauwer,
De Moor and Vandewalle 2000, "On the best rank-1 and rank-(R1,R2,…,RN) approximation of higher-order tensors",
alg. 4.2), started from the truncated HOSVD.  A step of orthogonal iteration takes the place of each
eigendecomposition: tr(UᵀSU) of a positive semidefinite S does not fall under U ← orth(S·U), so neither does
the energy that the cores keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ...lazy import torch
from .problem import Cores, Problem, Settings

_CHUNK = 1 << 23  # numbers of cores that are worked on at once
_ENOUGH = 1e-4  # of the energy in one step: what all later ones add is not worth their time


@dataclass(frozen=True)
class SharedCores:
    """The bases within the problem's bases.

    ups: per group (L, p, R) float32 with orthonormal columns; downs: (L, R, q) with orthonormal rows, both by
    descending energy and 0 behind a layer's own rank.  ranks: per group (L,) int64.  share: what is left of
    problem.total, what lies outside the problem's cores counted in.  numbers: what is stored for it.
    """

    ups: list[torch.Tensor]
    downs: list[torch.Tensor]
    ranks: list[torch.Tensor]
    share: float
    numbers: int


def shared_cores(problem: Problem, numbers: int, settings: Settings) -> SharedCores:
    """The bases that leave the least for Σ_l R_l·(n_l + k_l) + M·R_l² stored numbers, over all layers at once.

    Layers' ranks are those of the truncated HOSVDs that keep the most energy within `numbers`.  Deterministic.
    Raises what settings.check raises.
    """
    steps = _Steps(settings, 2 * sum(len(group.values) for group in problem.groups))
    starts = [_hosvd(group, steps) for group in problem.groups]
    curves = [start.curve for start in starts]
    costs = [_costs(group, curve.shape[1]) for group, curve in zip(problem.groups, curves, strict=True)]
    ranks = allot(curves, costs, numbers)
    kept, ups, downs = 0.0, [], []
    for group, start, R in zip(problem.groups, starts, ranks, strict=True):
        up, down, energy = _hooi(group, start, R, settings, steps)
        ups.append(up)
        downs.append(down)
        kept += energy
    spent = sum(int(cost.gather(1, R[:, None]).sum()) for cost, R in zip(costs, ranks, strict=True))
    share = max(problem.energy - kept, 0.0) / problem.total if problem.total > 0 else 0.0
    return SharedCores(ups, downs, ranks, share, spent)


def allot(curves: Sequence[torch.Tensor], costs: Sequence[torch.Tensor], numbers: int) -> list[torch.Tensor]:
    """Ranks (L,) int64 per group that gain the most within `numbers`.

    curves: per group (L, s + 1) float64, what a layer gains at rank 0 … s.  costs: int64 likewise, ascending.
    Each layer takes the rank of the largest gain − μ·cost, with the least μ ≥ 0 that fits (Everett 1963); what is
    then left goes to the steps that gain the most per number.  Gains need not be concave.
    """
    sizes = [len(curve) for curve in curves]
    width = max((curve.shape[1] for curve in curves), default=1)
    gain = torch.cat([_widened(curve, width, -float("inf")) for curve in curves]).cpu()
    cost = torch.cat([_widened(cost, width, 1 << 50) for cost in costs]).cpu()

    def ranks_at(mu: float) -> torch.Tensor:
        return (gain - mu * cost.double()).argmax(1)

    def spent(ranks: torch.Tensor) -> int:
        return int(cost.gather(1, ranks[:, None]).sum())

    ranks = ranks_at(0.0)
    if spent(ranks) > numbers:
        low, high = 0.0, 2 * float(gain.amax()) + 1e-300  # a number costs no more than all there is to gain
        for _ in range(100):
            middle = (low + high) / 2 if low == 0 or high < 4 * low else (low * high) ** 0.5
            low, high = (middle, high) if spent(ranks_at(middle)) > numbers else (low, middle)
        ranks = _filled(ranks_at(high), gain, cost, numbers)
    return list(ranks.split(sizes))


def _filled(ranks: torch.Tensor, gain: torch.Tensor, cost: torch.Tensor, numbers: int) -> torch.Tensor:
    """Single steps up, the largest gain per number first, as long as one fits."""
    ranks, rows, last = ranks.clone(), torch.arange(len(ranks)), gain.shape[1] - 1
    left = numbers - int(cost[rows, ranks].sum())
    while True:
        after = (ranks + 1).clamp_max(last)
        price, more = cost[rows, after] - cost[rows, ranks], gain[rows, after] - gain[rows, ranks]
        rate = torch.where((price > 0) & (price <= left) & (more > 0), more / price.clamp_min(1), 0.0)
        best = int(rate.argmax()) if len(rate) else 0
        if not len(rate) or rate[best] <= 0:
            return ranks
        ranks[best] += 1
        left -= int(price[best])


def _widened(values: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    out = values.new_full((len(values), width), fill)
    out[:, : values.shape[1]] = values
    return out


def _costs(group: Cores, width: int) -> torch.Tensor:
    """(L, width) int64: the numbers that rank 0 … width − 1 takes; prohibitive above a layer's own most."""
    R = torch.arange(width)
    numbers = group.costs.long().cpu()[:, None] * R + group.values.shape[1] * R * R
    return torch.where(group.most.cpu()[:, None] >= R, numbers, 1 << 50)


# --- the bases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """Of a group: left (L, p, p) and right (L, q, q) singular vectors, in half precision where they are large.

    curve: (L, min(p, q) + 1) float64, the energy that truncation to rank 0 … keeps.
    """

    left: torch.Tensor
    right: torch.Tensor
    curve: torch.Tensor


class _Steps:
    """Tells settings.check how far it is."""

    def __init__(self, settings: Settings, all_steps: int):
        self.check, self.all, self.done = settings.check, max(1, all_steps), 0

    def __call__(self, steps: int) -> None:
        self.done += steps
        self.check(min(1.0, self.done / self.all))


def chunks(group: Cores, order: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(indices, values) of a few layers at a time, so that memory-mapped cores are never in memory as a whole."""
    L, M, p, q = group.values.shape
    order = torch.arange(L) if order is None else order
    for index in order.split(max(1, _CHUNK // max(1, M * p * q))):
        yield index, group.values[index]


def _hosvd(group: Cores, steps: _Steps) -> _Start:
    L, _, p, q = group.values.shape
    dtype = torch.float32 if L * (p * p + q * q) <= 1 << 25 else torch.float16
    left, right = torch.empty(L, p, p, dtype=dtype), torch.empty(L, q, q, dtype=dtype)
    curve = torch.zeros(L, min(p, q) + 1, dtype=torch.float64)
    for index, C in chunks(group):
        U, V = (_eigenvectors(X @ X.mT) for X in (_side_by_side(C), _side_by_side(C.mT)))
        squares = (U.mT[:, None] @ C @ V[:, None]).square().sum(1).double()
        kept = squares.cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2)
        left[index], right[index], curve[index, 1:] = U.to("cpu", dtype), V.to("cpu", dtype), kept.cpu()
        steps(len(index))
    return _Start(left, right, curve)


def _side_by_side(C: torch.Tensor) -> torch.Tensor:
    """(B, p, M·q): all models' cores beside each other."""
    return C.transpose(1, 2).flatten(2)


def _eigenvectors(S: torch.Tensor) -> torch.Tensor:
    """Of symmetric matrices, by descending eigenvalue."""
    scale = S.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)  # far from the edges of float32
    return torch.linalg.eigh(S / scale[:, None, None]).eigenvectors.flip(2)


def _hooi(group: Cores, start: _Start, ranks: torch.Tensor, settings: Settings, steps: _Steps):
    """(ups, downs, energy kept) of a group."""
    L, _, p, q = group.values.shape
    widest = int(ranks.max()) if L else 0
    ups, downs, energy = torch.zeros(L, p, widest), torch.zeros(L, widest, q), 0.0
    for index, C in chunks(group, ranks.argsort(stable=True)):  # layers of like rank together
        R = ranks[index]
        most = int(R.max())
        live = (torch.arange(most) < R[:, None]).to(C.device, C.dtype)[:, None]  # (B, 1, R)
        U, V = (side[index, :, :most].to(C.device, C.dtype) for side in (start.left, start.right))
        U, V, kept = _iterate(C, _orthonormal(U, live), _orthonormal(V, live), live, settings)
        ups[index, :, :most], downs[index, :most] = U.cpu(), V.mT.cpu()
        energy += float(kept.sum())
        steps(len(index))
    return ups, downs, energy


def _iterate(C: torch.Tensor, U: torch.Tensor, V: torch.Tensor, live: torch.Tensor, settings: Settings):
    """(U, V, energy kept (B,) float64), rotated so that a lower rank is a part of it."""
    T = C.mT @ U[:, None]  # (B, M, q, R)
    W = T.mT @ V[:, None]  # (B, M, R, R)
    whole, kept = _energy(C), _energy(W)
    for _ in range(settings.iterations):
        V = _orthonormal((T @ W).sum(1), live)
        T = C @ V[:, None]  # (B, M, p, R)
        U = _orthonormal((T @ (T.mT @ U[:, None])).sum(1), live)
        T = C.mT @ U[:, None]
        W = T.mT @ V[:, None]
        before, kept = kept, _energy(W)
        if float((kept - before).sum()) <= max(settings.tolerance, _ENOUGH) * float(whole.sum()):
            break
    left, right = (_live_eigenvectors(X @ X.mT, live) for X in (_side_by_side(W), _side_by_side(W.mT)))
    return U @ left * live, V @ right * live, kept


def _energy(X: torch.Tensor) -> torch.Tensor:
    """(B,) float64: ‖X‖² of each layer."""
    return torch.linalg.vector_norm(X.flatten(1), dim=1, dtype=None if X.device.type == "mps" else torch.float64) ** 2


def _orthonormal(X: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span X (B, m, R)'s, 0 where they are not live."""
    return torch.linalg.qr(X * live).Q * live


def _live_eigenvectors(S: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Those within the live rows and columns of S first."""
    below = S.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)[:, None] * (live[:, 0] - 1)
    return _eigenvectors(S + torch.diag_embed(below))

"""Shared bases with small free cores: Δ_ml ≈ U_l·C_ml·V_lᵀ, U_l (n, a) and V_l (k, b) the same for all models.

A Tucker-2 decomposition of each layer's stack of models by higher-order orthogonal iteration (De Lathauwer,
De Moor and Vandewalle 2000, "On the best rank-1 and rank-(R1,R2,…,RN) approximation of higher-order tensors",
alg. 4.2), started from the truncated HOSVD.  A step of orthogonal iteration takes the place of each
eigendecomposition: tr(UᵀSU) of a positive semidefinite S does not fall under U ← orth(S·U), so neither does
the energy that the cores keep.  a and b differ: directions of a layer's short side are cheap.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ...lazy import torch
from .problem import Cores, Problem, Settings

_CHUNK = 1 << 23  # numbers of cores that are worked on at once
_ENOUGH = 1e-4  # of the energy in one step: what all later ones add is not worth their time
_NOISE = 1e-7  # of a layer's energy: what float32 adds to it
_PATH = 256  # sizes of a layer's bases that are weighed against each other, about


@dataclass(frozen=True)
class SharedCores:
    """The bases within the problem's bases.

    ups: per group (L, p, a) float32 with orthonormal columns; downs: (L, b, q) with orthonormal rows, both by
    descending energy and 0 behind a layer's own rank.  up_ranks, ranks: per group (L,) int64, how many of them.
    share: what is left of problem.total, what lies outside the problem's cores counted in.  numbers: what is stored.
    """

    ups: list[torch.Tensor]
    downs: list[torch.Tensor]
    up_ranks: list[torch.Tensor]
    ranks: list[torch.Tensor]
    share: float
    numbers: int


def shared_cores(problem: Problem, numbers: int, settings: Settings) -> SharedCores:
    """The bases that leave the least for Σ_l a_l·n_l + b_l·k_l + M·a_l·b_l stored numbers, over all layers at once.

    Ranks are those of the truncated HOSVDs that keep the most energy within `numbers`; a is b where a group's
    `rows` are not known.  Deterministic.  Raises what settings.check raises.
    """
    steps = _Steps(settings, 2 * sum(len(group.values) for group in problem.groups))
    starts = [_hosvd(group, steps) for group in problem.groups]
    chosen = allot([start.gain for start in starts], [start.cost for start in starts], numbers)
    kept, spent = 0.0, 0
    found = SharedCores([], [], [], [], 0.0, 0)
    for group, start, path in zip(problem.groups, starts, chosen, strict=True):
        a, b, cost = (table.gather(1, path[:, None])[:, 0] for table in (start.a, start.b, start.cost))
        up, down, energy = _hooi(group, start, a, b, settings, steps)
        for values, value in zip((found.ups, found.downs, found.up_ranks, found.ranks), (up, down, a, b), strict=True):
            values.append(value)
        kept, spent = kept + energy, spent + int(cost.sum())
    share = max(problem.energy - kept, 0.0) / problem.total if problem.total > 0 else 0.0
    return replace(found, share=share, numbers=spent)


def allot(curves: Sequence[torch.Tensor], costs: Sequence[torch.Tensor], numbers: int) -> list[torch.Tensor]:
    """Steps (L,) int64 per group that gain the most within `numbers`.

    curves: per group (L, s + 1) float64, what a layer gains after 0 … s steps.  costs: int64 likewise, ascending.
    Each layer takes the steps of the largest gain − μ·cost, with the least μ ≥ 0 that fits (Everett 1963); what is
    then left goes to single steps that gain the most per number.  Gains need not be concave.
    """
    sizes = [len(curve) for curve in curves]
    width = max((curve.shape[1] for curve in curves), default=1)
    gain = torch.cat([_widened(curve, width, -float("inf")) for curve in curves]).cpu()
    cost = torch.cat([_widened(cost, width, 1 << 50) for cost in costs]).cpu()

    def steps_at(mu: float) -> torch.Tensor:
        return (gain - mu * cost.double()).argmax(1)

    def spent(steps: torch.Tensor) -> int:
        return int(cost.gather(1, steps[:, None]).sum())

    steps = steps_at(0.0)
    if spent(steps) > numbers:
        low, high = 0.0, 2 * float(gain.amax()) + 1e-300  # a number costs no more than all there is to gain
        for _ in range(100):
            middle = (low + high) / 2 if low == 0 or high < 4 * low else (low * high) ** 0.5
            low, high = (middle, high) if spent(steps_at(middle)) > numbers else (low, middle)
        steps = _filled(steps_at(high), gain, cost, numbers)
    return list(steps.split(sizes))


def _filled(steps: torch.Tensor, gain: torch.Tensor, cost: torch.Tensor, numbers: int) -> torch.Tensor:
    """Single steps more, the largest gain per number first, as long as one fits."""
    steps, rows, last = steps.clone(), torch.arange(len(steps)), gain.shape[1] - 1
    left = numbers - int(cost[rows, steps].sum())
    while True:
        after = (steps + 1).clamp_max(last)
        price, more = cost[rows, after] - cost[rows, steps], gain[rows, after] - gain[rows, steps]
        rate = torch.where((price > 0) & (price <= left) & (more > 0), more / price.clamp_min(1), 0.0)
        best = int(rate.argmax()) if len(rate) else 0
        if not len(rate) or rate[best] <= 0:
            return steps
        steps[best] += 1
        left -= int(price[best])


def _widened(values: torch.Tensor, width: int, fill: float) -> torch.Tensor:
    out = values.new_full((len(values), width), fill)
    out[:, : values.shape[1]] = values
    return out


# --- the bases -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Start:
    """Of a group: left (L, p, p) and right (L, q, q) singular vectors, in half precision where they are large.

    a, b, cost: (L, s + 1) int64, gain: float64: sizes of bases that grow step by step, what they take, and the
    energy that truncation to them keeps.
    """

    left: torch.Tensor
    right: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    cost: torch.Tensor
    gain: torch.Tensor


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
        yield index, group.values[index.to(group.values.device)]


def _hosvd(group: Cores, steps: _Steps) -> _Start:
    L, M, p, q = group.values.shape
    dtype = torch.float32 if L * (p * p + q * q) <= 1 << 25 else torch.float16
    left, right = torch.empty(L, p, p, dtype=dtype), torch.empty(L, q, q, dtype=dtype)
    paths = []
    n = (group.costs / 2 if group.rows is None else group.rows).cpu().double()
    k = group.costs.cpu().double() - n
    for index, C in chunks(group):
        U, V = (_eigenvectors(X @ X.mT) for X in (_side_by_side(C), _side_by_side(C.mT)))
        squares = (U.mT[:, None] @ C @ V[:, None]).square().sum(1).cpu().double()
        table = torch.nn.functional.pad(squares.cumsum(1).cumsum(2), (1, 0, 1, 0))  # (B, p + 1, q + 1)
        unit = (_NOISE * table[:, -1:, -1:]).clamp_min(1e-300)
        most = group.most[index].cpu()
        paths.append(_path((table / unit).round() * unit, n[index], k[index], most, M, group.rows is None))
        left[index], right[index] = U.to("cpu", dtype), V.to("cpu", dtype)
        steps(len(index))
    a, b, gain = (torch.cat(parts) for parts in zip(*paths, strict=True))
    cost = (a * n[:, None] + b * k[:, None] + M * a * b).round().long()
    return _Start(left, right, a, b, cost, gain)


def _path(table: torch.Tensor, n: torch.Tensor, k: torch.Tensor, most: torch.Tensor, M: int, square: bool):
    """(a, b, gain), each (B, s + 1): from nothing, always one more of the kind that gains more per number.

    table: (B, p + 1, q + 1), what bases of a and b directions keep.  square: both kinds at once.
    """
    B, p, q = len(table), table.shape[1] - 1, table.shape[2] - 1
    rows, stride = torch.arange(B), max(1, (p + q) // _PATH)
    a, b = torch.zeros(B, dtype=torch.int64), torch.zeros(B, dtype=torch.int64)
    end_a, end_b = (most.clamp_max(min(p, q)),) * 2 if square else (torch.full((B,), p), torch.full((B,), q))
    path = [(a, b, table[rows, a, b])]
    count = -(-min(p, q) // stride) if square else -(-p // stride) - (-q // stride) - 1
    for _ in range(count):
        taller, wider = torch.minimum(a + stride, end_a), torch.minimum(b + stride, end_b)
        if square or len(path) == 1:
            a, b = taller, wider
        else:
            here = table[rows, a, b]
            price_a, price_b = (taller - a) * (n + M * b), (wider - b) * (k + M * a)
            rate_a = (table[rows, taller, b] - here) / price_a.clamp_min(1)
            rate_b = (table[rows, a, wider] - here) / price_b.clamp_min(1)
            taking_a = (price_a > 0) & ((rate_a >= rate_b) | (price_b <= 0))
            a, b = torch.where(taking_a, taller, a), torch.where(taking_a, b, wider)
        path.append((a, b, table[rows, a, b]))
    return (torch.stack(parts, 1) for parts in zip(*path, strict=True))


def _side_by_side(C: torch.Tensor) -> torch.Tensor:
    """(B, p, M·q): all models' cores beside each other."""
    return C.transpose(1, 2).flatten(2)


def _eigenvectors(S: torch.Tensor) -> torch.Tensor:
    """Of symmetric matrices, by descending eigenvalue."""
    scale = S.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-30)  # far from the edges of float32
    return torch.linalg.eigh(S / scale[:, None, None]).eigenvectors.flip(2)


def _hooi(group: Cores, start: _Start, a: torch.Tensor, b: torch.Tensor, settings: Settings, steps: _Steps):
    """(ups, downs, energy kept) of a group."""
    L, _, p, q = group.values.shape
    ups, downs, energy = torch.zeros(L, p, int(a.max())), torch.zeros(L, int(b.max()), q), 0.0
    for index, C in chunks(group, (a + b).argsort(stable=True)):  # layers of like ranks together
        steps(len(index))
        tall, wide = (_live(ranks[index], C) for ranks in (a, b))
        if not tall.shape[2] or not wide.shape[2]:
            continue
        U, V = start.left[index, :, : tall.shape[2]].to(C), start.right[index, :, : wide.shape[2]].to(C)
        U, V, kept = _iterate(C, _orthonormal(U, tall), _orthonormal(V, wide), tall, wide, settings)
        ups[index, :, : U.shape[2]], downs[index, : V.shape[2]] = U.cpu(), V.mT.cpu()
        energy += float(kept.sum())
    return ups, downs, energy


def _live(ranks: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """(B, 1, largest rank) of 1 and 0: which columns are a layer's own."""
    return (torch.arange(int(ranks.max())) < ranks[:, None]).to(C)[:, None]


def _iterate(
    C: torch.Tensor, U: torch.Tensor, V: torch.Tensor, tall: torch.Tensor, wide: torch.Tensor, settings: Settings
):
    """(U, V, energy kept (B,) float64), rotated so that a lower rank is a part of it."""
    T = C.mT @ U[:, None]  # (B, M, q, a)
    W = T.mT @ V[:, None]  # (B, M, a, b)
    whole, kept = _energy(C), _energy(W)
    for _ in range(settings.iterations):
        V = _orthonormal((T @ W).sum(1), wide)
        T = C @ V[:, None]  # (B, M, p, b)
        U = _orthonormal((T @ (T.mT @ U[:, None])).sum(1), tall)
        T = C.mT @ U[:, None]
        W = T.mT @ V[:, None]
        before, kept = kept, _energy(W)
        if float((kept - before).sum()) <= max(settings.tolerance, _ENOUGH) * float(whole.sum()):
            break
    X, Y = _side_by_side(W), _side_by_side(W.mT)
    left, right = _live_eigenvectors(X @ X.mT, tall), _live_eigenvectors(Y @ Y.mT, wide)
    return U @ left * tall, V @ right * wide, kept


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

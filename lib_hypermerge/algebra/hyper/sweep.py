"""One sweep of alternating least squares over all LoRAs of all layers: ups, downs, then the multipliers.

The model is a coupled block-term decomposition in rank-(L, L, 1) terms; updating a whole factor of all terms at
once is the alternating least squares of De Lathauwer & Nion 2008 (SIAM J. Matrix Anal. Appl. 30(3), part III),
here with the third factor, the multipliers, shared by all layers.

Shapes within a group: C (l, M, p, q) cores, A (l, R, q) downs and U (l, p, R) ups of all LoRAs, one after another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

from ...lazy import torch
from .parallel import one_thread_each
from .problem import Cores

T = TypeVar("T")

_BYTES = 8 << 20  # of cores at a time: a few of these fit every memory, and there are some for every thread
_DEVICE_BYTES = 256 << 20
_COPIED = 32 << 20  # numbers
_LEAST = 1e-30  # squares below it, such as equal models' rounding leaves, are near the end of float32
_SHIFT = 1e-6  # of a unit diagonal, for 32 rows: keeps Cholesky's factor real in float32
_DEPENDENT = 1e-6  # LoRAs are told apart down to this share of the first eigenvalue: products are float32's


@dataclass(frozen=True)
class Layout:
    """Where each LoRA's rows lie in a group. ranks: the most that any layer of the group has of each LoRA."""

    ranks: tuple[int, ...]

    @property
    def slices(self) -> list[slice]:
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @property
    def total(self) -> int:
        return sum(self.ranks)

    def expand(self, small: torch.Tensor) -> torch.Tensor:
        """(K, K) → (R, R): one number for each pair of LoRAs to one for each pair of rows."""
        counts = torch.tensor(self.ranks, device=small.device)
        return small.repeat_interleave(counts, 0).repeat_interleave(counts, 1)

    def sum_blocks(self, wide: torch.Tensor) -> torch.Tensor:
        """(l, R, R) → (K, K) float64 on the CPU: sums over layers and blocks."""
        of = torch.arange(len(self.ranks)).repeat_interleave(torch.tensor(self.ranks))
        sums = torch.zeros(len(self.ranks), self.total, dtype=torch.float64)
        sums = sums.index_add_(0, of, wide.sum(0).cpu().double())
        return torch.zeros(len(self.ranks), len(self.ranks), dtype=torch.float64).index_add_(1, of, sums)


@dataclass
class Terms:
    """What is solved for. multipliers: (M, K) float64 on the CPU.  downs: per group (L, R, q) float32, on its device.

    Rows of zeros stay so: that is how a layer has fewer ranks than its group. Ups follow from the two by least squares.
    """

    multipliers: torch.Tensor
    downs: list[torch.Tensor]
    layouts: list[Layout]

    def copy(self) -> Terms:
        return Terms(self.multipliers.clone(), [A.clone() for A in self.downs], self.layouts)

    def go_back_to(self, other: Terms) -> None:
        self.multipliers = other.multipliers.clone()
        for A, B in zip(self.downs, other.downs, strict=True):
            A.copy_(B)


@dataclass(frozen=True)
class Fixed:
    """One LoRA that stands. multipliers (M,), per group ups (L, p, r) and downs (L, r, q)."""

    multipliers: torch.Tensor
    ups: list[torch.Tensor]
    downs: list[torch.Tensor]

    def taken_from(self, C: torch.Tensor, g: int, part: slice) -> torch.Tensor:
        D = self.ups[g][part] @ self.downs[g][part]
        return C - self.multipliers.to(C)[:, None, None] * D[:, None]


@dataclass(frozen=True)
class View:
    """The cores of a problem, a few layers at a time, less what LoRAs that stand already explain of them."""

    groups: Sequence[Cores]
    fixed: tuple[Fixed, ...] = ()

    def each(self, function: Callable[[int, slice, torch.Tensor], T]) -> Iterator[T]:
        """function(group, layers, C float32) of all chunks, in their order, as many at a time as torch has threads.

        Each runs in one thread: that beats threads inside these small operations, and results do not depend on how
        many there are.
        """
        return one_thread_each(lambda chunk: function(*chunk, self._cores(*chunk)), self._chunks())

    def _chunks(self) -> list[tuple[int, slice]]:
        out = []
        for g, cores in enumerate(self.groups):
            layers, *shape = cores.values.shape
            limit = _BYTES if cores.values.device.type == "cpu" else _DEVICE_BYTES
            step = max(1, limit // (4 * max(1, math.prod(shape))))
            out += [(g, slice(start, min(start + step, layers))) for start in range(0, layers, step)]
        return out

    def _cores(self, g: int, part: slice) -> torch.Tensor:
        C = self.groups[g].values[part]
        for term in self.fixed:
            C = term.taken_from(C, g, part)
        return C

    @cached_property
    def energy(self) -> float:
        """Σ ‖C_m‖², summed in float64."""
        return sum(self.each(lambda g, part, C: float(C.square().sum((1, 2, 3)).cpu().double().sum())))

    def less(self, term: Fixed) -> View:
        """What is left beside one more LoRA: as a copy if that is small, else worked out whenever it is looked at."""
        view = View(self.groups, (*self.fixed, term))
        if sum(cores.values.numel() for cores in self.groups) > _COPIED:
            return view
        values = [torch.empty(cores.values.shape, device=cores.values.device) for cores in self.groups]
        for _ in view.each(lambda g, part, C: values[g][part].copy_(C)):
            pass
        return View([replace(cores, values=C) for cores, C in zip(self.groups, values, strict=True)])


def sweep(view: View, terms: Terms, ridge: float, *, free: bool = True, ups: list[torch.Tensor] | None = None) -> float:
    """Improves terms in place; returns Σ ‖C_m − Σ_i λ_mi U_i A_i‖² after it, inf where float32 could not hold them.

    ridge: share of each term's own energy, ‖λ_i‖²‖D_i‖², that is added to what is minimised. It keeps two terms
    from growing without bound against each other, and shifts the solution by its square only.
    free: False keeps the multipliers, scaled to norm 1.  ups: filled with (L, p, R) per group if given.
    The new downs describe their rows in the old ones' coordinates, so the two may be subtracted.
    """
    unit = normalised(terms.multipliers)
    gamma = ridged(unit.mT @ unit, ridge)
    models, count = unit.shape
    inner = torch.zeros(models, count, dtype=torch.float64)
    products = torch.zeros(count, count, dtype=torch.float64)

    def improve(g: int, part: slice, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        layout = terms.layouts[g]
        S, weights = combine(unit, C), layout.expand(gamma.to(C))
        A, bases = orthonormal(terms.downs[g][part], layout)
        U = best_ups(S, A, weights, layout)
        A = best_downs(S, U, weights, layout)
        if ups is None:
            terms.downs[g][part] = in_bases(A, bases, layout)
        else:
            terms.downs[g][part], ups[g][part] = A, U
        return inner_products(C, U, A, layout), layout.sum_blocks((U.mT @ U) * (A @ A.mT))

    for own_inner, own_products in view.each(improve):
        inner += own_inner
        products += own_products
    if not bool(inner.isfinite().all() and products.isfinite().all()):
        return math.inf
    terms.multipliers = best_multipliers(inner, products, ridge) if free else unit
    return loss_of(view.energy, terms.multipliers, inner, products)


def normalised(multipliers: torch.Tensor) -> torch.Tensor:
    return multipliers / multipliers.norm(dim=0).clamp_min(1e-300)


def ridged(gram: torch.Tensor, ridge: float) -> torch.Tensor:
    return gram + ridge * torch.diag(gram.diagonal())


def combine(multipliers: torch.Tensor, C: torch.Tensor) -> torch.Tensor:
    """(l, K, p, q): S_i = Σ_m λ_mi C_m."""
    layers, models, p, q = C.shape
    return (multipliers.mT.to(C) @ C.reshape(layers, models, p * q)).reshape(layers, -1, p, q)


def best_ups(S: torch.Tensor, A: torch.Tensor, weights: torch.Tensor, layout: Layout) -> torch.Tensor:
    """All ups given downs: U·(weights ∘ AAᵀ) = [S_i A_iᵀ]."""
    right = torch.cat([S[:, i] @ A[:, rows].mT for i, rows in enumerate(layout.slices)], 2)
    return right @ inverse(weights * (A @ A.mT))


def best_downs(S: torch.Tensor, U: torch.Tensor, weights: torch.Tensor, layout: Layout) -> torch.Tensor:
    """All downs given ups."""
    right = torch.cat([U[:, :, rows].mT @ S[:, i] for i, rows in enumerate(layout.slices)], 1)
    return inverse(weights * (U.mT @ U)) @ right


def inner_products(C: torch.Tensor, U: torch.Tensor, A: torch.Tensor, layout: Layout) -> torch.Tensor:
    """(M, K) float64 on the CPU: Σ_l ⟨C_m, U_i A_i⟩."""
    layers, models, p, q = C.shape
    D = torch.stack([(U[:, :, rows] @ A[:, rows]).flatten(1) for rows in layout.slices], 1)
    return (C.reshape(layers, models, p * q) @ D.mT).cpu().double().sum(0)


def best_multipliers(inner: torch.Tensor, products: torch.Tensor, ridge: float) -> torch.Tensor:
    """Λ·G = B for B (M, K), G (K, K), by the pseudo-inverse; 0 for a LoRA that is empty."""
    scale = products.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, 1 / scale.clamp_min(1e-150), torch.zeros_like(scale))
    G = ridged(products * scale[:, None] * scale, ridge)
    return (inner * scale) @ torch.linalg.pinv(G, rtol=_DEPENDENT, hermitian=True) * scale


def loss_of(energy: float, multipliers: torch.Tensor, inner: torch.Tensor, products: torch.Tensor) -> float:
    explained = 2 * (multipliers * inner).sum() - ((multipliers @ products) * multipliers).sum()
    return max(0.0, energy - float(explained))


def inverse(N: torch.Tensor) -> torch.Tensor:
    """Of positive semi-definite (l, R, R), after scaling to a unit diagonal; zero rows count as absent."""
    factor, scale = _factor(N)
    identity = torch.eye(N.shape[1], dtype=N.dtype, device=N.device).expand_as(N)
    W = torch.linalg.solve_triangular(factor, identity, upper=False) * _inverse_or_zero(scale)[:, None, :]
    return W.mT @ W


Bases = list[tuple[torch.Tensor, torch.Tensor]]


def orthonormal(A: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, Bases]:
    """Rows of each LoRA orthonormal (nearly so where they depend on each other), and what leads back.

    Zero rows stay zero.
    """
    out, bases = [], []
    for rows in layout.slices:
        factor, scale = _factor(A[:, rows] @ A[:, rows].mT)
        scaled = _inverse_or_zero(scale)[:, :, None] * A[:, rows]
        out.append(torch.linalg.solve_triangular(factor, scaled, upper=False))
        bases.append((factor, scale))
    return torch.cat(out, 1), bases


def in_bases(A: torch.Tensor, bases: Bases, layout: Layout) -> torch.Tensor:
    """What orthonormal did, undone."""
    parts = zip(bases, layout.slices, strict=True)
    return torch.cat([scale[:, :, None] * (factor @ A[:, rows]) for (factor, scale), rows in parts], 1)


def _factor(N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky's factor of N scaled to a unit diagonal, and the scale: N = diag(scale)·L·Lᵀ·diag(scale)."""
    diagonal = N.diagonal(dim1=1, dim2=2)
    scale = diagonal.clamp_min(_LEAST).sqrt() * (diagonal > _LEAST)
    inverse_scale = _inverse_or_zero(scale)
    unit = N * inverse_scale[:, :, None] * inverse_scale[:, None, :]
    shift = _SHIFT * max(1.0, N.shape[1] / 32)
    unit.diagonal(dim1=1, dim2=2).add_(torch.where(scale > 0, shift, 1.0))
    factor, failed = torch.linalg.cholesky_ex(unit)
    while shift < 1 and bool(failed.any()):  # rows so dependent that rounding made an eigenvalue negative
        shift *= 10
        unit.diagonal(dim1=1, dim2=2).add_(shift * (failed > 0)[:, None])
        factor, failed = torch.linalg.cholesky_ex(unit)
    return factor, scale


def _inverse_or_zero(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1 / x.clamp_min(1e-30), torch.zeros_like(x))

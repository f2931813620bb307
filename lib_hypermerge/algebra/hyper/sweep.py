"""One sweep of alternating least squares over all LoRAs of all layers: ups, downs, then the multipliers.

The model is a coupled block-term decomposition in rank-(L, L, 1) terms; updating a whole factor of all terms at
once is the alternating least squares of De Lathauwer & Nion 2008 (SIAM J. Matrix Anal. Appl. 30(3), part III),
here with the third factor, the multipliers, shared by all layers.

Shapes within a group: C (l, M, p, q) cores, A (l, R, q) downs and U (l, p, R) ups of all LoRAs, one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ...lazy import torch
from .problem import Cores

_BYTES = 16 << 20  # of cores at a time: a few of these fit every cache and every memory
_DEVICE_BYTES = 256 << 20
_SHIFT = 1e-6  # of a unit diagonal: keeps Cholesky's factor real in float32


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
        summed = wide.sum(0).cpu().double()
        return torch.stack([torch.stack([summed[a, b].sum() for b in self.slices]) for a in self.slices])


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


@dataclass(frozen=True)
class View:
    """The cores of a problem, a few layers at a time, less what terms that stand already explain of them.

    energy: what is left to explain, Σ ‖C_m‖².
    """

    groups: Sequence[Cores]
    energy: float
    fixed: Sequence[Fixed] = field(default=())

    def chunks(self) -> Iterator[tuple[int, slice, torch.Tensor]]:
        """(group, layers, C float32)."""
        for g, cores in enumerate(self.groups):
            layers, *shape = cores.values.shape
            limit = _BYTES if cores.values.device.type == "cpu" else _DEVICE_BYTES
            step = max(1, limit // (4 * max(1, shape[0] * shape[1] * shape[2])))
            for start in range(0, layers, step):
                part = slice(start, min(start + step, layers))
                C = cores.values[part]
                for term in self.fixed:
                    C = term.taken_from(C, g, part)
                yield g, part, C


@dataclass(frozen=True)
class Fixed:
    """One LoRA that stands. multipliers (M,), per group ups (L, p, r) and downs (L, r, q)."""

    multipliers: torch.Tensor
    ups: list[torch.Tensor]
    downs: list[torch.Tensor]

    def taken_from(self, C: torch.Tensor, g: int, part: slice) -> torch.Tensor:
        D = self.ups[g][part] @ self.downs[g][part]
        return C - self.multipliers.to(C)[:, None, None] * D[:, None]


def sweep(
    view: View,
    terms: Terms,
    ridge: float,
    rounds: int = 1,
    *,
    free: bool = True,
    ups: list[torch.Tensor] | None = None,
) -> float:
    """Improves terms in place; returns Σ ‖C_m − Σ_i λ_mi U_i A_i‖² after it.

    ridge: share of each term's own energy, ‖λ_i‖²‖D_i‖², that is added to what is minimised. It keeps two terms
    from growing without bound against each other, and shifts the solution by its square only.
    rounds: of ups and downs before the multipliers.  free: False keeps the multipliers, scaled to norm 1.
    ups: filled with (L, p, R) per group if given.
    """
    unit = terms.multipliers / terms.multipliers.norm(dim=0).clamp_min(1e-300)
    gamma = ridged(unit.mT @ unit, ridge)
    models, count = unit.shape
    inner = torch.zeros(models, count, dtype=torch.float64)
    products = torch.zeros(count, count, dtype=torch.float64)
    for g, part, C in view.chunks():
        layout, A = terms.layouts[g], terms.downs[g][part]
        S = combine(unit, C)
        weights = layout.expand(gamma.to(C))
        for _ in range(rounds):
            A = orthonormal(A, layout)
            U = best_ups(S, A, weights, layout)
            U = orthonormal(U.mT, layout).mT
            A = best_downs(S, U, weights, layout)
        terms.downs[g][part] = A
        if ups is not None:
            ups[g][part] = U
        inner += inner_products(C, U, A, layout)
        products += layout.sum_blocks((U.mT @ U) * (A @ A.mT))
    terms.multipliers = best_multipliers(inner, products, ridge) if free else unit
    return loss_of(view.energy, terms.multipliers, inner, products)


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
    return (inner * scale) @ torch.linalg.pinv(G, rtol=1e-10, hermitian=True) * scale


def loss_of(energy: float, multipliers: torch.Tensor, inner: torch.Tensor, products: torch.Tensor) -> float:
    explained = 2 * (multipliers * inner).sum() - ((multipliers @ products) * multipliers).sum()
    return max(0.0, energy - float(explained))


def inverse(N: torch.Tensor) -> torch.Tensor:
    """Of positive semi-definite (l, R, R), after scaling to a unit diagonal; zero rows count as absent."""
    W, scale = _whitening(N)
    return (W.mT @ W) * scale[:, :, None] * scale[:, None, :]


def orthonormal(A: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows of each LoRA orthonormal (nearly so where they depend on each other); zero rows stay zero."""
    out = []
    for rows in layout.slices:
        part = A[:, rows]
        W, scale = _whitening(part @ part.mT)
        out.append(W @ (scale[:, :, None] * part))
    return torch.cat(out, 1)


def _whitening(N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """W (l, R, R) and a scale (l, R): W·diag(scale)·N·diag(scale)·Wᵀ = 1 but for zero rows and the shift."""
    diagonal = N.diagonal(dim1=1, dim2=2)
    there = diagonal > 0
    scale = torch.where(there, diagonal.clamp_min(1e-36).rsqrt(), torch.zeros_like(diagonal))
    unit = N * scale[:, :, None] * scale[:, None, :]
    unit.diagonal(dim1=1, dim2=2).add_(torch.where(there, _SHIFT, 1.0))
    factor = torch.linalg.cholesky_ex(unit)[0]
    identity = torch.eye(N.shape[1], dtype=N.dtype, device=N.device).expand_as(N)
    return torch.linalg.solve_triangular(factor, identity, upper=False), scale

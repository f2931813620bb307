"""The last step on whole matrices: the up factors that are best for given down factors, and what is missed then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...lazy import torch
from ..lowrank import check_range

_RIDGE = 1e-6  # of each term's own energy: above what rounding in products could be amplified to


@dataclass(frozen=True)
class Fit:
    """ups: per LoRA (n, r_i) in the output's dtype.  errors: (M,) float64, ‖E_m − Σ_i λ_mi up_i·down_i‖²_F as rounded.

    inner: (M, K) float64, ⟨E_m, D_i⟩.  gram: (K, K) float64, ⟨D_i, D_j⟩.
    """

    ups: list[torch.Tensor]
    errors: torch.Tensor
    inner: torch.Tensor
    gram: torch.Tensor


def spread(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    """(…, K) → (…, Σr): each LoRA's value once for each of its directions."""
    return values.repeat_interleave(torch.tensor(list(ranks)), dim=-1)


def fit(products: torch.Tensor, downs: Sequence[torch.Tensor], multipliers: torch.Tensor, energies: torch.Tensor,
        dtype: torch.dtype) -> Fit:  # fmt: skip
    """Minimise Σ_m ‖E_m − Σ_i λ_mi B_i·A_i‖² over all B_i together, by its normal equations in float64.

    Where multipliers depend on each other and ranks exceed a layer's, many B_i do: small ones come out.
    products: (M, n, Σr) float32, E_m·[A_1; …]ᵀ.  downs: the A_i (r_i, k) as rounded for the file.
    multipliers: (M, K) float64.  energies: (M,) float64, ‖E_m‖².  Raises NumericalError if dtype cannot hold B.
    """
    ranks = [len(down) for down in downs]
    A = torch.cat([down.float() for down in downs])
    overlap = _product(A, A)
    wide = spread(multipliers, ranks)  # (M, Σr)
    normal = (wide.mT @ wide) * overlap
    right = torch.zeros(products.shape[1:], dtype=torch.float64)
    for m, product in enumerate(products):
        right.add_(product.double() * wide[m])
    ups = [up.to(dtype).contiguous() for up in _small_solution(normal, right.mT).mT.split(ranks, dim=1)]
    for up in ups:
        check_range(up, dtype)
    return measure(ups, products, overlap, multipliers, energies)


def _small_solution(N: torch.Tensor, P: torch.Tensor) -> torch.Tensor:
    """X of N·X = P, N positive semi-definite, float64; without what N hardly tells apart.

    Tikhonov's regularisation, iterated once: where N has eigenvalue e, once scaled to a unit diagonal, X misses
    (ridge / (e + ridge))² of the solution: next to nothing where N is well conditioned.
    """
    scale = N.diagonal()
    scale = torch.where(scale > 0, scale.clamp_min(1e-300).rsqrt(), torch.zeros_like(scale))
    N, P = N * scale[:, None] * scale, P * scale[:, None]
    factor, pivots = torch.linalg.lu_factor(N + _RIDGE * torch.eye(len(N), dtype=N.dtype))
    X = torch.linalg.lu_solve(factor, pivots, P)
    X += torch.linalg.lu_solve(factor, pivots, P - N @ X)
    return X * scale[:, None]


def measure(ups: list[torch.Tensor], products: torch.Tensor, overlap: torch.Tensor, multipliers: torch.Tensor,
            energies: torch.Tensor) -> Fit:  # fmt: skip
    """What ups and downs as they are miss; overlap: (Σr, Σr) float64, A·Aᵀ."""
    ranks = [up.shape[1] for up in ups]
    B = torch.cat([up.double() for up in ups], 1)
    onto = torch.stack([(B * product).sum(0) for product in products])  # (M, Σr)
    inner = torch.stack([part.sum(1) for part in onto.split(ranks, dim=1)], 1)
    both = (B.mT @ B) * overlap
    rows = torch.stack([part.sum(0) for part in both.split(ranks, dim=0)])
    gram = torch.stack([part.sum(1) for part in rows.split(ranks, dim=1)], 1)
    errors = energies - 2 * (multipliers * inner).sum(1) + ((multipliers @ gram) * multipliers).sum(1)
    return Fit(ups, errors.clamp_min(0), inner, gram)


def _product(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """X·Yᵀ in float64, some columns at a time, so that no whole copies are made."""
    out = torch.zeros(len(X), len(Y), dtype=torch.float64)
    step = max(1, (1 << 20) // max(1, len(X) + len(Y)))
    for start in range(0, X.shape[1], step):
        out += X[:, start : start + step].double() @ Y[:, start : start + step].double().mT
    return out

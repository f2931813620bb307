"""One LoRA at a time, exactly: `D_il ← SVD_r(Σ_m λ_mi (Δ_ml − Σ_{j≠i} λ_mj D_jl) / Σ_m λ_mi²)`.

Slower to converge than sweeps over all LoRAs. But these creep where singular values lie close together, which an
exact step does not mind; so it has the last word.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...lazy import torch
from .sweep import Fixed, Layout, View, best_multipliers, combine, inner_products, loss_of, orthonormal

_KRYLOV = 2  # powers beyond the rows at hand


def polish(view: View, found: list[Fixed], check: Callable[[], None]) -> tuple[list[Fixed], float]:
    """Every LoRA once, then the multipliers: (LoRAs, Σ ‖C_m − Σ_i λ_mi D_i‖²), no worse than before.

    inf and the same LoRAs where float32 could not hold them.
    """
    check()
    count = len(found)
    multipliers = torch.stack([term.multipliers for term in found], 1)
    ups = [[U.clone() for U in term.ups] for term in found]
    downs = [[A.clone() for A in term.downs] for term in found]
    inner = torch.zeros_like(multipliers)
    products = torch.zeros(count, count, dtype=torch.float64)

    def improve(g: int, part: slice, C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        S = combine(multipliers, C)
        D = torch.stack([ups[i][g][part] @ downs[i][g][part] for i in range(count)], 1)
        for i in range(count):
            T = target(S, D, multipliers, i)
            A = leading_rows(T, downs[i][g][part])
            U = T @ A.mT
            ups[i][g][part], downs[i][g][part], D[:, i] = U, A, U @ A
        layout = Layout(tuple(downs[i][g].shape[1] for i in range(count)))
        U = torch.cat([ups[i][g][part] for i in range(count)], 2)
        A = torch.cat([downs[i][g][part] for i in range(count)], 1)
        return inner_products(C, U, A, layout), layout.sum_blocks((U.mT @ U) * (A @ A.mT))

    for own_inner, own_products in view.each(improve):
        inner += own_inner
        products += own_products
    if not bool(inner.isfinite().all() and products.isfinite().all()):
        return found, math.inf
    multipliers = best_multipliers(inner, products, 0.0)
    loss = loss_of(view.energy, multipliers, inner, products)
    return [Fixed(multipliers[:, i], ups[i], downs[i]) for i in range(count)], loss


def target(S: torch.Tensor, D: torch.Tensor, multipliers: torch.Tensor, i: int) -> torch.Tensor:
    """(l, p, q): what LoRA i is to come close to, given S_i = Σ_m λ_mi C_m and the other LoRAs D, both (l, K, p, q)."""
    gamma = multipliers.mT @ multipliers
    own = float(gamma[i, i])
    if not own:
        return torch.zeros_like(S[:, i])
    weights = (gamma[i] / own).to(D)
    weights[i] = 0
    return S[:, i] / own - (weights[:, None, None] * D).sum(1)


def leading_rows(T: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(l, r, q): leading right singular vectors of T (l, p, q), as many as rows (l, r, q) has that are not 0.

    From the space of rows and what TᵀT makes of them, or of all of T where that is hardly larger.
    """
    count, q = rows.shape[1:]
    own = (rows != 0).any(2).sum(1)
    blocks = [rows]
    for _ in range(_KRYLOV):
        blocks.append(orthonormal((blocks[-1] @ T.mT) @ T, Layout((count,)))[0])
    space = torch.cat(blocks, 1)
    if space.shape[1] >= q:
        basis = torch.eye(q, device=T.device).expand(len(T), q, q)
    else:
        basis = torch.linalg.qr(space.mT)[0].mT
    image = T @ basis.mT
    vectors = torch.linalg.eigh((image.mT @ image).cpu().double())[1].flip(2)[:, :, :count]
    there = torch.arange(count) < own[:, None].cpu()
    return (vectors * there[:, None, :]).mT.to(T) @ basis


def spectra(view: View, found: Sequence[Fixed], i: int) -> list[torch.Tensor]:
    """Per group (L, min(p, q)) float64: squared singular values, descending, of LoRA i's target times Σ_m λ_mi²."""
    multipliers = torch.stack([term.multipliers for term in found], 1)

    def squares(g: int, part: slice, C: torch.Tensor) -> tuple[int, torch.Tensor]:
        D = torch.stack([term.ups[g][part] @ term.downs[g][part] for term in found], 1)
        T = target(combine(multipliers, C), D, multipliers, i)
        T = T if T.shape[1] <= T.shape[2] else T.mT
        values = torch.linalg.eigvalsh((T @ T.mT).cpu().double()).flip(1).clamp_min(0)
        return g, values * multipliers[:, i].square().sum()

    out: list[list[torch.Tensor]] = [[] for _ in view.groups]
    for g, values in view.each(squares):
        out[g].append(values)
    return [torch.cat(group) for group in out]

"""The small problem that is iterated on: what each model's change is within bases that all models share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...lazy import torch


@dataclass(frozen=True)
class Cores:
    """Layers whose cores have one shape.

    values: (L, M, p, q) float32, possibly memory-mapped: √ω_l · U_lᵀ·Δ_ml·V_l with orthonormal U_l (n, p),
    V_l (k, q).  costs: (L,) n + k, the numbers that one more rank takes.  most: (L,) min(n, k).
    rows: (L,) n, where it is known.
    """

    values: torch.Tensor
    costs: torch.Tensor
    most: torch.Tensor
    rows: torch.Tensor | None = None


@dataclass(frozen=True)
class Problem:
    """groups: all layers.  gram: (M, M) float64, Σ_l ω_l ⟨Δ_ml, Δ_m'l⟩ of the whole differences (not of the cores).

    total: what residual shares are shares of.  Minimise Σ_ml ω_l ‖Δ_ml − Σ_i λ_mi D_il‖²_F, rank(D_il) ≤ r_il.
    """

    groups: Sequence[Cores]
    gram: torch.Tensor
    total: float

    @property
    def energy(self) -> float:
        """Σ_ml ω_l ‖Δ_ml‖²_F."""
        return float(self.gram.diagonal().sum())


@dataclass
class Solution:
    """multipliers: (M, K) float64, largest |λ| of each LoRA 1 and positive.

    rooms: rows that each LoRA has in downs.  downs: per group (L, Σ rooms, q) float32: LoRA i's rows, balanced (√σ
    times orthonormal, descending), at offset Σ_{j<i} rooms_j; rows behind a layer's own rank are 0.  ups: per group
    (L, p, Σ rooms) the other factors.
    ranks: per group (L, K) int64, as many as have singular values above rounding: 0 where a layer does not change.
    loss: the residual share (of problem.total, error outside the cores counted in) after each iteration of the start
    that won; it never rises.  notes: what a person should know.
    """

    multipliers: torch.Tensor
    downs: list[torch.Tensor]
    ups: list[torch.Tensor]
    ranks: list[torch.Tensor]
    loss: list[float]
    rooms: Sequence[int] = ()
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How to solve. seed: the same gives the same solution.  check: may raise to stop; told the share done."""

    starts: int = 3
    seed: int = 0
    tolerance: float = 1e-5
    iterations: int = 200
    check: Callable[[float], None] = lambda share: None

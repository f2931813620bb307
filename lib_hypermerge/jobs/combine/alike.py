"""How alike LoRAs are: cosines of their changes, what their directions have in common, and what their sum loses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...algebra.core import core_of
from ...algebra.factored import LowRank
from ...algebra.rank import by_energy
from ...algebra.slabs import cross
from .changes import Change, Term

_MAIN = 0.9  # of a change's energy, in the directions that count for the overlap


@dataclass
class Alike:
    """Sums over a layer or many, (m, m) float64 over the m LoRAs. gram: ⟨Δ_i, Δ_j⟩ at strength 1.

    overlap, weight: the layers' overlaps times ‖Δ_i‖·‖Δ_j‖, and these; of layers in which both have factors.
    common: how many layers' matrices both change; on the diagonal, the LoRA alone.
    of_sum, of_terms: ‖Σ w·Δ‖² and Σ ‖w·Δ‖².
    """

    gram: torch.Tensor
    overlap: torch.Tensor
    weight: torch.Tensor
    common: torch.Tensor
    of_sum: float = 0.0
    of_terms: float = 0.0

    @staticmethod
    def none(count: int) -> Alike:
        gram, overlap, weight, common = torch.zeros(4, count, count, dtype=torch.float64).unbind()
        return Alike(gram, overlap, weight, common)

    def add(self, other: Alike) -> None:
        self.gram = self.gram + other.gram
        self.overlap = self.overlap + other.overlap
        self.weight = self.weight + other.weight
        self.common = self.common + other.common
        self.of_sum += other.of_sum
        self.of_terms += other.of_terms

    def cosines(self) -> list[list[float | None]]:
        """None where a LoRA changes nothing."""
        sizes = self.gram.diagonal().clamp_min(0).sqrt()
        return _table(self.gram, sizes[:, None] * sizes)

    def overlaps(self) -> list[list[float | None]]:
        """Of main directions, 0 to 1, larger changes counting more; None where no layer is changed by both."""
        return _table(self.overlap, self.weight)


def measure(terms: Sequence[Term], count: int) -> Alike:
    """Of one layer. count: of all LoRAs."""
    out = Alike.none(count)
    main = {term.index: _Directions.of(term.change) for term in terms if isinstance(term.change, LowRank)}
    for a, first in enumerate(terms):
        i = first.index
        out.common[i, i] = 1
        out.gram[i, i] = main[i].energy if i in main else _energy(first.change)
        for second in terms[:a]:
            j = second.index
            out.common[i, j] = out.common[j, i] = 1
            if i in main and j in main:
                product, shared = main[i].compared(main[j])
                size = math.sqrt(float(out.gram[i, i] * out.gram[j, j]))
                out.weight[i, j] = out.weight[j, i] = size
                out.overlap[i, j] = out.overlap[j, i] = size * shared
            else:
                product = inner(first.change, second.change)
            out.gram[i, j] = out.gram[j, i] = product
    strengths = torch.zeros(count, dtype=torch.float64)
    for term in terms:
        strengths[term.index] = term.strength
    out.of_sum = max(0.0, float(strengths @ out.gram @ strengths))
    out.of_terms = float(strengths.square() @ out.gram.diagonal())
    return out


@dataclass(frozen=True)
class _Directions:
    """The main directions of a change A = a.scale·a.up·a.down: a.up·left and a.downᵀ·right are orthonormal."""

    a: LowRank
    energy: float
    left: torch.Tensor  # (r, m) float64
    right: torch.Tensor  # (r, m)

    @staticmethod
    def of(a: LowRank) -> _Directions:
        core = core_of(a)
        S = core.S[: core.rank]
        m = min(core.rank, by_energy(S, core.energy, _MAIN, complete=True) or core.rank) if core.rank else 0
        half = S[:m].sqrt()
        return _Directions(a, core.energy, core.lift[:, :m] / half, core.drop[:m].mT / half)

    def compared(self, other: _Directions) -> tuple[float, float]:
        """(⟨A, B⟩, the overlap of the main directions as in `subspace_overlap`)."""
        ups, downs = cross(self.a.up, other.a.up), cross(self.a.down.mT, other.a.down.mT)
        m = min(self.left.shape[1], other.left.shape[1])
        sides = (self.left.mT @ ups @ other.left, self.right.mT @ downs @ other.right)
        shared = sum(float(side.square().sum()) for side in sides) / (2 * m) if m else 0.0
        return self.a.scale * other.a.scale * float((ups * downs).sum()), min(1.0, shared)


def _energy(change: Change) -> float:
    assert isinstance(change, torch.Tensor)
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2


def inner(a: Change, b: Change) -> float:
    """⟨A, B⟩ in float64, of which at least one is a matrix."""
    if isinstance(a, LowRank):
        a, b = b, a
    assert isinstance(a, torch.Tensor)
    if isinstance(b, LowRank):  # ⟨A, s·U·D⟩ = s·⟨A·Dᵀ, U⟩
        return b.scale * float(((a @ b.down.float().mT).double() * b.up.double()).sum())
    return float((a.double() * b.double()).sum())


@dataclass
class Course:
    """Sums by component and block, and over all."""

    count: int
    blocks: dict[tuple[str, str], Alike] = field(default_factory=dict)

    def add(self, component: str, block: str, own: Alike) -> None:
        self.blocks.setdefault((component, block), Alike.none(self.count)).add(own)

    @property
    def is_zero(self) -> bool:
        """Whether no LoRA changes a matrix."""
        return not any(own.gram.diagonal().any() for own in self.blocks.values())

    def to_json(self) -> dict[str, Any]:
        """cosine, overlap: matrices over the LoRAs.  pairs: [i, j], and by_block for each of these in this order.

        common: how many layers' matrices both change, be it by zeros.
        kept: ‖Σ w·Δ‖² / Σ ‖w·Δ‖², below 1 where changes cancel each other, above where they add up.
        """
        total = Alike.none(self.count)
        by_block: dict[str, dict[str, Any]] = defaultdict(dict)
        pairs = [(i, j) for i in range(self.count) for j in range(i + 1, self.count)]
        for (component, block), own in sorted(self.blocks.items(), key=_unet_first):
            total.add(own)
            cosines, overlaps = own.cosines(), own.overlaps()
            by_block[component][block] = {
                "cosine": [cosines[i][j] for i, j in pairs], "overlap": [overlaps[i][j] for i, j in pairs],
                "kept": own.of_sum / own.of_terms if own.of_terms else None,
            }  # fmt: skip
        return {
            "cosine": total.cosines(),
            "overlap": total.overlaps(),
            "common": total.common.int().tolist(),
            "kept": total.of_sum / total.of_terms if total.of_terms else None,
            "pairs": [list(pair) for pair in pairs],
            "by_block": dict(by_block),
        }


def _unet_first(item: tuple[tuple[str, str], Alike]) -> tuple[bool, str, str]:
    (component, block), _ = item
    return component != "unet", component, block


def _table(values: torch.Tensor, sizes: torch.Tensor) -> list[list[float | None]]:
    return [
        [min(1.0, max(-1.0, float(v / s))) if s > 0 else None for v, s in zip(row, of_row, strict=True)]
        for row, of_row in zip(values, sizes, strict=True)
    ]

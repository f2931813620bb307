"""How alike LoRAs are: cosines of their changes, what their directions have in common, and what their sum loses."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ...algebra import factored
from ...algebra.factored import LowRank
from ...algebra.merging.overlap import overlap_of
from ...algebra.merging.singular import singular
from .changes import Change, Term

_MAIN = 0.9  # of a change's energy, in the directions that count for the overlap


@dataclass
class Alike:
    """Sums over a layer or many, (m, m) float64 over the m LoRAs. gram: ⟨Δ_i, Δ_j⟩ at strength 1.

    overlap, weight: the layers' overlaps times ‖Δ_i‖·‖Δ_j‖, and these; of layers in which both have factors.
    of_sum, of_terms: ‖Σ w·Δ‖² and Σ ‖w·Δ‖².
    """

    gram: torch.Tensor
    overlap: torch.Tensor
    weight: torch.Tensor
    of_sum: float = 0.0
    of_terms: float = 0.0

    @staticmethod
    def none(count: int) -> Alike:
        gram, overlap, weight = torch.zeros(3, count, count, dtype=torch.float64).unbind()
        return Alike(gram, overlap, weight)

    def add(self, other: Alike) -> None:
        self.gram = self.gram + other.gram
        self.overlap = self.overlap + other.overlap
        self.weight = self.weight + other.weight
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
    for a, first in enumerate(terms):
        for second in terms[: a + 1]:
            i, j = first.index, second.index
            out.gram[i, j] = out.gram[j, i] = inner(first.change, second.change)
    low = [(term.index, term.change) for term in terms if isinstance(term.change, LowRank)]
    main = [(index, singular(change, _MAIN)) for index, change in low] if len(low) > 1 else []
    for a, (i, first) in enumerate(main):
        for j, second in main[:a]:
            size = math.sqrt(max(0.0, float(out.gram[i, i] * out.gram[j, j])))
            out.weight[i, j] = out.weight[j, i] = size
            out.overlap[i, j] = out.overlap[j, i] = size * overlap_of(first, second)
    strengths = torch.zeros(count, dtype=torch.float64)
    for term in terms:
        strengths[term.index] = term.strength
    out.of_sum = max(0.0, float(strengths @ out.gram @ strengths))
    out.of_terms = float(strengths.square() @ out.gram.diagonal())
    return out


def inner(a: Change, b: Change) -> float:
    """⟨A, B⟩ in float64."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return factored.inner(a, b)
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

    def to_json(self) -> dict[str, Any]:
        """cosine, overlap: matrices over the LoRAs.  pairs: [i, j], and by_block for each of these in this order.

        kept: ‖Σ w·Δ‖² / Σ ‖w·Δ‖², below 1 where changes cancel each other, above where they add up.
        """
        total = Alike.none(self.count)
        by_block: dict[str, dict[str, Any]] = defaultdict(dict)
        pairs = [(i, j) for i in range(self.count) for j in range(i + 1, self.count)]
        for (component, block), own in sorted(self.blocks.items()):
            total.add(own)
            cosines, overlaps = own.cosines(), own.overlaps()
            by_block[component][block] = {
                "cosine": [cosines[i][j] for i, j in pairs], "overlap": [overlaps[i][j] for i, j in pairs],
                "kept": own.of_sum / own.of_terms if own.of_terms else None,
            }  # fmt: skip
        return {
            "cosine": total.cosines(),
            "overlap": total.overlaps(),
            "kept": total.of_sum / total.of_terms if total.of_terms else None,
            "pairs": [list(pair) for pair in pairs],
            "by_block": dict(by_block),
        }


def _table(values: torch.Tensor, sizes: torch.Tensor) -> list[list[float | None]]:
    return [
        [min(1.0, max(-1.0, float(v / s))) if s > 0 else None for v, s in zip(row, of_row, strict=True)]
        for row, of_row in zip(values, sizes, strict=True)
    ]

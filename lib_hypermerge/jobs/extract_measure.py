"""What an extraction measured: errors per component and block, ranks, and the curve over ranks."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch

from ..adapters.lora import tensor_bytes
from .extract_layers import Fit, LayerResult


def _ratio(error2: float, energy: float) -> float:
    return math.sqrt(max(error2, 0.0) / energy) if energy > 0 else 0.0


@dataclass
class Measures:
    """Sums in float64 over what was written."""

    itemsize: int
    blocks: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    ranks: Counter[int] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    fell_back: int = 0
    rivals: dict[str, float] = field(default_factory=lambda: defaultdict(float))  # by component
    _spectra: list[tuple[torch.Tensor, float, int, int]] = field(default_factory=list)

    def add(self, result: LayerResult, spectrum: LayerResult) -> None:
        """Take note of a written layer; spectrum is the result that knows most of its singular values."""
        module = result.pair.tuned
        sums = self.blocks[module.component, module.block]
        sums[0] += result.factors.error2 if result.factors else result.error2
        sums[1] += result.energy
        self.methods[result.method] += 1
        self.fell_back += result.fell_back
        if result.factors is None or spectrum.S is None:
            return  # spectral shifts have neither ranks nor a curve over them
        self.ranks[result.factors.rank] += 1
        n, k = module.matrix_shape
        self._spectra.append((spectrum.S.square(), result.energy, n, k))

    def add_fit(self, result: LayerResult, fit: Fit) -> None:
        """Take note of a layer that is written in one of its fits."""
        module = result.pair.tuned
        sums = self.blocks[module.component, module.block]
        sums[0] += fit.error2
        sums[1] += result.energy
        self.rivals[module.component] += fit.rival2
        self.methods[result.method] += 1
        self.fell_back += result.fell_back
        if fit.rank is not None:
            self.ranks[fit.rank] += 1

    @property
    def error2(self) -> float:
        return math.fsum(sums[0] for sums in self.blocks.values())

    @property
    def energy(self) -> float:
        return math.fsum(sums[1] for sums in self.blocks.values())

    @property
    def relative_error(self) -> float:
        return _ratio(self.error2, self.energy)

    def by_component(self) -> dict[str, Any]:
        """component → relative error, its share of the change, and the same per block; what a family other than
        LoRA gains over one of its size."""
        out: dict[str, Any] = {}
        for component in sorted({c for c, _ in self.blocks}, reverse=True):
            own = {block: sums for (c, block), sums in sorted(self.blocks.items()) if c == component}
            error2, energy = (math.fsum(s[i] for s in own.values()) for i in (0, 1))
            out[component] = {
                "relative_error": _ratio(error2, energy),
                "share_of_change": energy / self.energy,
                "blocks": {
                    b: {"relative_error": _ratio(*s), "share_of_change": s[1] / self.energy} for b, s in own.items()
                },
            }
            if rival2 := self.rivals.get(component):
                out[component]["gain"] = 1 - math.sqrt(error2 / rival2)
        return out

    def curve(self) -> list[dict[str, float]]:
        """Error and size with no layer above a rank, for ranks as far as any spectrum is known.

        A layer of which fewer singular values are known stays at as many in error and size alike.
        """
        top = max((len(S2) for S2, *_ in self._spectra), default=0)
        ranks = sorted({1 << i for i in range(top.bit_length()) if 1 << i <= top} | ({top} if top else set()))
        return [self._point(rank) for rank in ranks]

    def _point(self, rank: int) -> dict[str, float]:
        error2, size = 0.0, 0
        for S2, energy, n, k in self._spectra:
            kept = min(rank, len(S2))
            error2 += max(energy - float(S2[:kept].sum()), 0.0)
            size += tensor_bytes(kept, n, k, self.itemsize)
        return {"rank": rank, "relative_error": _ratio(error2, self.energy), "bytes": size}

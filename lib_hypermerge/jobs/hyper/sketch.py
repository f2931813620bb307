"""The first pass: of each layer, what all models' changes have in common, small enough to iterate on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...algebra import svd
from ...algebra.hyper import bases
from ..buffers import Buffers
from ..devices import on_device
from .inputs import Layer
from .stack import Stack

_SLAB = 1 << 22  # numbers of all models that are multiplied at a time
_CACHE = 192 << 20  # bytes of one layer's differences that a worker keeps for the second look at them
SLAB_BYTES = _CACHE + (16 << 20)  # of differences and their pieces, at most
WITHIN_BYTES = 256 << 20  # of all models' Δ·Vᵀ in one layer; where it is more, columns and cores take a look each
_LOW_FROM = 1 << 18  # numbers in a layer from which cheap products pay
_ROUNDING = 4e-14  # share of a layer's energy that the rounding of the mean leaves of models that are equal in it


@dataclass(frozen=True)
class Sketch:
    """basis: (q, k) orthonormal rows V in the format they are kept in; None: the identity.  cores: (M, p, q) float32.

    gram: (M, M) float64, ⟨Δ_m, Δ_m'⟩ of the whole layer.  centre: squared norm of the mean (or base).
    """

    layer: Layer
    basis: torch.Tensor | None
    cores: torch.Tensor
    gram: torch.Tensor
    centre: float
    fell_back: bool = False


class Sketcher:
    """Called by workers with a layer. Thread-safe.

    total_rank: of all LoRAs together in one layer.  dtype: of the stored basis.
    """

    def __init__(self, stack: Stack, total_rank: int, dtype: torch.dtype, device: str, seed: int):
        self.stack, self.total_rank, self.dtype, self.device, self.seed = stack, total_rank, dtype, device, seed
        self._buffers = Buffers()

    def widths(self, layer: Layer) -> tuple[int, int]:
        return bases.width_for(self.total_rank, *layer.shape, self.stack.models)

    def sketch(self, layer: Layer) -> Sketch:
        return on_device(self.device, lambda device, fell_back: self._sketch(layer, device, fell_back))

    def gram(self, layer: Layer) -> Sketch:
        """The Gram matrix alone, which is all that LoRAs of any rank need."""
        M = self.stack.models
        gram, centre = torch.zeros(M, M, dtype=torch.float64), 0.0
        for _, _, _, own_gram, own_centre in self._slabs(layer, torch.float32, "cpu"):
            gram, centre = gram + own_gram, centre + own_centre
        if self._is_rounding(gram, centre):
            gram = torch.zeros_like(gram)
        return Sketch(layer, None, torch.empty(M, 0, 0), gram, centre)

    def _sketch(self, layer: Layer, device: str, fell_back: bool) -> Sketch:
        M, k = self.stack.models, layer.shape[1]
        p, q = self.widths(layer)
        gram, centre = torch.zeros(M, M, dtype=torch.float64), 0.0
        low = torch.bfloat16 if self._cheap(layer, q, device) else torch.float32
        omega = svd.gaussian(q, k, self.seed).mT.to(device, low).contiguous() if q < k else None
        Z = torch.zeros(k, q, device=device)
        for _, _, slab, own_gram, own_centre in self._slabs(layer, low, device):
            gram, centre = gram + own_gram, centre + own_centre
            if omega is not None:
                Z += slab.mT @ (slab @ omega)
        if not math.isfinite(float(gram.sum())):
            return Sketch(layer, None, torch.empty(0), gram, centre)
        basis = None if omega is None else bases.orthonormal(Z).to(self.dtype)
        cores = self._cores(layer, basis, low, device, p, q).cpu()
        if self._is_rounding(gram, centre):
            cores, gram = torch.zeros_like(cores), torch.zeros_like(gram)
        return Sketch(layer, None if basis is None else basis.cpu(), cores, gram, centre, fell_back)

    def _is_rounding(self, gram: torch.Tensor, centre: float) -> bool:
        """Whether the models differ by no more than their mean's rounding. gram may not be finite: then no."""
        return float(gram.trace()) <= self.stack.models * _ROUNDING * centre

    def _cheap(self, layer: Layer, q: int, device: str) -> bool:
        """Whether products in bfloat16 serve: they choose bases, and the last pass corrects what they blur."""
        n, k = layer.shape
        return q < k and device == "cpu" and n * k >= _LOW_FROM and svd.native_bf16()

    def _cores(
        self, layer: Layer, basis: torch.Tensor | None, low: torch.dtype, device: str, p: int, q: int
    ) -> torch.Tensor:
        """(M, p, q) from Δ_m·Vᵀ: held as a whole, or where all models' are too large, looked at twice more."""
        M, n = self.stack.models, layer.shape[0]
        V = None if basis is None else basis.to(device, low).mT.contiguous()

        def within() -> Iterator[tuple[int, int, torch.Tensor]]:
            for start, stop, slab, _, _ in self._slabs(layer, low, device, again=True):
                yield start, stop, (slab if V is None else slab @ V).float().view(M, stop - start, q)

        if 4 * M * n * q <= WITHIN_BYTES:
            W = torch.empty(M, n, q, device=device)
            for start, stop, rows in within():
                W[:, start:stop] = rows
            return bases.cores(W, p, self.seed + 1)
        if p >= n:
            columns = torch.eye(n, device=device)
        else:
            mixed = svd.gaussian(p, M * q, self.seed + 1).mT.to(device).view(M, q, p)
            columns = bases.orthonormal(torch.cat([torch.bmm(rows, mixed).sum(0) for _, _, rows in within()]))
        found = torch.zeros(M, len(columns), q, device=device)
        for start, stop, rows in within():
            found += columns[:, start:stop] @ rows
        return found

    def _slabs(
        self, layer: Layer, low: torch.dtype, device: str, again: bool = False
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor, float]]:
        """(first row, last row, (M·rows, k) in `low`, Gram matrix, centre's squared norm); valid until the next.

        again: a second time for the same layer, directly after the first; what fits the cache is not read anew.
        """
        M, (n, k) = self.stack.models, layer.shape
        height = max(1, min(n, _SLAB // max(1, M * k)))
        fits = M * n * k * low.itemsize <= _CACHE
        kept = self._buffers.get("slab", M * (n if fits else height) * k, low)
        nothing = torch.zeros(M, M, dtype=torch.float64)
        for start in range(0, n, height):
            stop = min(start + height, n)
            place = M * start * k if fits else 0
            slab = kept[place : place + M * (stop - start) * k].view(M, stop - start, k)
            found = (nothing, 0.0) if again and fits else self.stack.differences(layer, start, stop, slab)
            yield start, stop, slab.view(-1, k).to(device), *found

"""The first pass: of each layer, what all models' changes have in common, small enough to iterate on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...algebra import svd
from ...algebra.hyper import bases
from ..buffers import Buffers
from ..devices import is_out_of_memory, release
from .inputs import Layer
from .stack import Stack

_SLAB = 1 << 22  # numbers of all models that are multiplied at a time
_CACHE = 192 << 20  # bytes of one layer's differences that a worker keeps for the second look at them
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
        try:
            return self._sketch(layer, self.device, False)
        except RuntimeError as error:
            if self.device == "cpu" or not is_out_of_memory(error):
                raise
        release(self.device)
        return self._sketch(layer, "cpu", True)

    def gram(self, layer: Layer) -> Sketch:
        """The Gram matrix alone, which is all that LoRAs of any rank need."""
        M = self.stack.models
        gram, centre = torch.zeros(M, M, dtype=torch.float64), 0.0
        for _, _, _, own_gram, own_centre in self._slabs(layer, torch.float32, "cpu"):
            gram, centre = gram + own_gram, centre + own_centre
        return Sketch(layer, None, torch.empty(M, 0, 0), gram, centre)

    def _sketch(self, layer: Layer, device: str, fell_back: bool) -> Sketch:
        M, (n, k) = self.stack.models, layer.shape
        p, q = self.widths(layer)
        gram, centre = torch.zeros(M, M, dtype=torch.float64), 0.0
        basis, low = None, torch.float32
        if q < k:
            if device == "cpu" and n * k >= _LOW_FROM and svd.native_bf16():
                low = torch.bfloat16
            omega = svd.gaussian(q, k, self.seed).mT.to(device, low).contiguous()
            Z = torch.zeros(k, q, device=device)
            for start, stop, slab, own_gram, own_centre in self._slabs(layer, low, device):
                gram, centre = gram + own_gram, centre + own_centre
                Y = slab @ omega
                Z += (slab.mT @ Y).float() if stop - start < n else slab.mT @ Y
            if not math.isfinite(float(gram.sum())):
                return Sketch(layer, None, torch.empty(0), gram, centre)
            basis = bases.row_basis(Z).to(self.dtype)
        W = torch.empty(M, n, q, device=device)
        V = None if basis is None else basis.to(device, low).mT.contiguous()
        for start, stop, slab, own_gram, own_centre in self._slabs(layer, low, device, again=V is not None):
            if V is None:
                gram, centre = gram + own_gram, centre + own_centre
            W[:, start:stop] = (slab if V is None else slab @ V).view(M, stop - start, q)
        cores = bases.cores(W, p, self.seed + 1).cpu()
        if float(gram.trace()) <= M * _ROUNDING * centre:
            cores, gram = torch.zeros_like(cores), torch.zeros_like(gram)
        return Sketch(layer, None if basis is None else basis.cpu(), cores, gram, centre, fell_back)

    def _slabs(self, layer: Layer, low: torch.dtype, device: str, again: bool = False):
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

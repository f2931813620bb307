"""The same rows of all models, as differences to their mean or base, in pieces that stay in the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ..buffers import Buffers
from .inputs import CheckpointSource, Inputs, Layer

_PIECE = 1 << 17  # numbers of each model at a time: a few models' float32 fit the second-level cache
_SUM = 1 << 10  # products that are added up in float32


class Stack:
    """Thread-safe. weights: of the mean, of sum 1; ignored where the inputs have a base.

    centre: what the differences are taken from, the base or the weighted mean, in float32.
    """

    def __init__(self, inputs: Inputs, weights: Sequence[float] | None):
        self.inputs = inputs
        count = len(inputs.sources)
        self._weights = torch.tensor(weights or [1 / count] * count, dtype=torch.float32)
        self._base = None if inputs.base is None else CheckpointSource("base", inputs.base)
        self._relative = torch.tensor([source.relative for source in inputs.sources])
        self._buffers = Buffers()

    @property
    def models(self) -> int:
        return len(self.inputs.sources)

    def differences(self, layer: Layer, start: int, stop: int, out: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Fill out (M, stop − start, k), of any dtype, with W_m − centre.

        Returns their Gram matrix (M, M) float64, summed before out's rounding, and the centre's squared norm.
        """
        M, k = self.models, layer.shape[1]
        gram, energy = torch.zeros(M, M, dtype=torch.float64), 0.0
        for a, b, rows, centre in self._pieces(layer, start, stop):
            self._subtract(rows, centre, centre)
            gram += _gram(rows.view(M, -1))
            energy += float(_squares(centre.view(1, -1)))
            out[:, a - start : b - start].copy_(rows.view(M, b - a, k))
        return gram, energy

    def residuals(self, layer: Layer, start: int, stop: int, out: torch.Tensor, hyper: torch.Tensor) -> torch.Tensor:
        """Fill hyper (stop − start, k) with the centre, rounded to its dtype, and out (M, …) float32 with W_m − hyper.

        Returns ‖W_m − hyper‖² of each model, (M,) float64.
        """
        M, k = self.models, layer.shape[1]
        energies = torch.zeros(M, dtype=torch.float64)
        for a, b, rows, centre in self._pieces(layer, start, stop):
            rounded = hyper[a - start : b - start]
            rounded.copy_(centre.view(b - a, k))
            again = self._buffers.get("rounded", centre.numel(), torch.float32).view(centre.shape)
            again.copy_(rounded.view(centre.shape))
            self._subtract(rows, centre, again)
            energies += _squares(rows.view(M, -1))
            out[:, a - start : b - start].copy_(rows.view(M, b - a, k))
        return energies

    def _subtract(self, rows: torch.Tensor, centre: torch.Tensor, hyper: torch.Tensor) -> None:
        """rows − hyper in place. A LoRA's rows are the change of the base: base + change − hyper, small first."""
        if not self._relative.any():
            rows.sub_(hyper)
            return
        for m, relative in enumerate(self._relative.tolist()):
            if not relative:
                rows[m].sub_(hyper)
            elif hyper is not centre:
                rows[m].add_(centre - hyper)

    def _pieces(self, layer: Layer, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(first row, last row, (M, rows, k) as the sources give them, the centre's (rows, k)), until the next."""
        M, k = self.models, layer.shape[1]
        height = max(1, _PIECE // max(1, k))
        for a in range(start, stop, height):
            b = min(a + height, stop)
            rows = self._buffers.get("rows", M * (b - a) * k, torch.float32).view(M, b - a, k)
            centre = self._buffers.get("centre", (b - a) * k, torch.float32).view(b - a, k)
            for m, source in enumerate(self.inputs.sources):
                source.rows_into(layer, a, b, rows[m])
            if self._base is not None:
                self._base.rows_into(layer, a, b, centre)
            else:
                torch.mv(rows.view(M, -1).mT, self._weights, out=centre.view(-1))
            yield a, b, rows, centre


def _gram(flat: torch.Tensor) -> torch.Tensor:
    """(M, M) float64 of (M, numbers) float32. Short sums: float32 loses a hundred-thousandth in long ones."""
    M, count = flat.shape
    whole = count // _SUM * _SUM
    out = torch.zeros(M, M, dtype=torch.float64)
    if whole:
        parts = flat[:, :whole].unflatten(1, (-1, _SUM)).transpose(0, 1)
        out += torch.bmm(parts, parts.mT).double().sum(0)
    if whole < count:
        out += (flat[:, whole:] @ flat[:, whole:].mT).double()
    return out


def _squares(flat: torch.Tensor) -> torch.Tensor:
    """(M,) float64 sums of squares of (M, numbers) float32."""
    return torch.linalg.vector_norm(flat, dim=1, dtype=torch.float64).square()

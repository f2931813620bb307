"""α·tuned − β·base of one tensor, read in pieces that stay in the processor's cache."""

from __future__ import annotations

import numpy as np
import torch

from ..algebra.lowrank import Matrix
from ..files.dtypes import ITEMSIZE, torch_dtype
from ..files.source import TensorFile, TensorInfo
from .buffers import Buffers

_PIECE = 1 << 18  # elements; measured: fits the second-level cache with its conversions


class Difference:
    """Reads pairs of tensors of two files. Thread-safe; results are valid until the thread's next call."""

    def __init__(self, tuned: TensorFile, base: TensorFile, tuned_weight: float, base_weight: float):
        self.tuned, self.base = tuned, base
        self.alpha, self.beta = tuned_weight, base_weight
        self._buffers = Buffers()

    def load(self, tuned: TensorInfo, base: TensorInfo, device: str = "cpu", low: torch.dtype | None = None) -> Matrix:
        """The difference as (n, k) float32 with its squared norm (inf or nan if a number is not finite).

        low: also keep a copy in this dtype, for cheap products.
        """
        n = tuned.shape[0] if tuned.shape else 1
        if device != "cpu":
            return self._load_on(device, tuned, base, n)
        numel = tuned.numel
        out = self._buffers.get("matrix", numel, torch.float32)
        copy = None if low is None else self._buffers.get("low", numel, low)
        energy = self._fill(out, copy, tuned, base)
        shape = (n, numel // n if n else 0)
        return Matrix(out.view(shape), energy, None if copy is None else copy.view(shape))

    def energy(self, tuned: TensorInfo, base: TensorInfo) -> float:
        """The squared norm of the difference alone, in little memory."""
        total, alike = 0.0, _Alike(self)
        for _, t, b in self._pieces(tuned, base):
            piece = self._subtract(self._buffers.get("piece", t.numel(), torch.float32), t, b)
            total += float(torch.dot(piece, piece))
            alike.see(t, b)
        return 0.0 if alike else total

    def equal(self, tuned: TensorInfo, base: TensorInfo) -> bool:
        """Whether both hold the same numbers; without arithmetic where they are stored alike."""
        if tuned.dtype != base.dtype or tuned.stride is not None or base.stride is not None:
            return self.energy(tuned, base) == 0
        return all(_same_bytes(t, b) for _, t, b in self._pieces(tuned, base))

    def _load_on(self, device: str, tuned: TensorInfo, base: TensorInfo, n: int) -> Matrix:
        stored = self.tuned.read(tuned), self.base.read(base)
        alike = _Alike(self)
        alike.see(*stored)
        # MPS has no float64
        t, b = ((x.float() if x.dtype == torch.float64 else x).to(device).float() for x in stored)
        A = (self.alpha * t - self.beta * b).reshape(n, -1)
        return Matrix(A, 0.0 if alike else float(torch.linalg.vector_norm(A)) ** 2)

    def _fill(self, out: torch.Tensor, copy: torch.Tensor | None, tuned: TensorInfo, base: TensorInfo) -> float:
        energy, alike = 0.0, _Alike(self)
        for start, t, b in self._pieces(tuned, base):
            piece = self._subtract(out[start : start + t.numel()], t, b)
            energy += float(torch.dot(piece, piece))
            if copy is not None:
                copy[start : start + t.numel()].copy_(piece)
            alike.see(t, b)
        return 0.0 if alike else energy

    def _subtract(self, out: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        out.copy_(t)
        if self.alpha != 1:
            out.mul_(self.alpha)
        if b.dtype != torch.float32:
            b = self._buffers.get("base", b.numel(), torch.float32).copy_(b)
        return out.sub_(b, alpha=self.beta)

    def _pieces(self, tuned: TensorInfo, base: TensorInfo):
        """Yield (start, tuned piece, base piece) in the stored formats; each is valid until the next."""
        if tuned.stride is not None or base.stride is not None:
            yield 0, self.tuned.read(tuned).flatten(), self.base.read(base).flatten()
            return
        for start in range(0, tuned.numel, _PIECE):
            count = min(_PIECE, tuned.numel - start)
            yield (
                start,
                self._piece("raw tuned", self.tuned, tuned, start, count),
                self._piece("raw base", self.base, base, start, count),
            )

    def _piece(self, name: str, file: TensorFile, info: TensorInfo, start: int, count: int) -> torch.Tensor:
        itemsize = ITEMSIZE[info.dtype]
        raw = self._buffers.get(name, _PIECE * 8, torch.uint8)[: count * itemsize]
        array: np.ndarray = raw.numpy()
        file.read_into(info.offset + start * itemsize, array.data)
        return raw.view(torch_dtype(info.dtype))


class _Alike:
    """Whether two tensors in different formats are the same but for the coarser one's rounding.

    Pieces are shown one after another. Never true for equal formats, where a difference tells by itself.
    """

    def __init__(self, difference: Difference):
        self._seen = False
        self._tuned_rounds_to_base = self._base_rounds_to_tuned = difference.alpha == difference.beta

    def see(self, t: torch.Tensor, b: torch.Tensor) -> None:
        if t.dtype == b.dtype:
            self._tuned_rounds_to_base = self._base_rounds_to_tuned = False
            return
        self._seen = True
        self._tuned_rounds_to_base = self._tuned_rounds_to_base and _same_bytes(t.to(b.dtype), b)
        self._base_rounds_to_tuned = self._base_rounds_to_tuned and _same_bytes(b.to(t.dtype), t)

    def __bool__(self) -> bool:
        return self._seen and (self._tuned_rounds_to_base or self._base_rounds_to_tuned)


def _same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))

"""One tensor of a checkpoint with all adapters applied to it, in pieces where the adapters allow that."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from ..adapters.adapter import Adapter
from ..algebra.products import times_transposed
from ..files.source import TensorFile, TensorInfo
from .merge_plan import Step

# Elements. A piece is what one worker hands over, small enough for the allocator to use its memory again; a slab is
# what is computed on at a time, so that it stays in the second-level cache with its product. Both measured.
_PIECE, _SLAB = 1 << 21, 1 << 18


@dataclass(frozen=True)
class _Product:
    """scale · up · down_tᵀ, added to rows start…stop."""

    start: int
    stop: int
    up: torch.Tensor
    down_t: torch.Tensor
    scale: float


class TensorMerge:
    """Computes in float32, or in float64 where dtype is as wide as float32, and rounds once.

    Thread-safe: pieces of one tensor may be computed at the same time.
    """

    def __init__(self, file: TensorFile, info: TensorInfo, steps: Sequence[Step], dtype: torch.dtype):
        self.file, self.info, self.steps, self.dtype = file, info, steps, dtype
        self._wide = torch.float64 if dtype.itemsize >= 4 else torch.float32
        self._lock = threading.Lock()
        self._products: list[_Product] | None = None
        self._left = 0

    def pieces(self) -> list[tuple[int, int]]:
        """The row ranges to be asked of rows(), in order: one, unless every adapter is a plain LoRA."""
        shape = self.info.shape
        n = shape[0] if shape else 1
        splits = len(shape) > 1 and self.info.stride is None and all(step.is_product for step in self.steps)
        height = max(1, _PIECE // max(1, self.info.numel // max(1, n))) if splits else n
        found = [(start, min(start + height, n)) for start in range(0, n, height)] if splits else [(0, n)]
        self._left = len(found)
        return found

    def rows(self, start: int, stop: int) -> torch.Tensor | None:
        """Those rows of the result in dtype; None if a number in them is not finite."""
        if not all(step.is_product for step in self.steps) or len(self.info.shape) < 2:
            return self._whole()
        try:
            info = self.info if self.info.stride is not None else self.info.rows(start, stop)
            return self._add_products(self.file.read(info), start, self._prepared())
        finally:
            with self._lock:
                self._left -= 1
                if self._left <= 0:
                    self._products = None

    def _whole(self) -> torch.Tensor | None:
        out = self.file.read(self.info).to(self._wide, copy=True)
        for step in self.steps:
            rows, adapter = out[step.start : step.stop], step.load()
            change = adapter.bias_change() if step.bias else adapter.change(rows)
            assert change is not None
            rows.add_(change.to(rows.dtype).reshape(rows.shape), alpha=step.strength)
        return out.to(self.dtype) if self._fits(out) else None

    def _fits(self, numbers: torch.Tensor) -> bool:
        """Whether they are finite and stay so in the output's format. One pass, several times faster than isfinite."""
        if not numbers.numel():
            return True
        least, most = numbers.aminmax()  # NaN if there is one, and then nothing compares
        limit = torch.finfo(self.dtype).max
        return bool(least >= -limit) and bool(most <= limit)

    def _prepared(self) -> list[_Product]:
        """Every factor once per tensor, by whoever comes first."""
        with self._lock:
            if self._products is None:
                self._products = [self._product(step, step.load()) for step in self.steps]
            return self._products

    def _product(self, step: Step, adapter: Adapter) -> _Product:
        low = adapter.low_rank(self._wide)
        assert low is not None
        up, down_t = low.up.to(self._wide).contiguous(), low.down.to(self._wide).mT.contiguous()
        return _Product(step.start, step.stop, up, down_t, low.scale * step.strength)

    def _add_products(self, weight: torch.Tensor, first: int, products: list[_Product]) -> torch.Tensor | None:
        """weight: rows from `first` on, as stored."""
        out = weight if weight.dtype == self.dtype else torch.empty(weight.shape, dtype=self.dtype)
        flat, flat_out = weight.flatten(1), out.view(weight.shape[0], -1)
        n, k = flat.shape
        for start, stop in _slabs(n, k):
            slab = flat[start:stop].to(self._wide)
            for p in products:
                a, b = max(first + start, p.start), min(first + stop, p.stop)
                if a < b:
                    change = times_transposed(p.up[a - p.start : b - p.start], p.down_t)
                    slab[a - first - start : b - first - start].add_(change, alpha=p.scale)
            if not self._fits(slab):
                return None
            flat_out[start:stop].copy_(slab)
        return out


def _slabs(n: int, k: int) -> Iterator[tuple[int, int]]:
    height = max(1, _SLAB // max(1, k))
    for start in range(0, n, height):
        yield start, min(start + height, n)

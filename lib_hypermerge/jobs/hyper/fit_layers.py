"""One layer of a fit: what the model's change and the LoRAs' changes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...adapters.adapter import BIAS
from ...adapters.lora import UP_BIAS
from ...adapters.norm import SHIFT
from ...algebra.products import times_transposed
from ...files.source import TensorFile, TensorInfo
from ...layouts.adapter_file import Entry, Target
from ..adapter_inputs import LoraInput
from ..pairing import Pair

BIAS_PARTS = frozenset((BIAS, SHIFT, UP_BIAS))
_PIECE = 1 << 20  # numbers of a layer that are read and multiplied at a time


@dataclass(frozen=True)
class Use:
    """A LoRA's module and the layer's rows that it changes. index: the LoRA's, in the order of the fit."""

    index: int
    lora: LoraInput
    entry: Entry
    target: Target

    @property
    def is_factored(self) -> bool:
        """Whether the change is a product of stored factors; others are formed as matrices."""
        return self.lora.families[self.entry.key].family == "lora"


@dataclass
class Sums:
    """Of a layer or many: ‖Δ‖², inner (K,) ⟨Δ, D_i⟩ and gram (K, K) ⟨D_i, D_j⟩, float64."""

    energy: float
    inner: torch.Tensor
    gram: torch.Tensor

    @classmethod
    def zero(cls, count: int) -> Sums:
        return cls(0.0, torch.zeros(count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64))

    def add(self, other: Sums) -> None:
        self.energy += other.energy
        self.inner = self.inner + other.inner
        self.gram = self.gram + other.gram

    @property
    def is_finite(self) -> bool:
        return bool(torch.cat((torch.tensor([self.energy]), self.inner, self.gram.flatten())).isfinite().all())


class LayerFit:
    """Called by workers with a layer. Thread-safe.

    wide: products in float64 rather than float32, for models that the LoRAs give back nearly exactly.
    """

    def __init__(self, model: TensorFile, hyper: TensorFile, count: int, wide: bool):
        self.model, self.hyper, self.count = model, hyper, count
        self.dtype = torch.float64 if wide else torch.float32

    def sums(self, pair: Pair, uses: Sequence[Use]) -> Sums:
        """Reads the layer of both models some rows at a time."""
        assert pair.tuned.weight is not None and pair.base.weight is not None
        n, k = pair.base.matrix_shape
        factors = _Factors(uses, n, k, self.count, self.dtype)
        dense = [(use.index, self._dense(pair.base.weight, use, n, k)) for use in uses if not use.is_factored]
        out = Sums.zero(self.count)
        height = max(1, _PIECE // max(1, k))
        for start in range(0, n, height):
            stop = min(start + height, n)
            change = _rows(self.model, pair.tuned.weight, start, stop, self.dtype)
            change -= _rows(self.hyper, pair.base.weight, start, stop, self.dtype)
            out.energy += float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
            out.inner += factors.inner(change, start, stop)
            for i, D in dense:
                out.inner[i] += _inner(change, D[start:stop])
        out.gram = factors.gram()
        for i, D in dense:
            crossed = factors.inner(D, 0, n)
            out.gram[i] += crossed
            out.gram[:, i] += crossed
            for j, E in dense:
                out.gram[i, j] += _inner(D, E)
        return out

    def _dense(self, weight: TensorInfo, use: Use, n: int, k: int) -> torch.Tensor:
        """A change of any family as (n, k), 0 where it does not reach; that of the hyper-model's own numbers."""
        out = torch.zeros(n, k, dtype=self.dtype)
        rows = self.hyper.read(weight.rows(use.target.start, use.target.stop)).to(self.dtype)
        out[use.target.start : use.target.stop] = use.lora.load(use.entry).change(rows).flatten(1)
        return out


class _Factors:
    """All factored changes of a layer side by side: up (n, R), zero where a change does not reach, down (R, k)."""

    def __init__(self, uses: Sequence[Use], n: int, k: int, count: int, dtype: torch.dtype):
        self.count = count
        self.slices: list[tuple[int, float, slice]] = []  # (LoRA, its alpha / rank, its columns of up)
        ups, downs, first = [torch.zeros(n, 0, dtype=dtype)], [torch.zeros(0, k, dtype=dtype)], 0
        for use in uses:
            if use.is_factored:
                low = use.lora.load(use.entry).low_rank(torch.float64)
                assert low is not None  # a plain LoRA always has it
                up = torch.zeros(n, low.rank, dtype=dtype)
                up[use.target.start : use.target.stop] = low.up
                ups.append(up)
                downs.append(low.down.to(dtype))
                self.slices.append((use.index, low.scale, slice(first, first + low.rank)))
                first += low.rank
        self.up, self.down = torch.cat(ups, 1), torch.cat(downs)

    def inner(self, X: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """(K,) inner products with X (stop − start, k), which stands for those rows: ⟨X, s·U·D⟩ = s·⟨X·Dᵀ, U⟩."""
        out = torch.zeros(self.count, dtype=torch.float64)
        if self.slices:
            sums = (times_transposed(X, self.down) * self.up[start:stop]).sum(0, dtype=torch.float64)
            for i, scale, columns in self.slices:
                out[i] += scale * sums[columns].sum()
        return out

    def gram(self) -> torch.Tensor:
        """(K, K), from small products in float64: ⟨U₁D₁, U₂D₂⟩ = ⟨U₁ᵀU₂, D₁D₂ᵀ⟩."""
        out = torch.zeros(self.count, self.count, dtype=torch.float64)
        for i, s, mine in self.slices:
            up, down = self.up[:, mine].double(), self.down[mine].double()
            for j, t, others in self.slices:
                if others.start <= mine.start:
                    ups, downs = up.mT @ self.up[:, others].double(), down @ self.down[others].double().mT
                    inner = s * t * _inner(ups, downs)
                    out[i, j] += inner
                    if others.start < mine.start:
                        out[j, i] += inner
        return out


def _rows(file: TensorFile, info: TensorInfo, start: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
    return file.read(info.rows(start, stop)).flatten(1).to(dtype)


def _inner(X: torch.Tensor, Y: torch.Tensor) -> float:
    return float((X.double() * Y.double()).sum())

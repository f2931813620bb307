"""One layer: the LoRAs' changes made one by the method that was asked for, rounded, and measured as rounded."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from ...adapters import lora
from ...adapters.adapter import BIAS
from ...adapters.full import DIFF
from ...adapters.norm import SHIFT, WEIGHT
from ...algebra import rank as rank_rules
from ...algebra.core import core_of
from ...algebra.factored import LowRank
from ...algebra.lowrank import Factors, Matrix, check_range, decompose, factorise
from ...algebra.merging.merge import linear, merge
from ...algebra.side_by_side import rounded
from ...errors import NumericalError
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...layouts.module import CONV
from .alike import Alike, measure
from .changes import Change, Changes, Term, whole
from .layers import Layer
from .plan import CombinePlan
from .spec import USUAL_DENSITY

SIDE_BY_SIDE, BY_FACTORS, BY_MATRIX = "side by side", "decomposed by factors", "decomposed by whole matrices"
WHOLE, NORM, NOTHING = "whole matrices", "norms", "sums of zero"
_NOTHING = 1e-13  # squared share of the terms below which their sum in float32 is rounding
_CANCELLED = 1e-9  # squared share of the terms below which a sum of factors deserves a closer look
_POOR = 4.0  # in squared spacings of the number format: rounding that cancelling columns have made worse


@dataclass(frozen=True)
class Made:
    """A layer of the result. tensors: by their names in the file; none where nothing is left.

    rank: of its factors, 0 without.  energy, error2: ‖Δ‖² of what the method made, and of what rounding and cutting
    miss of that.  alike: of the LoRAs in this layer, None where they change no matrix.
    """

    layer: Layer
    how: str
    tensors: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    rank: int = 0
    energy: float = 0.0
    error2: float = 0.0
    alike: Alike | None = None

    @property
    def is_conv(self) -> bool:
        return self.layer.module.kind == CONV


@dataclass(frozen=True)
class Spectrum:
    """S: singular values, (m,) float64, descending.  complete: whether these are all above rounding."""

    layer: Layer
    S: torch.Tensor
    complete: bool


class LayerWork:
    """Called by workers with a layer. Thread-safe."""

    def __init__(self, plan: CombinePlan):
        self.plan, self.spec = plan, plan.spec
        self.dtype = torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])
        file = plan.model.file if plan.has_weights else None
        way = plan.spec.way
        self.changes = Changes(file, way.is_exact, self.dtype.itemsize > 2, way.first_is_special)

    def make(self, layer: Layer, rank: int | None = None) -> Made:
        """rank: under a size. Raises NumericalError that names the layer."""
        try:
            return self._norm(layer) if layer.is_norm else self._layer(layer, rank)
        except NumericalError as error:
            if layer.name in error.what or ".safetensors" in error.what:
                raise
            raise NumericalError(f"{layer.name}: {error.what}", error.why, error.hint) from None

    def spectrum(self, layer: Layer, cap: int) -> Spectrum:
        """Of what the method makes; of a matrix without factors no more than cap values, unless all come anyway."""
        terms = self.changes.of_weight(layer) if layer.changes_weight else []
        merged = self._merged(layer, terms)
        if merged is None or self._is_nothing(merged, measure(terms, len(self.plan.loras))):
            return Spectrum(layer, torch.zeros(0, dtype=torch.float64), True)
        if isinstance(merged, LowRank):
            core = core_of(merged)
            return Spectrum(layer, core.S[: core.rank], True)
        basis = decompose(_matrix(merged), min(cap, *layer.size), "auto", self.spec.seed)
        known = basis.S if basis.exact else basis.S[: len(basis.rows)]
        return Spectrum(layer, known, basis.exact)

    def _layer(self, layer: Layer, rank: int | None) -> Made:
        terms = self.changes.of_weight(layer) if layer.changes_weight else []
        alike = measure(terms, len(self.plan.loras)) if terms else None
        merged = self._merged(layer, terms)
        bias = self._bias(layer)
        factors, how = None, NOTHING
        if merged is not None and alike is not None:
            factors, how = self._factors(layer, merged, alike, rank)
        if how == WHOLE and merged is not None:
            merged = whole(merged)
            stored = _in(self.dtype, merged)
            error2, energy = float((merged - stored.float()).double().square().sum()), _energy(merged)
            tensors = [(f"{layer.name}.{DIFF}", stored.reshape(layer.shape))]
            return Made(layer, how, tensors + bias, 0, energy, error2, alike)
        if factors is None:
            return Made(layer, how, zeros(layer, self.dtype) + bias if bias else [], int(bool(bias)), alike=alike)
        tensors = list(lora.tensors(layer.name, factors.up, factors.down, layer.shape))
        return Made(layer, how, tensors + bias, factors.rank, factors.energy, factors.error2, alike)

    def _merged(self, layer: Layer, terms: Sequence[Term]) -> Change | None:
        """None where there is nothing to merge."""
        way = self.spec.way
        if not terms or (way.first_is_special and terms[0].index != 0):
            return None
        weighted = [(term.strength, term.change) for term in terms]
        if way.is_exact:
            return linear(weighted)
        return merge(
            self.spec.method, weighted,
            density=USUAL_DENSITY if self.spec.density is None else self.spec.density,
            seed=self.spec.seed ^ zlib.crc32(layer.name.encode()), energy=self.spec.directions,
        )  # fmt: skip

    def _is_nothing(self, merged: Change, alike: Alike) -> bool:
        """Whether terms have cancelled each other but for float32's rounding; factors tell that by their core."""
        return isinstance(merged, torch.Tensor) and _energy(merged) <= _NOTHING * alike.of_terms

    def _factors(self, layer: Layer, merged: Change, alike: Alike, rank: int | None) -> tuple[Factors | None, str]:
        spec = self.spec
        if not spec.cuts and not layer.has_factors:
            return None, NOTHING if self._is_nothing(whole(merged), alike) else WHOLE
        wanted = rank or spec.rank or (layer.rank if spec.energy is None else min(layer.size))
        wanted = min(wanted, *layer.size)
        if isinstance(merged, LowRank):
            return self._of_low_rank(merged, wanted, alike)
        if self._is_nothing(merged, alike):
            return None, NOTHING
        matrix = _matrix(merged)
        basis = decompose(matrix, wanted, "auto" if spec.energy is None else "exact", spec.seed)
        if spec.energy is not None:
            wanted = rank_rules.by_energy(basis.S, matrix.energy, spec.energy, complete=True) or wanted
        return factorise(matrix, basis, wanted, self.dtype), BY_MATRIX

    def _of_low_rank(self, merged: LowRank, wanted: int, alike: Alike) -> tuple[Factors | None, str]:
        """Columns side by side where all are kept, unless they cancel so much that rounding would show."""
        plain = None
        if self.spec.energy is None and self.spec.size is None and merged.rank <= wanted:
            plain = rounded(merged, self.dtype, alike.of_sum if self.spec.way.is_exact else None)
            precise = plain.error2 <= _POOR * torch.finfo(self.dtype).eps ** 2 * plain.energy
            if precise and plain.energy > _CANCELLED * alike.of_terms:
                return plain, SIDE_BY_SIDE
        core = core_of(merged)
        if core.rank == 0:
            return None, NOTHING
        if self.spec.energy is not None:
            S = core.S[: core.rank]
            wanted = rank_rules.by_energy(S, core.energy, self.spec.energy, complete=True) or core.rank
        cut = core.factors(wanted, self.dtype)
        if plain is not None and plain.error2 <= cut.error2:
            return plain, SIDE_BY_SIDE
        return cut, BY_FACTORS

    def _norm(self, layer: Layer) -> Made:
        scale, shift = self.changes.of_norm(layer), self.changes.of_bias(layer)
        if not scale.any() and not shift.any():
            return Made(layer, NOTHING)
        tensors = [(f"{layer.name}.{WEIGHT}", _in(self.dtype, scale))]
        if layer.module.bias is not None or shift.any():  # A1111 refuses a norm's scale without its shift
            tensors.append((f"{layer.name}.{SHIFT}", _in(self.dtype, shift)))
        return Made(layer, NORM, tensors)

    def _bias(self, layer: Layer) -> list[tuple[str, torch.Tensor]]:
        bias = self.changes.of_bias(layer) if layer.changes_bias else None
        return [] if bias is None or not bias.any() else [(f"{layer.name}.{BIAS}", _in(self.dtype, bias))]


def zeros(layer: Layer, dtype: torch.dtype) -> list[tuple[str, torch.Tensor]]:
    """A module that changes nothing: A1111 takes neither a bias alone nor a part of a fused attention."""
    n, k = layer.size
    empty = torch.zeros(n, 1, dtype=dtype), torch.zeros(1, k, dtype=dtype)
    return list(lora.tensors(layer.name, *empty, layer.shape))


def _in(dtype: torch.dtype, numbers: torch.Tensor) -> torch.Tensor:
    out = numbers.to(dtype)
    check_range(out, dtype)
    return out


def _matrix(change: torch.Tensor) -> Matrix:
    return Matrix(change, _energy(change))


def _energy(change: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2

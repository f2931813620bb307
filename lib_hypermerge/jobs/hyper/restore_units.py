"""One module of several LoRAs with weights as one: summed in float64, rounded once, measured as rounded."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ...adapters import lora
from ...adapters.adapter import BIAS, Adapter
from ...adapters.full import DIFF
from ...adapters.lora import UP
from ...adapters.norm import SHIFT, WEIGHT
from ...algebra.factored import LowRank, compress, weighted_sum
from ...algebra.lowrank import check_range
from ...algebra.side_by_side import rounded
from ...errors import NumericalError
from ...layouts.adapter_file import Entry, Target
from ...layouts.module import CONV, LORA_KINDS, NORM, Module
from ..adapter_inputs import LoraInput
from .fit_layers import BIAS_PARTS


@dataclass(frozen=True)
class Term:
    """A module of a LoRA, the rows of a layer that it changes, and its weight."""

    lora: LoraInput
    entry: Entry
    target: Target
    weight: float

    @property
    def rank(self) -> int:
        """Of its factors; 0 if it has none."""
        return self.entry.shapes[UP][1] if UP in self.entry.shapes else 0

    def load(self) -> Adapter:
        return self.lora.load(self.entry)


@dataclass
class Unit:
    """A module of the result. terms: none for one of zeros, which stands in for the rest of a fused attention."""

    module: Module
    terms: list[Term] = field(default_factory=list)

    @property
    def name(self) -> str:
        assert self.module.name is not None
        return self.module.name

    @property
    def is_layer(self) -> bool:
        """Whether it has factors."""
        return self.module.kind in LORA_KINDS and (not self.terms or any(term.rank for term in self.terms))

    def rank(self, most: int | None) -> int:
        """That it is written with: of all terms together, no more than asked for, no more than the layer has."""
        return max(1, min(sum(term.rank for term in self.terms), most or 1 << 30, *self.module.matrix_shape))

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Part name → shape of what is added to the layer as it is: norms, biases."""
        assert self.module.weight is not None
        names = {name for term in self.terms for name in term.entry.shapes}
        if self.module.kind == NORM:  # A1111 refuses a norm's scale without its shift
            shift = {SHIFT: self.module.weight.shape} if self.module.bias is not None else {}
            return {WEIGHT: self.module.weight.shape} | shift
        return {BIAS: self.module.weight.shape[:1]} if names & BIAS_PARTS else {}


@dataclass(frozen=True)
class Joined:
    """tensors: by their names in the file, in its dtype.  energy, error2: ‖Σ‖² and ‖Σ − written‖² of the weight."""

    name: str
    tensors: list[tuple[str, torch.Tensor]]
    is_conv: bool = False
    rank: int = 0
    energy: float = 0.0
    error2: float = 0.0


def join(unit: Unit, most: int | None, dtype: torch.dtype) -> Joined:
    """A module of the result. most: the rank asked for, None for all there is. NumericalError for NaN and overflow."""
    parts = [(f"{unit.name}.{part}", tensor) for part, tensor in _added(unit, dtype).items()]
    if not unit.is_layer:
        return Joined(unit.name, parts)
    assert unit.module.weight is not None
    n, k = unit.module.matrix_shape
    whole = _sum(unit, n, k)
    rank = unit.rank(most)
    made = rounded(whole, dtype) if whole.rank <= rank else compress(whole, dtype, rank)
    tensors = list(lora.tensors(unit.name, made.up, made.down, unit.module.weight.shape))
    return Joined(unit.name, tensors + parts, unit.module.kind == CONV, made.rank, made.energy, made.error2)


def _sum(unit: Unit, n: int, k: int) -> LowRank:
    """Factors of all terms side by side, in float64; a rank of zeros if there are none."""
    terms = []
    for term in unit.terms:
        if term.rank:
            low = term.load().low_rank(torch.float64)
            assert low is not None  # a plain LoRA always has it
            _check_finite(term, low.up, low.down)
            up = torch.zeros(n, low.rank, dtype=torch.float64)
            up[term.target.start : term.target.stop] = low.up
            terms.append((term.weight, LowRank(up, low.down, low.scale)))
    zeros = LowRank(torch.zeros(n, 1, dtype=torch.float64), torch.zeros(1, k, dtype=torch.float64))
    return weighted_sum(terms or [(1.0, zeros)])


def _check_finite(term: Term, *tensors: torch.Tensor) -> None:
    if not all(tensor.double().isfinite().all() for tensor in tensors):
        raise NumericalError(
            f"{term.entry.key} in {term.lora.path.name} holds NaN or Inf.", "The file is damaged.", "Get a sound copy."
        )


def _added(unit: Unit, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What is added to a norm or a bias, summed."""
    out = {part: torch.zeros(shape, dtype=torch.float64) for part, shape in unit.parts.items()}
    shift = next((part for part in out if part != WEIGHT), None)
    for term in unit.terms if out else ():
        adapter, rows = term.load(), slice(term.target.start, term.target.stop)
        scale = adapter.tensors.get(WEIGHT, adapter.tensors.get(DIFF))
        change = adapter.bias_change()
        if scale is not None and unit.module.kind not in LORA_KINDS:
            _check_finite(term, scale)
            out[WEIGHT][rows] += term.weight * scale.double().flatten()
        if change is not None and shift is not None:
            _check_finite(term, change)
            out[shift][rows] += term.weight * change.double()
    for part, tensor in out.items():
        check_range(tensor.to(dtype), dtype)
        out[part] = tensor.to(dtype)
    return out

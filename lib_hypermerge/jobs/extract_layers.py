"""One layer: read both weights, subtract, decompose, round, measure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..algebra import rank as rank_rules
from ..algebra import svd, svdiff
from ..algebra.lowrank import Factors, Matrix, decompose, factorise
from .devices import on_device
from .difference import Difference
from .extract_plan import ExtractPlan
from .pairing import Pair

_FIRST_GUESS = 32


@dataclass(frozen=True)
class Fit:
    """A layer in a family as it stands in the file.

    rank: None where there is none.  error2: ‖ΔW − what the rounded tensors make‖²_F.  rival2: that of a LoRA of as
    many numbers.  method: how a LoRA's factors were found.
    """

    family: str
    tensors: tuple[tuple[str, torch.Tensor], ...]
    rank: int | None
    error2: float
    rival2: float

    @property
    def nbytes(self) -> int:
        """Of the tensors, but for alpha."""
        return sum(tensor.nbytes for _, tensor in self.tensors if tensor.dim())


@dataclass(frozen=True)
class LayerResult:
    """status: written, identical or nonfinite.  Of a written layer factors, or shifts and their error2, or its
    fits by family.
    S: the singular values known, descending float64; complete tells whether these are all.
    fell_back: computed on the CPU for want of device memory."""

    pair: Pair
    status: str
    energy: float = 0.0
    factors: Factors | None = None
    shifts: torch.Tensor | None = None
    fits: dict[str, Fit] | None = None
    error2: float = 0.0
    S: torch.Tensor | None = None
    complete: bool = False
    method: str = ""
    fell_back: bool = False


class LayerWork:
    """Called by workers with a pair; rank None means that the spec's rule decides. Thread-safe."""

    def __init__(self, plan: ExtractPlan, device: str, dtype: torch.dtype):
        self.plan, self.spec, self.device, self.dtype = plan, plan.spec, device, dtype
        self.difference = Difference(plan.tuned.file, plan.base.file, plan.spec.tuned_weight, plan.spec.base_weight)
        use_low = device == "cpu" and plan.spec.method != "exact" and svd.native_bf16()
        self._low = torch.bfloat16 if use_low else None

    def extract(self, pair: Pair, rank: int | None = None) -> LayerResult:
        return self.on_device(pair, lambda matrix: self._factorise(matrix, pair, rank))

    def shifts(self, pair: Pair) -> LayerResult:
        """Spectral shifts (m,) in the output's dtype, and the error that these make."""

        def work(matrix: Matrix) -> dict:
            base = self.base_weight(pair, matrix.A.device).reshape(matrix.A.shape)
            shifts, error2 = svdiff.extract(base, matrix.A, self.dtype)
            return {"shifts": shifts.cpu(), "error2": error2, "method": "spectral"}

        return self.on_device(pair, work)

    def base_weight(self, pair: Pair, device: torch.device) -> torch.Tensor:
        """A new tensor in float32, in the weight's shape."""
        assert pair.base.weight is not None
        stored = self.plan.base.file.read(pair.base.weight)
        return stored.to(device, copy=True).float()

    def spectrum(self, pair: Pair, cap: int) -> LayerResult:
        """Singular values up to cap, without factors."""

        def values(matrix: Matrix) -> dict:
            basis = decompose(matrix, min(cap, self.plan.largest_rank(pair)), self.spec.method, self.spec.seed)
            known = basis.S if basis.exact else basis.S[: len(basis.rows)]
            return {"S": known, "complete": basis.exact}

        return self.on_device(pair, values)

    def on_device(self, pair: Pair, work: Callable[[Matrix], dict]) -> LayerResult:
        """A layer's change on the device, or on the CPU for want of memory; work answers with fields of its result."""
        return on_device(self.device, lambda device, fell_back: self._run(pair, work, device, fell_back))

    def _run(self, pair: Pair, work, device: str, fell_back: bool) -> LayerResult:
        assert pair.tuned.weight is not None and pair.base.weight is not None
        matrix = self.difference.load(pair.tuned.weight, pair.base.weight, device, self._low)
        if not math.isfinite(matrix.energy):
            return LayerResult(pair, "nonfinite")
        if matrix.energy == 0:
            return LayerResult(pair, "identical")
        return LayerResult(pair, "written", matrix.energy, fell_back=fell_back, **work(matrix))

    def _factorise(self, matrix: Matrix, pair: Pair, rank: int | None) -> dict:
        basis, rank = self._choose(matrix, pair, rank)
        factors = factorise(matrix, basis, rank, self.dtype)
        known = basis.S if basis.exact else factors.S
        method = "exact" if basis.exact else "randomised"
        return {"factors": factors, "S": known, "complete": basis.exact, "method": method}

    def _choose(self, matrix: Matrix, pair: Pair, rank: int | None) -> tuple[svd.Basis, int]:
        spec, most = self.spec, self.plan.largest_rank(pair)
        bounds = rank_rules.Bounds(min(spec.min_rank, most), most)
        if rank is None and spec.rank_rule == "fixed":
            rank = self.plan.fixed_rank(pair)
        if rank is not None:
            return decompose(matrix, rank, spec.method, spec.seed), rank
        if spec.rank_rule == "cumulative":  # needs the sum of all singular values
            basis = decompose(matrix, most, "spectrum", spec.seed)
            return basis, bounds.clamp(rank_rules.by_cumulative(basis.S, spec.rank_target or 1) or most)
        guess = min(max(_FIRST_GUESS, spec.min_rank), most)
        while True:  # widen until the rule is satisfied within what is known
            basis = decompose(matrix, guess, spec.method, spec.seed)
            S = basis.S if basis.exact else basis.S[:guess]
            found = self._by_rule(S, matrix.energy, basis.exact or guess == most)
            if found is not None and (found <= guess or guess == most):
                return basis, bounds.clamp(found)
            guess = most if found is not None else min(2 * guess, most)

    def _by_rule(self, S: torch.Tensor, energy: float, complete: bool) -> int | None:
        target = self.spec.rank_target or 1.0
        if self.spec.rank_rule == "ratio":
            return rank_rules.by_ratio(S, target, complete)
        return rank_rules.by_energy(S, energy, target, complete)

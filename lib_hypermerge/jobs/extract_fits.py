"""One layer in another family than LoRA: fitted, rounded, measured, and compared with a LoRA of the same size.

What a family may take is what a LoRA of the layer's rank takes: LoHa has half of that rank, LoKr the largest sizes
that fit. DoRA takes its magnitudes beside the factors. So that nothing is had for free, each fit is measured
against a LoRA of exactly as many numbers; where that is a fraction of a rank, the direction concerned counts for the
fraction. A fit is not finished where it will not come as close as the layer's LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..adapters import loha, lokr, lora
from ..adapters.dora import SCALE
from ..algebra import dora, hadamard, kronecker
from ..algebra.lowrank import Factors, Matrix, decompose, factorise
from .extract_layers import Fit, LayerResult, LayerWork
from .extract_spec import DORA, LOHA, LOKR, LORA
from .pairing import Pair

_WORTH = 0.01  # a round of DoRA that lessens the squared error by less is the last
_LEAST_NORM = 2.0**-14  # of a channel: below it float16, in which hosts compute the norm, has few digits or none


class FamilyWork:
    """Fits layers in several families. Called by workers; thread-safe."""

    def __init__(self, work: LayerWork):
        self.work, self.plan, self.spec, self.dtype = work, work.plan, work.spec, work.dtype

    def fits(self, pair: Pair, families: Iterable[str]) -> LayerResult:
        """The layer as a LoRA and in each of the families that has a form for its size, by family."""

        def work(matrix: Matrix) -> dict:
            layer = _Layer(self, pair, matrix)
            made = {LORA: layer.plain()}
            for family in families:
                fit = _MAKERS[family](layer)
                if fit is not None:
                    made[family] = fit
            return {"fits": made, "method": layer.method}

        return self.work.on_device(pair, work)


def kept(fits: dict[str, Fit], family: str) -> Fit:
    """The family's fit if it is closer than a LoRA of its size, and than the one of the layer's rank; else that."""
    fit, plain = fits.get(family), fits[LORA]
    return fit if fit is not None and fit.error2 < min(fit.rival2, plain.error2) else plain


class _Layer:
    """A changed layer, and the LoRA that all else is compared with."""

    def __init__(self, owner: FamilyWork, pair: Pair, matrix: Matrix):
        assert pair.tuned.weight is not None and pair.tuned.name is not None
        self.owner, self.pair, self.matrix = owner, pair, matrix
        self.name, self.shape = pair.tuned.name, pair.tuned.weight.shape
        self.n, self.k = pair.tuned.matrix_shape
        self.rank = owner.plan.fixed_rank(pair)
        basis = decompose(matrix, self.rank + 1, owner.spec.method, owner.spec.seed)
        self.lora = factorise(matrix, basis, self.rank, owner.dtype)
        self.method = "exact" if basis.exact else "randomised"
        self.next2 = float(basis.S[self.rank]) ** 2 if len(basis.S) > self.rank else 0.0

    def rival2(self, numbers: int) -> float:
        """The squared error of a LoRA of so many numbers: σ² of its directions by the share of them that it has."""
        own, wanted = self.lora.rank, numbers / (self.n + self.k)
        if wanted >= own:
            return max(self.lora.error2 - (wanted - own) * self.next2, 0.0)
        missing = (torch.arange(1, own + 1) - wanted).clamp(0, 1)
        return self.lora.error2 + float((missing * self.lora.S.square().cpu()).sum())

    def truncated(self, A: torch.Tensor) -> Factors:
        """The LoRA of another change of this layer."""
        matrix = Matrix(A, _energy(A), None if self.matrix.low is None else A.to(self.matrix.low.dtype))
        basis = decompose(matrix, self.rank, self.owner.spec.method, self.owner.spec.seed)
        return factorise(matrix, basis, self.rank, self.owner.dtype)

    def plain(self) -> Fit:
        error2 = self.lora.error2
        return Fit(LORA, self._factors(self.lora), self.lora.rank, error2, error2)

    def dora(self) -> Fit | None:
        """None where magnitudes bring less than as many numbers bring a LoRA, or where a channel is too small for its
        norm to be divided by, whatever a host computes in."""
        base = self.owner.work.base_weight(self.pair, self.matrix.A.device)
        tuned = base + self.matrix.A.reshape(self.shape)
        rival2 = self.rival2(self.lora.rank * (self.n + self.k) + self.shape[1])
        tried: list[Factors] = []

        def approximate(change: torch.Tensor) -> torch.Tensor:
            tried.append(self.truncated(change.reshape(self.n, self.k)) if tried else self.lora)
            up, down = (factor.to(change.device).float() for factor in (tried[-1].up, tried[-1].down))
            return (up @ down).reshape(self.shape)

        found = dora.fit(base, tuned, approximate, dora.INPUT, worth=_WORTH, target=rival2)
        if found is None:
            return None
        stored = found.magnitudes.to(self.owner.dtype)
        sizes = torch.cat((dora.norms(found.V, dora.INPUT).flatten(), stored.float().abs().flatten()))
        if not (sizes >= _LEAST_NORM).all() or not stored.isfinite().all():
            return None
        factors = tried[found.turn]
        tensors = (*self._factors(factors), (f"{self.name}.{SCALE}", stored.cpu()))
        return Fit(DORA, tensors, factors.rank, dora.missed(found.V, stored.float(), tuned, dora.INPUT), rival2)

    def loha(self) -> Fit | None:
        """None where half a rank is none, or where it would not come as close as the layer's LoRA."""
        rank, spec = self.rank // 2, self.owner.spec
        if rank == 0:
            return None
        found = hadamard.fit(self.matrix, rank, self.owner.dtype, spec.seed, spec.method, self.lora.error2)
        if found is None:
            return None
        rival2 = self.rival2(2 * rank * (self.n + self.k))
        return Fit(LOHA, tuple(loha.tensors(self.name, found)), rank, found.error2, rival2)

    def lokr(self) -> Fit | None:
        """None where the layer's sides have no factors that fit, or where none comes as close as the layer's LoRA."""
        channels, spec = self.shape[1], self.owner.spec
        choices = kronecker.choices(self.n, channels, self.k // channels, self.rank * (self.n + self.k))
        found = kronecker.fit(self.matrix, choices, self.owner.dtype, spec.seed, spec.method, self.lora.error2)
        if found is None:
            return None
        rank = None if found.down is None else len(found.down)
        tensors = tuple(lokr.tensors(self.name, found, self.shape))
        return Fit(LOKR, tensors, rank, found.error2, self.rival2(found.numbers))

    def _factors(self, factors: Factors) -> tuple[tuple[str, torch.Tensor], ...]:
        return tuple(lora.tensors(self.name, factors.up, factors.down, self.shape))


_MAKERS = {DORA: _Layer.dora, LOHA: _Layer.loha, LOKR: _Layer.lokr}


def _energy(A: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(A)) ** 2

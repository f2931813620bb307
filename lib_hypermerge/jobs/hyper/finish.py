"""The last pass over the files: the hyper-model's rows, the LoRAs' final factors, and what is missed, measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ...algebra.hyper import container_finish
from ...algebra.hyper import finish as algebra
from ...algebra.lowrank import check_range
from ...algebra.products import times_transposed
from ...files.dtypes import torch_dtype
from ..buffers import Buffers
from ..devices import on_device
from .inputs import Layer
from .stack import Stack

_SLAB = 1 << 21  # numbers of all models that are multiplied at a time
_PRECISE_BELOW = 1e-2  # share of a layer's change under which its error is measured from the residual itself


@dataclass(frozen=True)
class Job:
    """A layer to finish.  downs: per LoRA (r_i, q) float32, r_i may be 0.  multipliers: (M, K) float64.

    hyper: the number format of the hyper-model's rows.  box: the container's down (b, q) float32, if there is one.
    basis: (q, k), what both are in terms of; None: q is k.  up_rank: columns of the container's up.
    mix: (K, M) float64, of LoRAs without a limit: D_i = Σ_m mix_im E_m.
    """

    index: int
    layer: Layer
    downs: list[torch.Tensor]
    multipliers: torch.Tensor
    hyper: str
    box: torch.Tensor | None = None
    basis: torch.Tensor | None = None
    up_rank: int = 0
    mix: torch.Tensor | None = None


@dataclass(frozen=True)
class Box:
    """A layer of the container: up (n, a), down (b, k), cores (M, a, b). errors: (M,) float64."""

    up: torch.Tensor
    down: torch.Tensor
    cores: torch.Tensor
    errors: torch.Tensor


@dataclass
class Finished:
    """A layer as it is written.  rows: (n, k) of the hyper-model in its format.  factors: per LoRA (up, down);
    whole: or its change as one matrix (n, k).

    energies, errors: (M,) float64, ‖W_m − hyper‖² and what the LoRAs leave of it.  inner (M, K) and gram (K, K): of
    the LoRAs as rounded.  box: the container's up, down and cores, and its errors.  status: written, or nonfinite.
    """

    job: Job
    status: str
    rows: torch.Tensor
    energies: torch.Tensor
    errors: torch.Tensor
    inner: torch.Tensor
    gram: torch.Tensor
    factors: list[tuple[torch.Tensor, torch.Tensor] | None] = field(default_factory=list)
    whole: list[torch.Tensor] = field(default_factory=list)
    box: Box | None = None
    fell_back: bool = False


class Finisher:
    """Called by workers with a job. Thread-safe. dtype: of the factors."""

    def __init__(self, stack: Stack, dtype: torch.dtype, device: str):
        self.stack, self.dtype, self.device = stack, dtype, device
        self._buffers = Buffers()

    def finish(self, job: Job) -> Finished:
        return on_device(self.device, lambda device, fell_back: self._finish(job, device, fell_back))

    def _finish(self, job: Job, device: str, fell_back: bool) -> Finished:
        if job.mix is not None:
            return self._finish_whole(job, job.mix)
        M, (n, k), K = self.stack.models, job.layer.shape, job.multipliers.shape[1]
        kept = [i for i, down in enumerate(job.downs) if len(down) and bool(down.any())]
        basis = None if job.basis is None else job.basis.float()
        downs = [self._rounded(_in_terms_of(basis, job.downs[i])) for i in kept]
        box = None if job.box is None or not len(job.box) else _in_terms_of(basis, job.box).to(self.dtype)
        thin = [down.float() for down in downs] + ([] if box is None else [box.float()])
        A = torch.cat(thin).to(device).contiguous() if thin else torch.empty(0, k)
        rows = torch.empty(n, k, dtype=torch_dtype(job.hyper))
        energies, products = torch.zeros(M, dtype=torch.float64), torch.empty(M, n, len(A))
        for start, stop, slab in self._slabs(job, rows, energies):
            if len(A):
                product = times_transposed(slab.view(-1, k).to(device), A)
                products[:, start:stop] = product.view(M, stop - start, -1).cpu()
        done = Finished(
            job, "written", rows, energies, energies, torch.zeros(M, K, dtype=torch.float64),
            torch.zeros(K, K, dtype=torch.float64), [None] * K, fell_back=fell_back,
        )  # fmt: skip
        if not bool(energies.isfinite().all()):
            done.status = "nonfinite"
            return done
        if not bool(energies.any()):  # the models are equal here, and their differences were rounding
            return done
        if downs:
            width = sum(map(len, downs))
            self._fit(done, kept, downs, products[:, :, :width])
        if box is not None:
            own = products[:, :, len(A) - len(box) :].contiguous()
            made = container_finish.finish(own, box, energies, job.up_rank)
            done.box = Box(made.up, box, made.cores, made.errors)
        return done

    def _finish_whole(self, job: Job, mix: torch.Tensor) -> Finished:
        """LoRAs of any rank: sums of the models' changes themselves. On the CPU: every number is used once."""
        M, (n, k), K = self.stack.models, job.layer.shape, len(mix)
        rows, wholes = torch.empty(n, k, dtype=torch_dtype(job.hyper)), torch.empty(K, n, k, dtype=self.dtype)
        energies, errors = torch.zeros(M, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        inner, gram = torch.zeros(M, K, dtype=torch.float64), torch.zeros(K, K, dtype=torch.float64)
        for start, stop, slab in self._slabs(job, rows, energies):
            flat = slab.view(M, -1).double()
            rounded = (mix @ flat).to(self.dtype)
            wholes[:, start:stop] = rounded.view(K, stop - start, k)
            D = rounded.double()
            inner += flat @ D.mT
            gram += D @ D.mT
            errors += (flat - job.multipliers @ D).square_().sum(1)
        status = "written" if bool(energies.isfinite().all()) else "nonfinite"
        if status == "written":
            for whole in wholes:
                check_range(whole, self.dtype)
        done = Finished(job, status, rows, energies, errors, inner, gram)
        done.whole = list(wholes)
        return done

    def _fit(self, done: Finished, kept: list[int], downs: list[torch.Tensor], products: torch.Tensor) -> None:
        multipliers = done.job.multipliers[:, kept]
        fit = algebra.fit(products, downs, multipliers, done.energies, self.dtype)
        done.inner[:, kept] = fit.inner
        done.gram[torch.tensor(kept)[:, None], torch.tensor(kept)] = fit.gram
        for i, up, down in zip(kept, fit.ups, downs, strict=True):
            done.factors[i] = (up, down)
        done.errors = fit.errors
        if bool((fit.errors < _PRECISE_BELOW * done.energies).any()):
            done.errors = self._residual(done.job, fit.ups, downs, multipliers)

    def _residual(self, job: Job, ups: Sequence[torch.Tensor], downs: Sequence[torch.Tensor],
                  multipliers: torch.Tensor) -> torch.Tensor:  # fmt: skip
        """(M,) ‖E_m − Σ λ up·down‖² in float64, from the numbers themselves rather than as a difference of energies."""
        M, (n, k) = self.stack.models, job.layer.shape
        B, A = torch.cat([up.double() for up in ups], 1), torch.cat([down.double() for down in downs])
        wide = algebra.spread(multipliers, [len(down) for down in downs])
        errors = torch.zeros(M, dtype=torch.float64)
        rows, energies = torch.empty(n, k, dtype=torch_dtype(job.hyper)), torch.zeros(M, dtype=torch.float64)
        for start, stop, slab in self._slabs(job, rows, energies):
            for m in range(M):
                left = slab[m].double().addmm_(B[start:stop] * wide[m], A, alpha=-1.0)
                errors[m] += float(torch.linalg.vector_norm(left)) ** 2
        return errors

    def _slabs(self, job: Job, rows: torch.Tensor, energies: torch.Tensor) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(first row, last row, (M, rows, k) W_m − hyper), valid until the next; rows and energies are filled."""
        M, (n, k) = self.stack.models, job.layer.shape
        height = max(1, min(n, _SLAB // max(1, M * k)))
        for start in range(0, n, height):
            stop = min(start + height, n)
            slab = self._buffers.get("slab", M * (stop - start) * k, torch.float32).view(M, stop - start, k)
            energies += self.stack.residuals(job.layer, start, stop, slab, rows[start:stop])
            yield start, stop, slab

    def _rounded(self, down: torch.Tensor) -> torch.Tensor:
        """In the file's format; rows that it rounds to nothing are left out."""
        rounded = down.to(self.dtype)
        check_range(rounded, self.dtype)
        alive = rounded.any(1)
        return rounded[alive] if bool(alive.any()) else rounded[:1]


def _in_terms_of(basis: torch.Tensor | None, rows: torch.Tensor) -> torch.Tensor:
    return rows if basis is None else rows @ basis

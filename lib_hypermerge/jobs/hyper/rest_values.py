"""The numbers of what no LoRA carries: means or one model's own, and how far each model is from what is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ...errors import NumericalError
from ...files.dtypes import ITEMSIZE, torch_dtype
from ...words import percent
from .inputs import Inputs
from .rests import FIXED, MEASURED, VAE, Origin, Rest
from .spec import HyperSpec, weights_of

_PIECE = 1 << 17  # numbers of each model at a time
_ALIKE = 0.01  # relative difference up to which VAEs are one but for rounding (bf16's is 0.0017)


@dataclass(frozen=True)
class RestValue:
    """tensor: as it is written, in its format and shape.

    errors, changes: (M,) float64, ‖own − written‖² and ‖own − centre‖² of each model; the centre is the base, or the
    mean before rounding. 0 for a model that has no such tensor, and throughout for what is not measured.
    """

    tensor: torch.Tensor
    errors: torch.Tensor
    changes: torch.Tensor


class RestValues:
    """value() is thread-safe. warnings: what a person must know of the choice of a VAE.

    Different VAEs are not averaged: each was trained as a whole, and a decoder between two decoders blurs and shifts
    colours. Where they differ by more than rounding, the first model's is taken.
    """

    def __init__(
        self, inputs: Inputs, spec: HyperSpec, rests: Sequence[Rest], check: Callable[[], None] = lambda: None
    ):
        self.inputs = inputs
        count = len(inputs.sources)
        self._weights = weights_of(spec.weights, count) or [1 / count] * count
        self.warnings: list[str] = []
        vaes = [rest for rest in rests if rest.kind == VAE and rest.taken is None]
        self._vaes = self._choose_vaes(vaes, check) if vaes else ()

    def _choose_vaes(self, rests: Sequence[Rest], check: Callable[[], None]) -> tuple[int, ...]:
        """The models whose VAEs' mean is written: all that have one, or one of them; none for the template's own."""
        complete = [m for m in range(len(self.inputs.sources)) if all(m in rest.parts for rest in rests)]
        if len(complete) < 2:
            return tuple(complete)
        first, *others = complete
        whole, apart = 0.0, dict.fromkeys(others, 0.0)
        for rest in rests:
            for pieces in _pieces([rest.parts[m] for m in complete]):
                check()
                own = pieces[0].float()
                whole += float(torch.dot(own, own))
                for m, piece in zip(others, pieces[1:], strict=True):
                    if not _same(piece, pieces[0]):
                        difference = piece.float() - own
                        apart[m] += float(torch.dot(difference, difference))
            if not math.isfinite(whole + math.fsum(apart.values())):
                raise self._not_finite(rest, None)
        far = {m: math.sqrt(d / whole) for m, d in apart.items() if d > _ALIKE**2 * whole > 0}
        if far:
            labels = self.inputs.labels
            shown = ", ".join(f"{labels[m]} by {percent(share)}" for m, share in far.items())
            self.warnings.append(
                f"The models have different VAEs ({shown}), whose mean would be none: the hyper-model has that of "
                f"{labels[first]}."
            )
        return tuple(complete) if any(apart.values()) and not far else (first,)

    def value(self, rest: Rest) -> RestValue:
        """What is written for a tensor. NumericalError if a model's numbers are NaN or Inf, or become so."""
        M, parts, taken = len(self.inputs.sources), rest.parts, rest.taken
        errors, changes = torch.zeros(M, dtype=torch.float64), torch.zeros(M, dtype=torch.float64)
        if rest.kind == VAE:
            parts = {m: parts[m] for m in self._vaes}
        if not parts:
            own = taken or Origin(self.inputs.template.file, rest.info)
            return RestValue(self._converted(rest, own), errors, changes)
        weights = self._normalised(list(parts))
        out = torch.empty(rest.info.numel, dtype=torch_dtype(rest.dtype))
        origins = list(dict.fromkeys(o for o in (*parts.values(), taken, rest.centre) if o is not None))
        start = 0
        for pieces in _pieces(origins):
            wide = _widened(origins, pieces)
            own = {m: wide[origin] for m, origin in parts.items()}
            mean = _mean(own, weights)
            centre = mean if rest.centre is None else wide[rest.centre]
            stored = out[start : start + len(mean)].copy_(mean if taken is None else wide[taken])
            start += len(mean)
            written = stored.double()
            if not bool((written + mean + centre).isfinite().all()):
                raise self._not_finite(rest, taken)
            if rest.kind in MEASURED:
                distinct = {id(x): x for x in own.values()}
                far = {key: (_distance(x, written), _distance(x, centre)) for key, x in distinct.items()}
                for m, x in own.items():
                    errors[m] += far[id(x)][0]
                    changes[m] += far[id(x)][1]
        return RestValue(out.reshape(rest.info.shape), errors, changes)

    def own(self, rest: Rest, m: int) -> torch.Tensor:
        """A model's own numbers, float64; of a model without them, the written ones."""
        origin = rest.parts.get(m)
        if origin is None:
            return self.value(rest).tensor.double()
        return origin.file.read(origin.info).double()

    def _normalised(self, sources: list[int]) -> dict[int, float]:
        """Of sum 1 over those that have a tensor."""
        total = math.fsum(self._weights[m] for m in sources)
        return {m: self._weights[m] / total if total > 0 else 1 / len(sources) for m in sources}

    def _converted(self, rest: Rest, origin: Origin) -> torch.Tensor:
        """One file's own, bit for bit unless another format is asked for."""
        tensor = origin.file.read(origin.info)
        if rest.kind == FIXED or rest.dtype == origin.info.dtype:
            return tensor
        out = tensor.to(torch_dtype(rest.dtype))
        if not out.double().isfinite().all():
            raise self._not_finite(rest, origin)
        return out

    def _not_finite(self, rest: Rest, taken: Origin | None) -> NumericalError:
        origins = {self.inputs.labels[m]: origin for m, origin in rest.parts.items()}
        if taken is not None:
            origins[taken.file.path.name] = taken
        if rest.centre is not None:
            origins[rest.centre.file.path.name] = rest.centre
        bad = [label for label, o in origins.items() if not o.file.read(o.info).double().isfinite().all()]
        if bad:
            return NumericalError(
                f"{rest.label} holds NaN or Inf in {', '.join(bad)}.", "The file is damaged.", "Get a sound copy."
            )
        return NumericalError(
            f"{rest.label} does not fit the number format {str(torch_dtype(rest.dtype)).removeprefix('torch.')}.",
            "Its largest numbers overflow.", "Choose another format for the hyper-model.",
        )  # fmt: skip


def _widened(origins: Sequence[Origin], pieces: Sequence[torch.Tensor]) -> dict[Origin, torch.Tensor]:
    """In float64; what is the same as the first is the same tensor."""
    first = pieces[0].double()
    return {o: first if _same(x, pieces[0]) else x.double() for o, x in zip(origins, pieces, strict=True)}


def _mean(own: dict[int, torch.Tensor], weights: dict[int, float]) -> torch.Tensor:
    """Of equal numbers these exactly; of equal weights the sum's part, whose zeros stay zeros."""
    first, *others = own.values()
    if all(x is first for x in others):
        return first
    if len(set(weights.values())) == 1:
        return sum(others, first).div_(len(own))
    mean = torch.zeros_like(first)
    for m, x in own.items():
        mean.add_(x, alpha=weights[m])
    return mean


def _distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """‖x − y‖²."""
    return 0.0 if x is y else float((x - y).square_().sum())


def _pieces(origins: Sequence[Origin]) -> Iterator[list[torch.Tensor]]:
    """The same numbers of several tensors, flat and in their formats."""
    numel = origins[0].info.numel
    strided = {i: o.file.read(o.info).flatten() for i, o in enumerate(origins) if o.info.stride is not None}
    for start in range(0, numel, _PIECE):
        stop = min(start + _PIECE, numel)
        yield [
            strided[i][start:stop] if i in strided else _read(origin, start, stop) for i, origin in enumerate(origins)
        ]


def _read(origin: Origin, start: int, stop: int) -> torch.Tensor:
    itemsize = ITEMSIZE[origin.info.dtype]
    raw = torch.empty((stop - start) * itemsize, dtype=torch.uint8)
    origin.file.read_into(origin.info.offset + start * itemsize, raw.numpy().data)
    return raw.view(torch_dtype(origin.info.dtype))


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether both are the same bits."""
    return x.dtype == y.dtype and torch.equal(x.view(torch.uint8), y.view(torch.uint8))

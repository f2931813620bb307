"""One layer of a LoRA, brought to each of the ranks that were asked for."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ...adapters import families
from ...adapters.adapter import BIAS
from ...adapters.dora import MAGNITUDES, SCALE, Dora
from ...adapters.lora import DOWN, MID, UP
from ...algebra import projecting
from ...algebra.core import core_of
from ...algebra.factored import LowRank
from ...algebra.lowrank import Factors, Matrix, decompose, factorise
from ...algebra.padding import pad
from ...errors import NumericalError
from ...layouts.adapter_file import Entry
from ...layouts.module import CONV
from ..convert_checkpoint import is_finite
from ..convert_modules import ModuleWork, alpha_tensor, damaged
from ..convert_plan import AdapterPlan
from ..convert_restore import ALPHA, Tensors
from ..convert_units import CARRY, REFIT, Out, Source, Unit
from .pieces import Piece, arrange, stored_dtype, told
from .plan import stays
from .ranks import Spectrum, asked, by_spectrum
from .refit import refit
from .spec import FIXED, RANDOM, RSVD, SPARSE, SVD, ResizeSpec

REFITTED = "magnitudes fitted anew"

# a module of the result (by its name) and its spectrum → the rank for each rung
Choose = Callable[[str, Spectrum], list[int]]


class Spectral(Protocol):
    """A change of which the singular values are known; factors() gives its best factors of a rank."""

    @property
    def S(self) -> torch.Tensor: ...

    @property
    def rank(self) -> int: ...

    @property
    def energy(self) -> float: ...

    def factors(self, rank: int, dtype: torch.dtype) -> Factors: ...


@dataclass
class Rung:
    """What came of a layer at one rank. error2, energy: of the change.  methods: one for each module.

    errors, expected: what each method misses, and is expected to; of compared, the energy of the modules of which all
    methods could be measured.
    """

    outputs: list[tuple[Out, Tensors]] = field(default_factory=list)
    error2: float = 0.0
    energy: float = 0.0
    compared: float = 0.0
    errors: dict[str, float] = field(default_factory=dict)
    expected: dict[str, float] = field(default_factory=dict)
    methods: list[str] = field(default_factory=list)

    def add(self, what: dict[str, float], amounts: dict[str, float]) -> None:
        for method, amount in amounts.items():
            what[method] = what.get(method, 0.0) + amount


@dataclass
class Made:
    """A layer, or a module that no layer answers to (unit None)."""

    unit: Unit | None
    rungs: list[Rung]
    strange: list[str] = field(default_factory=list)  # keys of modules with NaN or Inf that were carried over


class _Whole:
    """A change that is no product of factors."""

    def __init__(self, change: torch.Tensor, most: int, everything: bool):
        self.matrix = Matrix(change, float(change.double().square().sum()))
        self._basis = decompose(self.matrix, most, "exact" if everything else "auto")
        self.S, self.energy = self._basis.S, self.matrix.energy
        self.rank = int((1e-7 * self.S[0] < self.S).sum()) if len(self.S) else 0

    def factors(self, rank: int, dtype: torch.dtype) -> Factors:
        return factorise(self.matrix, self._basis, rank, dtype)


class ResizeWork(ModuleWork):
    """Called by workers. choose: the ranks of a module.  Thread-safe."""

    def __init__(self, plan: AdapterPlan, asked_for: ResizeSpec, choose: Choose | None = None):
        super().__init__(plan)
        self.asked = asked_for
        self.choose = choose or (lambda name, found: [by_spectrum(asked_for, r, found) for r in asked_for.rungs])

    def resize(self, unit: Unit) -> Made:
        """All modules of the results that a layer gives. Raises NumericalError that names the module."""
        if unit.how == CARRY:
            made = super().make(unit)
            return Made(unit, [Rung(made.outputs) for _ in self.asked.rungs], made.strange)
        out = Made(unit, [Rung() for _ in self.asked.rungs])
        if unit.how == REFIT:
            for source, wanted in zip(unit.sources, unit.written, strict=True):
                with _naming(wanted.name):
                    self._refit(unit, source, wanted, out)
            return out
        for piece in self._pieces(unit):
            self._piece(piece, unit.module.kind == CONV, out)
        return out

    def spectra(self, unit: Unit) -> list[tuple[str, Spectrum]]:
        """Of every module of the result that a layer gives, by its name."""
        is_conv = unit.module.kind == CONV
        if unit.how == REFIT:
            found = []
            for source, wanted in zip(unit.sources, unit.written, strict=True):
                low = self._inner(source, self._sound(unit, source)).low_rank(torch.float64)
                assert low is not None
                found.append((wanted.name, self._spectrum_of_dora(low, is_conv)))
            return found
        return [
            (piece.out.name, self._spectrum(piece, self._spectral(piece, is_conv), is_conv))
            for piece in self._pieces(unit)
        ]

    def other(self, entry: Entry) -> Made:
        """A module that no layer answers to: resized if it is a plain LoRA, else as it is."""
        tensors, finite = self.verbatim(entry)
        out = Made(None, [Rung() for _ in self.asked.rungs], [] if finite else [entry.key])
        name = Out(entry.key, 0, 0)
        if not (finite and UP in tensors and DOWN in tensors and MID not in tensors) or set(MAGNITUDES) & set(tensors):
            for rung in out.rungs:
                rung.outputs.append((name, tensors))
            return out
        low = families.build({k: t for k, t in tensors.items() if k in (UP, DOWN, ALPHA, "scale")}).low_rank()
        assert low is not None
        shape = (len(low.up), *tensors[DOWN].shape[1:])
        beside = {k: t for k, t in tensors.items() if k == BIAS}
        piece = Piece(name, shape, low, stored_dtype(tensors), tensors, beside)
        self._piece(piece, len(shape) == 4 and shape[2:] != (1, 1), out)
        return out

    # --- modules of the result --------------------------------------------------------------------------------------

    def _pieces(self, unit: Unit) -> list[Piece]:
        made = []
        for source in unit.sources:
            tensors = self._sound(unit, source)
            weight = self._weight(unit, source, torch.float32)
            made.append(told(source, tensors, self._adapter(source, tensors), weight))
        return arrange(unit, made)

    def _sound(self, unit: Unit, source: Source) -> Tensors:
        """A module's tensors as kohya's files have them. NumericalError if one holds NaN or Inf."""
        tensors, known = self._read(unit, source)
        if not all(is_finite(t) for t in tensors.values() if t.is_floating_point()):
            raise damaged(source)
        return self._told(source, tensors, known)

    def _spectral(self, piece: Piece, is_conv: bool) -> Spectral:
        if isinstance(piece.change, LowRank):
            return core_of(piece.change)
        everything = self.asked.rank_rule != FIXED
        most = piece.own_rank if everything else min(piece.own_rank, max(self._wanted(is_conv)))
        return _Whole(piece.change, most, everything)

    def _spectrum(self, piece: Piece, core: Spectral, is_conv: bool) -> Spectrum:
        cost = sum(piece.size) * (self.dtype or piece.dtype).itemsize
        return Spectrum(core.S, core.rank, cost, is_conv, piece.own_rank)

    def _spectrum_of_dora(self, low: LowRank, is_conv: bool) -> Spectrum:
        """Of what magnitudes are put on."""
        core, dtype = core_of(low), self.dtype or stored_dtype({UP: low.up, DOWN: low.down})
        return Spectrum(core.S, core.rank, (len(low.up) + low.down.shape[1]) * dtype.itemsize, is_conv, low.rank)

    def _piece(self, piece: Piece, is_conv: bool, out: Made) -> None:
        with _naming(piece.out.name):
            core = self._spectral(piece, is_conv)
            ranks = self.choose(piece.out.name, self._spectrum(piece, core, is_conv))
            for rung, wanted, rank in zip(out.rungs, self._wanted(is_conv), ranks, strict=True):
                self._rung(piece, core, rank, wanted, rung)

    def _wanted(self, is_conv: bool) -> list[int]:
        """The rank that every module shall have, where lower ones are filled up."""
        return [asked(self.asked, rung, is_conv) for rung in self.asked.rungs]

    def _rung(self, piece: Piece, core: Spectral, rank: int, wanted: int, rung: Rung) -> None:
        method, stored = self.asked.method, piece.stored
        rung.energy += core.energy
        keeps = stored is not None and self.asked.rank_rule == FIXED and len(stored[DOWN]) <= wanted
        if keeps and stored is not None:
            tensors = {k: t for k, t in stored.items() if k != BIAS}
            rung.methods.append("as it was")
            error2 = 0.0
        else:
            factors = self._factors_by(method, piece, core, rank)
            tensors = self._tensors(piece, factors)
            rung.methods.append(method if isinstance(piece.change, LowRank) else "decomposed")
            error2 = factors.error2
        rung.error2 += error2
        self._measure(piece, core, rank, method, error2, keeps, rung)
        if self.asked.fill:
            tensors = _filled(tensors, wanted, self._seed(piece))
        rung.outputs.append((piece.out, tensors | piece.beside))

    def _measure(
        self, piece: Piece, core: Spectral, rank: int, method: str, error2: float, keeps: bool, rung: Rung
    ) -> None:
        """What each method misses: of the one that was chosen, of the best, and in a preview of all."""
        methods = (SVD, RSVD, RANDOM, SPARSE) if self.asked.preview else (method, SVD)
        errors = {method: error2}
        for other in dict.fromkeys(methods):
            if other != method:
                errors[other] = 0.0 if keeps else self._factors_by(other, piece, core, rank).error2
        rung.compared += core.energy
        rung.add(rung.errors, errors)
        rung.add(rung.expected, {
            kind: 0.0 if keeps else projecting.expected_error2(_factored(piece.change), rank, kind == SPARSE)
            for kind in (RANDOM, SPARSE) if kind in errors
        })  # fmt: skip

    def _factors_by(self, method: str, piece: Piece, core: Spectral, rank: int) -> Factors:
        dtype, change = self.dtype or piece.dtype, piece.change
        if method == SVD or (method == RSVD and not isinstance(change, LowRank)):
            return core.factors(rank, dtype)
        low = _factored(change)
        if method == RSVD:
            return projecting.randomised(low, rank, dtype, self._seed(piece))
        return projecting.random_projection(low, rank, dtype, self._seed(piece), sparse=method == SPARSE)

    def _seed(self, piece: Piece) -> int:
        return (self.asked.seed + zlib.crc32(piece.out.name.encode())) % (1 << 62)

    def _tensors(self, piece: Piece, factors: Factors) -> Tensors:
        up, down = factors.up, factors.down
        if len(piece.shape) == 4:
            up, down = up[..., None, None], down.reshape(len(down), *piece.shape[1:])
        return {UP: up, DOWN: down, ALPHA: alpha_tensor(len(down), up.dtype)}

    # --- DoRA -------------------------------------------------------------------------------------------------------

    def _inner(self, source: Source, tensors: Tensors) -> families.Adapter:
        adapter = self._adapter(source, tensors)
        assert isinstance(adapter, Dora)
        return adapter.adapter

    def _refit(self, unit: Unit, source: Source, wanted: Out, out: Made) -> None:
        """Fewer directions, and the magnitudes that go best with them: never further off than those of the file."""
        tensors = self._sound(unit, source)
        adapter = self._adapter(source, tensors)
        assert isinstance(adapter, Dora)
        low = adapter.adapter.low_rank(torch.float64)
        assert low is not None
        is_conv = unit.module.kind == CONV
        if self.asked.rank_rule == FIXED and stays(self.asked, unit, source):
            for rung, rank in zip(out.rungs, self._wanted(is_conv), strict=True):
                rung.outputs.append((wanted, _filled(tensors, rank, 0) if self.asked.fill else tensors))
                rung.methods.append("as it was")
            return
        W = self._weight(unit, source, torch.float64)
        goal = W + adapter.change(W)
        energy = float((goal - W).square().sum())
        ranks = self.choose(wanted.name, self._spectrum_of_dora(low, is_conv))
        for rung, rank, full in zip(out.rungs, ranks, self._wanted(is_conv), strict=True):
            rung.energy += energy
            fitted = refit(adapter, W, goal, rank, self.dtype or stored_dtype(tensors))
            rung.error2 += fitted.error2
            rung.methods.append(REFITTED)
            made = self._factors(source, fitted.factors) | {SCALE: fitted.magnitudes}
            made |= {k: v for k, v in tensors.items() if k == BIAS}
            rung.outputs.append((wanted, _filled(made, full, 0) if self.asked.fill else made))


@contextlib.contextmanager
def _naming(module: str) -> Iterator[None]:
    """A NumericalError within tells which module it is about."""
    try:
        yield
    except NumericalError as error:
        if module in error.what:
            raise
        raise NumericalError(f"{module}: {error.what}", error.why, error.hint) from None


def _factored(change: LowRank | torch.Tensor) -> LowRank:
    """A whole matrix as a product with the unit matrix of the shorter side: random directions of what it has."""
    if isinstance(change, LowRank):
        return change
    n, k = change.shape
    return LowRank(change, torch.eye(k)) if n > k else LowRank(torch.eye(n), change)


def _filled(tensors: Tensors, rank: int, seed: int) -> Tensors:
    """With directions that change nothing, so that there are as many as asked for."""
    if len(tensors[DOWN]) >= rank:
        return tensors
    up, down, alpha = pad(tensors[UP], tensors[DOWN], tensors.get(ALPHA), rank, seed)
    return tensors | {UP: up, DOWN: down} | ({} if alpha is None else {ALPHA: alpha})

"""One layer of a LoRA: read, turned into what was asked for, cut or joined as the output names it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..adapters import families, norm
from ..adapters.adapter import BIAS, Adapter
from ..adapters.dora import MAGNITUDES, SCALE, Dora
from ..adapters.lora import DOWN, UP, UP_BIAS
from ..adapters.swapped import swap
from ..algebra import dora, factored
from ..algebra import rank as rank_rules
from ..algebra.lowrank import Factors, Matrix, decompose, factorise
from ..errors import NumericalError
from ..files.dtypes import OUTPUT_DTYPES, torch_dtype
from ..layouts.adapter_file import Entry
from ..layouts.dialects import parts
from . import convert_rules, convert_seams
from .convert_checkpoint import is_finite
from .convert_plan import AdapterPlan
from .convert_restore import ALPHA, Tensors, restored
from .convert_spec import KEEP, KOHYA
from .convert_units import AXIS, CARRY, PLAIN, Out, Source, Unit, diffusers_names

_KOHYA_LIKE = (parts.KOHYA, parts.LYCORIS)
_ONE_RATIO = 1e-6  # of float32 magnitudes


@dataclass
class Made:
    """What came of a layer. error2, energy: of the change, where something was computed.  methods: one per source.

    strange: keys of modules that hold NaN or Inf.
    """

    unit: Unit
    outputs: list[tuple[Out, Tensors]] = field(default_factory=list)
    error2: float = 0.0
    energy: float = 0.0
    methods: list[str] = field(default_factory=list)
    joined: str = ""  # how sources became one module
    strange: list[str] = field(default_factory=list)


class ModuleWork:
    """Called by workers with a unit. Thread-safe."""

    def __init__(self, plan: AdapterPlan):
        self.plan, self.spec, self.file = plan, plan.spec, plan.lora.file
        asked = plan.spec.dtype
        self.dtype = None if asked == KEEP else torch_dtype(OUTPUT_DTYPES[asked])

    def make(self, unit: Unit) -> Made:
        """All modules of the output that a layer gives."""
        out, made = Made(unit), []
        for source in unit.sources:
            tensors, known = self._read(unit, source)
            computed = unit.how == PLAIN or (unit.how == AXIS and convert_rules.turns(source, self.spec))
            if not _are_finite(tensors):
                if computed:
                    raise damaged(source)
                out.strange.append(source.entry.key)
            if computed:
                tensors = self._computed(unit, source, tensors, out)
            made.append(self._told(source, tensors, known and unit.how == CARRY))
        out.outputs, out.joined = convert_seams.arrange(unit, made)
        return out

    def _computed(self, unit: Unit, source: Source, tensors: Tensors, out: Made) -> Tensors:
        """A plain LoRA, or magnitudes along the other axis. Raises NumericalError that names the module."""
        try:
            return (self._plain if unit.how == PLAIN else self._axis)(unit, source, tensors, out)
        except NumericalError as error:
            if source.entry.key in error.what:
                raise
            raise NumericalError(f"{source.entry.key}: {error.what}", error.why, error.hint) from None

    def verbatim(self, entry: Entry) -> tuple[Tensors, bool]:
        """A module that no layer answers to, and whether all its numbers are finite."""
        tensors = {part: self._cast(self.file.file.read(info), entry, part) for part, info in entry.parts.items()}
        return tensors, _are_finite(tensors)

    # --- reading --------------------------------------------------------------------------------------------------

    def _read(self, unit: Unit, source: Source) -> tuple[Tensors, bool]:
        """A module's tensors, and whether they are known to be all that it has in kohya's spelling."""
        tensors = {part: self.file.file.read(info) for part, info in source.entry.parts.items()}
        names = diffusers_names(self.plan.model.architecture.id, unit.module)
        name = next((n for n, piece in names if piece.start == source.start and piece.stop == source.stop), None)
        kind = None if name is None else self.plan.notes.kinds.get(name)
        before = restored(tensors, kind, source.entry.alpha)
        known = before is not tensors or self.file.dialect in _KOHYA_LIKE
        out = {part: self._cast(tensor, source.entry, part) for part, tensor in before.items()}
        if convert_rules.axis_of(source) == dora.OUTPUT:  # as kohya's files have them, whatever the dialect
            name = next(name for name in MAGNITUDES if name in out)
            out[SCALE] = out.pop(name).reshape(-1, *[1] * (max(2, len(source.shape)) - 1))
        return out, known

    def _cast(self, tensor: torch.Tensor, entry: Entry, part: str) -> torch.Tensor:
        if self.dtype is None or not tensor.is_floating_point() or part in (ALPHA, "scale"):
            return tensor
        out = tensor.to(self.dtype)
        if not is_finite(out) and is_finite(tensor):
            raise NumericalError(
                f"{entry.key}.{part} does not fit the number format {self.spec.dtype}.",
                "Its largest numbers overflow.", "Keep the number format, or choose bf16 or fp32.",
            )  # fmt: skip
        return out

    def _told(self, source: Source, tensors: Tensors, known: bool) -> Tensors:
        """With the alpha that a configuration gives, or that its absence means; a bias as kohya's files have it."""
        tensors = dict(tensors)
        if self.spec.to != KOHYA:
            tensors.pop(BIAS, None)
            tensors.pop(UP_BIAS, None)
        elif UP_BIAS in tensors:
            change = self._adapter(source, tensors).bias_change()
            assert change is not None
            tensors.pop(UP_BIAS)
            tensors[BIAS] = change.to(tensors[UP].dtype)
        if not known and not {ALPHA, "scale"} & tensors.keys() and (UP in tensors or source.entry.alpha is not None):
            first = next(iter(tensors.values()))
            alpha = source.entry.alpha
            tensors[ALPHA] = alpha_tensor(len(tensors[DOWN]) if alpha is None else alpha, first.dtype)
        return tensors

    def _adapter(self, source: Source, tensors: Tensors) -> Adapter:
        return families.build(tensors, source.entry.alpha)

    def _weight(self, unit: Unit, source: Source, dtype: torch.dtype) -> torch.Tensor:
        """The rows that a source changes, in its own order; zeros where the numbers do not matter."""
        info = unit.module.weight
        assert info is not None
        if not self.plan.has_weights or not source.family.needs_weight:
            return torch.zeros((), dtype=dtype).expand(source.shape)  # takes no memory: a layer's can be large
        weight = self.plan.model.file.read(info.rows(source.start, source.stop)).to(dtype)
        if weight.dim() > 1:  # of a widened first layer what the file knows
            weight = weight[:, : source.shape[1]].contiguous()
        return swap(weight) if source.swapped else weight

    # --- a plain LoRA ---------------------------------------------------------------------------------------------

    def _plain(self, unit: Unit, source: Source, tensors: Tensors, out: Made) -> Tensors:
        adapter = self._adapter(source, tensors)
        low = adapter.low_rank(torch.float64)
        if low is not None and convert_rules.keeps_factors(source, self.spec):
            out.energy += factored.norm(low) ** 2
            out.methods.append("as it was")
            return tensors
        dtype = self.dtype or next(t.dtype for part, t in tensors.items() if t.is_floating_point() and part != ALPHA)
        if low is not None:
            factors = factored.compress(low, dtype, self.spec.rank, self.spec.energy)
            out.methods.append("from its factors")
        else:
            wide = torch.float64 if dtype.itemsize > 2 else torch.float32
            change = adapter.change(self._weight(unit, source, wide))
            if change.dim() < 2:
                return self._norm(unit, change.to(dtype), out)
            matrix = _matrix(change, source)
            rank = self._rank(matrix, None)
            factors = factorise(matrix, decompose(matrix, rank), rank, dtype)
            out.methods.append("decomposed")
        out.error2 += factors.error2
        out.energy += factors.energy
        return self._factors(source, factors) | {k: v for k, v in tensors.items() if k == BIAS}

    def _norm(self, unit: Unit, change: torch.Tensor, out: Made) -> Tensors:
        """The change of a normalisation's scale, with the unchanged shift that A1111 asks for."""
        out.methods.append("as norms")
        return {norm.WEIGHT: change} | ({} if unit.module.bias is None else {norm.SHIFT: torch.zeros_like(change)})

    def _rank(self, matrix: Matrix, own: int | None) -> int:
        """As asked for; else a module's own, which is what its size allows where it has none."""
        most = min(matrix.A.shape)
        if self.spec.energy is None or matrix.energy == 0:
            return min(most, self.spec.rank or own or most)
        S = decompose(matrix, most, "exact").S
        return min(most, rank_rules.by_energy(S, matrix.energy, self.spec.energy, complete=True) or most)

    def _factors(self, source: Source, factors: Factors) -> Tensors:
        up, down = factors.up, factors.down
        if len(source.shape) == 4:
            up, down = up[..., None, None], down.reshape(len(down), *source.shape[1:])
        return {UP: up, DOWN: down, ALPHA: alpha_tensor(len(down), up.dtype)}

    # --- magnitudes along the other axis --------------------------------------------------------------------------

    def _axis(self, unit: Unit, source: Source, tensors: Tensors, out: Made) -> Tensors:
        axis = dora.INPUT if self.spec.dora_axis == "input" else dora.OUTPUT
        adapter = self._adapter(source, tensors)
        assert isinstance(adapter, Dora)
        magnitudes = next(tensors[name] for name in MAGNITUDES if name in tensors)
        W = self._weight(unit, source, torch.float64)
        goal = W + adapter.change(W)
        inner = {k: v for k, v in tensors.items() if k not in MAGNITUDES}
        V = W + adapter.adapter.change(W)
        energy = float((goal - W).square().sum())
        out.energy += energy
        ratio = (magnitudes.to(W.dtype).flatten() / dora.norms(V, 1 - axis).flatten()).abs()
        if bool(ratio.max() - ratio.min() <= _ONE_RATIO * ratio.max()):  # as if there were one magnitude for all
            made = dora.norms(goal, axis).to(magnitudes.dtype)
            out.methods.append("the same factors")
            out.error2 += dora.missed(V, made.to(V.dtype), goal, axis)
            return inner | {SCALE: made}
        tried: list[Factors] = []
        own = source.family.rank(source.entry.shapes)
        rank = self._rank(_matrix(goal - W, source), own)

        def truncate(change: torch.Tensor) -> torch.Tensor:
            matrix = _matrix(change, source)
            factors = factorise(matrix, decompose(matrix, rank), rank, magnitudes.dtype)
            tried.append(factors)
            return (factors.up.double() @ factors.down.double()).reshape(W.shape)

        fit = dora.fit(W, goal, truncate, axis)
        assert fit is not None  # there is no target
        m = fit.magnitudes.to(magnitudes.dtype)
        out.methods.append("fitted")
        out.error2 += dora.missed(fit.V, m.to(W.dtype), goal, axis)
        return self._factors(source, tried[fit.turn]) | {SCALE: m} | {k: v for k, v in inner.items() if k == BIAS}


def _are_finite(tensors: Tensors) -> bool:
    return all(is_finite(tensor) for tensor in tensors.values() if tensor.is_floating_point())


def damaged(source: Source) -> NumericalError:
    """The error for a module with numbers that are none."""
    return NumericalError(
        f"{source.entry.key} holds NaN or Inf, or makes them.", "The LoRA or the checkpoint is damaged.",
        "Get a sound copy.",
    )  # fmt: skip


def _matrix(change: torch.Tensor, source: Source) -> Matrix:
    A = change.flatten(1).float()
    energy = float(A.double().square().sum())
    if not math.isfinite(energy):
        raise damaged(source)
    return Matrix(A, energy)


def alpha_tensor(alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """A scalar in float16 where it is exact there and the factors are of 16 bits, else in float32."""
    small = torch.tensor(float(alpha), dtype=torch.float16)
    return small if dtype.itemsize == 2 and float(small) == alpha else torch.tensor(float(alpha))

"""One layer: both weights read, their directions compared, and what every LoRA has for it carried over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch

from ...adapters import lora as plain
from ...adapters.adapter import BIAS
from ...algebra import factored
from ...algebra.factored import LowRank
from ...algebra.transfer import methods
from ...algebra.transfer.subspace import COMPARED, Directions, directions, similarity
from ...errors import HypermergeError, NumericalError
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...layouts.module import LORA_KINDS, Model, Module
from .changes import Change, Tensors, Use, cast, read_change, verbatim
from .plan import Task, TransferPlan, key_of
from .spec import COPY, CROSS, KEEP, LORA_X

COPIED, PROJECTED, MAPPED = "copied", "projected", "mapped"
DISSIMILAR, OTHER_SIZE, NOTHING, OTHER_KIND, ZERO, NO_LAYER = (
    "below the least similarity", "of another size", "nothing left", "of another kind", "zero as it is",
    "no layer in the target",
)  # fmt: skip


@dataclass
class Moved:
    """What became of one LoRA's change of a layer. action: one of the first three, or why it is left out.

    energy: ‖ΔW_s‖².  kept: ‖ΔW_t‖².  error2: what rank and rounding took of that.  apart: ‖ΔW_t − ΔW_s‖², None
    where sizes differ.  lost_bias: a change of a bias that the target's layer has no place for.  is_zero: it changes
    nothing in the source either.  was, rank: the family of modules that became a plain LoRA of this rank; None for
    what stayed what it was.
    """

    action: str
    tensors: Tensors | None = None
    energy: float = 0.0
    kept: float = 0.0
    error2: float = 0.0
    apart: float | None = None
    lost_bias: bool = False
    is_zero: bool = False
    was: str | None = None
    rank: int = 0


@dataclass
class Carried:
    """A layer of the target. similarity: None where nothing tells.  equal: the weights are the same numbers.

    moved: by the LoRA's number.  failed: what went wrong with one LoRA of a batch, likewise.
    """

    task: Task
    similarity: float | None = None
    equal: bool = False
    moved: dict[int, Moved] = field(default_factory=dict)
    failed: dict[int, HypermergeError] = field(default_factory=dict)


class LayerWork:
    """Called by workers. Thread-safe."""

    def __init__(self, plan: TransferPlan):
        self.plan, self.spec = plan, plan.spec
        self.dtype = None if plan.spec.dtype == KEEP else torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])

    def carry(self, task: Task) -> Carried:
        """Everything about a layer. Raises NumericalError."""
        out, source = Carried(task), task.partner.source
        weight = read_weight(self.plan.source, source)
        if not task.is_compared(self.spec):
            is_norm = source.kind not in LORA_KINDS and source.kind == task.partner.target.kind
            why = COPIED if is_norm and task.same_size else OTHER_SIZE
            self._each(out, lambda i, uses: self._move(i, uses, task, weight, why))
            return out
        other = read_weight(self.plan.target, task.partner.target)
        out.equal = task.same_size and _equal(weight, other, task)
        if out.equal:
            out.similarity, source_d, target_d = 1.0, None, None
        else:
            share = COMPARED if self._copies(task) else self.spec.energy
            source_d, target_d = directions(weight.flatten(1), share), directions(other.flatten(1), share)
            out.similarity = similarity(source_d, target_d)
        below = out.similarity is not None and out.similarity < self.spec.threshold and not self.spec.force

        def one(i: int, uses: list[Use]) -> Moved:
            if below:
                return self._move(i, uses, task, weight, DISSIMILAR)
            if out.equal or self._copies(task) or source_d is None or target_d is None:
                return self._move(i, uses, task, weight, COPIED, out.equal)
            return self._project(i, uses, task, weight, source_d, target_d)

        self._each(out, one)
        return out

    def lose(self, number: int, uses: list[Use]) -> Moved | HypermergeError:
        """What a LoRA has for a layer that goes nowhere, or of a batch what is wrong with it."""
        weight = read_weight(self.plan.source, uses[0][1].module)
        try:
            return self._left_out(number, uses, weight, NO_LAYER)
        except HypermergeError as error:
            if not self.plan.is_batch:
                raise
            return error

    def _each(self, out: Carried, carry: Callable[[int, list[Use]], Moved]) -> None:
        """Every LoRA of a layer; what is wrong with one of a batch concerns no other."""
        for i, uses in out.task.uses.items():
            try:
                out.moved[i] = carry(i, uses)
            except HypermergeError as error:
                if not self.plan.is_batch:
                    raise
                out.failed[i] = error

    def _left_out(self, number: int, uses: list[Use], weight: torch.Tensor, why: str) -> Moved:
        if weight.dim() < 2:
            return Moved(why)
        change = read_change(self.plan.loras[number], uses, weight)
        return Moved(ZERO if change.is_zero else why, energy=change.energy, is_zero=change.is_zero)

    def _copies(self, task: Task) -> bool:
        """Whether the whole space is spanned, so that nothing is projected."""
        return task.same_size and (self.spec.method == COPY or self.spec.energy == 1)

    def _move(
        self, number: int, uses: list[Use], task: Task, weight: torch.Tensor, action: str, equal: bool = False
    ) -> Moved:
        """Copied, or left out."""
        lora = self.plan.loras[number]
        is_layer = weight.dim() > 1
        if action != COPIED:
            return self._left_out(number, uses, weight, action)
        tensors = verbatim(lora, uses, self.spec.rank, self.dtype, equal)
        if tensors is None and not is_layer:
            return Moved(OTHER_KIND)
        change = read_change(lora, uses, weight) if is_layer else None
        energy = 0.0 if change is None else change.energy
        if tensors is None:
            assert change is not None
            return self._computed(COPIED, number, change, change.low, task, uses)
        out = Moved(COPIED, tensors, energy, energy, apart=0.0, is_zero=change is not None and change.is_zero)
        if BIAS in tensors and not _takes_bias(task.partner.target, tensors[BIAS]):
            del tensors[BIAS]
            out.lost_bias = True
            if not tensors:
                return Moved(NOTHING, lost_bias=True)
        return out

    def _project(
        self, number: int, uses: list[Use], task: Task, weight: torch.Tensor, source: Directions, target: Directions
    ) -> Moved:
        change = read_change(self.plan.loras[number], uses, weight)
        if change.low is None:  # of the bias alone
            return self._move(number, uses, task, weight, COPIED)
        if self.spec.method == CROSS:
            low = methods.cross(change.low, self._spanned(source), self._spanned(target))
        elif self.spec.method == LORA_X:
            low = methods.lora_x(change.low, self._spanned(target))
        else:
            low = methods.prolora(change.low, self._spanned(source), self._spanned(target))
        return self._computed(PROJECTED if task.same_size else MAPPED, number, change, low, task, uses)

    def _spanned(self, found: Directions) -> Directions:
        return found.first(found.count(self.spec.energy))

    def _computed(
        self, action: str, number: int, change: Change, low: LowRank | None, task: Task, uses: list[Use]
    ) -> Moved:
        """New factors for a change that is given as a product."""
        entry, target = uses[0][0], task.partner.target
        dtype, tensors = self.dtype or change.dtype, {}
        if change.is_zero:
            return Moved(ZERO, is_zero=True)
        out = Moved(action, tensors, change.energy)
        if low is not None:
            kept = factored.norm(low) ** 2
            if kept <= 1e-12 * change.energy:
                return Moved(NOTHING, energy=change.energy)
            rank = self.spec.rank or change.rank
            try:
                factors = factored.compress(low, dtype, rank)
            except NumericalError as error:
                raise NumericalError(f"{entry.key}: {error.what}", error.why, error.hint) from None
            assert target.weight is not None and change.low is not None
            named = plain.tensors("", factors.up, factors.down, target.weight.shape)
            tensors |= {name.removeprefix("."): tensor for name, tensor in named}
            out.kept, out.error2, out.rank = kept, factors.error2, factors.up.shape[1]
            families = (self.plan.loras[number].families[entry.key] for entry, _ in uses)
            out.was = next((family.title for family in families if family.family != "lora"), None)
            if task.same_size:
                minus = replace(change.low, scale=-change.low.scale)
                out.apart = factored.norm(factored.weighted_sum(((1.0, low), (1.0, minus)))) ** 2
        if change.bias is not None:
            if _takes_bias(target, change.bias):
                tensors[BIAS] = cast(change.bias, dtype, entry.key)
            else:
                out.lost_bias = True
        return out if tensors else Moved(NOTHING, lost_bias=out.lost_bias)


def read_weight(model: Model, module: Module) -> torch.Tensor:
    """A layer's weight in float32. NumericalError for NaN or Inf."""
    assert module.weight is not None
    weight = model.file.read(module.weight).float()
    if not bool(weight.isfinite().all()):
        raise NumericalError(
            f"{key_of(module)} in {model.file.path.name} holds NaN or Inf.", "The checkpoint is damaged.",
            "Get a sound copy.",
        )  # fmt: skip
    return weight


def _equal(a: torch.Tensor, b: torch.Tensor, task: Task) -> bool:
    """Whether two weights are the same but for the number format that one of them is stored in."""
    infos = (task.partner.source.weight, task.partner.target.weight)
    narrow = min((torch_dtype(info.dtype) for info in infos if info is not None), key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(narrow).float(), b.to(narrow).float())


def _takes_bias(module: Module, bias: torch.Tensor) -> bool:
    return module.bias is not None and module.bias.numel == bias.numel()

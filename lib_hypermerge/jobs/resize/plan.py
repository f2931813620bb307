"""What a resize will read, compute and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...adapters.adapter import flat
from ...adapters.lora import MID, tensor_bytes
from ...algebra import svd
from ...errors import HypermergeError, OutputError, SpecError
from ...files.folder_writer import check_folder_target
from ...files.writer import check_room, check_target
from ...layouts.dialects import parts
from ...layouts.module import CONV
from ...layouts.opening import open_checkpoint
from .. import convert_rules
from ..adapter_alone import open_alone
from ..adapter_inputs import open_lora
from ..checkpoint_formats import KEEP
from ..convert_plan import FOLDER_MARKS, AdapterPlan, plan_units
from ..convert_spec import DIFFUSERS, KOHYA, PEFT, ConvertSpec
from ..convert_units import CARRY, PLAIN, REFIT, Source, Unit
from ..host import Host
from ..outputs import refuse_inputs
from . import naming
from .ranks import asked
from .spec import FIXED, SIZE, ResizeSpec
from .spec import REFIT as STAYS_DORA

_PROCESS_BYTES = 320 << 20  # Python with torch, about
_ANY_RANK = 4096
_HEADER_BYTES = 400  # of one module
_FLOPS, _BYTES = 1.2e10, 6e8  # of one core and of files, a second


@dataclass(frozen=True)
class Facts:
    """What headers tell of a LoRA that can be resized. largest: its modules' largest rank.  sizes: of each result."""

    name: str
    path: Path
    outputs: tuple[Path, ...]
    architecture: str
    dialect: str
    families: dict[str, int]
    modules: int
    largest: int
    sizes: tuple[int, ...]
    flops: float
    bytes_per_worker: int
    bytes_to_read: int
    left_out: int
    warnings: tuple[str, ...]


@dataclass
class ResizePlan:
    """Holds no file open: each is opened again when its turn comes. failed: LoRAs of a batch that cannot be resized."""

    spec: ResizeSpec
    facts: list[Facts]
    failed: dict[str, HypermergeError] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> ResizePlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is held."""

    @property
    def is_batch(self) -> bool:
        return len(self.facts) + len(self.failed) > 1

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        sizes = [size for one in self.facts for size in one.sizes]
        read = sum(one.bytes_to_read for one in self.facts)
        cores = min(host.threads() or 2, 8)
        seconds = 1 + sum(one.flops for one in self.facts) / _FLOPS / cores + (read + sum(sizes)) / _BYTES
        names = sorted({one.architecture for one in self.facts})
        failed = [f"{name}: {error.what} {error.hint}" for name, error in self.failed.items()]
        known = self.spec.rank_rule in (FIXED, SIZE)
        return {
            "verb": "resize",
            "architecture": " and ".join(names),
            "files": len(self.facts),
            "modules": sum(one.modules for one in self.facts),
            "largest_rank": max((one.largest for one in self.facts), default=0),
            "left_out": sum(one.left_out for one in self.facts),
            "outputs": [str(path) for one in self.facts for path in one.outputs],
            "expected_bytes": sum(sizes) if known else None,
            "most_bytes": sum(sizes),
            "bytes_to_read": read,
            "expected_seconds": round(seconds, 1),
            "expected_memory": _PROCESS_BYTES + cores * max((one.bytes_per_worker for one in self.facts), default=0),
            "warnings": [*(w for one in self.facts for w in one.warnings), *failed],
        }


def make_plan(spec: ResizeSpec, host: Host) -> ResizePlan:
    """Look at every LoRA. Raises SpecError, FormatError, LayoutError or OutputError; of a batch only if no LoRA
    can be resized, or if the results cannot be written."""
    found = naming.find(spec, host)
    plan = ResizePlan(spec, [])
    targets = naming.outputs(spec, found, host, plan.failed)
    checkpoint = None if spec.checkpoint is None else host.resolve_checkpoint(spec.checkpoint)
    for name, path in found.items():
        if name in plan.failed:
            continue
        try:
            with open_plan(spec, path, targets[name], checkpoint) as own:
                _check_targets(spec, own, targets[name], [*found.values(), *([checkpoint] if checkpoint else [])], host)
                plan.facts.append(_facts(spec, name, own, targets[name]))
        except OutputError:
            raise
        except HypermergeError as error:
            if len(found) == 1:
                raise
            plan.failed[name] = error
    if not plan.facts:
        first, error = next(iter(plan.failed.items()))
        raise SpecError(
            f"None of the {len(found)} LoRAs can be resized.", f"{first}: {error.what} {error.why}".rstrip(), error.hint
        )
    if not spec.preview:
        _check_room(plan)
    return plan


def open_plan(spec: ResizeSpec, path: Path, outputs: Sequence[Path], checkpoint: Path | None) -> AdapterPlan:
    """A LoRA seen as the layers of its result; close it. Raises SpecError, FormatError or LayoutError."""
    model = None if checkpoint is None else open_checkpoint(checkpoint)
    try:
        lora, names = open_alone(path) if model is None else (open_lora(path, model), model)
    except BaseException:
        if model is not None:
            model.file.close()
        raise
    try:
        to = _dialect(spec, lora.file.dialect)
        plain = ConvertSpec(
            lora=path.name, checkpoint=spec.checkpoint, out="", to=to, family="lora", dtype=spec.dtype,
            rank=max(spec.rungs) or _ANY_RANK, overwrite=spec.overwrite,
        )  # fmt: skip
        output = outputs[0].with_suffix("") if to == PEFT else outputs[0]
        plan = AdapterPlan(plain, output, lora, names, model is not None, asked=spec, made="resized")
    except BaseException:
        lora.close()
        if model is not None:
            model.file.close()
        raise
    try:
        plan_units(plan)
        if spec.dora == STAYS_DORA:
            plan.units = [_keeping_dora(unit) for unit in plan.units]
        convert_rules.check(plan)
        _check_ranks(spec, plan)
        _check_refits(spec, plan)
        return plan
    except BaseException:
        plan.close()
        raise


def rungs(spec: ResizeSpec, plan: AdapterPlan, outputs: Sequence[Path]) -> list[AdapterPlan]:
    """The plan as the writer of each result takes it; they share the open files."""
    return [
        dataclasses.replace(plan, output=output, spec=dataclasses.replace(plan.spec, rank=rank or _ANY_RANK))
        for output, rank in zip(outputs, spec.rungs, strict=True)
    ]


def own_rank(source: Source) -> int:
    """A module's directions as stored, as far as its sizes tell."""
    if source.family.family == "dora":
        return source.family.rank(source.entry.shapes) or 1
    return min(convert_rules.exact_rank(source) or min(flat(source.shape)), min(flat(source.shape)))


def stays(spec: ResizeSpec, unit: Unit, source: Source) -> bool:
    """Whether a DoRA is small enough in every result, so that nothing of it has to be fitted."""
    return all(own_rank(source) <= asked(spec, rung, unit.module.kind == CONV) for rung in spec.rungs)


def _dialect(spec: ResizeSpec, own: str) -> str:
    if spec.to != KEEP:
        return spec.to
    if own == parts.PEFT:
        return PEFT
    return DIFFUSERS if own in (parts.DIFFUSERS, parts.DIFFUSERS_OLD) else KOHYA


def _keeping_dora(unit: Unit) -> Unit:
    is_dora = all(s.family.family == "dora" and MID not in s.entry.parts for s in unit.sources)
    return dataclasses.replace(unit, how=REFIT) if unit.how == PLAIN and is_dora else unit


def _check_ranks(spec: ResizeSpec, plan: AdapterPlan) -> None:
    sources = [source for unit in plan.units if unit.how != CARRY for source in unit.sources]
    if not sources:
        raise SpecError(
            f"{plan.lora.path.name} holds nothing that has a rank.", "It has only norms, biases or embeddings.",
            "Choose another LoRA.",
        )  # fmt: skip
    if spec.rank_rule != FIXED or spec.fill:
        return
    largest = max(map(own_rank, sources))
    above = [rung for rung in spec.rungs if rung > largest and not (spec.conv_rank and spec.conv_rank < largest)]
    if above:
        raise SpecError(
            f"Rank {above[0]} is above that of {plan.lora.path.name}, {largest}.",
            "There are no further directions to keep.",
            "Ask for less, or let lower ranks be filled up: that changes nothing, and makes room for training.",
        )


def _check_refits(spec: ResizeSpec, plan: AdapterPlan) -> None:
    if plan.has_weights:
        return
    units = [unit for unit in plan.units if unit.how == REFIT]
    blind = [s for unit in units for s in unit.sources if spec.rank_rule != FIXED or not stays(spec, unit, s)]
    if blind:
        raise SpecError(
            f"The magnitudes of {len(blind)} DoRA modules must be fitted anew, which takes the checkpoint's weights.",
            f"One is {blind[0].entry.key}.",
            "Name the checkpoint that the LoRA was trained on.",
        )


def _check_targets(
    spec: ResizeSpec, plan: AdapterPlan, outputs: Sequence[Path], inputs: Sequence[Path], host: Host
) -> None:
    if plan.spec.to == PEFT and (len(outputs) > 1 or len(inputs) - plan.has_weights > 1):
        raise SpecError(
            f"{plan.lora.path.name} would become a PEFT folder, and these are written one at a time.",
            hint="Choose kohya's dialect, or resize it alone, to one rank.",
        )
    for output in [plan.output] if plan.spec.to == PEFT else outputs:
        refuse_inputs(output, list(inputs), host)
        convert_rules.refuse_swallowing(output, plan.lora.path)
        if spec.preview:
            continue
        if plan.spec.to == PEFT:
            check_folder_target(output, 0, spec.overwrite, FOLDER_MARKS)
        else:
            check_target(output, 0, spec.overwrite)


def _check_room(plan: ResizePlan) -> None:
    needed: dict[Path, int] = {}
    for one in plan.facts:
        for output, size in zip(one.outputs, one.sizes, strict=True):
            needed[output.parent] = needed.get(output.parent, 0) + size
    known = plan.spec.rank_rule in (FIXED, SIZE)
    for folder, size in needed.items():
        check_room(folder, plan.facts[0].outputs[0].name, size if known else 0)


def _facts(spec: ResizeSpec, name: str, plan: AdapterPlan, outputs: Sequence[Path]) -> Facts:
    computed = [(unit, source) for unit in plan.units if unit.how != CARRY for source in unit.sources]
    flops, widest = 0.0, 0
    for unit, source in computed:
        (n, k), r = flat(source.shape), own_rank(source)
        if source.family.needs_weight or (convert_rules.exact_rank(source) is None and unit.how != REFIT):
            flops += 1.2e10 * svd.cost(min(n, k), max(n, k), min(r, 128), False) * (5 if unit.how == REFIT else 1)
            widest = max(widest, 16 * n * k)
        else:
            flops += 4.0 * (n + k) * r * r
            widest = max(widest, 24 * (n + k) * r)
    return Facts(
        name, plan.lora.path, tuple([plan.output] if plan.spec.to == PEFT else outputs), plan.model.title,
        plan.lora.file.dialect, plan.lora.counts, sum(len(unit.written) for unit in plan.units),
        max(own_rank(source) for _, source in computed), tuple(_size(spec, plan, rung) for rung in spec.rungs), flops,
        widest, sum(info.nbytes for entry in plan.lora.file.entries.values() for info in entry.parts.values()),
        sum(map(len, plan.left_out.values())), tuple(plan.warnings),
    )  # fmt: skip


def _size(spec: ResizeSpec, plan: AdapterPlan, rung: int) -> int:
    """A result's size: about what the ranks take, at most where the rule chooses them, or the target."""
    most = int((spec.rank_target or 0) * 2**20) if spec.rank_rule == SIZE else None
    total = 4096 + sum(info.nbytes for _, info in plan.embeddings.values())
    for unit in plan.units:
        is_conv = unit.module.kind == CONV
        for source in unit.sources:
            infos = list(source.entry.parts.values())
            if unit.how == CARRY:
                total += sum(info.numel * plan.itemsize(info.dtype) for info in infos)
                continue
            wanted = asked(spec, rung, is_conv) if rung else spec.max_rank or _ANY_RANK
            rank = wanted if spec.fill else min(wanted, own_rank(source))
            total += tensor_bytes(rank, *flat(source.shape), plan.itemsize(infos[0].dtype))
        total += _HEADER_BYTES * len(unit.written)
    return total if most is None else min(total, most)

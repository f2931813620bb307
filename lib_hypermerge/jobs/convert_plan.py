"""What the conversion of a LoRA will read, compute and write; made from headers, where every refusal happens."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter, flat
from ..files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ..files.folder_writer import check_folder_target
from ..files.opening import open_tensors
from ..files.source import TensorFile, TensorInfo
from ..files.writer import check_target
from ..layouts.adapter_file import Entry
from ..layouts.dialects import parts
from ..layouts.dialects.peft import CONFIG_NAME
from ..layouts.module import Model, Module
from ..layouts.opening import open_checkpoint
from . import convert_rules
from .adapter_alone import open_alone, told_shape
from .adapter_inputs import LoraInput, open_lora
from .convert_restore import Notes, read
from .convert_spec import KEEP, KOHYA, PEFT, ConvertSpec
from .convert_units import Source, Unit, diffusers_names, outs
from .host import Host
from .outputs import read_recipe, refuse_inputs
from .spec import Spec

_PROCESS_BYTES = 320 << 20  # Python with torch, about
EMBEDDINGS = "embeddings.safetensors"  # bundled ones, in a PEFT folder
FOLDER_MARKS = (*parts.FOLDERS, CONFIG_NAME)


@dataclass
class AdapterPlan:
    """Holds all files open; use as a context or close() it.

    spec: what is done.  model: the checkpoint, or only the names of its architecture.  units: what is written.
    verbatim: kohya's modules that no layer answers to, carried over as they are.  left_out: what the result cannot
    say → keys.
    """

    spec: ConvertSpec
    output: Path
    lora: LoraInput
    model: Model
    has_weights: bool
    units: list[Unit] = field(default_factory=list)
    verbatim: list[Entry] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    notes: Notes = field(default_factory=Notes)
    kohya_keys: dict[tuple[str, str], str] = field(default_factory=dict)  # (component, path) → the key in a kohya file
    embeddings: dict[str, tuple[TensorFile, TensorInfo]] = field(default_factory=dict)  # bundled ones
    asked: Spec | None = None  # what the recipe tells, where that is not spec
    made: str = "converted"
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> AdapterPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.lora.close()
        for file, _ in self.embeddings.values():
            file.close()
        if self.has_weights:
            self.model.file.close()

    def itemsize(self, stored: str) -> int:
        """Bytes of a number that is stored in this format, in the result."""
        return ITEMSIZE[stored if self.spec.dtype == KEEP else OUTPUT_DTYPES[self.spec.dtype]]

    def bytes_at(self, rank: int | None) -> int:
        """The result's size, about; rank for what has to be decomposed without one being asked for."""
        total = sum(info.nbytes for _, info in self.embeddings.values())
        for entry in self.verbatim:
            total += sum(info.numel * self.itemsize(info.dtype) for info in entry.parts.values())
        for unit in self.units:
            for source in unit.sources:
                if unit.how == "carry" or (exact := convert_rules.rank_of(source, unit.how, self.spec)) == 0:
                    infos = source.entry.parts.values()
                    total += sum(info.numel * self.itemsize(info.dtype) for info in infos)
                else:
                    n, k = flat(source.shape)
                    stored = next(iter(source.entry.parts.values())).dtype
                    total += (exact or rank or min(n, k)) * (n + k) * self.itemsize(stored)
            total += 400 * len(unit.outs)
        return total

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds: the largest change that is formed whole, a few times over."""
        return max((16 * unit.numel for unit in self.units if unit.how != "carry"), default=0)

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        computed = [unit for unit in self.units if unit.how != "carry"]
        numbers = sum(unit.numel for unit in computed)
        expected = self.bytes_at(self.spec.rank or 32)
        return {
            "verb": "convert",
            "output": str(self.output),
            "architecture": self.model.title,
            "dialect": self.lora.file.dialect,
            "families": self.lora.counts,
            "modules": sum(len(unit.written) for unit in self.units),
            "computed": len(computed),
            "left_out": sum(len(keys) for keys in self.left_out.values()),
            "expected_bytes": None if self.spec.energy else expected,
            "most_bytes": self.bytes_at(None),
            "expected_seconds": round(1 + expected / 5e8 + numbers / 2e7, 1),
            "expected_memory": _PROCESS_BYTES + 4 * self.bytes_per_worker + (0 if self.spec.to == KOHYA else expected),
            "warnings": self.warnings,
        }


def make_plan(spec: ConvertSpec, host: Host) -> AdapterPlan:
    """Open everything and check it. Raises SpecError, FormatError, LayoutError or OutputError."""
    assert spec.lora is not None
    path, output = host.resolve_lora(spec.lora), host.lora_output(spec.out)
    if spec.to == PEFT:
        output = output.with_suffix("")
    model = None if spec.checkpoint is None else open_checkpoint(host.resolve_checkpoint(spec.checkpoint))
    try:
        if model is None:
            lora, names = open_alone(path)
        else:
            lora, names = open_lora(path, model), model
        plan = AdapterPlan(spec, output, lora, names, model is not None)
    except BaseException:
        if model is not None:
            model.file.close()
        raise
    try:
        refuse_inputs(output, [path, *([model.file.path] if model else [])], host)
        convert_rules.refuse_swallowing(output, path)
        plan_units(plan)
        convert_rules.check(plan)
        if spec.to == PEFT:
            check_folder_target(output, plan.bytes_at(spec.rank or 32), spec.overwrite, FOLDER_MARKS)
        else:
            check_target(output, plan.bytes_at(spec.rank or 32), spec.overwrite)
    except BaseException:
        plan.close()
        raise
    return plan


def embeddings_of(lora: LoraInput) -> dict[str, tuple[TensorFile, TensorInfo]]:
    """Tensors of bundled embeddings: in the file, or in a file of their own that a PEFT folder of ours has."""
    found: dict[str, tuple[TensorFile, TensorInfo]] = {}
    beside = lora.path / EMBEDDINGS
    if beside.is_file():
        file = open_tensors(beside)
        found |= {name: (file, info) for name, info in file.tensors.items()}
    return found | {name: (lora.file.file, info) for name, info in lora.file.embeddings.items()}


def plan_units(plan: AdapterPlan) -> None:
    """Find out what becomes of each module."""
    plan.embeddings = embeddings_of(plan.lora)
    groups: dict[tuple[str, str], tuple[Module, list[Source]]] = {}
    for entry, target in plan.lora.resolution.targets:
        module, family = target.module, plan.lora.families[entry.key]
        source = Source(entry, family, target.start, target.stop, target.swapped, _shape(plan, entry, family, target))
        groups.setdefault((module.component, module.path), (module, []))[1].append(source)
    architecture = plan.model.architecture.id
    names = [name for module, _ in groups.values() for name, _ in diffusers_names(architecture, module)]
    if plan.lora.file.dialect != parts.KOHYA:
        plan.notes = read(read_recipe(plan.lora.file.metadata), names)
    for module, sources in groups.values():
        sources.sort(key=lambda source: source.start)
        keep_key = plan.spec.to == KOHYA and plan.lora.file.dialect == parts.KOHYA and len(sources) == 1
        own = sources[0].entry.key if keep_key else None
        if plan.lora.file.dialect == parts.KOHYA and len(sources) == 1:
            plan.kohya_keys[module.component, module.path] = sources[0].entry.key
        made = outs(plan.spec.to, architecture, module, own, plan.notes.names)
        plan.units += convert_rules.units_of(plan, module, sources, made)
    plan.units.sort(key=lambda unit: (unit.how == "carry", -unit.numel, unit.outs[0].name))
    lost = list(plan.lora.resolution.unmatched)
    lost += [key for keys in plan.lora.resolution.absent.values() for key in keys]
    if plan.spec.to == KOHYA and plan.lora.file.dialect == parts.KOHYA and (plan.spec.family == KEEP or plan.asked):
        plan.verbatim = [plan.lora.file.entries[key] for key in lost]
    elif lost:
        plan.left_out["without a layer"] = lost
    if plan.lora.file.unknown:
        plan.left_out["no part of any module"] = list(plan.lora.file.unknown)


def _shape(plan: AdapterPlan, entry: Entry, family: type[Adapter], target) -> tuple[int, ...]:
    """The weight that a source changes: the checkpoint's, or as the tensors themselves tell where there is none."""
    weight = target.module.weight
    assert weight is not None
    wanted = target.shape
    if plan.has_weights or family.fits(entry.shapes, wanted):
        return wanted
    return told_shape(entry.shapes, len(weight.shape)) or wanted


def counts(plan: AdapterPlan) -> dict[str, int]:
    """How many modules of each component are written."""
    return dict(Counter(unit.module.component for unit in plan.units for _ in unit.written))

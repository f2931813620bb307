"""What a merge will read, change and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.adapter import BIAS, Adapter
from ..adapters.lora import UP_BIAS
from ..adapters.norm import SHIFT
from ..files.checkpoint_writer import TensorPlan, header_of
from ..files.dtypes import ITEMSIZE
from ..files.source import TensorInfo
from ..files.writer import check_target
from ..layouts.adapter_file import AdapterFile, Entry
from ..layouts.module import Model
from ..layouts.opening import open_checkpoint
from . import block_weights
from .adapter_inputs import LoraInput, open_lora
from .checkpoint_formats import KEEP, check_formats, components, format_of
from .host import Host
from .merge_metadata import merged_metadata
from .merge_spec import MergeSpec
from .outputs import left_behind, refuse_inputs
from .spec import WeightedLora

_BIAS_PARTS = frozenset((BIAS, SHIFT, UP_BIAS))
_PROCESS_BYTES = 320 << 20  # Python with torch, about


@dataclass(frozen=True)
class Step:
    """One adapter's part in one tensor: rows start…stop of it, at a strength. bias: its bias_change, not its change."""

    lora: LoraInput
    entry: Entry
    start: int
    stop: int
    strength: float
    bias: bool = False

    @property
    def is_product(self) -> bool:
        """Whether each row of the change comes from a row of one factor alone."""
        return not self.bias and self.lora.families[self.entry.key].family == "lora"

    def load(self) -> Adapter:
        return self.lora.load(self.entry)


@dataclass
class MergePlan:
    """Holds all files open; use as a context or close() it.

    steps: by the checkpoint's tensor names, in the order in which they are applied.  tensors: what will be written.
    """

    spec: MergeSpec
    output: Path
    model: Model
    loras: list[LoraInput] = field(default_factory=list)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    applied: Counter[str] = field(default_factory=Counter)  # modules by component
    zeroed: Counter[str] = field(default_factory=Counter)  # modules that add nothing, by reason
    homeless_biases: int = 0
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> MergePlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.model.file.close()
        for lora in self.loras:
            lora.close()

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in (self.model.file, *(lora.file.file for lora in self.loras)):
            file.check_unchanged()

    @property
    def order(self) -> list[TensorInfo]:
        """The checkpoint's tensors as they lie in the file."""
        return sorted(self.model.file.tensors.values(), key=lambda info: (info.offset, info.name))

    @property
    def bytes(self) -> int:
        """The file's size, exactly."""
        return 8 + len(header_of(self.tensors, self.metadata)) + sum(plan.nbytes for plan in self.tensors.values())

    @property
    def unmatched(self) -> int:
        return sum(len(lora.resolution.unmatched) + len(lora.file.unknown) for lora in self.loras)

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds: the largest tensor that is changed as a whole, as stored, computed on and written."""
        whole = (n for n, steps in self.steps.items() if not all(step.is_product for step in steps))
        return max((16 * self.model.file.tensors[name].numel for name in whole), default=32 << 20)

    def expected_seconds(self, threads: int) -> float:
        """A rough forecast: reading, products and hashing shared by the cores, and the disk."""
        numbers = sum(info.numel for info in self.model.file.tensors.values())
        return 1.0 + (self.bytes / 1.2e9 + numbers / 1.5e9) * 2 / max(1, min(threads or os.cpu_count() or 1, 2))

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        return {
            "verb": "merge",
            "architecture": self.model.title,
            "blocks": len(block_weights.blocks_of(self.model.architecture.id)),
            "modules": sum(self.applied.values()),
            "components": dict(self.applied),
            "left_out": self.zeroed.total(),
            "unmatched": self.unmatched,
            "expected_bytes": self.bytes,
            "most_bytes": self.bytes,
            "expected_seconds": round(self.expected_seconds(host.threads()), 1),
            "expected_memory": _PROCESS_BYTES + 4 * self.bytes_per_worker,
            "output": str(self.output),
            "warnings": self.warnings,
        }


def make_plan(spec: MergeSpec, host: Host, sources: Sequence[Path | AdapterFile] | None = None) -> MergePlan:
    """Open and check everything. Raises SpecError, FormatError, LayoutError, UnchangedError, OutputError.

    sources: of the LoRAs, where these are not to be looked up by their names; the plan takes them over.
    """
    plan = plan_change(spec, host, host.checkpoint_output(spec.out), sources)
    try:
        refuse_inputs(plan.output, [plan.model.file.path, *(lora.path for lora in plan.loras)], host)
        plan.metadata = merged_metadata(spec, plan.model, plan.loras, plan.output.stem)
        check_target(plan.output, plan.bytes, spec.overwrite)
    except BaseException:
        plan.close()
        raise
    return plan


def plan_change(
    spec: MergeSpec, host: Host, output: Path, sources: Sequence[Path | AdapterFile] | None = None
) -> MergePlan:
    """The same for the change alone: nothing is asked of the output."""
    model = open_checkpoint(host.resolve_checkpoint(spec.checkpoint))
    plan = MergePlan(spec, output, model)
    try:
        for index, item in enumerate(spec.loras):
            lora = open_lora(host.resolve_lora(item.lora) if sources is None else sources[index], model)
            plan.loras.append(lora)
            _add_steps(plan, lora, item)
        _plan_tensors(plan)
        _gather_warnings(plan)
    except BaseException:
        plan.close()
        raise
    return plan


def _add_steps(plan: MergePlan, lora: LoraInput, item: WeightedLora) -> None:
    weights = block_weights.parse(item.blocks, plan.model.architecture.id)
    te_weight = item.weight if item.te_weight is None else item.te_weight
    for entry, target in lora.resolution.targets:
        module = target.module
        strength = item.weight if module.component == "unet" else te_weight
        strength *= weights.of(module.component, module.block)
        if strength == 0 or entry.key in lora.idle:
            plan.zeroed["weight 0" if strength == 0 else "alpha 0"] += 1
            continue
        plan.applied[module.component] += 1
        if module.weight is not None and set(entry.shapes) - _BIAS_PARTS:
            _add_step(plan, module.weight, lora, entry, (target.start, target.stop), strength, False)
        if _BIAS_PARTS & entry.parts.keys():
            if module.bias is None:
                plan.homeless_biases += 1
            else:
                _add_step(plan, module.bias, lora, entry, (target.start, target.stop), strength, True)


def _add_step(
    plan: MergePlan, info: TensorInfo, lora: LoraInput, entry: Entry, rows: tuple[int, int], strength: float, bias: bool
) -> None:
    """info may be the q, k or v rows of a fused tensor: the step counts rows within the whole."""
    whole = plan.model.file.tensors[info.name]
    if not whole.numel:
        return
    row = math.prod(whole.shape[1:]) if whole.stride is None else whole.stride[0]
    first = (info.offset - whole.offset) // (row * ITEMSIZE[whole.dtype]) if row else 0
    step = Step(lora, entry, first + rows[0], first + rows[1], strength, bias)
    plan.steps.setdefault(info.name, []).append(step)


def _plan_tensors(plan: MergePlan) -> None:
    spec, component_of = plan.spec, components(plan.model)
    wanted = {"unet": spec.dtype, "te": spec.te_dtype, "vae": spec.vae_dtype}
    check_formats(wanted.values())
    for info in plan.order:
        choice = wanted.get(component_of.get(info.name, ""), KEEP)
        plan.tensors[info.name] = TensorPlan(format_of(info, choice), info.shape)


def _gather_warnings(plan: MergePlan) -> None:
    for lora in plan.loras:
        plan.warnings += lora.warnings
        if lora.file.embeddings:
            plan.warnings.append(
                f"{lora.path.name} brings {len(lora.file.embeddings)} tensors of embeddings; a checkpoint "
                "cannot hold them: keep the LoRA's embedding as a file of its own."
            )
    plan.warnings += left_behind(plan.model.file)
    if plan.homeless_biases:
        plan.warnings.append(
            f"{plan.homeless_biases} modules change a bias that their layer does not have; it was left out."
        )
    if not plan.steps:
        plan.warnings.append("Every weight or alpha is 0: the result is a copy of the checkpoint.")

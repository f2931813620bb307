"""Several LoRAs with weights as one: what is opened, refused and written."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapters.full import DIFF
from ...adapters.lora import tensor_bytes
from ...errors import LayoutError, UnchangedError
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ...files.metadata import lora_metadata, with_hashes
from ...files.writer import check_target, header_bytes
from ...layouts.module import LORA_KINDS, Model
from ...layouts.opening import open_checkpoint
from ..adapter_inputs import LoraInput, open_lora
from ..checkpoint_formats import KEEP
from ..host import Host
from ..outputs import refuse_inputs
from ..spec import WeightedLora
from .restore_spec import RestoreSpec
from .restore_units import Joined, Term, Unit, join

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_SLACK = 256


@dataclass
class JoinPlan:
    """Holds all files open; use as a context or close() it. left_out: modules that the result lacks, by reason."""

    spec: RestoreSpec
    output: Path
    model: Model
    recipe: dict[str, Any]
    loras: list[LoraInput] = field(default_factory=list)
    units: list[Unit] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def close(self) -> None:
        self.model.file.close()
        for lora in self.loras:
            lora.close()

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in (self.model.file, *(lora.file.file for lora in self.loras)):
            file.check_unchanged()

    @property
    def title(self) -> str:
        return self.model.title

    @property
    def hyper(self) -> str:
        return self.model.file.path.name

    @property
    def components(self) -> dict[str, int]:
        """How many modules of each are written."""
        return dict(Counter(unit.module.component for unit in self.units))

    @property
    def unmatched(self) -> int:
        return sum(len(lora.resolution.unmatched) for lora in self.loras)

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return OUTPUT_DTYPES["fp16" if self.spec.dtype == KEEP else self.spec.dtype]

    @property
    def bytes(self) -> int:
        """The file's size, at most."""
        size, numbers, alphas = ITEMSIZE[self.dtype], 0, 4 * len(self.units)
        for unit in self.units:
            if unit.is_layer:
                numbers += tensor_bytes(unit.rank(self.spec.rank), *unit.module.matrix_shape, 1)
            numbers += sum(shape[0] for shape in unit.parts.values())
        return 16 + numbers * size + alphas + self.header_reserve()

    def tasks(self, dtype: torch.dtype) -> list[Callable[[], Joined]]:
        """Each makes a module of the result; NumericalError if dtype cannot hold it, or for NaN."""
        return [partial(join, unit, self.spec.rank, dtype) for unit in self.units]

    @property
    def bytes_per_worker(self) -> int:
        """Factors in float64 with what compressing them takes."""
        return max(
            (
                48 * (sum(term.rank for term in unit.terms) + 1) * sum(unit.module.matrix_shape)
                for unit in self.units
                if unit.is_layer
            ),
            default=0,
        )

    def metadata(self, ranks: dict[str, int], conv_ranks: dict[str, int]) -> dict[str, str]:
        """The header's texts without hashes."""
        parents = [{"name": file.path.name, "bytes": file.size}
                   for file in (self.model.file, *(lora.file.file for lora in self.loras))]  # fmt: skip
        texts = lora_metadata(
            name=self.output.stem, base=self.model.base, base_file=self.model.file.path.name, ranks=ranks,
            conv_ranks=conv_ranks, recipe={**self.recipe, "parents": parents},
        )  # fmt: skip
        return {**texts, "ss_training_comment": "restored by Hypermerge"}

    def header_reserve(self) -> int:
        """An upper bound of the header's size."""
        end, entries = 10**12, {}
        for unit in self.units:
            n, k = unit.module.matrix_shape
            rank = unit.rank(self.spec.rank)
            shapes: dict[str, Sequence[int]] = dict(unit.parts)
            if unit.is_layer:
                shapes |= {"lora_up.weight": (n, rank, 1, 1), "lora_down.weight": (rank, k, 10, 10), "alpha": ()}
            for part, shape in shapes.items():
                entries[f"{unit.name}.{part}"] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end]}
        texts = with_hashes(self.metadata({"": 10_000}, {"": 10_000}), "0" * 64, "0" * 8)
        return len(header_bytes(entries, texts)) + _SLACK

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        threads = max(1, min(host.threads() or os.cpu_count() or 1, 8))
        return {
            "architecture": self.model.title,
            "modules": len(self.units),
            "components": self.components,
            "left_out": sum(self.left_out.values()),
            "expected_bytes": self.bytes,
            "most_bytes": self.bytes,
            "expected_seconds": round(1.5 + self.bytes / 1e8 / threads, 1),
            "expected_memory": _PROCESS_BYTES + threads * self.bytes_per_worker,
            "output": str(self.output),
            "warnings": self.warnings,
        }


def plan_join(
    spec: RestoreSpec, terms: Sequence[WeightedLora], paths: Sequence[Path], host: Host, recipe: dict[str, Any]
) -> JoinPlan:
    """Open and check everything. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError.

    terms: the LoRAs of paths with their weights.  recipe: what the result says of how it was made.
    """
    assert spec.hyper is not None
    output = host.lora_output(spec.out)
    plan = JoinPlan(spec, output, open_checkpoint(host.resolve_checkpoint(spec.hyper)), recipe)
    try:
        refuse_inputs(output, [plan.model.file.path, *paths], host)
        found: dict[tuple[str, str], Unit] = {}
        for term, path in zip(terms, paths, strict=True):
            lora = open_lora(path, plan.model)
            plan.loras.append(lora)
            plan.warnings += lora.warnings
            _refuse_others(lora)
            _add_terms(plan, lora, term, found)
        plan.units = list(_with_fused(plan, found))
        if not found:
            raise UnchangedError("The LoRAs add nothing with these multipliers.", hint="Choose others.")
        check_target(output, plan.bytes, spec.overwrite)
    except BaseException:
        plan.close()
        raise
    return plan


def _refuse_others(lora: LoraInput) -> None:
    """Of other families the sum is no product of factors."""
    other = next((key for key, family in lora.families.items() if family.family not in ("lora", "norm", "full")), None)
    if other is None:
        other = next(
            (e.key for e, t in lora.resolution.targets if DIFF in e.shapes and t.module.kind in LORA_KINDS), None
        )
    if other is not None:
        raise LayoutError(
            f"{lora.path.name} is no plain LoRA.",
            f"Its module {other} is of the family {lora.families[other].title}, which cannot be joined with others.",
            "Restore a checkpoint, or convert that file to the family lora first.",
        )


def _add_terms(plan: JoinPlan, lora: LoraInput, item: WeightedLora, found: dict[tuple[str, str], Unit]) -> None:
    te = item.weight if item.te_weight is None else item.te_weight
    for entry, target in lora.resolution.targets:
        module = target.module
        weight = item.weight if module.component == "unet" else te
        if weight == 0 or entry.key in lora.idle:
            plan.left_out["weight 0" if weight == 0 else "alpha 0"] += 1
        elif module.name is None:
            plan.left_out["no name in a LoRA file"] += 1
            plan.warnings.append(f"{module.component}.{module.path} has no name in a LoRA file; it is left out.")
        else:
            unit = found.setdefault((module.component, module.path), Unit(module))
            unit.terms.append(Term(lora, entry, target, weight))


def _with_fused(plan: JoinPlan, found: dict[tuple[str, str], Unit]):
    """In the model's order; A1111 applies q, k, v and out of a fused attention all or none."""
    fused = {(unit.module.component, unit.module.fused) for unit in found.values() if unit.module.fused}
    for component, modules in plan.model.components.items():
        for path, module in modules.items():
            if (component, path) in found:
                yield found[component, path]
            elif module.fused and (component, module.fused) in fused and module.name is not None:
                yield Unit(module)

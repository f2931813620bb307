"""What a hyper-merge will read, compute and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...adapters.lora import tensor_bytes
from ...algebra.hyper.bases import width_for
from ...errors import SpecError
from ...files.checkpoint_writer import TensorPlan
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ..host import Host
from . import rests, targets
from .inputs import Inputs, Layer, open_inputs
from .recipe import CONTAINER_SUFFIX, SUFFIX
from .rests import Rest
from .sketch import SLAB_BYTES, WITHIN_BYTES
from .spec import CONTAINER, LAYERS, LORAS, MOST_LORAS, NONE, HyperSpec, full_count, ranks_of, weights_of
from .work import mend, work_folder

_ENTRY_BYTES = 470  # header text of one module's three tensors, as it is reserved
_PROCESS_BYTES = 320 << 20  # Python with torch, about
_CORES_BYTES = 384 << 20  # of cores that are held in memory; more are mapped from the work folder


@dataclass
class HyperPlan:
    """Holds all files open; use as a context or close() it.

    ranks: of the LoRAs, in order; empty where they are planned for a size, or where there is no limit.
    hyper: the file that will hold the hyper-model, None if none is written.  loras: as many as there may be.
    """

    spec: HyperSpec
    inputs: Inputs
    rests: list[Rest]
    ranks: tuple[int, ...]
    model_output: Path
    loras: list[Path]
    rest_files: dict[str, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> HyperPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.inputs.close()

    @property
    def models(self) -> int:
        return len(self.inputs.sources)

    @property
    def full(self) -> int:
        """How many LoRAs without a limit of rank are asked for; 0 for ranks."""
        return 0 if self.spec.size is not None else full_count(self.spec.ranks)

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[OUTPUT_DTYPES[self.spec.dtype]]

    @property
    def writes_model(self) -> bool:
        """Whether there is a hyper-model to write: of LoRAs alone, the base is it, unchanged."""
        return not self.spec.loras_only and bool(self.inputs.models)

    @property
    def writes_loras(self) -> bool:
        return self.spec.form != CONTAINER

    @property
    def writes_container(self) -> bool:
        return self.spec.form != LORAS

    @property
    def recipe_output(self) -> Path:
        return self.model_output.with_name(self.model_output.stem + SUFFIX)

    @property
    def container_output(self) -> Path:
        return self.loras[0].parent / f"{self.model_output.stem}{CONTAINER_SUFFIX}"

    @property
    def work_folder(self) -> Path:
        return work_folder(self.model_output)

    @property
    def weights(self) -> Sequence[float] | None:
        return weights_of(self.spec.weights, self.models)

    @property
    def per_rank(self) -> int:
        """Numbers that one more rank in every layer takes."""
        return sum(sum(layer.shape) for layer in self.inputs.layers)

    @property
    def directions(self) -> int:
        """In how many ways the models can differ from the hyper-model."""
        return self.models if self.inputs.base else max(1, self.models - 1)

    @property
    def numbers_beside(self) -> int:
        """What a LoRA takes besides its factors, counted in numbers."""
        return -(-self.lora_bytes(0) // self.itemsize)

    def numbers_for(self, count: int) -> int:
        """The budget of stored numbers where a size is given, over that many LoRAs; their headers are counted off."""
        assert self.spec.size is not None
        return max(0, int(self.spec.size * 2**20) // self.itemsize - count * self.numbers_beside)

    @property
    def numbers(self) -> int:
        """The budget of stored numbers where a size is given, of one file."""
        return self.numbers_for(1)

    @property
    def enough_bytes(self) -> int:
        """A size from which on LoRAs have every rank that the layers have."""
        most = max(min(layer.shape) for layer in self.inputs.layers)
        return (self.spec.count or self.directions) * self.lora_bytes(most)

    @cached_property
    def _most_rank(self) -> int:
        """The most that all LoRAs of the size can have together: one with all there is room for, then the next."""
        shapes = [layer.shape for layer in self.inputs.layers]
        most, left, total = max(map(min, shapes)), self.numbers, 0
        prices = [sum(sum(shape) for shape in shapes if min(shape) >= rank) for rank in range(1, most + 1)]
        for _ in range(self.spec.count or self.directions):
            for price in prices:
                if price > left:
                    return max(1, total)
                left, total = left - price, total + 1
        return max(1, total)

    @property
    def total_rank(self) -> int:
        """Of all LoRAs together in a layer, foreseen where a size is given; layers may get up to half more."""
        total = sum(self.ranks) if self.ranks else 0
        if self.spec.size is not None:
            total = self._most_rank
        return round(1.5 * total) if self.spec.allocation == LAYERS else total

    def lora_bytes(self, rank: int) -> int:
        """A LoRA's size with that rank in every layer that allows it."""
        layers = self.inputs.layers
        factors = sum(tensor_bytes(min(rank, *layer.shape), *layer.shape, self.itemsize) for layer in layers)
        return factors + _ENTRY_BYTES * len(layers) + 4096

    @property
    def loras_bytes(self) -> int:
        if self.spec.size is not None:
            return min(int(self.spec.size * 2**20), self.enough_bytes)
        if self.full:
            return self.full * sum(layer.module.weight.numel * self.itemsize for layer in self.inputs.layers
                                   if layer.module.weight)  # fmt: skip
        return sum(self.lora_bytes(rank) for rank in self.ranks)

    @property
    def model_bytes(self) -> int:
        """Of the hyper-model; 0 if none is written."""
        return sum(plan.nbytes for plan in self.tensors.values()) + (1 << 17) if self.writes_model else 0

    @property
    def model_sizes(self) -> dict[Path, int]:
        """Bytes of the checkpoints and LoRAs to be written, about."""
        sizes = {self.model_output: self.model_bytes} if self.writes_model else {}
        if self.writes_loras:
            each = [self.lora_bytes(rank) for rank in self.ranks]
            each = each or [self.loras_bytes // len(self.loras)] * len(self.loras)
            sizes |= dict(zip(self.loras, each, strict=True))
        return sizes | dict.fromkeys(self.rest_files.values(), 1 << 20)

    @property
    def other_sizes(self) -> dict[Path, int]:
        """Of the files beside them."""
        container = {self.container_output: self.loras_bytes} if self.writes_container else {}
        return {self.recipe_output: 1 << 16, **container}

    @property
    def tensors(self) -> dict[str, TensorPlan]:
        """The hyper-model's tensors in the template's order."""
        return rests.tensor_plans(self.inputs, self.spec)

    @property
    def work_bytes(self) -> int:
        """Of bases and cores on the disk; cores that do not fit the memory stand there twice, once in one piece."""
        if self.full:
            return 0
        mapped = sum(map(self.cores_bytes, self.inputs.layers)) if self.maps_cores else 0
        return mapped + sum(self._work_bytes(layer) for layer in self.inputs.layers)

    def _work_bytes(self, layer: Layer) -> int:
        p, q = width_for(self.total_rank, *layer.shape, self.models)
        basis = 0 if q == layer.shape[1] else q * layer.shape[1] * self.itemsize
        return basis + self.cores_bytes(layer)

    def cores_bytes(self, layer: Layer) -> int:
        p, q = width_for(self.total_rank, *layer.shape, self.models)
        return 4 * self.models * p * q

    @property
    def maps_cores(self) -> bool:
        """Whether the cores are too large to be held."""
        return sum(map(self.cores_bytes, self.inputs.layers)) > _CORES_BYTES

    @property
    def bytes_to_read(self) -> int:
        files = {id(source.file): source.file.size for source in self.inputs.sources}
        return 2 * sum(files.values())

    @property
    def expected_bytes(self) -> int:
        together = self.loras_bytes * ((self.writes_loras and 1) + (self.writes_container and 1))
        return self.model_bytes + together

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds of its largest layer: differences, and what is left of them within the bases."""
        most = 0
        for layer in self.inputs.layers if not self.full else ():
            n, k = layer.shape
            q = width_for(self.total_rank, n, k, self.models)[1]
            within = min(4 * self.models * n * q, WITHIN_BYTES)
            most = max(most, 6 * q * k + within + 4 * self.models * n * self.total_rank)
        return most + SLAB_BYTES

    @property
    def expected_memory(self) -> int:
        largest = max(layer.module.weight.nbytes for layer in self.inputs.layers if layer.module.weight)
        cores = min(_CORES_BYTES, sum(map(self.cores_bytes, self.inputs.layers))) if not self.full else 0
        return _PROCESS_BYTES + max(4 * largest + 2 * self.bytes_per_worker, 2 * cores)

    def expected_seconds(self, device: str, threads: int) -> float:
        """A rough forecast of the run."""
        from ..devices import slowness

        cores = max(1, min(threads or os.cpu_count() or 1, 8))
        numbers = sum(layer.module.weight.numel for layer in self.inputs.layers if layer.module.weight)
        products = 2.0 * numbers * self.models * (3 * (2 * self.total_rank + 16) / 150e9 + self.total_rank / 60e9)
        solving = sum(map(self.cores_bytes, self.inputs.layers)) * 100 / 4e9 if not self.full else 0
        if device != "cpu":
            products, solving = products / 20, solving / 20
        else:
            products, solving = products * slowness() / cores, solving * slowness()
        return 1.5 + products + solving + self.bytes_to_read / 3e9 + self.expected_bytes / 1e9

    def to_json(self, host: Host) -> dict[str, Any]:
        """The forecast; raises DeviceError."""
        from ..devices import resolve_device

        device = resolve_device(self.spec.device, host.device())
        ranks = self.ranks if self.writes_loras else ()
        return {
            "verb": "hyper",
            "output": str(self.model_output if self.writes_model else self.loras[0].parent),
            "architecture": self.inputs.template.title,
            "models": self.inputs.labels,
            "modules": len(self.inputs.layers),
            "loras": [
                {"name": path.stem, "rank": rank, "bytes": self.lora_bytes(rank)}
                for path, rank in zip(self.loras, ranks, strict=False)
            ],
            "hyper_bytes": self.model_bytes,
            "expected_bytes": self.expected_bytes,
            "most_bytes": self.expected_bytes,
            "bytes_to_read": self.bytes_to_read,
            "work_bytes": self.work_bytes,
            "device": device,
            "expected_memory": self.expected_memory,
            "expected_seconds": round(self.expected_seconds(device, host.threads()), 1),
            "warnings": self.warnings,
        }


def make_plan(spec: HyperSpec, host: Host) -> HyperPlan:
    """Open everything and check what can be known before computing.

    Raises SpecError, FormatError, LayoutError or OutputError.
    """
    inputs = open_inputs(spec, host)
    try:
        ranks = ranks_of(spec.ranks) if spec.size is None else ()
        most = len(ranks) or full_count(spec.ranks) if spec.size is None else spec.count or MOST_LORAS
        model_output = targets.model_path(spec, host)
        loras = [targets.lora_path(spec, host, str(i + 1)) for i in range(most)]
        plan = HyperPlan(spec, inputs, rests.plan_rests(inputs, spec, host), ranks, model_output, loras)
        plan.warnings += inputs.warnings
        if spec.remainders != NONE:
            plan.rest_files = {
                label: targets.lora_path(spec, host, f"{name}-rest")
                for label, name in zip(inputs.labels, targets.plain(inputs.labels), strict=True)
            }
        if spec.size is not None and plan.numbers_for(spec.count or 1) < plan.per_rank * (spec.count or 1):
            least = plan.lora_bytes(1) * (spec.count or 1)
            raise SpecError(
                f"{spec.size:g} MiB are too little.",
                f"Rank 1 in {spec.count or 1} of them takes about {least / 2**20:.1f} MiB.", "Ask for more.",
            )  # fmt: skip
        if spec.size is not None and spec.size * 2**20 > plan.enough_bytes:
            plan.warnings.append(
                f"{_mib(plan.enough_bytes)} MiB are enough: the LoRAs then have every rank that the layers have."
            )
        if not spec.preview:
            mend(plan.work_folder)
            paths = [source.path for source in inputs.sources] + ([inputs.base.file.path] if inputs.base else [])
            targets.check(spec, host, paths, plan.model_sizes, plan.other_sizes, {plan.work_folder: plan.work_bytes})
    except BaseException:
        inputs.close()
        raise
    return plan


def _mib(nbytes: int) -> str:
    """Rounded up."""
    tenths = -(-nbytes * 10 // 2**20)
    return f"{tenths / 10:g}"

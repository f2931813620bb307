"""One LoRA out of a container: what its modules are, how large they get, and how each is made."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...adapters import lora
from ...algebra.factored import compress
from ...errors import UnchangedError
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ...files.metadata import lora_metadata, with_hashes
from ...files.writer import check_target, header_bytes
from ...layouts.detect import title_of
from ..checkpoint_formats import KEEP
from ..host import Host
from ..outputs import refuse_inputs
from .container import Container
from .container_lora import component_of
from .restore_spec import RestoreSpec
from .restore_units import Joined

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_SLACK = 256


@dataclass
class ContainerPlan:
    """Holds the container open; close() it.

    te, unet: the models' shares.  names: of the modules that are written.  recipe: what the result says of its making.
    """

    spec: RestoreSpec
    output: Path
    container: Container
    te: Mapping[str, float]
    unet: Mapping[str, float]
    recipe: dict[str, Any]
    names: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    unmatched: int = 0
    begun: float = field(default_factory=time.perf_counter)

    def close(self) -> None:
        self.container.close()

    def check_unchanged(self) -> None:
        """InputChangedError if the container was replaced or written to since it was opened."""
        self.container.file.check_unchanged()

    @property
    def title(self) -> str:
        return title_of(self.container.stated.base)

    @property
    def hyper(self) -> str:
        return self.container.stated.hyper

    @property
    def components(self) -> dict[str, int]:
        """How many modules of each are written."""
        return dict(Counter(component_of(name) for name in self.names))

    @property
    def dtype(self) -> str:
        """As safetensors names it."""
        return OUTPUT_DTYPES["fp16" if self.spec.dtype == KEEP else self.spec.dtype]

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """Of a module's tensors, at most."""
        n, *rest = self.container.modules[name]
        rank, ones = self.container.rank(name, self.spec.rank), [1] * (len(rest) - 1)
        return {"lora_up.weight": (n, rank, *ones), "lora_down.weight": (rank, *rest), "alpha": ()}

    @property
    def bytes(self) -> int:
        """The file's size, at most."""
        numbers = sum(torch.Size(shape).numel() for name in self.names for shape in self.shapes(name).values())
        return 16 + ITEMSIZE[self.dtype] * numbers + 4 * len(self.names) + self.header_reserve()

    @property
    def bytes_per_worker(self) -> int:
        """A module's factors in float64, with what compressing them takes."""
        return max(
            (48 * sum(torch.Size(shape).numel() for shape in self.shapes(name).values()) for name in self.names),
            default=0,
        )

    def metadata(self, ranks: dict[str, int], conv_ranks: dict[str, int]) -> dict[str, str]:
        """The header's texts without hashes."""
        parents = [{"name": self.container.file.path.name, "bytes": self.container.file.size}]
        texts = lora_metadata(
            name=self.output.stem, base=self.container.stated.base, base_file=self.hyper, ranks=ranks,
            conv_ranks=conv_ranks, recipe={**self.recipe, "parents": parents},
        )  # fmt: skip
        return {**texts, "ss_training_comment": "restored by Hypermerge"}

    def header_reserve(self) -> int:
        """An upper bound of the header's size."""
        entries = {
            f"{name}.{part}": {"dtype": "BF16", "shape": list(shape), "data_offsets": [10**12, 10**12]}
            for name in self.names
            for part, shape in self.shapes(name).items()
        }
        texts = with_hashes(self.metadata({"": 10_000}, {"": 10_000}), "0" * 64, "0" * 8)
        return len(header_bytes(entries, texts)) + _SLACK

    def tasks(self, dtype: torch.dtype) -> list[Callable[[], Joined]]:
        """Each makes a module of the result; NumericalError if dtype cannot hold it, FormatError for NaN."""
        return [partial(self._make, name, dtype) for name in self.names]

    def _make(self, name: str, dtype: torch.dtype) -> Joined:
        shares = self.unet if component_of(name) == "unet" else self.te
        shape = self.container.modules[name]
        rank = self.container.rank(name, self.spec.rank)
        made = compress(self.container.change(name, shares), dtype, rank)
        is_conv = len(shape) == 4 and shape[2:] != (1, 1)
        tensors = list(lora.tensors(name, made.up, made.down, shape))
        return Joined(name, tensors, is_conv, made.rank, made.energy, made.error2)

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        threads = max(1, min(host.threads() or os.cpu_count() or 1, 8))
        return {
            "architecture": self.title,
            "modules": len(self.names),
            "components": self.components,
            "expected_bytes": self.bytes,
            "most_bytes": self.bytes,
            "expected_seconds": round(1.5 + self.bytes / 5e7 / threads, 1),
            "expected_memory": _PROCESS_BYTES + threads * self.bytes_per_worker,
            "output": str(self.output),
            "warnings": self.warnings,
        }


def plan_container(
    spec: RestoreSpec, container: Container, te: Mapping[str, float], unet: Mapping[str, float], host: Host,
    recipe: dict[str, Any],
) -> ContainerPlan:  # fmt: skip
    """Takes the container over. Raises SpecError, UnchangedError or OutputError."""
    plan = ContainerPlan(spec, host.lora_output(spec.out), container, te, unet, recipe)
    refuse_inputs(plan.output, [container.file.path], host)
    plan.names = [n for n in container.modules if any((unet if component_of(n) == "unet" else te).values())]
    plan.left_out["weight 0"] += len(container.modules) - len(plan.names)
    if not plan.names:
        raise UnchangedError(
            "Every share is 0.", "That is the hyper-model itself, for which no LoRA is needed.", "Choose other shares."
        )
    check_target(plan.output, plan.bytes, spec.overwrite)
    return plan

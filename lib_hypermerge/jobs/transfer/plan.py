"""What a transfer will read, compute and write, as far as headers tell."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import HypermergeError
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ...layouts.adapter_file import Entry, Target
from ...layouts.module import LORA_KINDS, Model, Module
from ..adapter_inputs import LoraInput
from ..host import Host
from .pairing import Choice, Chosen, Partner, comparable, lay, numel
from .spec import COPY, CROSS, KEEP, USUAL_RANK, TransferSpec
from .tree import tree

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_ENTRY_BYTES = 800  # header text of one module's tensors, about
_OF_EXACT = 0.5  # eigenvectors in float32 instead of float64, and products with part of them only; measured


@dataclass(frozen=True)
class Task:
    """A layer of both models.  uses: what each LoRA has for the source's, by the LoRA's number."""

    partner: Partner
    uses: dict[int, list[tuple[Entry, Target]]]

    @property
    def numel(self) -> int:
        """Of both weights."""
        infos = (self.partner.source.weight, self.partner.target.weight)
        return sum(info.numel for info in infos if info is not None)

    @property
    def same_size(self) -> bool:
        source, target = self.partner.source.weight, self.partner.target.weight
        return source is not None and target is not None and source.shape == target.shape

    def is_compared(self, spec: TransferSpec) -> bool:
        """Whether its two weights are decomposed."""
        if self.partner.target.kind not in LORA_KINDS or self.partner.source.kind not in LORA_KINDS:
            return False
        return self.same_size or (spec.method == CROSS and self.same_kernel)

    @property
    def same_kernel(self) -> bool:
        source, target = self.partner.source.weight, self.partner.target.weight
        return source is not None and target is not None and source.shape[2:] == target.shape[2:]


@dataclass
class Layout:
    """tasks: largest first.  lost: what the LoRAs change that has no layer in the target, by LoRA and source layer."""

    tasks: list[Task] = field(default_factory=list)
    lost: dict[int, dict[str, list[tuple[Entry, Target]]]] = field(default_factory=dict)


@dataclass
class TransferPlan:
    """Holds all files open; use as a context or close() it.

    uses: of each LoRA, what it has for a layer of the source, by component.path.  choices: lists of blocks that are
    to be paired by similarity.  failed: by name, LoRAs of a batch that cannot be transferred.
    """

    spec: TransferSpec
    source: Model
    target: Model
    loras: list[LoraInput] = field(default_factory=list)
    outputs: list[Path] = field(default_factory=list)
    uses: list[dict[str, list[tuple[Entry, Target]]]] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)  # as foreseen
    warnings: list[str] = field(default_factory=list)
    failed: dict[str, HypermergeError] = field(default_factory=dict)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> TransferPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.source.file.close()
        self.target.file.close()
        for lora in self.loras:
            lora.close()

    @property
    def is_batch(self) -> bool:
        """Whether one LoRA's failure leaves others to go on with."""
        return len(self.loras) + len(self.failed) > 1

    def embeddings(self, lora: LoraInput) -> list[str]:
        """The bundled embeddings' tensors that the new file carries along: if its text encoders are as wide."""
        widths = [_text_widths(model) for model in (self.source, self.target)]
        same = all(widths[0].get(component) == width for component, width in widths[1].items())
        return [name for name in lora.file.embeddings if same and name.startswith("bundle_emb.")]

    def lay_out(self, choose: Callable[[Choice], Chosen]) -> Layout:
        """Lay the models beside each other. choose: see pairing.lay()."""
        out, placed = Layout(), set()
        for component, modules in self.target.components.items():
            own = self.source.components.get(component)
            if not own:
                continue
            for partner in lay(tree(own), tree(modules), choose, component):
                key = key_of(partner.source)
                uses = {i: found[key] for i, found in enumerate(self.uses) if key in found}
                if uses and partner.target.weight is not None and partner.target.name is not None:
                    out.tasks.append(Task(partner, uses))
                    placed.add(key)
        out.tasks.sort(key=lambda task: (-task.numel, key_of(task.partner.target)))
        for i, found in enumerate(self.uses):
            out.lost[i] = {key: uses for key, uses in found.items() if key not in placed}
        return out

    @property
    def choice_numel(self) -> int:
        """Numbers that are read to pair blocks by similarity."""
        return sum(numel(choice, name) for choice in self.choices for name in comparable(choice))

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds: both weights in float32, and their directions."""
        return max((16 * task.numel for task in self.layout.tasks), default=0)

    def bytes_of(self, number: int) -> int:
        """The size of a LoRA's file, about."""
        total, lora = 4096, self.loras[number]
        for task in self.layout.tasks:
            for entry, _ in task.uses.get(number, ()):
                total += _ENTRY_BYTES + self._entry_bytes(lora, entry, task)
        return total

    def _entry_bytes(self, lora: LoraInput, entry: Entry, task: Task) -> int:
        dtype = next((info.dtype for part, info in entry.parts.items() if part not in ("alpha", "scale")), "F16")
        n, k = task.partner.target.matrix_shape
        itemsize = ITEMSIZE[dtype if self.spec.dtype == KEEP else OUTPUT_DTYPES[self.spec.dtype]]
        family = lora.families[entry.key]
        stored = sum(info.numel for info in entry.parts.values()) * itemsize
        if self.spec.method == COPY and not family.needs_weight:
            return stored
        rank = family.rank(entry.shapes) or USUAL_RANK
        rank = rank if family.family == "lora" else rank**2 if family.family == "loha" else USUAL_RANK
        return min(rank, self.spec.rank or rank, n, k) * (n + k) * itemsize

    def expected_seconds(self, threads: int) -> float:
        """A rough forecast: both decompositions of every layer, and of the blocks that are to be chosen from."""
        from ...algebra import svd
        from ..devices import slowness

        sizes = [m.matrix_shape for task in self.layout.tasks if task.is_compared(self.spec)
                 for m in (task.partner.source, task.partner.target)]  # fmt: skip
        for choice in self.choices:
            blocks = [block for _, block in (*choice.source, *choice.target)]
            sizes += [block.leaves[name].matrix_shape for name in comparable(choice) for block in blocks]
        seconds = sum(svd.cost(min(size), max(size), min(size), False, "exact") for size in sizes)
        return 1.0 + _OF_EXACT * seconds * slowness() / self._workers(threads)

    def _workers(self, threads: int) -> int:
        from ..workers import plan_workers

        return plan_workers(threads, "cpu", self.bytes_per_worker)[0]

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        tasks, numbers = self.layout.tasks, range(len(self.loras))
        infos = [info for task in tasks for info in (task.partner.source.weight, task.partner.target.weight) if info]
        return {
            "verb": "transfer",
            "outputs": [str(path) for path in self.outputs],
            "architecture": f"{self.source.title} to {self.target.title}" if self.source.title != self.target.title
            else self.target.title,
            "modules": sum(len(task.uses) for task in tasks),
            "paired": dict(Counter(task.partner.how for task in tasks)),
            "lists_to_pair_by_similarity": len(self.choices),
            "other_sizes": sum(not task.same_size for task in tasks),
            "unmatched": sum(len(lost) for lost in self.layout.lost.values()),
            "expected_bytes": sum(self.bytes_of(i) for i in numbers),
            "bytes_to_read": sum(info.nbytes for info in infos) + 2 * self.choice_numel,
            "expected_memory": _PROCESS_BYTES + self._workers(host.threads()) * self.bytes_per_worker,
            "expected_seconds": round(self.expected_seconds(host.threads()), 1),
            "device": "cpu",
            "warnings": [*self.warnings, *(f"{name}: {error.what} {error.hint}".rstrip()
                                           for name, error in self.failed.items())],
        }  # fmt: skip


def key_of(module: Module) -> str:
    """A layer's name in both models."""
    return f"{module.component}.{module.path}"


def _text_widths(model: Model) -> dict[str, int]:
    """Of the token embeddings, by component."""
    return {
        component: module.weight.shape[-1]
        for component, modules in model.components.items()
        for path, module in modules.items()
        if path.endswith("token_embedding") and module.weight is not None
    }

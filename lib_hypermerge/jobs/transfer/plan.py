"""What a transfer will read, compute and write; made from headers, and where every refusal happens but one: how alike
the models are is known only when their numbers are read."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import LayoutError, SpecError, UnchangedError
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ...files.writer import check_room, check_target
from ...layouts.adapter_file import Entry, Target
from ...layouts.module import LORA_KINDS, Model, Module
from ...layouts.opening import open_checkpoint
from ..adapter_inputs import LoraInput, open_lora
from ..host import Host
from ..outputs import refuse_inputs
from ..resize.naming import MOST_FILES
from .pairing import PLACE, Choice, Chosen, Partner, comparable, lay
from .spec import COPY, CROSS, KEEP, NAME, USUAL_RANK, TransferSpec
from .tree import tree

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_ENTRY_BYTES = 330  # header text of one module's tensors, about
_MARKERS = {"v_pred": "v-prediction", "ztsnr": "zero terminal SNR"}


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
    to be paired by similarity.
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

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in (self.source.file, self.target.file, *(lora.file.file for lora in self.loras)):
            file.check_unchanged()

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
        total = 0
        for choice in self.choices:
            names = comparable(choice)
            blocks = [block for _, block in (*choice.source, *choice.target)]
            total += sum(math.prod(block.leaves[name].matrix_shape) for block in blocks for name in names)
        return total

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
        dtype, (n, k) = next(iter(entry.parts.values())).dtype, task.partner.target.matrix_shape
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
        return 1.0 + seconds * slowness() / self._workers(threads)

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
            "warnings": self.warnings,
        }  # fmt: skip


def key_of(module: Module) -> str:
    """A layer's name in both models."""
    return f"{module.component}.{module.path}"


def make_plan(spec: TransferSpec, host: Host) -> TransferPlan:
    """Open everything and check it. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError."""
    source = open_checkpoint(host.resolve_checkpoint(spec.source_base))
    try:
        target = open_checkpoint(host.resolve_checkpoint(spec.target_base))
    except BaseException:
        source.file.close()
        raise
    plan = TransferPlan(spec, source, target)
    try:
        _refuse_models(source, target)
        for path in _paths(spec, host):
            plan.loras.append(open_lora(path, source))
        plan.outputs = [host.lora_output(spec.out.replace(NAME, _stem(lora.path))) for lora in plan.loras]
        _refuse_names(plan, host)
        plan.uses = [_uses(lora) for lora in plan.loras]
        plan.layout = plan.lay_out(lambda choice: _foreseen(plan, choice))
        _refuse_nothing(plan)
        _gather_warnings(plan)
        if not spec.preview:
            sizes = [plan.bytes_of(i) for i in range(len(plan.loras))]
            for path, size in zip(plan.outputs, sizes, strict=True):
                check_target(path, size, spec.overwrite)
            check_room(plan.outputs[0].parent, "the new LoRAs", sum(sizes))
    except BaseException:
        plan.close()
        raise
    return plan


def _paths(spec: TransferSpec, host: Host) -> list[Path]:
    """Every LoRA that was named, or that a folder or pattern takes in, once."""
    found: dict[str, Path] = {}
    for name in spec.loras:
        found |= host.find_loras(name) or {name: host.resolve_lora(name)}
    if len(found) > MOST_FILES:
        raise SpecError(
            f"{len(found)} LoRAs are too many at once.", f"At most {MOST_FILES} are, as all files appear together.",
            "Do it in parts.",
        )  # fmt: skip
    spec.check_names(len(found))
    return list(found.values())


def _refuse_models(source: Model, target: Model) -> None:
    names = source.file.path.name, target.file.path.name
    if source.architecture is not target.architecture:
        raise LayoutError(
            "The two bases are of different architectures.",
            f"{names[0]} is {source.title}, {names[1]} is {target.title}; their layers do not correspond.",
            "Transfer works between relatives: a fine-tuned, distilled or pruned model and what it came from.",
        )
    if source.file.is_same(target.file):
        raise UnchangedError("Both bases are the same file.", "The LoRA works with it as it is.", "Choose two models.")


def _text_widths(model: Model) -> dict[str, int]:
    """Of the token embeddings, by component."""
    return {
        component: module.weight.shape[-1]
        for component, modules in model.components.items()
        for path, module in modules.items()
        if path.endswith("token_embedding") and module.weight is not None
    }


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _refuse_names(plan: TransferPlan, host: Host) -> None:
    inputs = [plan.source.file.path, plan.target.file.path, *(lora.path for lora in plan.loras)]
    seen: dict[str, int] = {}
    for number, path in enumerate(plan.outputs):
        other = seen.setdefault(str(path).casefold(), number)
        if other != number:
            raise SpecError(
                f"Two of the new LoRAs would be called {path.name}.",
                f"They come from {plan.loras[other].path} and {plan.loras[number].path}.", "Transfer them one by one.",
            )  # fmt: skip
        refuse_inputs(path, inputs, host)


def _uses(lora: LoraInput) -> dict[str, list[tuple[Entry, Target]]]:
    found: dict[str, list[tuple[Entry, Target]]] = {}
    for entry, target in lora.resolution.targets:
        if entry.key not in lora.idle:
            found.setdefault(key_of(target.module), []).append((entry, target))
    return found


def _foreseen(plan: TransferPlan, choice: Choice) -> Chosen:
    """Before anything is read, by order; the choice is noted."""
    from ...algebra.transfer.order import spread

    plan.choices.append(choice)
    return Chosen(spread(len(choice.target), len(choice.source)), PLACE)


def _refuse_nothing(plan: TransferPlan) -> None:
    layers = [task for task in plan.layout.tasks if task.partner.target.kind in LORA_KINDS]
    if not layers:
        raise LayoutError(
            "The LoRAs change no layer that the target base has.",
            f"They are {', '.join(lora.path.name for lora in plan.loras)}.", "Choose another target.",
        )  # fmt: skip
    if plan.spec.method != CROSS and not any(task.same_size for task in layers):
        task = layers[0].partner
        assert task.source.weight is not None and task.target.weight is not None
        raise LayoutError(
            "No layer has the same size in both bases.",
            f"{key_of(task.target)} is {list(task.source.weight.shape)} in the source and "
            f"{list(task.target.weight.shape)} in the target.",
            "Only the method cross goes from one size to another.",
        )


def _gather_warnings(plan: TransferPlan) -> None:
    for lora in plan.loras:
        plan.warnings += lora.warnings
        left = len(lora.file.embeddings) - len(plan.embeddings(lora))
        if left:
            plan.warnings.append(
                f"{lora.path.name}: {left} tensors of embeddings are left out: keep the embedding as a file of its own."
            )
    for marker, meaning in _MARKERS.items():
        if (marker in plan.source.file.tensors) != (marker in plan.target.file.tensors):
            which = "source" if marker in plan.source.file.tensors else "target"
            plan.warnings.append(f"Only the {which} base is marked for {meaning}; no LoRA carries that.")
    touched = {key.split(".", 1)[0] for uses in plan.uses for key in uses}
    for component in sorted(touched - plan.target.components.keys()):
        plan.warnings.append(f"{component}: the target base brings none along, so what is for it is left out.")
    if plan.spec.method != CROSS:
        others = sum(not task.same_size for task in plan.layout.tasks)
        if others:
            plan.warnings.append(
                f"{others} layers have another size in the target and are left out; the method cross maps them."
            )

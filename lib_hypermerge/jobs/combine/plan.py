"""What a combination will read, compute and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import os
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...adapters.lora import tensor_bytes
from ...algebra.merging.methods import DENSE, FULL
from ...errors import SpecError, UnchangedError
from ...files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ...files.source import TensorFile, TensorInfo
from ...files.writer import check_target
from ...layouts.dialects.parts import KOHYA
from ...layouts.module import Model
from ...layouts.opening import open_checkpoint
from .. import block_weights
from ..adapter_inputs import LoraInput, idle_warning
from ..convert_plan import embeddings_of
from ..convert_write import embedding_name
from ..host import Host
from ..outputs import left_behind, refuse_inputs
from . import inputs, layers, names
from .layers import Layer
from .names import Wanted
from .spec import CombineSpec

_PROCESS_BYTES = 350 << 20  # Python with torch, about
_ENTRY_BYTES = 350  # of a module in the header, about
_USUAL_RANK = 32  # of a forecast of what only the spectra tell
_ALL_RANKS = 1 << 20  # more than any layer has


@dataclass
class CombinePlan:
    """Holds all files open; use as a context or close() it.

    model: the checkpoint, or only the names of its architecture.  left_out: modules that the result lacks, by reason.
    embeddings: bundled ones, by their tensors' names in the result; repeated: those of a name that was there already.
    """

    spec: CombineSpec
    output: Path
    wanted: list[Wanted]
    model: Model
    has_weights: bool
    loras: list[LoraInput] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    embeddings: dict[str, tuple[TensorFile, TensorInfo]] = field(default_factory=dict)
    repeated: int = 0
    beside: list[TensorFile] = field(default_factory=list)  # files of embeddings in PEFT folders
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> CombinePlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        for lora in self.loras:
            lora.close()
        for file in self.beside:
            file.close()
        if self.has_weights:
            self.model.file.close()

    def check_unchanged(self) -> None:
        """InputChangedError if a file was replaced or written to since it was opened."""
        for file in (*(lora.file.file for lora in self.loras), *([self.model.file] if self.has_weights else ())):
            file.check_unchanged()

    @cached_property
    def names(self) -> list[str]:
        """The LoRAs', as they are told apart."""
        return names.told_apart([lora.path for lora in self.loras])

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[OUTPUT_DTYPES[self.spec.dtype]]

    @property
    def components(self) -> dict[str, int]:
        """How many layers of each are changed."""
        return dict(Counter(layer.module.component for layer in self.layers if layer.parts))

    @property
    def unmatched(self) -> int:
        return sum(len(lora.resolution.unmatched) + len(lora.file.unknown) for lora in self.loras)

    def rank_of(self, layer: Layer, unknown: int) -> int:
        """That a layer will have at most; unknown: for what only its spectrum tells."""
        if not layer.parts or not layer.changes_weight:
            return 1
        return min(self._most_rank(layer), self.spec.rank or (layer.rank if not self.spec.cuts else unknown))

    def _most_rank(self, layer: Layer) -> int:
        """What the method can make of a layer; never more than all LoRAs together but where it fills the matrix."""
        return min(layer.size) if self.spec.way.rank == FULL else layer.rank

    @property
    def most_rank(self) -> int:
        """That any layer can have; 0 if no matrix is changed."""
        return max((self._most_rank(layer) for layer in self.matrices), default=0)

    @property
    def is_cut_to_all(self) -> bool:
        """Whether matrices of full rank become factors of the rank of all LoRAs, for nothing else was asked for."""
        whole = self.spec.way.rank == FULL and not self.spec.cuts
        return whole and any(layer.has_factors and layer.rank < min(layer.size) for layer in self.matrices)

    @property
    def cut(self) -> str:
        """What the result is cut to, in words; "" where nothing is."""
        spec = self.spec
        if spec.rank is not None:
            return f"rank {spec.rank}" if spec.rank < self.most_rank else ""
        if spec.energy is not None:
            return f"{100 * spec.energy:.6g} % of the squared change"
        if spec.size is not None:
            return f"{spec.size:g} MiB"
        return "the ranks of all LoRAs together" if self.is_cut_to_all else ""

    @property
    def matrices(self) -> list[Layer]:
        """The layers whose matrix is changed."""
        return [layer for layer in self.layers if layer.changes_weight and not layer.is_norm]

    def is_whole(self, layer: Layer) -> bool:
        """Whether it will be a matrix, because not all changes of it have factors and none is to be cut."""
        return layer.changes_weight and not layer.is_norm and not self.spec.cuts and not layer.has_factors

    def bytes_at(self, unknown: int) -> int:
        """The file's size, about. unknown: rank of what only the spectra tell."""
        total = 4096 + sum(info.nbytes for _, info in self.embeddings.values())
        for layer in self.layers:
            n, k = layer.size
            total += _ENTRY_BYTES
            if layer.is_norm:
                total += 2 * n * self.itemsize
            elif self.is_whole(layer):
                total += n * k * self.itemsize
            else:
                total += tensor_bytes(self.rank_of(layer, unknown), n, k, self.itemsize)
            total += n * self.itemsize if layer.changes_bias and not layer.is_norm else 0
        return total

    @property
    def expected_bytes(self) -> int | None:
        """None where it depends on the spectra."""
        if self.spec.size is not None:
            return min(int(self.spec.size * 2**20), self.bytes_at(_ALL_RANKS))
        return None if self.spec.energy is not None else self.bytes_at(_USUAL_RANK)

    @property
    def most_bytes(self) -> int:
        return self.expected_bytes or self.bytes_at(_ALL_RANKS)

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds: factors in float64 with what decomposing them takes, or whole matrices."""
        most = 0
        for layer in self.layers:
            if layer.changes_weight and not layer.is_norm:
                n, k = layer.size
                dense = self.spec.way.kind == DENSE or not layer.has_factors
                count = len({part.index for part in layer.parts})
                most = max(most, 4 * n * k * (count + 4) if dense else 40 * layer.rank * (n + k))
        return most

    def expected_seconds(self, threads: int) -> float:
        """A rough forecast."""
        flops = 0.0
        for layer in self.layers:
            if layer.changes_weight and not layer.is_norm:
                n, k = layer.size
                dense = self.spec.way.kind == DENSE or not layer.has_factors
                flops += 20.0 * n * k * (min(n, k) if dense else 1) + 20.0 * layer.rank**2 * (n + k)
        passes = 2 if self.spec.size is not None else 1
        return 1.0 + passes * flops / 2e10 / max(1, min(threads or os.cpu_count() or 1, 8))

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        threads = max(1, min(host.threads() or os.cpu_count() or 1, 8))
        return {
            "verb": "combine",
            "architecture": self.model.title,
            "blocks": len(block_weights.blocks_of(self.model.architecture.id)),
            "loras": [self.lora_json(index) for index in range(len(self.loras))],
            "method": self.spec.method,
            "modules": sum(self.components.values()),
            "components": self.components,
            "left_out": self.left_out.total(),
            "unmatched": self.unmatched,
            "expected_bytes": self.expected_bytes,
            "most_bytes": self.most_bytes,
            "expected_seconds": round(self.expected_seconds(host.threads()), 1),
            "expected_memory": _PROCESS_BYTES + threads * self.bytes_per_worker,
            "output": str(self.output),
            "warnings": [self.spec.told, *self.warnings],
        }

    def lora_json(self, index: int) -> dict[str, Any]:
        """What is told of a LoRA."""
        want, lora = self.wanted[index], self.loras[index]
        te = want.item.weight if want.item.te_weight is None else want.item.te_weight
        return {
            "name": self.names[index], "weight": want.item.weight, "te_weight": te, "blocks": want.item.blocks,
            "dyn": want.dyn, "dialect": lora.file.dialect, "families": lora.counts,
            "modules": len(lora.resolution.targets), "unmatched": len(lora.resolution.unmatched),
        }  # fmt: skip


def make_plan(spec: CombineSpec, host: Host) -> CombinePlan:
    """Open and check everything. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError."""
    wanted, notes = names.wanted(spec, host)
    output = host.lora_output(spec.out)
    checkpoint = None if spec.checkpoint is None else open_checkpoint(host.resolve_checkpoint(spec.checkpoint))
    try:
        paths = [want.path for want in wanted]
        refuse_inputs(output, [*paths, *([checkpoint.file.path] if checkpoint else [])], host)
        loras, model = inputs.open_all(paths, checkpoint)
    except BaseException:
        if checkpoint is not None:
            checkpoint.file.close()
        raise
    plan = CombinePlan(spec, output, wanted, model, checkpoint is not None, loras, warnings=notes)
    try:
        found = layers.find(wanted, loras, model, plan.has_weights, spec.way.first_is_special)
        plan.layers, plan.left_out = found.layers, found.left_out
        _add_embeddings(plan)
        _gather_warnings(plan)
        _check(plan)
        if not spec.preview:
            check_target(output, plan.expected_bytes or plan.bytes_at(_USUAL_RANK), spec.overwrite)
    except BaseException:
        plan.close()
        raise
    return plan


def _add_embeddings(plan: CombinePlan) -> None:
    """Bundled ones; of two by one name the first, as AUTOMATIC1111 has it."""
    seen: set[str] = set()
    for lora in plan.loras:
        own = embeddings_of(lora)
        plan.beside += list({id(file): file for file, _ in own.values() if file is not lora.file.file}.values())
        word = {name: embedding_name(name).split(".")[1] for name in own}
        plan.repeated += len(seen.intersection(word.values()))
        plan.embeddings |= {name: stored for name, stored in own.items() if word[name] not in seen}
        seen |= set(word.values())


def _gather_warnings(plan: CombinePlan) -> None:
    for name, want, lora in zip(plan.names, plan.wanted, plan.loras, strict=True):
        own = lora.warnings if plan.has_weights else _told_alone(name, lora, plan.model)
        plan.warnings += own + left_behind(lora.file.file)
        if want.dyn is not None:
            others = sum(
                not part.is_cut for layer in plan.layers for part in layer.parts
                if part.lora is lora and part.changes_weight and not layer.is_norm
            )  # fmt: skip
            if others:
                plan.warnings.append(
                    f"{name}: dyn={want.dyn} leaves {others} modules whole that are no plain LoRA, as in AUTOMATIC1111."
                )
    if plan.left_out["no name in a LoRA file"]:
        plan.warnings.append(
            f"{plan.left_out['no name in a LoRA file']} modules change layers for which a LoRA file has no name; left "
            "out."
        )
    whole = sum(plan.is_whole(layer) for layer in plan.layers)
    if whole:
        plan.warnings.append(
            f"{whole} layers have changes that are no product of factors; they are kept as whole matrices. Give a "
            "rank, an energy or a size for a plain LoRA."
        )
    if plan.repeated:
        plan.warnings.append(f"{plan.repeated} bundled embeddings have a name that is taken; the first is kept.")
    if plan.spec.way.first_is_special:
        plan.warnings.append(
            f"The first is {plan.names[0]}; the weights of the others are of no account, be they 0. Where their block "
            "weights are 0 they leave a layer alone."
        )
    if plan.is_cut_to_all:
        plan.warnings.append(
            f"{plan.spec.way.title} fills whole matrices; they are cut to the ranks of all LoRAs together. Give a "
            "rank, an energy or a size for more or less."
        )
    if plan.spec.rank is not None and plan.most_rank and plan.spec.rank >= plan.most_rank:
        plan.warnings.append(_cuts_nothing(plan, plan.spec.rank))


def _cuts_nothing(plan: CombinePlan, rank: int) -> str:
    """The note on a rank that is at least what there is."""
    told = f"No layer has more than {plan.most_rank} directions: rank {rank} cuts nothing."
    by_factors = plan.spec.way.kind != DENSE and all(layer.has_factors for layer in plan.matrices)
    return f"{told} The factors are put side by side, as without a rank." if by_factors else told


def _told_alone(name: str, lora: LoraInput, model: Model) -> list[str]:
    """What was left out or looks odd of a file that was laid over names alone, one sentence each."""
    file, lost = lora.file, lora.resolution.unmatched
    out = [f"{name}: {note}" for note in file.notes]
    if lost:
        out.append(f"{name}: {len(lost)} modules have no layer in {model.title}, such as {lost[0]}; left out.")
    if file.unknown:
        out.append(f"{name}: {len(file.unknown)} tensors are part of no module, such as {file.unknown[0]}; left out.")
    without = [
        entry.key for entry, _ in lora.resolution.targets
        if entry.alpha is None and "alpha" not in entry.parts and "lora_down.weight" in entry.parts
    ]  # fmt: skip
    if without and file.dialect == KOHYA:
        out.append(f"{name}: {len(without)} modules have no alpha, such as {without[0]}: it is taken to be the rank.")
    return out + idle_warning(lora)


def _check(plan: CombinePlan) -> None:
    blind = [p for layer in plan.layers for p in layer.parts if p.family.needs_weight]
    if blind and not plan.has_weights:
        kinds = Counter(part.family.title for part in blind)
        told = " and ".join(f"{count} {title} modules" for title, count in kinds.most_common())
        raise SpecError(
            f"The change of {told} depends on the checkpoint's weights.",
            f"One is {blind[0].entry.key} in {blind[0].lora.path.name}.",
            "Name the checkpoint that the LoRA was trained on.",
        )
    if not any(layer.parts for layer in plan.layers):
        raise UnchangedError(
            "The LoRAs add up to nothing.", f"Left out were {_counted(plan.left_out)}.", "Choose other weights."
        )
    if plan.spec.way.first_is_special and not any(
        part.index == 0 for layer in plan.layers for part in layer.parts if part.changes_weight
    ):
        raise UnchangedError(
            f"{plan.names[0]}, the first LoRA, changes nothing here.", hint="Give it a weight other than 0."
        )


def _counted(left_out: Counter[str]) -> str:
    return ", ".join(f"{count} modules: {why}" for why, count in left_out.items()) or "no modules"

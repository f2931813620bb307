"""The new LoRAs' files while they are written; they appear together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from ...adapters.lora import DOWN
from ...adapters.lora import tensors as lora_tensors
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.metadata import lora_metadata, with_hashes
from ...files.together import publish_together
from ...files.unnamed import Written
from ...files.writer import SafetensorsWriter, header_bytes
from ...layouts.dialects import parts
from ...layouts.module import CONV, Module
from ..outputs import RECIPE, STALE, recipe
from .changes import Tensors
from .plan import Layout, TransferPlan
from .spec import KEEP

_COMPUTED = 3  # tensors of a plain LoRA's module
_ENTRY = 130  # bytes of a tensor's entry in a header besides the module's name, at most
_SLACK = 1024
# of the source's header, what would be said of another base
_OF_THE_BASE = ("ss_sd_model", "ss_new_sd_model", "ss_base_model", "ss_v2", "ss_network")


class Files:
    """Use as a context: leaving it before publish() removes every trace."""

    def __init__(self, plan: TransferPlan, layout: Layout):
        self.plan, self._stack = plan, contextlib.ExitStack()
        count = len(plan.loras)
        self.writers: list[SafetensorsWriter] = []
        self._ranks: list[dict[str, int]] = [{} for _ in range(count)]
        self._conv_ranks: list[dict[str, int]] = [{} for _ in range(count)]
        self._others: list[set[str]] = [set() for _ in range(count)]  # families besides LoRA and norms
        self._written: list[set[str]] = [set() for _ in range(count)]
        self._dtypes: list[torch.dtype | None] = [None] * count
        try:
            for i, path in enumerate(plan.outputs):
                reserve = len(header_bytes({}, self._metadata(i, {}))) + self._entries(layout, i) + _SLACK
                writer = SafetensorsWriter(path, reserve, plan.spec.overwrite)
                self.writers.append(self._stack.enter_context(writer))
        except BaseException:
            self._stack.close()
            raise

    def _entries(self, layout: Layout, number: int) -> int:
        """Bytes of a header's entries, at most."""
        parts: dict[str, int] = {}
        begun = set()
        for task in layout.tasks:
            if number in task.uses:
                module = task.partner.target
                stored = max(len(entry.parts) for entry, _ in task.uses[number])
                parts[module.name or ""] = max(_COMPUTED, stored) + 1  # an alpha or a bias may be added
                begun.add((module.component, module.fused))
        for module in _fused(self.plan):
            if (module.component, module.fused) in begun:
                parts.setdefault(module.name or "", _COMPUTED)
        parts |= dict.fromkeys(self.plan.embeddings(self.plan.loras[number]), 1)
        return sum(count * (len(name.encode()) + _ENTRY) for name, count in parts.items())

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    def add(self, number: int, module: Module, tensors: Tensors, family: str) -> None:
        """A module of one LoRA. family: of these tensors."""
        assert module.name is not None
        for part, tensor in tensors.items():
            self.writers[number].add(f"{module.name}.{part}", tensor)
        self._written[number].add(module.name)
        if DOWN in tensors:
            ranks = self._conv_ranks if module.kind == CONV else self._ranks
            ranks[number][module.name] = len(tensors[DOWN])
            self._dtypes[number] = tensors[DOWN].dtype
        if family not in ("lora", "norm"):
            self._others[number].add(family)

    def finish(self, number: int, facts: dict[str, Any]) -> None:
        """Complete one LoRA's file. facts: for its recipe."""
        self._complete(number)
        lora, writer = self.plan.loras[number], self.writers[number]
        for name in self.plan.embeddings(lora):
            writer.add(name, lora.file.file.read(lora.file.embeddings[name]))
        texts = self._metadata(number, facts)
        writer.seal(lambda data, legacy: with_hashes(texts, data, legacy))

    def drop(self, number: int) -> None:
        """Give up one LoRA's file."""
        self.writers[number].abort()

    def publish(self, numbers: Sequence[int]) -> list[Written]:
        """Give the files of these LoRAs, which are finished, their names."""
        return publish_together([self.writers[i] for i in numbers])

    def _complete(self, number: int) -> None:
        """A1111 applies q, k, v and out of a fused attention all or none: zeros for what has none."""
        written = self._written[number]
        fused = _fused(self.plan)
        begun = {(m.component, m.fused) for m in fused if m.name in written}
        for module in fused:
            if module.name not in written and (module.component, module.fused) in begun:
                assert module.name is not None and module.weight is not None
                n, k = module.matrix_shape
                dtype = self._dtypes[number] or self._dtype or torch.float16
                zeros = torch.zeros(n, 1, dtype=dtype), torch.zeros(1, k, dtype=dtype)
                named = lora_tensors("", *zeros, module.weight.shape)
                self.add(number, module, {name.removeprefix("."): t for name, t in named}, "lora")

    @property
    def _dtype(self) -> torch.dtype | None:
        return None if self.plan.spec.dtype == KEEP else torch_dtype(OUTPUT_DTYPES[self.plan.spec.dtype])

    def _metadata(self, number: int, facts: dict[str, Any]) -> dict[str, str]:
        plan, lora, name = self.plan, self.plan.loras[number].file, self.plan.outputs[number].stem
        usual = lora_metadata(
            name=name, base=plan.target.base, base_file=plan.target.file.path.name, ranks=self._ranks[number],
            conv_ranks=self._conv_ranks[number], recipe={},
        )  # fmt: skip
        usual["ss_training_comment"] = "transferred by Hypermerge"
        if self._others[number]:
            usual["ss_network_module"] = "lycoris.kohya"
        kept = {}
        if lora.dialect in (parts.KOHYA, parts.LYCORIS):
            kept = {
                key: text
                for key, text in lora.metadata.items()
                if key not in STALE and key != "format" and not key.startswith(_OF_THE_BASE)
            }
        parents = {"loras": lora.file, "source_base": plan.source.file, "target_base": plan.target.file}
        return kept | usual | {RECIPE: recipe(plan.spec, parents, **facts)}


def _fused(plan: TransferPlan) -> list[Module]:
    """The target's layers that A1111 applies only together with others."""
    return [m for modules in plan.target.components.values() for m in modules.values() if m.fused and m.name]

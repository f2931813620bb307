"""The file of a combination in kohya's spelling, layer by layer; in a preview only its size is counted."""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from ...adapters.adapter import BIAS
from ...adapters.full import DIFF
from ...adapters.lora import DOWN, UP
from ...adapters.norm import SHIFT, WEIGHT
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.metadata import with_hashes
from ...files.writer import SafetensorsWriter, Written, header_bytes
from ..convert_write import embedding, embedding_name
from .layers import Layer
from .metadata import texts
from .plan import CombinePlan
from .work import NOTHING, WHOLE, Made, zeros

_SLACK = 256  # bytes of header for what is measured last
_WIDEST = 10**12  # an offset that no file reaches
_MEASURED = {"relative_error": 0.123456789}  # no shorter than what will stand there


class CombinedFile:
    """Use as a context: leaving it before commit() removes every trace. ranks: under a size, by the layers' names."""

    def __init__(self, plan: CombinePlan, ranks: dict[str, int] | None = None):
        self.plan = plan
        self.ranks: dict[str, int] = {}
        self.conv_ranks: dict[str, int] = {}
        self.kinds: Counter[str] = Counter()
        self.zeros = 0  # modules that stand in for the rest of a fused attention
        self.bytes = header_reserve(plan, ranks) + 8
        self._fused: dict[tuple[str, str], list[tuple[Layer, bool]]] = defaultdict(list)
        self._stack = contextlib.ExitStack()
        self._writer = None
        if not plan.spec.preview:
            writer = SafetensorsWriter(plan.output, self.bytes - 8, plan.spec.overwrite)
            self._writer = self._stack.enter_context(writer)

    def __enter__(self) -> CombinedFile:
        return self

    def __exit__(self, *_) -> None:
        self._stack.close()

    @property
    def modules(self) -> int:
        """Layers that the file changes."""
        return sum(self.kinds.values()) - self.kinds[NOTHING]

    def add(self, made: Made) -> None:
        """Write a layer, in the order of the plan."""
        layer = made.layer
        if layer.parts:
            self.kinds[made.how if made.tensors else NOTHING] += 1
        if layer.module.fused:
            self._fused[layer.module.component, layer.module.fused].append((layer, bool(made.tensors)))
        self._put(made.tensors)
        if made.rank:
            (self.conv_ranks if made.is_conv else self.ranks)[layer.name] = made.rank

    def finish(self, **measured: Any) -> Written | None:
        """What comes last: the rest of fused attentions, embeddings, the header. None in a preview."""
        dtype = torch_dtype(OUTPUT_DTYPES[self.plan.spec.dtype])
        for group in self._fused.values():  # A1111 applies q, k, v and out all or none
            if any(there for _, there in group):
                for layer in (layer for layer, there in group if not there):
                    self._put(zeros(layer, dtype))
                    self.ranks[layer.name] = 1
                    self.zeros += 1
        for name, (file, info) in self.plan.embeddings.items():
            self._put([(embedding_name(name), embedding(name, file.read(info)))])
        if self._writer is None:
            return None
        own = texts(self.plan, self.ranks, self.conv_ranks, self.kinds, **measured)
        return self._writer.commit(lambda data, legacy: with_hashes(own, data, legacy))

    def _put(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in tensors:
            self.bytes += tensor.nbytes
            if self._writer is not None:
                self._writer.add(name, tensor)


def header_reserve(plan: CombinePlan, ranks: dict[str, int] | None) -> int:
    """An upper bound of the header's size, close enough for a file of a size."""
    offset = 10 ** len(str(2 * plan.most_bytes)) if plan.spec.size is not None else _WIDEST
    entries: dict[str, dict] = {}
    conv: dict[str, int] = {}
    linear: dict[str, int] = {}

    def entry(name: str, shape: Sequence[int]) -> None:
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset]}

    for layer in plan.layers:
        if layer.is_norm:
            entry(f"{layer.name}.{WEIGHT}", layer.shape)
            entry(f"{layer.name}.{SHIFT}", layer.shape)
            continue
        if layer.changes_bias:
            entry(f"{layer.name}.{BIAS}", layer.shape[:1])
        if plan.is_whole(layer):
            entry(f"{layer.name}.{DIFF}", layer.shape)
        if ranks is not None and layer.name not in ranks and not layer.module.fused and not layer.changes_bias:
            continue
        rank = min(layer.size) if ranks is None else ranks.get(layer.name, 1)
        (linear if len(layer.shape) == 2 else conv)[layer.name] = rank
        axes = [1] * (len(layer.shape) - 2)
        entry(f"{layer.name}.{DOWN}", (rank, *layer.shape[1:]))
        entry(f"{layer.name}.{UP}", (layer.shape[0], rank, *axes))
        entry(f"{layer.name}.alpha", ())
    for name, (_, info) in plan.embeddings.items():
        entry(embedding_name(name), (1, *info.shape))
    own = with_hashes(texts(plan, linear, conv, {WHOLE: 1}, **_MEASURED), "0" * 64, "0" * 8)
    return len(header_bytes(entries, own)) + _SLACK


def overhead(plan: CombinePlan, ranks: dict[str, int]) -> int:
    """Bytes besides the factors of these layers: header, alphas, norms, biases, embeddings, modules of zeros."""
    total = 8 + header_reserve(plan, ranks) + 8  # the header ends on a multiple of 8
    total += sum(info.nbytes for _, info in plan.embeddings.values())
    for layer in plan.layers:
        n, k = layer.size
        if layer.is_norm:
            total += 2 * n * plan.itemsize
            continue
        total += n * plan.itemsize if layer.changes_bias else 0
        total += 4 if layer.name in ranks else 0
        if layer.name not in ranks and (layer.module.fused or layer.changes_bias):
            total += (n + k) * plan.itemsize + 4
    return total

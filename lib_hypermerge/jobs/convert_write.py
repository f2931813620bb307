"""Write the modules of a converted LoRA: a file of kohya's, a file of diffusers', or a folder of PEFT's."""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from ..adapters.dora import SCALE as MAGNITUDES
from ..adapters.lora import DOWN, UP
from ..algebra import folding
from ..files.folder_writer import FolderWriter
from ..files.metadata import with_hashes
from ..files.writer import SafetensorsWriter, Written, header_bytes
from ..layouts.dialects import peft
from ..layouts.module import CONV, Module
from .convert_metadata import lora_texts
from .convert_plan import EMBEDDINGS, AdapterPlan
from .convert_restore import ALPHA, Notes, Tensors, kind_of
from .convert_seams import scale_of
from .convert_spec import DIFFUSERS, KEEP, PEFT
from .convert_units import Out

_ENTRY = 130  # bytes of a tensor's entry in a header besides its name, at most
_NOTE = 130  # bytes of the note of a module besides its name, at most
_SLACK = 2048
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class Tally:
    """What the report tells. inexact: modules whose alpha could be folded into up only by rounding."""

    modules: int = 0
    inexact: int = 0
    padded: int = 0
    widened: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    conv_ranks: dict[str, int] = field(default_factory=dict)

    def count(self, name: str, module: Module | None, tensors: Tensors) -> None:
        self.modules += 1
        if DOWN in tensors:
            is_conv = module is not None and module.kind == CONV
            (self.conv_ranks if is_conv else self.ranks)[name] = len(tensors[DOWN])


class Sink(Protocol):
    """Takes modules as they come. module: the layer, None where there is none."""

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None: ...

    def commit(self) -> list[Written]: ...


@contextlib.contextmanager
def open_sink(plan: AdapterPlan, tally: Tally) -> Iterator[Sink]:
    """The writer of the dialect that was asked for; leaving it without commit() leaves nothing behind."""
    if plan.spec.to == DIFFUSERS:
        yield _DiffusersFile(plan, tally)
        return
    with contextlib.ExitStack() as stack:
        yield _PeftFolder(plan, tally, stack) if plan.spec.to == PEFT else _KohyaFile(plan, tally, stack)


def _metadata(plan: AdapterPlan, tally: Tally, notes: Notes | None = None) -> dict[str, str]:
    more = {} if notes is None else {"restore": notes.to_json()}
    return lora_texts(plan, tally.ranks, tally.conv_ranks, **more)


class _KohyaFile:
    def __init__(self, plan: AdapterPlan, tally: Tally, stack: contextlib.ExitStack):
        self.plan, self.tally = plan, tally
        names = [out.name for unit in plan.units for out in unit.outs] + [entry.key for entry in plan.verbatim]
        most = max((len(source.entry.parts) for unit in plan.units for source in unit.sources), default=3) + 2
        most = max(most, *(len(entry.parts) for entry in plan.verbatim), 5)
        reserve = sum(most * (len(name.encode()) + 18 + _ENTRY) for name in names) + _SLACK
        reserve += sum(len(_embedding_name(name).encode()) + _ENTRY for name in plan.embeddings)
        reserve += len(header_bytes({}, _metadata(plan, tally)))
        self.writer = stack.enter_context(SafetensorsWriter(plan.output, reserve, plan.spec.overwrite))

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None:
        self.tally.count(out.name, module, tensors)
        for part, tensor in tensors.items():
            self.writer.add(f"{out.name}.{part}", tensor)

    def commit(self) -> list[Written]:
        for name, (file, info) in self.plan.embeddings.items():
            self.writer.add(_embedding_name(name), file.read(info))
        texts = _metadata(self.plan, self.tally)
        return [self.writer.commit(lambda data, legacy: with_hashes(texts, data, legacy))]


def _embedding_name(name: str) -> str:
    """The name of a bundled embedding's tensor in kohya's files; cloneofsimo's `<token>` has none yet."""
    return name if name.startswith("bundle_emb.") else f"bundle_emb.{name.strip('<>')}.string_to_param.*"


class _DiffusersFile:
    """Kept until all is known: one rank and one number format for all modules of a component."""

    def __init__(self, plan: AdapterPlan, tally: Tally):
        self.plan, self.tally = plan, tally
        self.modules: list[tuple[Out, Module | None, Tensors]] = []
        self.attentive: set[str] = set()  # components with layers of attention

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None:
        self.modules.append((out, module, tensors))
        if out.name.endswith(_TEXT_ATTENTION):
            self.attentive.add(_component(out))

    def commit(self) -> list[Written]:
        keep = self.plan.spec.dtype == KEEP
        folds = [folding.is_invertible(t[UP], scale_of(t), t[UP].dtype) for _, _, t in self.modules]
        narrow = [t[UP].dtype.itemsize < 4 for _, _, t in self.modules]
        # one module that needs more digits makes all float32: PEFT multiplies factors of one format only
        self.tally.widened = keep and any(n and not f for n, f in zip(narrow, folds, strict=True))
        ranks: dict[str, int] = defaultdict(int)
        for out, _, tensors in self.modules:
            ranks[_component(out)] = max(ranks[_component(out)], len(tensors[DOWN]))
        notes, ready = Notes(), []
        for (out, module, tensors), folds_as_it_is in zip(self.modules, folds, strict=True):
            self.tally.count(out.name, module, tensors)
            widened = self.tally.widened and tensors[UP].dtype.itemsize < 4
            self.tally.inexact += not folds_as_it_is and not widened
            if folds_as_it_is or keep:
                notes.kinds[out.name] = kind_of(tensors)
            ready.append((out, self._ready(tensors, module, ranks[_component(out)])))
            _note_name(notes, self.plan, out, module)
        notes.kinds = {} if len(notes.kinds) < len(ready) else notes.kinds
        named = [(key, t) for out, tensors in ready for key, t in self._named(out, tensors)]
        texts = _metadata(self.plan, self.tally, notes)
        entries = {k: {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [10**11] * 2} for k, t in named}
        with SafetensorsWriter(
            self.plan.output, len(header_bytes(entries, texts)) + _SLACK, self.plan.spec.overwrite
        ) as writer:
            for key, tensor in named:
                writer.add(key, tensor)
            return [writer.commit(lambda data, legacy: texts)]

    def _ready(self, tensors: Tensors, module: Module | None, rank: int) -> Tensors:
        up, down = tensors[UP], tensors[DOWN]
        dtype = torch.float32 if self.tally.widened else up.dtype
        up, down = _shaped(folding.fold(up, scale_of(tensors), dtype), down.to(dtype), module)
        if len(down) < rank:  # diffusers 0.31 scales modules of other ranks than the first by the first's alpha
            self.tally.padded += 1
            more = rank - len(down)
            up = torch.cat((up, up.new_zeros(len(up), more, *up.shape[2:])), 1)
            down = torch.cat((down, down.new_zeros(more, *down.shape[1:])))
        out = {"A": down, "B": up}
        if MAGNITUDES in tensors:
            out["m"] = _magnitudes(tensors[MAGNITUDES].to(dtype), up)
        return out

    def _named(self, out: Out, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        # diffusers 0.31 takes text encoders' layers by PEFT's names only where attention is among them
        old = _component(out).startswith("text_encoder") and _component(out) not in self.attentive
        ends = ("lora_linear_layer.down", "lora_linear_layer.up") if old else ("lora_A", "lora_B")
        yield f"{out.name}.{ends[0]}.weight", tensors["A"]
        yield f"{out.name}.{ends[1]}.weight", tensors["B"]
        if "m" in tensors:
            yield f"{out.name}.lora_magnitude_vector", tensors["m"]


class _PeftFolder:
    def __init__(self, plan: AdapterPlan, tally: Tally, stack: contextlib.ExitStack):
        self.plan, self.tally, self.stack = plan, tally, stack
        self.folder = stack.enter_context(FolderWriter(plan.output, plan.spec.overwrite))
        self.writers: dict[str, SafetensorsWriter] = {}
        self.modules: dict[str, dict[str, tuple[int, float]]] = defaultdict(dict)
        self.dora: set[str] = set()
        self.notes = Notes()
        names = [out.name for unit in plan.units for out in unit.outs]
        self.reserve = sum(3 * (len(name) + 45 + _ENTRY) + 2 * (len(name) + _NOTE) for name in names)
        self.reserve += len(header_bytes({}, _metadata(plan, tally))) + _SLACK

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None:
        component, path = out.name.split(".", 1)
        self.tally.count(out.name, module, tensors)
        if component not in self.writers:
            target = self.folder.folder(component) / peft.WEIGHTS_NAMES[0]
            self.writers[component] = self.stack.enter_context(SafetensorsWriter(target, self.reserve))
        writer, rank = self.writers[component], len(tensors[DOWN])
        up, down = _shaped(tensors[UP], tensors[DOWN], module)
        name = f"base_model.model.{path}"
        writer.add(f"{name}.lora_A.weight", down)
        writer.add(f"{name}.lora_B.weight", up)
        if MAGNITUDES in tensors:
            self.dora.add(component)
            writer.add(f"{name}.lora_magnitude_vector", _magnitudes(tensors[MAGNITUDES], up))
        scaled = "scale" in tensors
        alpha = scale_of(tensors) * rank if scaled or ALPHA not in tensors else float(tensors[ALPHA].item())
        self.modules[component][path] = (rank, alpha)
        if not scaled:
            self.notes.kinds[out.name] = kind_of(tensors)
        _note_name(self.notes, self.plan, out, module)

    def commit(self) -> list[Written]:
        if len(self.notes.kinds) < self.tally.modules:
            self.notes.kinds = {}
        texts = _metadata(self.plan, self.tally, self.notes)
        written = []
        for component, writer in self.writers.items():
            written.append(writer.commit(lambda data, legacy: texts))
            config = peft.config(self.modules[component], use_dora=component in self.dora)
            self.folder.text(f"{component}/{peft.CONFIG_NAME}", json.dumps(config, indent=2) + "\n")
        if self.plan.embeddings:
            written.append(self._write_embeddings())
        self.folder.commit()
        inside = [(self.plan.output / w.path.relative_to(self.folder.part), w) for w in written]
        return [Written(path, w.bytes, w.sha256, w.data_sha256) for path, w in inside]

    def _write_embeddings(self) -> Written:
        found = self.plan.embeddings
        reserve = sum(len(_embedding_name(name).encode()) + _ENTRY for name in found) + _SLACK
        with SafetensorsWriter(self.folder.folder("") / EMBEDDINGS, reserve) as writer:
            for name, (file, info) in found.items():
                writer.add(_embedding_name(name), file.read(info))
            return writer.commit(lambda data, legacy: {"format": "pt"})


def _component(out: Out) -> str:
    return out.name.split(".", 1)[0]


def _note_name(notes: Notes, plan: AdapterPlan, out: Out, module: Module | None) -> None:
    """Remember a spelling of kohya's that is not the usual one."""
    key = None if module is None else plan.kohya_keys.get((module.component, module.path))
    if module is not None and key not in (None, module.name):
        notes.names[out.name] = key


def _shaped(up: torch.Tensor, down: torch.Tensor, module: Module | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors with as many axes as the layer's weight has."""
    axes = 2 if module is None or module.weight is None else len(module.weight.shape)
    if axes == 4 and down.dim() == 2:
        kernel = module.weight.shape[2:] if module is not None and module.weight is not None else (1, 1)
        down = down.reshape(len(down), -1, *kernel)
    if axes == 2 and down.dim() == 4:
        down = down.flatten(1)
    up = up.flatten(1)
    return (up[..., None, None] if axes == 4 else up), down


def _magnitudes(magnitudes: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As PEFT has them: (n,), or (1, n, 1, 1) for convolutions."""
    flat = magnitudes.flatten()
    return flat.reshape(1, -1, 1, 1) if up.dim() == 4 else flat

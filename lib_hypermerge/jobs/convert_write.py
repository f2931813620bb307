"""Write the modules of a converted LoRA: a file of kohya's, a file of diffusers', or a folder of PEFT's."""

from __future__ import annotations

import contextlib
import functools
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from ..adapters.dora import SCALE as MAGNITUDES
from ..adapters.lora import DOWN, UP
from ..algebra import folding
from ..errors import NumericalError
from ..files.folder_writer import FolderWriter
from ..files.metadata import with_hashes
from ..files.unnamed import UnnamedFile
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
# (function, items) → results in order, computed in parallel
Run = Callable[[Callable[..., Any], Iterable[Any]], Iterator[Any]]
_TEXT_ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class Tally:
    """What the report tells. inexact: modules whose alpha could be folded into up only by rounding.

    strange: keys of modules that hold NaN or Inf.
    """

    modules: int = 0
    inexact: int = 0
    padded: int = 0
    widened: bool = False
    ranks: dict[str, int] = field(default_factory=dict)
    conv_ranks: dict[str, int] = field(default_factory=dict)
    alphas: dict[str, float] = field(default_factory=dict)
    strange: list[str] = field(default_factory=list)

    def count(self, name: str, module: Module | None, tensors: Tensors) -> None:
        self.modules += 1
        if DOWN in tensors:
            is_conv = module is not None and module.kind == CONV
            (self.conv_ranks if is_conv else self.ranks)[name] = len(tensors[DOWN])
            self.alphas[name] = float(tensors[ALPHA].item()) if ALPHA in tensors else float(len(tensors[DOWN]))


class Sink(Protocol):
    """Takes modules as they come. module: the layer, None where there is none."""

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None: ...

    def seal(self) -> list[UnnamedFile]:
        """All that takes time or can fail, but for the names. A folder has no such files: it is there by commit()."""
        ...

    def commit(self) -> list[Written]: ...


@contextlib.contextmanager
def open_sink(plan: AdapterPlan, tally: Tally, run: Run, reserve: int | None = None) -> Iterator[Sink]:
    """The writer of the dialect that was asked for; leaving it without commit() leaves nothing behind.

    reserve: bytes of the header, where they are known; else as many as there could be.
    """
    with contextlib.ExitStack() as stack:
        if plan.spec.to == DIFFUSERS:
            yield _DiffusersFile(plan, tally, run, stack)
        elif plan.spec.to == PEFT:
            yield _PeftFolder(plan, tally, stack)
        else:
            yield _KohyaFile(plan, tally, stack, reserve)


def _metadata(plan: AdapterPlan, tally: Tally, notes: Notes | None = None) -> dict[str, str]:
    more = {} if notes is None else {"restore": notes.to_json()}
    return lora_texts(plan, tally.ranks, tally.conv_ranks, tally.alphas, **more)


class _KohyaFile:
    def __init__(self, plan: AdapterPlan, tally: Tally, stack: contextlib.ExitStack, reserve: int | None):
        self.plan, self.tally = plan, tally
        if reserve is None:
            reserve = self._most()
        self.writer = stack.enter_context(SafetensorsWriter(plan.output, reserve, plan.spec.overwrite))

    def _most(self) -> int:
        plan = self.plan
        names = [out.name for unit in plan.units for out in unit.outs] + [entry.key for entry in plan.verbatim]
        most = max((len(source.entry.parts) for unit in plan.units for source in unit.sources), default=3) + 2
        most = max(most, *(len(entry.parts) for entry in plan.verbatim), 5)
        reserve = sum(most * (len(name.encode()) + 18 + _ENTRY) for name in names) + _SLACK
        reserve += sum(len(embedding_name(name).encode()) + _ENTRY for name in plan.embeddings)
        return reserve + len(header_bytes({}, _metadata(plan, self.tally)))

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None:
        self.tally.count(out.name, module, tensors)
        for part, tensor in tensors.items():
            self.writer.add(f"{out.name}.{part}", tensor)

    def seal(self) -> list[UnnamedFile]:
        for name, (file, info) in self.plan.embeddings.items():
            self.writer.add(embedding_name(name), embedding(name, file.read(info)))
        texts = _metadata(self.plan, self.tally)
        self.writer.seal(lambda data, legacy: with_hashes(texts, data, legacy))
        return [self.writer]

    def commit(self) -> list[Written]:
        self.seal()
        return [self.writer.publish()]


def embedding_name(name: str) -> str:
    """The name of a bundled embedding's tensor in kohya's files; cloneofsimo's `<token>` has none yet."""
    return name if name.startswith("bundle_emb.") else f"bundle_emb.{name.strip('<>')}.string_to_param.*"


def embedding(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """cloneofsimo's single vectors as the rows that a bundled embedding has."""
    return tensor[None] if tensor.dim() == 1 and not name.startswith("bundle_emb.") else tensor


class _DiffusersFile:
    """Kept until all is known: one rank for all modules of a component, one number format for all.

    Of a format, because PEFT multiplies factors of one format only; so one module whose scaled up needs more digits
    makes all float32. Of a rank, because diffusers 0.31 scales all modules by the alpha of the first one's rank.
    """

    def __init__(self, plan: AdapterPlan, tally: Tally, run: Run, stack: contextlib.ExitStack):
        self.plan, self.tally, self.run, self.stack = plan, tally, run, stack
        self.modules: list[tuple[Out, Module | None, Tensors]] = []
        self.attentive: set[str] = set()  # components with layers of attention

    def add(self, out: Out, module: Module | None, tensors: Tensors) -> None:
        self.modules.append((out, module, tensors))
        if out.name.endswith(_TEXT_ATTENTION):
            self.attentive.add(_component(out))

    def commit(self) -> list[Written]:
        return [file.publish() for file in self.seal()]

    def seal(self) -> list[UnnamedFile]:
        keep = self.plan.spec.dtype == KEEP
        stored = {tensors[part].dtype for _, _, tensors in self.modules for part in (UP, DOWN)}
        common = functools.reduce(torch.promote_types, stored)

        def fits(item: tuple[Out, Module | None, Tensors]) -> tuple[bool, bool]:
            up, scale = item[2][UP], scale_of(item[2])
            as_it_is = folding.is_invertible(up, scale, common)
            return as_it_is, as_it_is or folding.is_invertible(up, scale, torch.float32)

        narrow, wide = (list(each) for each in zip(*self.run(fits, self.modules), strict=True))
        self.tally.widened = keep and common.itemsize < 4 and narrow != wide
        dtype, exact = (torch.float32, wide) if self.tally.widened else (common, narrow)
        self.tally.inexact = exact.count(False)
        notes = Notes()
        ranks: dict[str, int] = defaultdict(int)
        for (out, module, tensors), is_exact in zip(self.modules, exact, strict=True):
            self.tally.count(out.name, module, tensors)
            ranks[_component(out)] = max(ranks[_component(out)], len(tensors[DOWN]))
            if is_exact or keep:
                notes.kinds[out.name] = kind_of(tensors)
            _note_name(notes, self.plan, out, module)
        notes.kinds = {} if len(notes.kinds) < len(self.modules) else notes.kinds
        self.tally.padded = sum(len(tensors[DOWN]) < ranks[_component(out)] for out, _, tensors in self.modules)
        ready = self.run(lambda item: (item[0], _scaled(item, ranks[_component(item[0])], dtype)), self.modules)
        named = [(key, t) for out, tensors in ready for key, t in self._named(out, tensors)]
        texts = _metadata(self.plan, self.tally, notes)
        entries = {k: {"dtype": "BF16", "shape": list(t.shape), "data_offsets": [10**11] * 2} for k, t in named}
        reserve = len(header_bytes(entries, texts)) + _SLACK
        writer = self.stack.enter_context(SafetensorsWriter(self.plan.output, reserve, self.plan.spec.overwrite))
        for key, tensor in named:
            writer.add(key, tensor)
        writer.seal(lambda data, legacy: texts)
        return [writer]

    def _named(self, out: Out, tensors: Tensors) -> Iterator[tuple[str, torch.Tensor]]:
        # diffusers 0.31 takes text encoders' layers by PEFT's names only where attention is among them
        old = _component(out).startswith("text_encoder") and _component(out) not in self.attentive
        ends = ("lora_linear_layer.down", "lora_linear_layer.up") if old else ("lora_A", "lora_B")
        yield f"{out.name}.{ends[0]}.weight", tensors["A"]
        yield f"{out.name}.{ends[1]}.weight", tensors["B"]
        if "m" in tensors:
            yield f"{out.name}.lora_magnitude_vector", tensors["m"]


def _scaled(item: tuple[Out, Module | None, Tensors], rank: int, dtype: torch.dtype) -> Tensors:
    """A module's factors with a scale of 1, filled up with zeros to a rank."""
    out, module, tensors = item
    up, down = _shaped(folding.fold(tensors[UP], scale_of(tensors), dtype), tensors[DOWN].to(dtype), module)
    if not up.isfinite().all() and tensors[UP].isfinite().all():
        raise NumericalError(
            f"{out.name}: alpha / rank times up does not fit the number format {str(dtype).removeprefix('torch.')}.",
            "Its largest numbers overflow.", "Choose fp32, or a dialect that has alphas.",
        )  # fmt: skip
    more = rank - len(down)
    if more:
        up = torch.cat((up, up.new_zeros(len(up), more, *up.shape[2:])), 1)
        down = torch.cat((down, down.new_zeros(more, *down.shape[1:])))
    magnitudes = {"m": _magnitudes(tensors[MAGNITUDES].to(dtype), up)} if MAGNITUDES in tensors else {}
    return {"A": down, "B": up} | magnitudes


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

    def seal(self) -> list[UnnamedFile]:
        return []

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
        reserve = sum(len(embedding_name(name).encode()) + _ENTRY for name in found) + _SLACK
        with SafetensorsWriter(self.folder.folder("") / EMBEDDINGS, reserve) as writer:
            for name, (file, info) in found.items():
                writer.add(embedding_name(name), embedding(name, file.read(info)))
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

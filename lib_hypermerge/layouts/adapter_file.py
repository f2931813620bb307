"""An adapter file seen as modules: which dialect it speaks, and which part of which module each tensor is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FormatError, LayoutError, SpecError
from ..files.opening import open_tensors
from ..files.source import TensorFile, TensorInfo
from ..files.virtual import Piece, VirtualFile
from .detect import recognise
from .dialects import cloneofsimo, parts, peft
from .module import Module

_EMBEDDING = "bundle_emb."


@dataclass(frozen=True)
class Entry:
    """The tensors of one module in an adapter file.

    key: the module's name as the file spells it.  name: the same with the dialect's dress taken off: underscores
    for dots and, if the file says it, the component before: `unet_down_blocks_0_…`, `te2_text_model_…`.
    parts: by kohya's and LyCORIS' part names, whatever the dialect (`lora_A.weight` is `lora_down.weight`).
    alpha: from a configuration; None where there is none or the parts hold one.
    """

    key: str
    name: str
    parts: Mapping[str, TensorInfo]
    alpha: float | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all parts but alpha and the like, which are no matrices."""
        return {part: info.shape for part, info in self.parts.items() if part not in ("alpha", "scale")}


@dataclass
class AdapterFile:
    """An open adapter file (or PEFT folder). dialect: kohya, diffusers, diffusers-old, peft, cloneofsimo, …

    order: for a dialect that numbers its modules, the classes whose layers it counts, by component.
    """

    file: TensorFile
    dialect: str
    entries: dict[str, Entry] = field(default_factory=dict)  # by key
    embeddings: dict[str, TensorInfo] = field(default_factory=dict)  # bundled ones, by tensor name
    unknown: list[str] = field(default_factory=list)  # tensors that are no part of any module
    notes: list[str] = field(default_factory=list)  # what had to be assumed
    order: Mapping[str, frozenset[str]] = field(default_factory=dict)

    @property
    def metadata(self) -> dict[str, str]:
        return self.file.metadata

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass(frozen=True)
class Target:
    """What a module of an adapter file changes: a layer of a checkpoint, or some of its rows where the
    checkpoint fuses what the file keeps apart. start, stop: rows within module.weight.

    swapped: the file has the two halves of these rows in the other order (diffusers' norm_out of Flux and SD3).
    channels: the file knows only so many of the layer's input channels, the first ones.
    """

    module: Module
    start: int
    stop: int
    swapped: bool = False
    channels: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of the weight that the file's module is meant for."""
        assert self.module.weight is not None
        _, *rest = self.module.weight.shape
        if self.channels is not None:
            rest[0] = self.channels
        return (self.stop - self.start, *rest)


@dataclass
class Resolution:
    """An adapter file laid over a checkpoint."""

    targets: list[tuple[Entry, Target]] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)  # keys of entries that no layer of the checkpoint answers to
    absent: dict[str, list[str]] = field(default_factory=dict)  # component that the checkpoint lacks → keys for it


def open_adapter(path: str | Path) -> AdapterFile:
    """A LoRA file (.safetensors, .pt, .bin …), or a folder that PEFT or diffusers saved.

    Raises SpecError (nothing there), FormatError (broken) or LayoutError (no adapter).
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    file = open_tensors(path)
    try:
        configs = peft.from_metadata(file.metadata, path.name)
        beside = path.parent / peft.CONFIG_NAME
        if not configs and path.name in peft.WEIGHTS_NAMES and beside.is_file():
            configs = {"": _config(beside)}
        return _read(file, configs)
    except BaseException:
        file.close()
        raise


def read_adapter(file: TensorFile) -> AdapterFile:
    """An open file of tensors as an adapter, without a configuration. Raises FormatError or LayoutError."""
    return _read(file, {})


def _config(path: Path) -> peft.PeftConfig:
    try:
        return peft.read_config(path.read_text(encoding="utf-8"), path.name)
    except UnicodeDecodeError:
        raise FormatError(f"{path.name} is no usable PEFT configuration.", "It is not UTF-8.") from None
    except OSError as error:
        raise SpecError(f"{path} cannot be read.", f"{error.strerror}.") from None


def _open_folder(path: Path) -> AdapterFile:
    """A PEFT folder, one per component, or a folder with a file of diffusers in it."""
    inner = {name: path / name for name in parts.FOLDERS if (path / name / peft.CONFIG_NAME).is_file()}
    if not inner and (path / peft.CONFIG_NAME).is_file():
        inner = {"": path}
    if not inner:
        alone = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".bin") and "lora" in p.name]
        if len(alone) == 1:
            return open_adapter(alone[0])
        raise LayoutError(
            f"{path.name} is a folder without an adapter.", f"It holds no {peft.CONFIG_NAME}.",
            "Name the folder that PEFT wrote, or a LoRA file.",
        )  # fmt: skip
    opened: list[TensorFile] = []
    configs = {}
    try:
        for name, folder in inner.items():
            configs[name] = _config(folder / peft.CONFIG_NAME)
            weights = next((folder / w for w in peft.WEIGHTS_NAMES if (folder / w).is_file()), None)
            if weights is None:
                raise SpecError(f"{folder} has no {peft.WEIGHTS_NAMES[0]}.", hint="The folder is incomplete.")
            opened.append(open_tensors(weights))
        whole = VirtualFile(path, opened)
        for name, file in zip(inner, opened, strict=True):
            for key, info in file.tensors.items():
                whole.add(f"{name}.{key}" if name else key, [Piece(file, info)])
        return _read(whole, configs)
    except BaseException:
        for file in opened:
            file.close()
        raise


def _read(file: TensorFile, configs: dict[str, peft.PeftConfig]) -> AdapterFile:
    """The modules of an open file. configs: by what stands before a module's path, "" for all."""
    adapter = AdapterFile(file, "")
    found: dict[str, dict[str, TensorInfo]] = {}
    votes: Counter[str] = Counter()
    names = cloneofsimo.spell(file)
    for key, info in file.tensors.items():
        if key.startswith(_EMBEDDING) or cloneofsimo.is_embedding(file, key):
            adapter.embeddings[key] = info
            continue
        spelled = parts.split(names.get(key, key))
        if spelled is None:
            adapter.unknown.append(key)
            continue
        module = found.setdefault(spelled.module, {})
        if spelled.part in module:
            raise FormatError(
                f"{file.path.name} has {spelled.part} of {spelled.module} twice.",
                f"{module[spelled.part].name} and {key} mean the same.",
            )
        module[spelled.part] = info
        votes[spelled.dialect] += 1
    for module, tensors in found.items():
        if "weight" in tensors and "on_input" not in tensors:  # a layer's own, not IA3's
            adapter.unknown.append(tensors.pop("weight").name)
        if _is_module(tensors):
            adapter.entries[module] = _entry(file, module, tensors, configs)
        else:
            adapter.unknown += [info.name for info in tensors.values()]
            for spelled in filter(None, (parts.split(names.get(i.name, i.name)) for i in tensors.values())):
                votes[spelled.dialect] -= 1
    _refuse_others(adapter)
    adapter.dialect = parts.PEFT if "" in configs else votes.most_common(1)[0][0]
    adapter.order = cloneofsimo.classes(file)
    if adapter.dialect == parts.PEFT and not configs:
        adapter.notes.append(f"{peft.CONFIG_NAME} is not beside it: alpha is taken to be equal to the rank.")
    for start in sorted({config.start for config in configs.values()} - {""}):
        adapter.notes.append(
            f"it was trained from PEFT's {start} start on a base that this changed; on others it is off."
        )
    return adapter


def _is_module(tensors: dict[str, TensorInfo]) -> bool:
    """Whether these are more than an alpha, or a plain layer's weight."""
    return bool(tensors.keys() - parts.AUXILIARY)


def _refuse_others(adapter: AdapterFile) -> None:
    """LayoutError for a checkpoint, or whatever else a file without modules is."""
    name = adapter.file.path.name
    if len(adapter.entries) > len(adapter.unknown):
        return
    try:
        title = recognise(adapter.file).title
    except LayoutError:
        title = ""
    if title:
        raise LayoutError(f"{name} is a checkpoint, not a LoRA.", f"It is a {title} model.", "Name a LoRA file here.")
    if adapter.entries:
        return
    if any(key in ("emb_params", "clip_l", "clip_g") or key.startswith("string_to_") for key in adapter.file.tensors):
        raise LayoutError(f"{name} is an embedding (textual inversion), not a LoRA.")
    shown = ", ".join(list(adapter.file.tensors)[:3])
    if adapter.unknown and all(key.endswith(".alpha") for key in adapter.unknown):
        raise LayoutError(
            f"{name} is no LoRA.", f"It holds the alphas of one, but none of its factors: {shown}.",
            "Save or download the LoRA again.",
        )  # fmt: skip
    raise LayoutError(
        f"{name} is no LoRA.",
        f"None of its tensors has a name that a LoRA's has: {shown}." if shown else "It holds no tensors.",
        "Name a LoRA file or a PEFT folder.",
    )


def _entry(file: TensorFile, module: str, tensors: dict[str, TensorInfo], configs: dict[str, peft.PeftConfig]) -> Entry:
    head, _, rest = module.partition(".")
    config, path = (configs[head], rest) if head in configs else (configs.get(""), module)
    alpha = None
    if config is not None and "alpha" not in tensors:
        path = path.removeprefix("base_model.model.")
        alpha = config.alpha_of(path)
        _check_rank(file, module, tensors, config.rank_of(path))
    return Entry(module, parts.undress(module, _component_of(file.path)), tensors, alpha)


def _component_of(path: Path) -> str:
    """What a file's or folder's name says of it, for dialects whose tensors' names do not."""
    if path.name in parts.FOLDERS:
        return parts.FOLDERS[path.name]
    if path.name in peft.WEIGHTS_NAMES:
        return parts.FOLDERS.get(path.parent.name, "")
    return "te1" if path.stem.endswith(("_te", ".text_encoder")) else ""


def _check_rank(file: TensorFile, module: str, tensors: dict[str, TensorInfo], rank: int) -> None:
    down = tensors.get("lora_down.weight")
    if down is not None and down.shape[:1] != (rank,):
        raise FormatError(
            f"{file.path.name} and its configuration disagree on the rank of {module}.",
            f"{down.name} is {list(down.shape)}, the configuration says {rank}.",
            "Save the adapter again.",
        )

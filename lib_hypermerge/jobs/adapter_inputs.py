"""A LoRA file as a job takes it: open, laid over a checkpoint, checked from headers, and read module by module."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ..adapters import families
from ..adapters.adapter import Adapter
from ..adapters.first_channels import FirstChannels
from ..adapters.swapped import Swapped
from ..errors import FormatError, LayoutError
from ..files.dtypes import FLOATS
from ..layouts.adapter_file import AdapterFile, Entry, Resolution, Target, open_adapter
from ..layouts.dialects.parts import KOHYA
from ..layouts.module import Model
from ..layouts.reference import reference_model
from ..layouts.resolve import identify, resolve

_FEW = 3
_FACTOR = "lora_down.weight"
_FIRST_LAYERS = {"input_blocks.0.0": 4, "img_in": 64}  # → channels in the plain models
_SINGLE = frozenset(("alpha", "scale", "on_input"))
_SCALED = frozenset(("lora", "loha", "lokr", "glora"))
_INTEGERS = _SINGLE | {"bias_indices", "bias_size"}


@dataclass
class LoraInput:
    """Holds the file open; close() it. families: by the entries' keys, checked."""

    file: AdapterFile
    resolution: Resolution
    families: dict[str, type[Adapter]] = field(default_factory=dict)
    idle: set[str] = field(default_factory=set)  # keys of modules that change nothing: their alpha is 0
    warnings: list[str] = field(default_factory=list)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> LoraInput:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def path(self) -> Path:
        return self.file.file.path

    @property
    def counts(self) -> dict[str, int]:
        """Modules by family."""
        return dict(Counter(family.family for family in self.families.values()))

    def load(self, entry: Entry) -> Adapter:
        """Read a module's tensors; its change is that of its target's rows as the checkpoint has them."""
        adapter, target = load(self.file, entry), self._targets[entry.key]
        if target.channels is not None:
            return FirstChannels.of(adapter, target.channels, replace(target, channels=None).shape)
        return Swapped.of(adapter) if target.swapped else adapter

    @cached_property
    def _targets(self) -> dict[str, Target]:
        return {entry.key: target for entry, target in self.resolution.targets}


def load(file: AdapterFile, entry: Entry) -> Adapter:
    """Read a module's tensors, as they are in the file."""
    return families.build({part: file.file.read(info) for part, info in entry.parts.items()}, entry.alpha)


def open_lora(source: Path | AdapterFile, model: Model) -> LoraInput:
    """Open a LoRA for a checkpoint (or take over one that is open), and refuse what headers show to be wrong.

    Raises SpecError, FormatError (broken, half a module, parts that disagree) or LayoutError (for another model).
    """
    file = open_adapter(source) if isinstance(source, Path) else source
    try:
        resolution = resolve(file, model)
        out = LoraInput(file, resolution, check_entries(file, resolution, model.architecture.id))
        out.warnings = _warnings(out)
        return out
    except BaseException:
        file.close()
        raise


def check_entries(file: AdapterFile, resolution: Resolution, architecture: str) -> dict[str, type[Adapter]]:
    """The family of every module that has a target, by key. FormatError or LayoutError for what cannot be applied.

    Of a first layer that the checkpoint has widened, the target becomes its first channels.
    """
    found, misfits = {}, []
    for index, (entry, target) in enumerate(resolution.targets):
        found[entry.key] = family = family_of(file, entry)
        fitting = next((t for t in (target, *_narrower(target)) if family.fits(entry.shapes, t.shape)), None)
        if fitting is None:
            misfits.append((entry, target))
        else:
            resolution.targets[index] = entry, fitting
    _refuse_twice(file, resolution)
    if misfits:
        raise _misfit(file, misfits, architecture)
    return found


def _narrower(target: Target) -> list[Target]:
    """The plain model's part of a first layer that others widen."""
    plain = _FIRST_LAYERS.get(target.module.path) if target.module.component == "unet" else None
    return [replace(target, channels=plain)] if plain and plain < target.shape[1] else []


def _refuse_twice(file: AdapterFile, resolution: Resolution) -> None:
    claimed: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for entry, target in resolution.targets:
        module = target.module
        claims = claimed.setdefault((module.component, module.path), [])
        for start, stop, other in claims:
            if start < target.stop and target.start < stop:
                raise FormatError(
                    f"{file.file.path.name} names the same layer twice.",
                    f"{other} and {entry.key} are both {module.component}.{module.path}.",
                    "Remove one of them.",
                )
        claims.append((target.start, target.stop, entry.key))


def _check_numbers(file: AdapterFile, entry: Entry) -> None:
    """FormatError for quantised factors, and for an alpha that is not one number."""
    for part, info in entry.parts.items():
        if part in _SINGLE and info.numel != 1:
            raise FormatError(
                f"{info.name} in {file.file.path.name} is no single number.", f"It is {list(info.shape)}."
            )
        if part not in _INTEGERS and info.dtype not in FLOATS:
            raise FormatError(
                f"{info.name} in {file.file.path.name} is stored as {info.dtype}.",
                "Without the factors of its quantisation these numbers mean nothing.",
                "Use the file as it was trained: fp16, bf16 or fp32.",
            )


def family_of(file: AdapterFile, entry: Entry) -> type[Adapter]:
    """The family of a module, complete and consistent; the error of one that is not names module and file."""
    _check_numbers(file, entry)
    try:
        return families.family_of(entry.shapes)
    except FormatError as error:
        raise FormatError(
            f"{entry.key} in {file.file.path.name} cannot be used: {error.what}", error.why, error.hint
        ) from None


def _misfit(file: AdapterFile, misfits: list[tuple[Entry, Target]], wanted: str) -> LayoutError:
    entry, target = misfits[0]
    module = target.module
    parts = ", ".join(f"{part} {list(shape)}" for part, shape in entry.shapes.items())
    layer = list(target.shape)
    more = f" So do {len(misfits) - 1} more." if len(misfits) > 1 else ""
    architecture, _ = identify(file)
    other = architecture if architecture != wanted else ""
    kind = f"The LoRA may be for {reference_model(other).architecture.title}." if other else ""
    return LayoutError(
        f"{entry.key} in {file.file.path.name} does not fit the checkpoint.",
        f"The layer {module.component}.{module.path} is {layer}, the module has {parts}.{more}",
        kind or "Choose the kind of checkpoint that the LoRA was trained on.",
    )


def _warnings(lora: LoraInput) -> list[str]:
    """What was left out or looks odd, one sentence each."""
    file, resolution = lora.file, lora.resolution
    name = file.file.path.name
    out = [f"{name}: {note}" for note in file.notes]
    if resolution.unmatched:
        out.append(f"{name}: {_listed(resolution.unmatched)} no layer of this checkpoint; left out.")
    for component, keys in resolution.absent.items():
        out.append(f"{name}: {len(keys)} modules are for {component}, which the checkpoint does not bring; left out.")
    if file.unknown:
        out.append(f"{name}: {len(file.unknown)} tensors are part of no module, such as {file.unknown[0]}; left out.")
    alphas = find_idle(lora)
    out += idle_warning(lora)
    # the other dialects have no alphas, or a configuration that holds them
    without = [entry.key for entry, _ in resolution.targets if alphas[entry.key] is None and _FACTOR in entry.parts]
    if without and file.dialect == KOHYA:
        out.append(f"{name}: {len(without)} modules have no alpha, such as {without[0]}: it is taken to be the rank.")
    wider = [target for _, target in resolution.targets if target.channels is not None]
    out += [
        f"{name}: {t.module.path} has {replace(t, channels=None).shape[1]} input channels here, {t.channels} of which "
        "the LoRA knows; the others stay as they are."
        for t in wider
    ]  # fmt: skip
    return out


def find_idle(lora: LoraInput) -> dict[str, float | None]:
    """Note which modules change nothing; returns every module's alpha by key. FormatError if one is NaN or Inf."""
    alphas = {entry.key: _alpha(lora.file, entry) for entry, _ in lora.resolution.targets}
    lora.idle = {key for key, alpha in alphas.items() if alpha == 0 and _is_scaled(lora, lora.file.entries[key])}
    return alphas


def idle_warning(lora: LoraInput) -> list[str]:
    """One sentence on the modules that change nothing; none without."""
    few = f"{len(lora.idle)} modules have alpha 0, such as {min(lora.idle, default='')}: they change nothing."
    return [f"{lora.path.name}: {few}"] if lora.idle else []


def _is_scaled(lora: LoraInput, entry: Entry) -> bool:
    """Whether alpha / rank multiplies the whole change; to OFT alpha is a bound, DoRA's magnitudes stand beside it."""
    family = lora.families[entry.key]
    return family.family in _SCALED and family.rank(entry.shapes) is not None


def _listed(keys: list[str]) -> str:
    shown = ", ".join(keys[:_FEW]) + (f" and {len(keys) - _FEW} more" if len(keys) > _FEW else "")
    return f"{len(keys)} modules ({shown}) have" if len(keys) > 1 else f"1 module ({shown}) has"


def _alpha(file: AdapterFile, entry: Entry) -> float | None:
    if "alpha" not in entry.parts:
        return entry.alpha
    alpha = file.file.read(entry.parts["alpha"]).item()
    if not math.isfinite(alpha):
        raise FormatError(f"{entry.key} in {file.file.path.name} has the alpha {alpha}.", "The file is damaged.")
    return alpha

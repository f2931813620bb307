"""A LoRA file as a job takes it: open, laid over a checkpoint, checked from headers, and read module by module."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ..adapters import families
from ..adapters.adapter import Adapter
from ..adapters.swapped import Swapped
from ..errors import FormatError, LayoutError
from ..layouts.adapter_file import AdapterFile, Entry, Resolution, Target, open_adapter
from ..layouts.module import Model
from ..layouts.reference import reference_model
from ..layouts.resolve import identify, resolve

_FEW = 3


@dataclass
class LoraInput:
    """Holds the file open; close() it. families: by the entries' keys, checked."""

    file: AdapterFile
    resolution: Resolution
    families: dict[str, type[Adapter]] = field(default_factory=dict)
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
        """Read a module's tensors."""
        adapter = load(self.file, entry)
        return Swapped.of(adapter) if entry.key in self._swapped else adapter

    @cached_property
    def _swapped(self) -> set[str]:
        return {entry.key for entry, target in self.resolution.targets if target.swapped}


def load(file: AdapterFile, entry: Entry) -> Adapter:
    """Read a module's tensors, as they are in the file."""
    return families.build({part: file.file.read(info) for part, info in entry.parts.items()}, entry.alpha)


def open_lora(path: Path, model: Model) -> LoraInput:
    """Open a LoRA for a checkpoint, and refuse what headers show to be wrong.

    Raises SpecError, FormatError (broken, half a module, parts that disagree) or LayoutError (for another model).
    """
    file = open_adapter(path)
    try:
        resolution = resolve(file, model)
        out = LoraInput(file, resolution, check_entries(file, resolution))
        out.warnings = _warnings(out)
        return out
    except BaseException:
        file.close()
        raise


def check_entries(file: AdapterFile, resolution: Resolution) -> dict[str, type[Adapter]]:
    """The family of every module that has a target, by key. FormatError or LayoutError for what cannot be applied."""
    found, misfits, claimed = {}, [], {}
    for entry, target in resolution.targets:
        found[entry.key] = family = family_of(file, entry)
        rows = target.stop - target.start
        weight = target.module.weight
        assert weight is not None
        if not family.fits(entry.shapes, (rows, *weight.shape[1:])):
            misfits.append((entry, target))
        other = claimed.setdefault((target.module.component, target.module.path, target.start), entry.key)
        if other != entry.key:
            raise FormatError(
                f"{file.file.path.name} names the same layer twice.",
                f"{other} and {entry.key} are both {target.module.component}.{target.module.path}.",
                "Remove one of them.",
            )
    if misfits:
        raise _misfit(file, misfits)
    return found


def family_of(file: AdapterFile, entry: Entry) -> type[Adapter]:
    """The family of a module, complete and consistent; the error of one that is not names module and file."""
    try:
        return families.family_of(entry.shapes)
    except FormatError as error:
        raise FormatError(
            f"{entry.key} in {file.file.path.name} cannot be used: {error.what}", error.why, error.hint
        ) from None


def _misfit(file: AdapterFile, misfits: list[tuple[Entry, Target]]) -> LayoutError:
    entry, target = misfits[0]
    module, weight = target.module, target.module.weight
    assert weight is not None
    parts = ", ".join(f"{part} {list(shape)}" for part, shape in entry.shapes.items())
    layer = [target.stop - target.start, *weight.shape[1:]]
    more = f" So do {len(misfits) - 1} more." if len(misfits) > 1 else ""
    architecture, _ = identify(file)
    kind = f"The LoRA may be for {reference_model(architecture).architecture.title}." if architecture else ""
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
        out.append(f"{name}: {_listed(resolution.unmatched, 'module')} no layer of this checkpoint, left out.")
    for component, keys in resolution.absent.items():
        out.append(f"{name}: {len(keys)} modules are for {component}, which the checkpoint does not bring; left out.")
    if file.unknown:
        out.append(f"{name}: {len(file.unknown)} tensors are part of no module, such as {file.unknown[0]}; left out.")
    zero = [entry.key for entry, _ in resolution.targets if _alpha(file, entry) == 0]
    if zero:
        out.append(f"{name}: {len(zero)} modules have alpha 0, such as {zero[0]}: they change nothing.")
    return out


def _listed(keys: list[str], what: str) -> str:
    shown = ", ".join(keys[:_FEW]) + (f" and {len(keys) - _FEW} more" if len(keys) > _FEW else "")
    return f"{len(keys)} {what}{'s have' if len(keys) > 1 else ' has'} ({shown})"


def _alpha(file: AdapterFile, entry: Entry) -> float | None:
    if "alpha" in entry.parts:
        return float(file.file.read(entry.parts["alpha"]))
    return entry.alpha

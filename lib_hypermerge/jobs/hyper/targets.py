"""What the files of a hyper-merge are called, and whether their names and their room are free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ...errors import SpecError
from ...files.writer import check_room, check_target
from ..host import Host
from ..outputs import refuse_inputs
from .spec import HyperSpec


def model_path(spec: HyperSpec, host: Host) -> Path:
    """Of the hyper-model. SpecError for a name that no file, or no prompt, can have."""
    path = host.checkpoint_output(_in_folder(spec, spec.name))
    if "=" in path.stem:
        raise SpecError(
            f"{path.stem!r} cannot stand in a prompt.", "What follows = is read as a setting of the LoRA.",
            "Choose a name without =.",
        )  # fmt: skip
    return path


def lora_path(spec: HyperSpec, host: Host, end: str) -> Path:
    """Of the file NAME-end among the LoRAs; NAME may bring a folder where names are paths."""
    folder = spec.name[: len(spec.name) - len(Path(spec.name).name)]
    return host.lora_output(_in_folder(spec, f"{folder}{model_path(spec, host).stem}-{end}"))


def plain(labels: Sequence[str]) -> list[str]:
    """Models' labels as parts of names that prompts can hold, each once."""
    out: list[str] = []
    for number, label in enumerate(labels, 1):
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in label)
        out.append(f"{name}-{number}" if name.casefold() in (other.casefold() for other in out) else name)
    return out


def check(
    spec: HyperSpec, host: Host, sources: list[Path], models: Mapping[Path, int], others: Mapping[Path, int],
    work: Mapping[Path, int],
) -> None:  # fmt: skip
    """All names are free, and the disks have room for everything together.

    models: checkpoints and LoRAs, others: files beside them, work: what is gone in the end; all with their bytes.
    Raises SpecError or OutputError.
    """
    for path in models:
        if path.parent.is_dir() or not spec.out_dir:  # a folder that was asked for is made later
            check_target(path, 0, spec.overwrite)
        refuse_inputs(path, sources, host)
    for path in others:
        if path.exists() and not spec.overwrite:
            raise SpecError(f"{path.name} exists already.", hint="Choose another name, or allow overwriting.")
    sizes = {**models, **others, **work}
    by_disk: dict[int, list[Path]] = {}
    for path in sizes:
        by_disk.setdefault(_existing(path.parent).stat().st_dev, []).append(path)
    for together in by_disk.values():
        check_room(_existing(together[0].parent), f"{spec.name} and its LoRAs", sum(sizes[path] for path in together))


def _in_folder(spec: HyperSpec, name: str) -> str:
    return name if not spec.out_dir else str(Path(spec.out_dir) / name)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise SpecError(f"{folder} is no folder.", hint="Choose another folder.")
    return folder

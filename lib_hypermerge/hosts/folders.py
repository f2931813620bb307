"""The models beneath a folder: files by their suffix, and folders that are one model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..files.opening import CHECKPOINT_SUFFIXES

_ONE_LORA, _ONE_CHECKPOINT = "adapter_config.json", "model_index.json"  # PEFT's and diffusers' mark of a folder
_SHARDS = ".safetensors.index.json"  # beside the pieces of a file that was saved in several


def checkpoint_names(folder: Path) -> dict[str, Path]:
    """Name → path of every checkpoint file and diffusers folder, sorted; names are relative, with slashes."""
    return _models(folder, _ONE_CHECKPOINT)


def lora_names(folder: Path) -> dict[str, Path]:
    """The same of LoRA files and PEFT folders."""
    return _models(folder, _ONE_LORA)


def _models(folder: Path, mark: str) -> dict[str, Path]:
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in _walk(folder, mark)))


def _walk(folder: Path, mark: str, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Linked folders too, but no link back to where it comes from; not into a folder that is one model."""
    try:
        real, entries = folder.resolve(), list(folder.iterdir())
    except (OSError, RuntimeError):  # it vanished, is not ours to read, or is a link to itself
        return
    if real in above:
        return
    if above and any(entry.name == mark for entry in entries):
        yield folder
        return
    pieces = tuple(entry.name[: -len(_SHARDS)] + "-" for entry in entries if entry.name.endswith(_SHARDS))
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry, mark, above | {real})
        elif entry.is_file() and _is_model(entry, pieces):
            yield entry


def _is_model(file: Path, pieces: tuple[str, ...]) -> bool:
    if file.name.endswith(_SHARDS):
        return True
    return file.suffix.lower() in CHECKPOINT_SUFFIXES and not (pieces and file.name.startswith(pieces))

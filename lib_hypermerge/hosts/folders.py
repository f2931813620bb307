"""The models beneath a folder: files by their suffix, and folders that are one model."""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files.opening import CHECKPOINT_SUFFIXES

_WILD = re.compile(r"[*?\[]")
_SHARDS = ".safetensors.index.json"  # beside the pieces of a file that was saved in several
_DENOISERS = ("unet", "transformer")
_COMPONENTS = (*_DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")


def checkpoint_names(folder: Path) -> dict[str, Path]:
    """Name → path of every checkpoint file and diffusers folder, sorted; names are relative, with slashes."""
    return _models(folder, _is_checkpoint)


def lora_names(folder: Path) -> dict[str, Path]:
    """The same of LoRA files and PEFT folders."""
    return _models(folder, _is_lora)


def matching(names: dict[str, Path], pattern: str) -> dict[str, Path]:
    """Those of a list that lie in the folder, or match the pattern; a * may stand for several folders."""
    folder = pattern.rstrip("/") + "/"
    if _WILD.search(pattern):
        return {name: path for name, path in names.items() if fnmatch.fnmatchcase(name, pattern)}
    return {name: path for name, path in names.items() if name.startswith(folder)}


def matching_paths(pattern: str) -> dict[str, Path]:
    """The same for paths: the LoRAs beneath a folder that is none itself, or of a pattern."""
    path = Path(pattern)
    if path.is_dir() and not _is_lora(path):
        return {str(found): found for found in lora_names(path).values()}
    if not _WILD.search(pattern):
        return {}
    found = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207 - patterns may be absolute
    return {str(p): p for p in found if (_is_lora(p) if p.is_dir() else p.suffix.lower() in CHECKPOINT_SUFFIXES)}


def _is_checkpoint(folder: Path) -> bool:
    """As diffusers writes them: an index, or a denoiser in its place."""
    return (folder / "model_index.json").is_file() or any((folder / d / "config.json").is_file() for d in _DENOISERS)


def _is_lora(folder: Path) -> bool:
    """As PEFT writes them, one for all or one for each component."""
    return any((folder / component / "adapter_config.json").is_file() for component in ("", *_COMPONENTS))


def _models(folder: Path, is_one: Callable[[Path], bool]) -> dict[str, Path]:
    return dict(sorted((path.relative_to(folder).as_posix(), path) for path in _walk(folder, is_one)))


def _walk(folder: Path, is_one: Callable[[Path], bool], above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Linked folders too, but no link back to where it comes from; not into a folder that is one model."""
    try:
        real, entries = folder.resolve(), list(folder.iterdir())
    except (OSError, RuntimeError):  # it vanished, is not ours to read, or is a link to itself
        return
    if real in above:
        return
    if above and is_one(folder):
        yield folder
        return
    pieces = tuple(entry.name[: -len(_SHARDS)] + "-" for entry in entries if entry.name.endswith(_SHARDS))
    for entry in entries:
        if entry.is_dir():
            yield from _walk(entry, is_one, above | {real})
        elif entry.is_file() and _is_model(entry, pieces):
            yield entry


def _is_model(file: Path, pieces: tuple[str, ...]) -> bool:
    if file.name.startswith("."):  # hidden, such as what macOS leaves beside a file
        return False
    if file.name.endswith(_SHARDS):
        return True
    return file.suffix.lower() in CHECKPOINT_SUFFIXES and not (pieces and file.name.startswith(pieces))

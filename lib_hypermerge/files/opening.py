"""Open a file of tensors by what it holds, whatever its name says; a sharded one by its index or folder."""

from __future__ import annotations

from pathlib import Path

from ..errors import SpecError
from .pickle import PickleFile
from .safetensors import SafetensorsFile
from .shards import is_index, open_shards
from .source import TensorFile

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
CHECKPOINT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


def open_tensors(path: str | Path) -> TensorFile:
    """A SafetensorsFile, a PickleFile, or the shards that an index (or a folder with one) names.

    Raises SpecError (no such file) or FormatError (broken).
    """
    path = Path(path)
    try:
        if path.is_dir():
            return open_shards(_index_in(path), _open_file)
        if not path.is_file():
            raise SpecError(f"There is no file {path}.", hint="Name a .safetensors, .ckpt or .pt file.")
    except OSError as error:
        raise _unreadable(path, error) from None
    return open_shards(path, _open_file) if is_index(path) else _open_file(path)


def _indices(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if is_index(entry) and entry.is_file())


def _index_in(folder: Path) -> Path:
    found = _indices(folder)
    if len(found) != 1:
        why = "It holds several sharded models." if found else "It holds no model in diffusers' layout and no shards."
        raise SpecError(f"{folder} is a folder.", why, "Name a .safetensors, .ckpt or .pt file.")
    return found[0]


def _open_file(path: Path) -> TensorFile:
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise _unreadable(path, error) from None
    has_json_header = start[8:9] == b"{"
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip or (path.suffix.lower() in PICKLE_SUFFIXES and not has_json_header):
        return PickleFile(path)
    return SafetensorsFile(path)


def _unreadable(path: Path, error: OSError) -> SpecError:
    return SpecError(f"{path} cannot be read.", f"{error.strerror}.")

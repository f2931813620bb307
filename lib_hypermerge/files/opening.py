"""Open a file of tensors by what it holds, whatever its name says."""

from __future__ import annotations

from pathlib import Path

from ..errors import SpecError
from .pickle import PickleFile
from .safetensors import SafetensorsFile
from .source import TensorFile

PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin")
CHECKPOINT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES)


def open_tensors(path: str | Path) -> TensorFile:
    """A SafetensorsFile or PickleFile. Raises SpecError (no such file) or FormatError (broken)."""
    path = Path(path)
    try:
        if not path.is_file():
            what = f"{path} is a folder." if path.is_dir() else f"There is no file {path}."
            raise SpecError(what, hint="Name a .safetensors, .ckpt or .pt file.")
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise SpecError(f"{path} cannot be read.", f"{error.strerror}.") from None
    has_json_header = start[8:9] == b"{"
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip or (path.suffix.lower() in PICKLE_SUFFIXES and not has_json_header):
        return PickleFile(path)
    return SafetensorsFile(path)

"""The hashes by which WebUIs and model sites know a file.

sha256: over the whole file; AUTOMATIC1111 shows its first ten digits for a checkpoint, Civitai calls those AutoV2.
data_sha256: over what follows a safetensors header, so metadata can be edited; kohya's `sshs_model_hash`, of which
AUTOMATIC1111 shows twelve digits for a LoRA, Civitai's AutoV3.  legacy: kohya's `sshs_legacy_hash`, the first eight
digits of the SHA-256 of 64 KiB from 1 MiB on.
Source: kohya-ss/sd-scripts library/train_util.py; A1111 modules/hashes.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError

_BLOCK = 1 << 22
_SAMPLE_START, _SAMPLE_SIZE = 0x100000, 0x10000
_LENGTH = 8  # bytes that tell a safetensors header's size
_MOST_HEADER = 100_000_000


@dataclass(frozen=True)
class Hashes:
    """In hexadecimal; data_sha256 is None where the file is no safetensors file."""

    sha256: str
    data_sha256: str | None
    legacy: str

    @property
    def autov2(self) -> str:
        return self.sha256[:10]

    @property
    def autov3(self) -> str | None:
        return self.data_sha256[:12] if self.data_sha256 else None


def data_start(path: Path) -> int | None:
    """Where a safetensors file's data begins; None if the file is none. Reads nine bytes."""
    with path.open("rb") as file:
        start = file.read(_LENGTH + 1)
    size = int.from_bytes(start[:_LENGTH], "little")
    is_header = start[_LENGTH:] == b"{" and size <= _MOST_HEADER
    return _LENGTH + size if is_header and _LENGTH + size <= path.stat().st_size else None


def data_size(path: Path) -> int | None:
    """Bytes of a safetensors file's data: equal for two files of equal tensors, whatever their metadata."""
    start = data_start(path)
    return None if start is None else path.stat().st_size - start


def hash_file(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> Hashes:
    """All hashes in one reading. on_bytes: told how many bytes were read since; may raise to stop.

    FormatError if the file cannot be read.
    """
    try:
        begin = data_start(path)
        whole, data = hashlib.sha256(), hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            position = 0
            while block := file.read(_BLOCK):
                whole.update(block)
                if begin is not None and position + len(block) > begin:
                    data.update(memoryview(block)[max(0, begin - position) :])
                position += len(block)
                on_bytes(len(block))
            file.seek(_SAMPLE_START)
            sample = file.read(_SAMPLE_SIZE)
    except OSError as error:
        raise FormatError(f"{path.name} cannot be read.", f"{error.strerror}.", "Check the disk.") from None
    legacy = hashlib.sha256(sample).hexdigest()[:8]
    return Hashes(whole.hexdigest(), None if begin is None else data.hexdigest(), legacy)

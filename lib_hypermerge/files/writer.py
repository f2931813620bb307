"""Stream tensors into a .safetensors file that appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, SpecError
from .dtypes import name_of
from .unnamed import UnnamedFile, Written

if TYPE_CHECKING:
    import torch

_SAMPLE_START, _SAMPLE_SIZE = 0x100000, 0x10000  # what old WebUIs hash


def check_target(path: Path, needed_bytes: int, overwrite: bool) -> None:
    """Refuse before anything is computed: target exists, folder missing or read-only, disk too small."""
    folder = path.parent
    if path.suffix != ".safetensors":
        raise SpecError(f"The output {path.name!r} must end in .safetensors.")
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # too long a name, a folder that may not be entered
        raise SpecError(f"{path} cannot be written.", f"{error.strerror}.", "Choose another name.") from None
    if not folder.is_dir():
        raise SpecError(f"There is no folder {folder}.", hint="Create it, or choose another output.")
    if path.is_dir():
        raise SpecError(f"{path} is a folder.", hint="Name a file.")
    if path.exists() and not overwrite:
        raise SpecError(f"{path.name} exists already.", hint="Choose another name, or allow overwriting.")
    check_room(folder, path.name, needed_bytes)


def check_room(folder: Path, name: str, needed_bytes: int) -> None:
    """OutputError if a folder cannot be written to or its disk is too small for what is to be called `name`."""
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"The folder {folder} cannot be written to.", "It is read-only for this user.")
    usage = shutil.disk_usage(folder)
    if usage.total == 0:  # a disk that does not tell, or no disk, such as /proc
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            why = f"{error.strerror}: it is not on a disk that takes files."
            raise OutputError(f"The folder {folder} cannot be written to.", why, "Choose another folder.") from None
        return
    free = usage.free
    if free < needed_bytes:
        raise OutputError(
            f"The disk is too full for {name}.",
            f"It needs about {needed_bytes / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free in {folder}.",
            "Free some space, or choose another folder.",
        )


def header_bytes(entries: dict[str, dict], metadata: dict[str, str]) -> bytes:
    """The JSON of a safetensors header, metadata first."""
    table = {"__metadata__": metadata, **entries}
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()


class SafetensorsWriter(UnnamedFile):
    """Use as a context: leaving it without commit() removes every trace.

    The data is streamed behind a reserved header, so tensors are written as they come, and hashes are
    over the final bytes.

    header_reserve: bytes kept for the header; unused ones become spaces, which the format allows.
    """

    def __init__(self, path: Path, header_reserve: int, overwrite: bool = False):
        self._entries: dict[str, dict] = {}
        self._data_size = 0
        self._data_hash = hashlib.sha256()
        self._start = 8 + (header_reserve + 7) // 8 * 8
        super().__init__(path, overwrite)
        with self.explained():
            os.lseek(self._fd, self._start, os.SEEK_SET)

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, in its own dtype. Names must be new."""
        import torch

        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._append(name, name_of(tensor.dtype), tensor.shape, raw.nbytes)
        self._put(raw)

    def _append(self, name: str, dtype: str, shape: Iterable[int], nbytes: int) -> None:
        """Enter the next tensor in the header; its bytes follow by _put()."""
        if name in self._entries:
            raise ValueError(f"the tensor {name} was written twice")
        stop = self._data_size + nbytes
        self._entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [self._data_size, stop]}
        self._data_size = stop

    def _put(self, raw: memoryview) -> None:
        with self.explained():
            self._write(raw)
        self._data_hash.update(raw)

    def seal(self, metadata: Callable[[str, str], dict[str, str]]) -> Written:
        """Write the header, hash, and flush to the disk: all that can take time or fail but the name.

        metadata(data_sha256, legacy_hash) makes the header's texts. legacy_hash is what old WebUIs
        compute: the first 8 hex digits of the SHA-256 of 64 KiB from 1 MiB on. It is "" if the header reaches
        that far: a hash cannot stand within what it is of.
        """
        with self.explained():
            digest = self._data_hash.hexdigest()
            header = header_bytes(self._entries, metadata(digest, self._legacy_hash()))
            room = self._start - 8
            if len(header) > room:
                raise ValueError(f"the header needs {len(header)} bytes and {room} were reserved")
            head = room.to_bytes(8, "little") + header.ljust(room, b" ")
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._write(memoryview(head))
            whole = hashlib.sha256(head)
            os.lseek(self._fd, self._start, os.SEEK_SET)
            while block := os.read(self._fd, 1 << 22):
                whole.update(block)
        return self._seal(self._start + self._data_size, whole.hexdigest(), digest)

    def commit(self, metadata: Callable[[str, str], dict[str, str]]) -> Written:
        """seal() and publish()."""
        self.seal(metadata)
        return self.publish()

    def _legacy_hash(self) -> str:
        if self._start > _SAMPLE_START:
            return ""
        os.lseek(self._fd, _SAMPLE_START, os.SEEK_SET)
        return hashlib.sha256(os.read(self._fd, _SAMPLE_SIZE)).hexdigest()[:8]

"""Write a whole checkpoint whose header is known beforehand: tensors in order, hashed and flushed while they come."""

from __future__ import annotations

import ctypes
import hashlib
import os
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .dtypes import ITEMSIZE
from .source import TensorFile, TensorInfo
from .unnamed import Written
from .writer import SafetensorsWriter, header_bytes

if TYPE_CHECKING:
    import torch

_PIECE = 1 << 22  # bytes copied at a time
_FLUSH_EVERY = 1 << 27  # bytes between hints to the disk, so that the last flush finds little to do
_ENDED = memoryview(b"")


@dataclass(frozen=True)
class TensorPlan:
    """A tensor to come."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        size = ITEMSIZE[self.dtype]
        for axis in self.shape:
            size *= axis
        return size


@lru_cache(maxsize=1)
def _sync_file_range() -> Callable[..., int] | None:
    """Linux' call of that name; Python has none for it, and no other begins to write without waiting."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function


def _begin_writing(fd: int, start: int, size: int) -> None:
    """Ask the system to begin to write a part of a file to the disk. Whether it does matters for speed alone."""
    call = _sync_file_range()
    if call is not None:
        call(fd, start, size, 2)  # SYNC_FILE_RANGE_WRITE


def header_of(tensors: Mapping[str, TensorPlan], metadata: dict[str, str]) -> bytes:
    """The safetensors header of these tensors in this order, padded to a multiple of 8 bytes."""
    entries, end = {}, 0
    for name, plan in tensors.items():
        start, end = end, end + plan.nbytes
        entries[name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [start, end]}
    raw = header_bytes(entries, metadata)
    return raw.ljust((len(raw) + 7) // 8 * 8, b" ")


class CheckpointWriter(SafetensorsWriter):
    """As SafetensorsWriter, with the header written first, so that the file is hashed once, in a thread of its own.

    tensors: what will be written, in this order.  Nothing appears under the target's name before commit().
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorPlan], metadata: dict[str, str], overwrite: bool):
        self._head = header_of(tensors, metadata)
        self._expected = dict(tensors)
        super().__init__(path, len(self._head), overwrite)
        self._whole = hashlib.sha256()
        self._failure: BaseException | None = None
        self._queue: queue.Queue[memoryview] = queue.Queue(4)
        self._thread = threading.Thread(target=self._hash, name="hypermerge-hash", daemon=True)
        self._thread.start()
        try:
            with self.explained():
                os.lseek(self._fd, 0, os.SEEK_SET)
                self._put(memoryview(len(self._head).to_bytes(8, "little") + self._head))
        except BaseException:
            self.abort()
            raise

    def begin(self, name: str, plan: TensorPlan) -> None:
        """Enter the next tensor; its rows follow by more()."""
        self._append(name, plan.dtype, plan.shape, plan.nbytes)

    def more(self, rows: torch.Tensor) -> None:
        """The next rows of the tensor that was begun. The memory is kept until it was hashed: do not reuse it."""
        import torch

        self._put(rows.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def copy(self, name: str, file: TensorFile, info: TensorInfo) -> None:
        """Append a tensor of another file, bit for bit."""
        self._append(name, info.dtype, info.shape, info.nbytes)
        import torch

        if info.stride is not None:
            self._put(file.read(info).reshape(-1).view(torch.uint8).numpy().data)
            return
        for start in range(0, info.nbytes, _PIECE):
            # by torch, whose memory is not cleared first
            piece = torch.empty(min(_PIECE, info.nbytes - start), dtype=torch.uint8).numpy().data
            file.read_into(info.offset + start, piece)
            self._put(piece)

    def _put(self, raw: memoryview) -> None:
        with self.explained():
            self._write(raw)
        self._queue.put(raw)

    def _hash(self) -> None:
        """Hash what was written; tell the disk to begin with it. Goes on after a failure, so that nobody waits."""
        begun = done = 0
        while (raw := self._queue.get()) is not _ENDED:
            try:
                self._whole.update(raw)
                done += raw.nbytes
                if done - begun >= _FLUSH_EVERY:
                    _begin_writing(self._fd, begun, done - begun)
                    begun = done
            except BaseException as error:
                self._failure = error

    def _join(self) -> None:
        if self._thread.is_alive():
            self._queue.put(_ENDED)
            self._thread.join()

    def seal(self) -> Written:  # type: ignore[override]
        """Flush to the disk: all that can take time or fail but the name. ValueError if the tensors are not those
        foretold."""
        self._join()
        if self._failure is not None:
            raise self._failure
        written = {name: TensorPlan(e["dtype"], tuple(e["shape"])) for name, e in self._entries.items()}
        if list(written.items()) != list(self._expected.items()):
            raise ValueError("what was written is not what the header says")
        return self._seal(self._start + self._data_size, self._whole.hexdigest(), "")

    def commit(self) -> Written:  # type: ignore[override]
        """seal() and publish()."""
        self.seal()
        return self.publish()

    def abort(self) -> None:
        self._join()
        super().abort()

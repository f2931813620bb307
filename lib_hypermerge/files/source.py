"""A file of named tensors: what is in it is known at once, its numbers are read when asked for."""

from __future__ import annotations

import math
import os
import struct
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import FormatError, InputChangedError, SpecError
from .dtypes import ITEMSIZE, torch_dtype

if TYPE_CHECKING:
    import torch


_NUMBERS = {
    "F64": "<d", "F32": "<f", "F16": "<e", "BF16": "<f", "I64": "<q", "I32": "<i", "I16": "<h", "I8": "<b",
    "U64": "<Q", "U32": "<I", "U16": "<H", "U8": "<B", "BOOL": "<?",
}  # fmt: skip
MAX_AXES = 64  # of a torch tensor


def is_possible(shape: tuple[int, ...]) -> bool:
    """Whether torch can make a tensor of that shape; if not, the header is forged."""
    return len(shape) <= MAX_AXES and min(shape, default=0) >= 0 and math.prod(max(1, size) for size in shape) < 1 << 63


@dataclass(frozen=True)
class TensorInfo:
    """A stored tensor: where its bytes lie in the file. stride is None for the usual row-major order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    stride: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    def rows(self, start: int, stop: int) -> TensorInfo:
        """Rows start…stop of the first axis (the q, k or v part of a fused weight)."""
        step = math.prod(self.shape[1:]) if self.stride is None else self.stride[0]
        shape = (stop - start, *self.shape[1:])
        return TensorInfo(self.name, self.dtype, shape, self.offset + start * step * ITEMSIZE[self.dtype], self.stride)


Identity = tuple[int, int, int, int]  # device, inode, size, time of the last change


class TensorFile(ABC):
    """An open file of tensors, or several that look like one (VirtualFile).

    besides: the names of what a pickle holds outside its state dict, such as optimizer_states.
    """

    besides: tuple[str, ...] = ()
    path: Path
    size: int  # bytes on the disk
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Let go of the files; no more can be read."""

    @property
    def parts(self) -> tuple[TensorFile, ...]:
        """The files on the disk that it consists of."""
        return (self,)

    @abstractmethod
    def is_same(self, other: TensorFile) -> bool:
        """Whether both are one file (or the same files), by whatever names."""

    @abstractmethod
    def check_unchanged(self) -> None:
        """InputChangedError if the path no longer holds the file that was opened, or it was written to."""

    @abstractmethod
    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill view with the file's bytes from offset on. Thread-safe."""

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The tensor in its stored format, in fresh memory."""
        import torch

        if info.numel == 0:
            return torch.empty(info.shape, dtype=torch_dtype(info.dtype))
        if info.stride is None:
            raw = torch.empty(info.nbytes, dtype=torch.uint8)
            self.read_into(info.offset, raw.numpy().data)
            return raw.view(torch_dtype(info.dtype)).reshape(info.shape)
        span = 1 + sum((size - 1) * step for size, step in zip(info.shape, info.stride, strict=True))
        raw = torch.empty(span * ITEMSIZE[info.dtype], dtype=torch.uint8)
        self.read_into(info.offset, raw.numpy().data)
        return raw.view(torch_dtype(info.dtype)).as_strided(info.shape, info.stride).contiguous()

    def number(self, info: TensorInfo) -> float:
        """The one value of a tensor; without torch, but for 8-bit floats."""
        raw = bytearray(info.nbytes)
        if info.dtype not in _NUMBERS:
            return float(self.read(info).item())
        self.read_into(info.offset, memoryview(raw))
        # a bfloat16 is the upper half of a float32
        return float(struct.unpack(_NUMBERS[info.dtype], b"\0\0" + raw if info.dtype == "BF16" else raw)[0])


class StoredFile(TensorFile):
    """One file on the disk. Subclasses fill `tensors` and `metadata` from the header alone.

    Reading uses positioned reads into the caller's memory and no memory map: a map would count the
    whole file as resident, and on Windows would keep it from being replaced.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        try:
            self._file = self.path.open("rb", buffering=0)
        except FileNotFoundError:
            raise SpecError(f"There is no file {self.path}.", hint="Check the name.") from None
        except IsADirectoryError:
            raise SpecError(f"{self.path} is a folder.", hint="Name a .safetensors or .ckpt file.") from None
        except OSError as error:
            raise SpecError(f"{self.path} cannot be opened.", f"{error.strerror}.") from None
        self._lock = threading.Lock()
        self._stat = self._identity(os.fstat(self._file.fileno()))
        self.size = self._stat[2]

    @staticmethod
    def _identity(stat: os.stat_result) -> Identity:
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns

    def close(self) -> None:
        self._file.close()

    def is_same(self, other: TensorFile) -> bool:
        return len(other.parts) == 1 and isinstance(other.parts[0], StoredFile) and other.parts[0]._stat == self._stat

    def check_unchanged(self) -> None:
        try:
            now = self._identity(self.path.stat())
        except OSError:
            now = None
        if now != self._stat or self._identity(os.fstat(self._file.fileno())) != self._stat:
            raise InputChangedError(
                f"{self.path.name} changed while it was being read.",
                "Another program replaced, moved or modified it.",
                "Run the job again when the file is complete.",
            )

    def read_into(self, offset: int, view: memoryview) -> None:
        done, total = 0, len(view)
        while done < total:
            try:
                got = self._read_some(offset + done, view[done:])
            except OSError as error:
                raise FormatError(
                    f"{self.path.name} cannot be read.", f"{error.strerror}.", "Check the disk."
                ) from None
            if got <= 0:
                self.check_unchanged()
                raise FormatError(f"{self.path.name} ends too early.", "The file is truncated.", "Download it again.")
            done += got

    def _read_some(self, offset: int, view: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [view], offset)
        with self._lock:  # Windows has no positioned read
            self._file.seek(offset)
            return self._file.readinto(view) or 0

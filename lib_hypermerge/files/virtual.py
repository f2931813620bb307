"""Several files of tensors seen as one, under other names, fused or turned where that takes no arithmetic."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import FormatError
from .dtypes import ITEMSIZE
from .source import TensorFile, TensorInfo


@dataclass(frozen=True)
class Piece:
    """A tensor of one of the files."""

    file: TensorFile
    info: TensorInfo

    def rows(self, start: int, stop: int) -> Piece:
        return Piece(self.file, self.info.rows(start, stop))


class VirtualFile(TensorFile):
    """Tensors of several files in one address space: an offset says which byte of which file.

    So read_into(info.offset, …) works as with a file on the disk, within one tensor. Owns the parts: closing it
    closes them.  path: the folder, or the file that names the parts.  metadata: what all parts agree on.
    """

    def __init__(self, path: Path, parts: Iterable[TensorFile]):
        self.path = path
        self._parts = tuple(parts)
        self.tensors = {}
        shared = [set(part.metadata.items()) for part in self._parts]
        self.metadata = dict(set.intersection(*shared)) if shared else {}
        self.besides = tuple(dict.fromkeys(name for part in self._parts for name in part.besides))
        self.size = sum(part.size for part in self._parts)
        self._starts: list[int] = []  # of each segment, in this file's addresses
        self._places: list[tuple[TensorFile, int]] = []  # its file and offset there
        self._end = 0

    def add(self, name: str, pieces: Sequence[Piece], shape: tuple[int, ...] | None = None) -> None:
        """A tensor made of the rows of all pieces, in order. shape: if other than theirs, with as many numbers.

        FormatError if the pieces do not fit together.
        """
        first = pieces[0].info
        if len(pieces) == 1:
            self._append(name, pieces[0], shape)
            return
        for piece in pieces:
            if piece.info.dtype != first.dtype or piece.info.shape[1:] != first.shape[1:]:
                raise FormatError(
                    f"{self.path.name}: {first.name} and {piece.info.name} do not fit together.",
                    f"They are {_described(first)} and {_described(piece.info)}, but parts of one layer.",
                    "Save the model again in one number format.",
                )
            if piece.info.stride is not None:
                raise FormatError(
                    f"{self.path.name}: the numbers of {piece.info.name} are in an unusual order.",
                    hint="Save the model again as .safetensors.",
                )
        start = self._end
        for piece in pieces:
            self._append(name, piece, None)
        rows = sum(piece.info.shape[0] for piece in pieces)
        self.tensors[name] = TensorInfo(name, first.dtype, shape or (rows, *first.shape[1:]), start)

    def add_transposed(self, name: str, piece: Piece) -> None:
        """A matrix turned: the same bytes, read by columns."""
        n, k = piece.info.shape
        by_row, by_column = piece.info.stride or (k, 1)
        self._append(name, piece, None)
        self.tensors[name] = replace(self.tensors[name], shape=(k, n), stride=(by_column, by_row))

    def add_empty(self, name: str) -> None:
        """A tensor without numbers, which says something by its name."""
        self.tensors[name] = TensorInfo(name, "F32", (0,), self._end)

    def _append(self, name: str, piece: Piece, shape: tuple[int, ...] | None) -> None:
        info = piece.info
        shape = info.shape if shape is None else shape
        stride = info.stride
        if stride is not None and shape != info.shape:
            stride = (*stride, *(1 for _ in shape[len(stride) :]))  # only axes of size 1 are added
        self.tensors[name] = TensorInfo(name, info.dtype, shape, self._end, stride)
        self._starts.append(self._end)
        self._places.append((piece.file, info.offset))
        self._end += _span(info)

    @property
    def parts(self) -> tuple[TensorFile, ...]:
        return tuple(stored for part in self._parts for stored in part.parts)

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def is_same(self, other: TensorFile) -> bool:
        mine, theirs = self.parts, other.parts
        return len(mine) == len(theirs) and all(any(m.is_same(t) for t in theirs) for m in mine)

    def check_unchanged(self) -> None:
        for part in self._parts:
            part.check_unchanged()

    def read_into(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            index = bisect_right(self._starts, offset + done) - 1
            stop = self._starts[index + 1] if index + 1 < len(self._starts) else self._end
            count = min(len(view) - done, stop - offset - done)
            if count <= 0:
                raise FormatError(f"{self.path.name} ends too early.", "More was asked for than its parts hold.")
            file, start = self._places[index]
            file.read_into(start + offset + done - self._starts[index], view[done : done + count])
            done += count


def _span(info: TensorInfo) -> int:
    """Bytes from a tensor's first number to its last."""
    if info.stride is None or info.numel == 0:
        return info.nbytes
    last = sum((size - 1) * step for size, step in zip(info.shape, info.stride, strict=True))
    return (last + 1) * ITEMSIZE[info.dtype]


def _described(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"

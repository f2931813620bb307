"""PyTorch's .ckpt/.pt files, read without running or importing anything they name.

A torch file is a pickle that describes tensors, and their bytes beside it: in a zip archive
(torch ≥ 1.6) or behind the pickle (older). The pickle is decoded with a table of harmless
stand-ins; tensors become places in the file, so numbers are read one tensor at a time here too.
Format: https://pytorch.org/docs/stable/notes/serialization.html
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

from ..errors import FormatError
from .dtypes import ITEMSIZE
from .source import StoredFile, TensorInfo, is_possible
from .unpickle import Decoder, TensorRef

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_MAX_PICKLE = 256 << 20
_PARAMS = "string_to_param"
_MAX_EXPANDED = 1 << 30  # bytes of a tensor that repeats its numbers by strides of 0


def _is_embedding(root) -> bool:
    """Whether it is AUTOMATIC1111's embedding: vectors by word, beside token numbers and what it was trained on."""
    return isinstance(root, dict) and isinstance(root.get(_PARAMS), dict)


def _tensors_in(root) -> dict[str, TensorRef]:
    """The state dict in what a pickle holds: under `state_dict`, at the top, or one level down; a list by number."""
    if _is_embedding(root):
        root = {f"{_PARAMS}.{word}": value for word, value in root[_PARAMS].items()}
    candidates = []
    if isinstance(root, (list, tuple)):
        candidates = [dict(enumerate(root))]
    if isinstance(root, dict):
        inner = [value for value in root.values() if isinstance(value, dict)]
        named = [root["state_dict"]] if isinstance(root.get("state_dict"), dict) else []
        candidates = named or [root, *inner]
    tables = [{str(k): v for k, v in table.items() if isinstance(v, TensorRef)} for table in candidates]
    return max(tables, key=len, default={})


def _besides(root, tensors: dict[str, TensorRef]) -> tuple[str, ...]:
    """The names of what lies at the top of a pickle and holds none of these tensors."""
    taken = {id(tensor) for tensor in tensors.values()}

    def is_taken(value) -> bool:
        return id(value) in taken or (isinstance(value, dict) and any(id(inner) in taken for inner in value.values()))

    return tuple(str(k) for k, value in root.items() if not is_taken(value)) if isinstance(root, dict) else ()


class PickleFile(StoredFile):
    """A torch pickle. FormatError if it is broken or names anything but tensors and containers."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            try:
                root, places = self._open_zip() if self._is_zip() else self._open_legacy()
                tensors = _tensors_in(root)
                self._place(tensors, places)
                self.besides = _besides(root, tensors)
                if _is_embedding(root):
                    self.metadata = {str(k): str(v) for k, v in root.items() if isinstance(v, (str, int, float))}
            except FormatError:
                raise
            except Exception as error:  # a damaged pickle can raise anything at all
                raise self._broken(f"Its pickle cannot be decoded ({type(error).__name__}).") from None
        except BaseException:
            self.close()
            raise

    def _is_zip(self) -> bool:
        if self.size == 0:
            raise self._broken("It is empty.")
        if zipfile.is_zipfile(self.path):
            return True
        with self.path.open("rb") as file:
            if file.read(4) == b"PK\x03\x04":
                raise self._broken("Its end is missing: it is truncated.")
        return False

    def _broken(self, why: str) -> FormatError:
        return FormatError(
            f"{self.path.name} is not a sound PyTorch file.", why, "Download it again, or use a .safetensors version."
        )

    def _decode(self, file, sizes: dict[str, int] | None = None):
        """The next object in a pickle stream; sizes receives the item size of each storage it names."""
        decoder = Decoder(file, {} if sizes is None else sizes)
        try:
            return decoder.load()
        except Exception:
            if decoder.refused is None:
                raise
            raise FormatError(
                f"{self.path.name} was refused: it wants to run code.",
                f"Its pickle imports {decoder.refused}, which no model needs.",
                "Do not open this file elsewhere either; use a .safetensors version.",
            ) from None

    def _open_zip(self):
        with zipfile.ZipFile(self.path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            names = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
            if len(names) != 1:
                raise self._broken("The archive holds no data.pkl, or several.")
            if entries[names[0]].file_size > _MAX_PICKLE:
                raise self._broken("Its table of contents is absurdly large.")
            root_folder = names[0][: -len("data.pkl")]
            order = root_folder + "byteorder"
            if order in entries and entries[order].file_size == 3 and archive.read(order) == b"big":
                raise self._broken("It was written on a big-endian machine.")
            with archive.open(names[0]) as file:
                root = self._decode(file)
        places = {}
        for name, entry in entries.items():
            if name.startswith(root_folder + "data/") and entry.compress_type == zipfile.ZIP_STORED:
                local = bytearray(30)
                self.read_into(entry.header_offset, memoryview(local))
                name_size, extra_size = int.from_bytes(local[26:28], "little"), int.from_bytes(local[28:30], "little")
                start = entry.header_offset + 30 + name_size + extra_size
                places[name.rsplit("/", 1)[-1]] = (start, entry.file_size)
        return root, places

    def _open_legacy(self):
        with self.path.open("rb") as file:
            if self._decode(file) != _LEGACY_MAGIC:
                raise self._broken("It is no file that torch.save has written.")
            self._decode(file)  # protocol version
            self._decode(file)  # sizes of the writer's integers
            sizes: dict[str, int] = {}
            root = self._decode(file, sizes)
            places = {}
            for key in self._decode(file):
                numel = int.from_bytes(file.read(8), "little")
                places[str(key)] = (file.tell(), numel * sizes[str(key)])
                file.seek(numel * sizes[str(key)], 1)
        return root, places

    def _place(self, tensors: dict[str, TensorRef], places: dict[str, tuple[int, int]]) -> None:
        for name, tensor in tensors.items():
            shape, stride, itemsize = tensor.shape, tensor.stride, ITEMSIZE[tensor.storage.dtype]
            if len(shape) != len(stride) or min((*stride, tensor.start)) < 0 or not is_possible(shape):
                raise self._broken(f"The entry of {name!r} is malformed.")
            start, length = places.get(tensor.storage.key, (0, -1))
            offset = start + tensor.start * itemsize
            if 0 not in shape:
                end = tensor.start + 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
                if end * itemsize > length or start + end * itemsize > self.size:
                    raise self._broken(f"The data of {name!r} is missing or too short.")
                if math.prod(shape) * itemsize > max(self.size, _MAX_EXPANDED):
                    raise self._broken(f"{name!r} is larger than the whole file.")
            dense, step = [], 1
            for size in reversed(shape):
                dense.append(step)
                step *= size
            row_major = all(s == d or n <= 1 for s, d, n in zip(stride, reversed(dense), shape, strict=True))
            self.tensors[name] = TensorInfo(name, tensor.storage.dtype, shape, offset, None if row_major else stride)

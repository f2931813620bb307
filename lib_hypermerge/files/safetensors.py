"""The safetensors header: 8-byte little-endian length, JSON, then the tensors' bytes without gaps.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from ..errors import FormatError
from .dtypes import ITEMSIZE
from .source import StoredFile, TensorInfo, is_possible

MAX_HEADER = 100_000_000


class SafetensorsFile(StoredFile):
    """A .safetensors file; FormatError says what is wrong with a broken one."""

    def __init__(self, path: Path):
        super().__init__(path)
        try:
            self._read_header()
        except BaseException:
            self.close()
            raise

    def _broken(self, why: str) -> FormatError:
        return FormatError(
            f"{self.path.name} is not a sound safetensors file.",
            why,
            "Download or save it again, or name another file.",
        )

    def _read_header(self) -> None:
        if self.size < 8:
            raise self._broken("It is empty." if self.size == 0 else "It is shorter than a header.")
        length = bytearray(8)
        self.read_into(0, memoryview(length))
        header_size = int.from_bytes(length, "little")
        if header_size > MAX_HEADER or header_size < 2:
            raise self._broken(f"Its header claims a length of {header_size} bytes.")
        if 8 + header_size > self.size:
            raise self._broken("It ends inside its header: it is truncated, or it is no safetensors file.")
        raw = bytearray(header_size)
        self.read_into(8, memoryview(raw))
        try:
            header = json.loads(raw.decode("utf-8"))
        except (UnicodeDecodeError, ValueError, RecursionError):
            raise self._broken("Its header is not JSON.") from None
        if not isinstance(header, dict):
            raise self._broken("Its header is not a JSON object.")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._broken("Its metadata is not a table of texts.")
        self.metadata = metadata
        self._read_entries(header, 8 + header_size)

    def _read_entries(self, header: dict, data_start: int) -> None:
        spans = []
        for name, entry in header.items():
            try:
                dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
                if not isinstance(dtype, str) or not all(type(size) is int for size in (*shape, start, stop)):
                    raise ValueError
                if start < 0 or not is_possible(shape):
                    raise ValueError
            except (TypeError, KeyError, ValueError):
                raise self._broken(f"The entry of {name!r} is malformed.") from None
            if dtype not in ITEMSIZE:
                raise self._broken(f"{name!r} has the unknown number format {dtype!r}.")
            if stop - start != math.prod(shape) * ITEMSIZE[dtype]:
                raise self._broken(f"The size of {name!r} does not fit its shape.")
            spans.append((start, stop, name))
            self.tensors[name] = TensorInfo(name, dtype, shape, data_start + start)
        end = 0
        for start, stop, name in sorted(spans):
            if start != end:
                raise self._broken(f"The data of {name!r} overlaps another tensor or leaves a gap.")
            end = stop
        if data_start + end > self.size:
            raise self._broken(f"It should be {data_start + end:,} bytes long and has {self.size:,}: it is truncated.")
        if data_start + end < self.size:
            raise self._broken(f"{self.size - data_start - end:,} bytes follow its last tensor.")

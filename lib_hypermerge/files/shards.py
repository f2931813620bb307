"""A model split over several files, with a JSON index that says which tensor lies where.

Format: huggingface/safetensors and huggingface/transformers, `*.safetensors.index.json` with `weight_map`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..errors import FormatError, SpecError
from .source import TensorFile
from .virtual import Piece, VirtualFile

INDEX_MARK = ".index."
_MAX_INDEX = 64 << 20


def is_index(path: Path) -> bool:
    """Whether a file's name is that of an index: model.safetensors.index.json, model.bin.index.fp16.json …"""
    return path.suffix.lower() == ".json" and INDEX_MARK in path.name.lower()


def open_shards(index: Path, open_file: Callable[[Path], TensorFile]) -> VirtualFile:
    """All tensors that an index names, as one file. FormatError if the index or a shard is broken or missing."""
    weight_map = _read(index)
    shards: dict[str, TensorFile] = {}
    try:
        for name in sorted(set(weight_map.values())):
            if not (index.parent / name).is_file():
                raise FormatError(
                    f"{name} is missing beside {index.name}.", "The model is split over several files.",
                    "Download the missing ones too.",
                )  # fmt: skip
            shards[name] = open_file(index.parent / name)
        file = VirtualFile(index, shards.values())
        for tensor, name in weight_map.items():
            if tensor not in shards[name].tensors:
                raise FormatError(
                    f"{name} does not hold {tensor}.", f"{index.name} says that it does.", "Download both again."
                )
            file.add(tensor, [Piece(shards[name], shards[name].tensors[tensor])])
        return file
    except BaseException:
        for shard in shards.values():
            shard.close()
        raise


def _read(index: Path) -> dict[str, str]:
    """tensor → file beside the index."""
    try:
        if index.stat().st_size > _MAX_INDEX:
            raise _broken(index, "It is absurdly large.")
        content = json.loads(index.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{index} cannot be read.", f"{error.strerror}.") from None
    except (UnicodeDecodeError, ValueError, RecursionError):
        raise _broken(index, "It is not JSON.") from None
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(index, "It has no weight_map.")
    for name in weight_map.values():
        # a name with a folder in it would lead out of the model
        if not isinstance(name, str) or not name or Path(name).name != name or "\\" in name:
            raise _broken(index, f"{name!r} is no file name.")
    return weight_map


def _broken(index: Path, why: str) -> FormatError:
    return FormatError(f"{index.name} is no sound index of a sharded model.", why, "Download it again.")

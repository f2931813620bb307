"""Decodes the pickle in a torch file into containers and places of tensors, with harmless stand-ins only.

Nothing that the pickle names is imported or called; no object of it ever gets attributes.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from typing import Any

from .dtypes import FROM_TORCH, ITEMSIZE
from .source import MAX_AXES

_STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "Float8_e4m3fnStorage": "F8_E4M3", "Float8_e5m2Storage": "F8_E5M2",
}  # fmt: skip

# Python's own decoder rather than the one in C: there a forged memo index takes any amount of memory, and
# what a pickle does to objects cannot be overridden. (Any, because its methods are not in the type stubs.)
_Unpickler: Any = pickle._Unpickler

# What training frameworks leave beside the weights. It is looked past, never imported.
_IGNORED = {
    ("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
    ("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
    ("pytorch_lightning.utilities.types", "_PATH"),
    ("numpy", "dtype"), ("numpy", "ndarray"),
    ("numpy.core.multiarray", "scalar"), ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"), ("numpy._core.multiarray", "_reconstruct"),
    ("_codecs", "encode"), ("argparse", "Namespace"), ("torch", "device"), ("torch", "Tensor"),
    ("torch.nn.parameter", "Parameter"),
    ("collections", "defaultdict"), ("collections", "Counter"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
    *((module, name) for module in ("builtins", "__builtin__")
      for name in ("set", "frozenset", "dict", "list", "int", "float", "bool", "complex", "range", "xrange")),
}  # fmt: skip


class _Ignored(dict):
    """Stands for any object that is no tensor; accepts whatever a pickle does to it."""

    def __new__(cls, *_args, **_kwargs):
        return super().__new__(cls)

    def __init__(self, *_args, **_kwargs):
        super().__init__()

    def append(self, _item):
        pass

    def extend(self, _items):
        pass


class _Parameters(_Ignored):
    """A module that is but a table of tensors; its state comes when it is made."""


@dataclass(frozen=True)
class StorageRef:
    dtype: str
    key: str


@dataclass(frozen=True)
class TensorRef:
    storage: StorageRef
    start: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _size(axes=()):
    if len(axes) > MAX_AXES:
        raise pickle.UnpicklingError("a tensor with too many axes")
    return tuple(map(int, axes))


def _rebuild_tensor(storage, start, shape, stride, *_rest):
    if not isinstance(storage, StorageRef):
        raise pickle.UnpicklingError("a tensor without a storage")
    return TensorRef(storage, int(start), _size(shape), _size(stride))


def _rebuild_tensor_v3(storage, start, shape, stride, _requires_grad, _hooks, dtype, *_rest):
    """A tensor of a newer dtype, such as fp8, in a storage without one."""
    if dtype not in FROM_TORCH.values() or not isinstance(storage, StorageRef):
        raise pickle.UnpicklingError("a tensor without a known number format")
    return _rebuild_tensor(StorageRef(dtype, storage.key), start, shape, stride)


def _rebuild_parameter(data, *_rest):
    return data


def _rebuild_with_attributes(rebuild, _type, arguments, _state):
    """A tensor that somebody gave attributes of its own."""
    if rebuild not in (_rebuild_tensor, _rebuild_tensor_v3):
        raise pickle.UnpicklingError("a tensor of an unknown kind")
    return rebuild(*arguments)


def _empty_table():
    return {}


_KNOWN = {
    ("collections", "OrderedDict"): _empty_table,
    ("torch", "Size"): _size,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch.nn.modules.container", "ParameterDict"): _Parameters,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): "U8",
    **{("torch", name): dtype for name, dtype in FROM_TORCH.items()},
}


class Decoder(_Unpickler):
    """Knows tensors, storages and plain containers; refuses every other name and keeps it in `refused`.

    sizes receives the item size of each storage that is named.
    """

    dispatch = {
        code: step for code, step in _Unpickler.dispatch.items()
        if code not in b"".join((pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.BYTEARRAY8, pickle.NEXT_BUFFER))
    }  # fmt: skip

    def __init__(self, file, sizes: dict[str, int]):
        super().__init__(file, encoding="utf-8")
        self.sizes = sizes
        self.refused: str | None = None

    def find_class(self, module: str, name: str):
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if (module, name) in _IGNORED:
            return _Ignored
        self.refused = "".join(sign if sign.isprintable() else "?" for sign in f"{module}.{name}"[:120])
        raise pickle.UnpicklingError(self.refused)

    def persistent_load(self, pid):
        kind, dtype, key = pid[:3]
        known = isinstance(dtype, str) and dtype in ITEMSIZE and isinstance(key, (str, int))
        if kind != "storage" or not known or (len(pid) > 5 and pid[5] is not None):
            raise pickle.UnpicklingError("a storage of an unknown kind")
        self.sizes[str(key)] = ITEMSIZE[dtype]
        return StorageRef(dtype, str(key))

    def _fill(self, items: list) -> None:
        # a nested key could take for ever to hash, or overflow the interpreter's stack
        if len(items) % 2 or not all(isinstance(key, (str, bytes, int, float, type(None))) for key in items[::2]):
            raise pickle.UnpicklingError("a table with strange keys")
        self.stack[-1].update(zip(items[::2], items[1::2], strict=True))

    def _set_item(self):
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def _set_items(self):
        self._fill(self.pop_mark())

    def _make_dict(self):
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _make_set(self):
        self.append(_Ignored())

    def _add_items(self):
        self.pop_mark()

    def _make_frozenset(self):
        self.pop_mark()
        self.append(_Ignored())

    def _set_attributes(self):
        state = self.stack.pop()  # state_dict()'s _metadata, an ignored object's state: nothing here has attributes
        if isinstance(self.stack[-1], _Parameters) and isinstance(state, dict):
            table = state.get("_parameters")
            if type(table) is dict:
                self.stack[-1].update(table)

    dispatch.update({
        pickle.SETITEM[0]: _set_item, pickle.SETITEMS[0]: _set_items, pickle.DICT[0]: _make_dict,
        pickle.EMPTY_SET[0]: _make_set, pickle.ADDITEMS[0]: _add_items, pickle.FROZENSET[0]: _make_frozenset,
        pickle.BUILD[0]: _set_attributes,
    })  # fmt: skip

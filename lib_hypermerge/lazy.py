"""torch, imported when it is first used: it takes a second, and headers are read without it.

`from ..lazy import torch` instead of `import torch` in what both headers and numbers go through.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any


class _Lazy:
    def __init__(self, name: str):
        self.__name__ = name

    def __getattr__(self, name: str) -> Any:
        module = import_module(self.__name__)
        self.__dict__.update(vars(module))  # later look-ups go without this call
        return getattr(module, name)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _Lazy("torch")

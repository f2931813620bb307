"""Memory that each worker thread keeps between layers: fresh memory costs more than the arithmetic on it."""

from __future__ import annotations

import threading

import torch


class Buffers(threading.local):
    """Named pieces of memory of the thread that asks; what they held is void after the next request of the name."""

    def __init__(self):
        self.store: dict[str, torch.Tensor] = {}

    def get(self, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """(numel,) of this dtype, with whatever is in it."""
        held = self.store.get(name)
        if held is None or held.numel() < numel or held.dtype != dtype:
            self.store[name] = held = torch.empty(numel, dtype=dtype)
        return held[:numel]

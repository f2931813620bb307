"""The container: one file with bases that all models share and small cores of each, from which LoRAs are made."""

from __future__ import annotations

from collections.abc import Iterator

import torch

UP, DOWN, CORES = "up", "down", "cores"


def module_tensors(
    name: str, up: torch.Tensor, down: torch.Tensor, cores: torch.Tensor, weight_shape: tuple[int, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the file holds of one module: NAME.up (n, a), NAME.down (b, k) or (b, c, kh, kw), NAME.cores (M, a, b).

    down comes flattened: (b, k).  Model m's change of the weight is up·cores[m]·down, without a further scale.
    """
    yield f"{name}.{UP}", up
    yield f"{name}.{DOWN}", down.reshape(len(down), *weight_shape[1:])
    yield f"{name}.{CORES}", cores

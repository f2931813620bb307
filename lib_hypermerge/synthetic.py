"""Checkpoints of random weights with true keys: for the tests and the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from .files.writer import SafetensorsWriter, header_bytes

Table = dict[str, tuple[int, ...]]
# (key, base weight in float32, generator) → tuned weight in float32
Tune = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor]


def write_pair(folder: Path, table: Table, tune: Tune, dtype: torch.dtype = torch.float16, seed: int = 0) -> list[Path]:
    """Write base.safetensors and tuned.safetensors, tensor by tensor; returns their paths."""
    paths = [folder / "base.safetensors", folder / "tuned.safetensors"]
    entries = {k: {"dtype": "BF16", "shape": list(s), "data_offsets": [10**12, 10**12]} for k, s in table.items()}
    reserve = len(header_bytes(entries, {"format": "pt"}))
    with SafetensorsWriter(paths[0], reserve, True) as base, SafetensorsWriter(paths[1], reserve, True) as tuned:
        for index, (key, shape) in enumerate(sorted(table.items())):
            generator = torch.Generator().manual_seed(seed * 100_003 + index)
            weight = random_weight(key, shape, generator)
            base.add(key, weight if weight.dtype == torch.int64 else weight.to(dtype))
            changed = weight if weight.dtype == torch.int64 else tune(key, weight, generator).to(dtype)
            tuned.add(key, changed)
        for writer in (base, tuned):
            writer.commit(lambda *_: {"format": "pt"})
    return paths


def random_weight(key: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A weight of the size a trained one has; norms are 1, biases 0, position_ids count."""
    if key.endswith("position_ids"):
        return torch.arange(shape[-1])[None]
    if key.endswith(".bias") or key.endswith("_bias") or not shape:
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_in = torch.Size(shape[1:]).numel()
    scale = 0.02 if "embedding" in key else 0.7 / fan_in**0.5
    return torch.randn(shape, generator=generator) * scale


def decaying(power: float = 0.7, directions: int = 256, strength: float = 0.05, tail: float = 0.1) -> Tune:
    """Tune every matrix by σ_i ∝ i^−power over some directions and a tail of noise, as fine-tuning does."""

    def tune(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        if weight.dim() < 2 or "first_stage" in key or "embedding" in key:
            return weight
        flat = weight.flatten(1)
        S = torch.arange(1, min(directions, *flat.shape) + 1).float() ** -power
        change = _product(flat.shape, S, generator)
        change = change / change.norm()
        noise = torch.randn(flat.shape, generator=generator)
        change = change + tail * noise / noise.norm()
        return weight + (strength * flat.norm() * change).reshape(weight.shape)

    return tune


def _product(shape: torch.Size, S: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    n, k = shape
    U = torch.randn(n, len(S), generator=generator) * S / n**0.5
    return U @ torch.randn(len(S), k, generator=generator) / k**0.5

"""Arithmetic on whole checkpoints, as people do it by hand, and how far two are apart."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def distance(first: Path, second: Path) -> float:
    """‖first − second‖ over all floating-point tensors but the autoencoder's, in float64."""
    one, other = _compared(first), _compared(second)
    return sum(float((one[key] - other[key]).square().sum()) for key in one) ** 0.5


def _compared(file: Path) -> dict[str, torch.Tensor]:
    return {
        key: tensor.double()
        for key, tensor in load_file(file).items()
        if tensor.is_floating_point() and not key.startswith("first_stage_model.")
    }


def change(base: Path, other: Path) -> float:
    """‖other − base‖ / ‖base‖."""
    return distance(base, other) / sum(float(tensor.square().sum()) for tensor in _compared(base).values()) ** 0.5


def missed(base: Path, original: Path, made: Path) -> float:
    """‖original − made‖ / ‖original − base‖."""
    return distance(original, made) / distance(original, base)


def weighted_sum(models: Mapping[Path, float], out: Path) -> Path:
    """Σ weight · model, tensor by tensor in float32, written as fp16: what checkpoint mergers do."""
    total: dict[str, torch.Tensor] = {}
    for file, weight in models.items():
        for key, tensor in load_file(file).items():
            if not tensor.is_floating_point():
                total[key] = tensor
            else:
                total[key] = total.get(key, torch.zeros((), dtype=torch.float32)) + weight * tensor.float()
    kept = {key: t.half() if t.is_floating_point() else t for key, t in total.items()}
    save_file(kept, out, metadata={"format": "pt"})
    return out

"""Changes of normalisation layers and biases, stored as they are (LyCORIS `norm`, `diff_b`)."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def tensors(
    name: str, weight: torch.Tensor, bias: torch.Tensor, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """A norm's change; A1111 refuses a file in which one of the two is missing."""
    yield f"{name}.w_norm", weight.flatten().to(dtype)
    yield f"{name}.b_norm", bias.flatten().to(dtype)


def bias_tensor(name: str, bias: torch.Tensor, dtype: torch.dtype) -> tuple[str, torch.Tensor]:
    """A bias's change, beside the LoRA of the same layer."""
    return f"{name}.diff_b", bias.flatten().to(dtype)

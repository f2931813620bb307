"""LoRA and LoCon: ΔW = alpha/r · up·down (Hu et al. 2021, arXiv 2106.09685; LyCORIS for convolutions)."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def tensors(
    name: str, up: torch.Tensor, down: torch.Tensor, weight_shape: tuple[int, ...]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one module with alpha = rank, as kohya files hold them.

    up: (n, r), down: (r, k), both in the file's dtype.  For a convolution (n, c, kh, kw) down becomes
    (r, c, kh, kw) and up (n, r, 1, 1).
    """
    rank = down.shape[0]
    if len(weight_shape) == 4:
        down = down.reshape(rank, *weight_shape[1:])
        up = up.reshape(*up.shape, 1, 1)
    yield f"{name}.lora_down.weight", down
    yield f"{name}.lora_up.weight", up
    # bfloat16 cannot hold every rank above 256, float16 every rank up to 2048
    alpha_dtype = torch.float32 if up.dtype == torch.float32 else torch.float16
    yield f"{name}.alpha", torch.tensor(float(rank), dtype=alpha_dtype)


def tensor_bytes(rank: int, n: int, k: int, itemsize: int) -> int:
    """Bytes of the two factors of one module."""
    return rank * (n + k) * itemsize

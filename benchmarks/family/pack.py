"""A checkpoint of the family in half its bytes and fewer, for the repository: rows of 7-bit numbers, compressed."""

from __future__ import annotations

import lzma
import sys
from pathlib import Path

import torch
from safetensors.torch import load, load_file, save
from torch import Tensor

MOST = 63  # 7 bits and a sign less: an error of about 1.5 % of a row's spread
_SCALE = ".scale"
FILE = Path(__file__).with_name("base.safetensors.xz")


def pack(tensors: dict[str, Tensor]) -> bytes:
    """Matrices and kernels as int8 with one fp16 scale a row, the rest as it is."""
    packed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            packed[key] = tensor.contiguous()
            continue
        rows = tensor.float().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / MOST).clamp_min(1e-12)
        packed[key] = (rows / scale).round().to(torch.int8).reshape(tensor.shape).contiguous()
        packed[key + _SCALE] = scale[:, 0].contiguous()
    return lzma.compress(save(packed), preset=9)


def unpack(data: bytes) -> dict[str, Tensor]:
    """The checkpoint again, in fp16."""
    packed = load(lzma.decompress(data))
    tensors = {}
    for key, tensor in packed.items():
        if key.endswith(_SCALE):
            continue
        scale = packed.get(key + _SCALE)
        if scale is not None:
            tensor = (tensor.float().flatten(1) * scale[:, None]).reshape(tensor.shape).half()
        tensors[key] = tensor
    return tensors


if __name__ == "__main__":  # python -m benchmarks.family.pack CHECKPOINT
    FILE.write_bytes(pack(load_file(sys.argv[1])))
    print(f"{FILE}: {FILE.stat().st_size / 1e6:.2f} MB")

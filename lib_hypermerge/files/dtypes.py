"""Number formats by their safetensors name; torch is imported only when a tensor is made."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import FormatError

if TYPE_CHECKING:
    import torch

ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2, "U32": 4, "U64": 8,
}  # fmt: skip

_TORCH = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "U16": "uint16", "U32": "uint32", "U64": "uint64",
}  # fmt: skip

FROM_TORCH = {torch_name: name for name, torch_name in _TORCH.items()}

FLOATS = frozenset(("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"))

OUTPUT_DTYPES = {"fp16": "F16", "bf16": "BF16", "fp32": "F32"}
EIGHT_BITS = {"fp8_e4m3": "F8_E4M3", "fp8_e5m2": "F8_E5M2"}  # of checkpoints only


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors dtype name; FormatError where this torch has none."""
    import torch

    dtype = getattr(torch, _TORCH.get(name, ""), None)
    if dtype is None:
        raise FormatError(
            f"The number format {name} cannot be read.",
            f"torch {torch.__version__} does not know it.",
            "Update torch, or save the file as fp16 first.",
        )
    return dtype


def name_of(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype."""
    plain = str(dtype).removeprefix("torch.")
    if plain not in FROM_TORCH:
        raise FormatError(f"Tensors of type {plain} cannot be stored in a safetensors file.")
    return FROM_TORCH[plain]

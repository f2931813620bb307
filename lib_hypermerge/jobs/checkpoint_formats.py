"""Which number format a tensor of a checkpoint gets, by its component."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import FormatError, SpecError
from ..files.dtypes import EIGHT_BITS, FLOATS, ITEMSIZE, OUTPUT_DTYPES, torch_dtype
from ..files.source import TensorInfo
from ..layouts.module import Model

KEEP = "keep"
DTYPES = {**OUTPUT_DTYPES, **EIGHT_BITS}


def components(model: Model) -> dict[str, str]:
    """The component of each tensor of a checkpoint: unet, vae, or te for all text encoders."""
    out = dict.fromkeys((info.name for info in model.vae.values()), "vae")
    for component, modules in model.components.items():
        for module in modules.values():
            for info in (module.weight, module.bias):
                if info is not None:
                    out[info.name] = "unet" if component == "unet" else "te"
    return out


def check_formats(choices: Iterable[str]) -> None:
    """SpecError where torch lacks one of these formats."""
    for choice in choices:
        try:
            if choice != KEEP:
                torch_dtype(DTYPES[choice])
        except FormatError as error:
            raise SpecError(
                f"The number format {choice} is not there.", error.why, "Choose another, or update torch."
            ) from None


def format_of(info: TensorInfo, choice: str) -> str:
    """The format that a tensor is written in where its component's is to be `choice`."""
    if choice == KEEP or info.dtype not in FLOATS:
        return info.dtype
    dtype = DTYPES[choice]
    if choice in EIGHT_BITS and len(info.shape) < 2:  # norms and biases are small, and hosts expect 16 bits
        return info.dtype if ITEMSIZE[info.dtype] <= 2 else "F16"
    return dtype

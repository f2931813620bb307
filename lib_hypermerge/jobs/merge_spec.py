"""The parameters of merge. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from .checkpoint_formats import KEEP
from .spec import CHECKPOINT, CHOICE, FLAG, LORAS, OUTPUT, Spec, WeightedLora, param

FORMATS = (
    (KEEP, "as in the checkpoint"), ("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float"),
    ("fp8_e4m3", "8-bit float, 4 bits of exponent"), ("fp8_e5m2", "8-bit float, 5 bits of exponent"),
)  # fmt: skip


@dataclass(frozen=True)
class MergeSpec(Spec):
    """A checkpoint that shows without a LoRA what its prompt would show with it."""

    verb: ClassVar[str] = "merge"

    checkpoint: str = param(CHECKPOINT, "Checkpoint", "The checkpoint that the LoRAs are merged into.")
    loras: tuple[WeightedLora, ...] = param(
        LORAS, "LoRAs",
        "Each with a weight as in a prompt; text encoders take the weight too, or one of their own. "
        "They are applied one after another.",
        flag="lora",
    )  # fmt: skip
    out: str = param(
        OUTPUT, "Name of the checkpoint", "The new file's name, without a folder.", placeholder="my-merge",
        target="checkpoint",
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format of the UNet", "8-bit floats: matrices only, and only where the WebUI can load them.",
        KEEP, choices=FORMATS,
    )  # fmt: skip
    te_dtype: str = param(
        CHOICE, "Number format of text encoders", "Of all text encoders.", KEEP, choices=FORMATS, advanced=True
    )
    vae_dtype: str = param(CHOICE, "Number format of the VAE", "It is carried over.", KEEP, choices=FORMATS[:4],
                           advanced=True)  # fmt: skip
    overwrite: bool = param(FLAG, "Overwrite", "Replace an existing file of that name.", False)

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """A name for the result after what goes into it; "" as long as nothing is chosen."""
        names = [values.get("checkpoint"), *(lora.get("lora") for lora in values.get("loras") or ())]
        return "-".join(PurePath(name).stem for name in names if name) if all(names[:2]) and len(names) > 1 else ""

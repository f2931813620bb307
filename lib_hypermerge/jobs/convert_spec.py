"""The parameters of convert. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ..errors import SpecError
from ..files.dtypes import EIGHT_BITS
from .checkpoint_formats import KEEP
from .spec import CHECKPOINT, CHOICE, FLAG, INTEGER, LORA, NUMBER, OUTPUT, Spec, param

SAME = "same"
KOHYA, DIFFUSERS, PEFT = "kohya", "diffusers", "peft"
FORMATS = (
    (KEEP, "as stored"), ("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float"),
    ("fp8_e4m3", "8-bit float, 4 bits of exponent (checkpoints)"),
    ("fp8_e5m2", "8-bit float, 5 bits of exponent (checkpoints)"),
)  # fmt: skip
_SAME = (SAME, "as the number format says")


@dataclass(frozen=True, kw_only=True)
class ConvertSpec(Spec):
    """A LoRA in another dialect or family, or a checkpoint in another number format."""

    verb: ClassVar[str] = "convert"

    lora: str | None = param(
        LORA, "LoRA", "The LoRA to convert, of any family. Empty: the checkpoint itself is converted.", None,
        optional=True,
    )  # fmt: skip
    checkpoint: str | None = param(
        CHECKPOINT, "Checkpoint",
        "With a LoRA: the base model that it is for, needed where its change depends on the weights. "
        "Alone: the checkpoint to convert.",
        None, optional=True,
    )  # fmt: skip
    out: str = param(OUTPUT, "Name of the result", "The new file's name, without a folder.", placeholder="my-style")
    to: str = param(
        CHOICE, "Dialect", "How the result names its layers. Only LoRAs have one.", KOHYA,
        choices=((KOHYA, "kohya: A1111, Forge, ComfyUI"), (DIFFUSERS, "diffusers"), (PEFT, "PEFT: a folder")),
    )  # fmt: skip
    family: str = param(
        CHOICE, "Family", "lora turns LoHa, LoKr, DoRA, OFT and all others into plain LoRAs.", KEEP,
        choices=((KEEP, "as it is"), ("lora", "plain LoRA")),
    )  # fmt: skip
    rank: int | None = param(
        INTEGER, "Rank", "Directions kept per layer. Empty: exactly, where the family is of low rank.", None,
        bounds=(1, 4096), optional=True, placeholder="exact",
    )  # fmt: skip
    energy: float | None = param(
        NUMBER, "Retained energy", "Instead of a rank: the share of each layer's squared change to keep.", None,
        bounds=(1e-6, 1.0), optional=True, placeholder="0.99",
    )  # fmt: skip
    dora_axis: str = param(
        CHOICE, "Axis of DoRA magnitudes", "A1111 reads only the input axis, PEFT and newer trainers the output axis.",
        KEEP, choices=((KEEP, "as it is"), ("input", "input channels"), ("output", "output channels")), advanced=True,
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format", "8-bit floats: matrices of checkpoints only, their VAE stays.", KEEP, choices=FORMATS
    )
    te_dtype: str = param(
        CHOICE, "Number format of text encoders", "Of a checkpoint.", SAME, choices=(_SAME, *FORMATS), advanced=True
    )
    vae_dtype: str = param(
        CHOICE, "Number format of the VAE", "Of a checkpoint.", SAME, choices=(_SAME, *FORMATS[:4]), advanced=True
    )
    prune: bool = param(
        FLAG, "Prune", "Of a checkpoint: leave out the tensors of EMA copies (model_ema.), of the VAE's training loss "
        "(first_stage_model.loss.) and of optimizers. What a .ckpt holds beside its state dict, such as "
        "optimizer_states and global_step, is never kept.", False,
    )  # fmt: skip
    overwrite: bool = param(FLAG, "Overwrite", "Replace an existing file of that name.", False)

    def check(self) -> None:
        if self.lora is None and self.checkpoint is None:
            raise SpecError("Nothing to convert was named.", hint="Name a LoRA, or a checkpoint.")
        if self.lora is None:
            self._check_alone()
        else:
            self._check_lora()

    def _check_alone(self) -> None:
        for name in ("to", "family", "rank", "energy", "dora_axis"):
            if getattr(self, name) != self.defaults()[name]:
                raise SpecError(
                    f"{name!r} is about LoRAs, and no LoRA was named.", hint="Name one, or leave that parameter out."
                )

    def _check_lora(self) -> None:
        for name in ("te_dtype", "vae_dtype", "prune"):
            if getattr(self, name) != self.defaults()[name]:
                raise SpecError(
                    f"{name!r} is about checkpoints, and a LoRA is converted.", hint="Leave that parameter out."
                )
        if self.dtype in EIGHT_BITS:
            raise SpecError("A LoRA in 8-bit floats is read by no WebUI.", hint="Choose fp16, bf16 or fp32.")
        if self.rank is not None and self.energy is not None:
            raise SpecError("Both a rank and an energy were given.", hint="Choose one of them.")
        reduces = self.family == "lora" or self.dora_axis != KEEP
        if (self.rank or self.energy) and not reduces:
            raise SpecError(
                "A rank or an energy was given, but the family is to stay as it is.",
                hint="Choose the family lora.",
            )
        if self.family == "lora" and self.dora_axis != KEEP:
            raise SpecError("A plain LoRA has no magnitudes.", hint="Choose the family lora, or an axis, not both.")
        if self.to != KOHYA and self.dora_axis == "input":
            raise SpecError(
                "PEFT and diffusers know no DoRA over input channels.", hint="Choose kohya, or the output axis."
            )

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """A name for the result after what goes into it; "" as long as nothing is chosen."""
        source = values.get("lora") or values.get("checkpoint")
        if not source:
            return ""
        if not values.get("lora"):
            dtype = values.get("dtype") or KEEP
            return f"{PurePath(source).stem}-{'converted' if dtype == KEEP else dtype}"
        form = "lora" if values.get("family") == "lora" else values.get("to") or KOHYA
        return f"{PurePath(source).stem}-{form}"

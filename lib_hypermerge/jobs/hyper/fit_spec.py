"""The parameters of fit. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..spec import CHECKPOINT, FILES, FLAG, TEXT, Spec, param

LORAS_LABEL, LORAS_HELP = "LoRA files", "Empty: those of the recipe, from the list or beside the hyper-model."
RECIPE_LABEL = "Recipe"
RECIPE_HELP = "A NAME.hypermerge.json. Empty: the one in the hyper-model, or beside it."


@dataclass(frozen=True)
class FitSpec(Spec):
    """How near a hyper-model's LoRAs come to a checkpoint that was not merged, and by which multipliers."""

    verb: ClassVar[str] = "fit"

    hyper: str = param(CHECKPOINT, "Hyper-model", "The hyper-model; or the base, where only LoRAs were written.")
    model: str = param(CHECKPOINT, "Model", "The checkpoint to come near to, of the same family.")
    loras: tuple[str, ...] = param(FILES, LORAS_LABEL, LORAS_HELP, (), optional=True, flag="lora")
    separate_te: bool = param(
        FLAG, "Multipliers of their own for text encoders",
        "Comes closer; a prompt then has two numbers a LoRA. Where the recipe has them, fit has them too.", False,
    )  # fmt: skip
    recipe: str | None = param(TEXT, RECIPE_LABEL, RECIPE_HELP, None, optional=True, advanced=True)

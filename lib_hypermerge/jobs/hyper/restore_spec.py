"""The parameters of restore. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ...errors import MissingError, SpecError
from ..checkpoint_formats import KEEP
from ..spec import CHECKPOINT, CHOICE, FILES, FLAG, INTEGER, MOST_WEIGHT, OUTPUT, TEXT, Spec, param
from .fit_spec import LORAS_HELP, LORAS_LABEL, RECIPE_HELP, RECIPE_LABEL

AS_CHECKPOINT, AS_LORA = "checkpoint", "lora"

Weights = dict[str, tuple[float, float]]  # name → (of text encoders, of the UNet), as in a prompt


@dataclass(frozen=True, kw_only=True)
class RestoreSpec(Spec):
    """One of the models of a hyper-merge, or a blend of them, as a checkpoint or as one LoRA."""

    verb: ClassVar[str] = "restore"

    hyper: str | None = param(
        CHECKPOINT, "Hyper-model", "The hyper-model; or the base, where only LoRAs were written.", None, optional=True
    )
    model: str | None = param(
        TEXT, "Model", "The name of one of the models that were merged. Empty: a blend.", None, optional=True,
        placeholder="my-fine-tune",
    )  # fmt: skip
    multipliers: str | None = param(
        TEXT, "Multipliers",
        "Of a blend: NAME-1=0.5,NAME-2=-0.3, or the numbers in order. 0.1:0.5 is 0.1 for text encoders, 0.5 for the "
        "UNet. Of a container: the models' shares.",
        None, optional=True, placeholder="0.5,-0.3",
    )  # fmt: skip
    out: str = param(
        OUTPUT, "Name of the result", "The new file's name, without a folder.", placeholder="my-fine-tune-restored",
        target="checkpoint",
    )  # fmt: skip
    kind: str = param(
        CHOICE, "Restore as", "Either shows what the prompt shows.", AS_CHECKPOINT, flag="as",
        choices=((AS_CHECKPOINT, "a checkpoint"), (AS_LORA, "one LoRA for the hyper-model")),
    )  # fmt: skip
    rank: int | None = param(
        INTEGER, "Rank", "Of one LoRA: directions kept per layer. Empty: all, exactly.", None, bounds=(1, 4096),
        optional=True, placeholder="exact",
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format", "Of all weights.", KEEP, advanced=True,
        choices=(
            (KEEP, "as in the hyper-model; of a LoRA fp16"), ("fp16", "16-bit float"), ("bf16", "bfloat16"),
            ("fp32", "32-bit float"),
        ),
    )  # fmt: skip
    loras: tuple[str, ...] = param(FILES, LORAS_LABEL, LORAS_HELP, (), optional=True, flag="lora", advanced=True)
    recipe: str | None = param(TEXT, RECIPE_LABEL, RECIPE_HELP, None, optional=True, advanced=True)
    container: str | None = param(
        TEXT, "Container", "A NAME.hypermerge, instead of LoRAs. Empty: the recipe's, where it has no LoRAs.", None,
        optional=True, advanced=True,
    )  # fmt: skip
    overwrite: bool = param(FLAG, "Overwrite", "Replace an existing file of that name.", False)

    def check(self) -> None:
        hint = "Name a model that was merged, or the multipliers of a blend."
        if self.model is None and self.multipliers is None:
            raise MissingError("Neither a model nor multipliers were named.", hint=hint)
        if self.model is not None and self.multipliers is not None:
            raise SpecError("Both a model and multipliers were named.", hint=hint)
        if self.hyper is None and (self.container is None or self.kind == AS_CHECKPOINT):
            raise SpecError("'hyper' is missing.", hint="Name the hyper-model that the LoRAs belong to.")
        if self.container is not None and self.loras:
            raise SpecError("Both a container and LoRAs were named.", hint="Name one of them.")
        if self.rank is not None and self.kind == AS_CHECKPOINT:
            raise SpecError("A rank is of a LoRA, and a checkpoint is to be written.", hint="Leave one of them out.")

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """After the model; "" as long as nothing is chosen."""
        if values.get("model"):
            return f"{values['model']}-restored"
        return f"{PurePath(values['hyper']).stem}-blend" if values.get("hyper") and values.get("multipliers") else ""


def weights_of(text: str, names: Sequence[str]) -> Weights:
    """The weights of a text such as "a=0.5,b=0.1:-0.3" or "0.5,-0.3"; names that it leaves out get 0.

    Raises SpecError: an unknown name, a name twice, a wrong count, no number, or one beyond ±100.
    """
    items = [item.strip() for item in text.split(",")]
    named = ["=" in item for item in items]
    if all(named):
        pairs = [(name.strip(), number) for name, number in (item.rsplit("=", 1) for item in items)]
    elif any(named):
        raise SpecError(f"{text!r} names some multipliers and others not.", hint="Name all or none.")
    elif len(items) != len(names):
        raise SpecError(f"{len(names)} multipliers are needed.", f"Got {text}.", f"In this order: {', '.join(names)}.")
    else:
        pairs = list(zip(names, items, strict=True))
    out: Weights = dict.fromkeys(names, (0.0, 0.0))
    seen = set()
    for name, number in pairs:
        if name not in out:
            raise SpecError(f"There is no {name!r} here.", hint=f"There are: {', '.join(names)}.")
        if name in seen:
            raise SpecError(f"{name!r} has two multipliers.", f"Got {text}.")
        seen.add(name)
        numbers = [_number(part, name) for part in number.split(":")]
        if len(numbers) > 2:
            raise SpecError(f"{number!r} are too many numbers for {name!r}.", hint="Give one, or two: te:unet.")
        out[name] = (numbers[0], numbers[-1])
    return out


def _number(text: str, name: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise SpecError(
            f"{text!r}, the multiplier of {name!r}, is no number.", hint="Such as 0.5, or 0.1:0.5."
        ) from None
    if not math.isfinite(number) or abs(number) > MOST_WEIGHT:
        raise SpecError(f"The multiplier of {name!r} is beyond ±{MOST_WEIGHT:g}.", f"Got {text}.")
    return number

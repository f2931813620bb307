"""The parameters of transfer. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ...errors import SpecError
from ..checkpoint_formats import KEEP
from ..spec import CHECKPOINT, CHOICE, FLAG, INTEGER, LORA_FILES, NUMBER, OUTPUT, Spec, param

COPY, LORA_X, PROLORA, CROSS = "copy", "lora-x", "prolora", "cross"
NAME = "{name}"  # stands for a LoRA's own name in that of its output
USUAL_ENERGY = 0.9
# ProLoRA's 0.8 counts from 0; told from chance that is about 0.75. Weights that differ by a third to a half of their
# norm are as unlike as this, by 10 % they have 0.94 and more.
USUAL_THRESHOLD = 0.7
USUAL_RANK = 64  # of changes that have no factors of their own


@dataclass(frozen=True)
class TransferSpec(Spec):
    """LoRAs of one base checkpoint, for another that is related to it."""

    verb: ClassVar[str] = "transfer"

    loras: tuple[str, ...] = param(
        LORA_FILES,
        "LoRAs",
        "One or more, all trained on the source base. On the command line also folders, and patterns such as "
        "'loras/*.safetensors'.",
        flag="lora",
    )
    source_base: str = param(CHECKPOINT, "Source base", "The checkpoint that the LoRAs were trained on.")
    target_base: str = param(
        CHECKPOINT, "Target base", "The one that they are to work with: a relative of the source, pruned or not."
    )
    out: str = param(
        OUTPUT, "Name of the new LoRA", "Of several LoRAs: with {name} in it, each one's own.",
        placeholder="{name}-for-target",
    )  # fmt: skip
    method: str = param(
        CHOICE, "Method", "Layers that are equal in both bases are copied whatever the method.", PROLORA,
        choices=(
            (COPY, "the LoRA as it is, where sizes agree"),
            (LORA_X, "what lies in the target's leading directions"),
            (PROLORA, "leading directions to leading directions, the rest to the rest"),
            (CROSS, "as lora-x, and direction by direction where sizes differ"),
        ),
    )  # fmt: skip
    threshold: float = param(
        NUMBER, "Least similarity",
        "Layers whose leading directions are less alike are left out. 1: the same, 0: as unrelated weights.",
        USUAL_THRESHOLD,
        bounds=(0, 1), advanced=True,
    )  # fmt: skip
    basis_energy: float | None = param(
        NUMBER, "Share of a weight's energy in its leading directions", "1: all directions, and nothing is projected.",
        None, bounds=(0.01, 1), advanced=True, optional=True, placeholder=str(USUAL_ENERGY),
    )  # fmt: skip
    rank: int | None = param(
        INTEGER, "Largest rank",
        f"Empty: as in the LoRA; {USUAL_RANK} where it has whole matrices or changes that depend on the weights.", None,
        bounds=(1, 4096), advanced=True, optional=True, placeholder="as in the LoRA",
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format", "Of the new LoRA.", KEEP, advanced=True,
        choices=((KEEP, "as in the LoRA"), ("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float")),
    )  # fmt: skip
    force: bool = param(
        FLAG, "Force", "Transfer between models that are not alike, and layers below the least similarity too.", False,
        advanced=True,
    )  # fmt: skip
    preview: bool = param(
        FLAG, "Preview", "Compute and measure everything, write nothing.", False, advanced=True, flag="dry-run"
    )
    overwrite: bool = param(FLAG, "Overwrite", "Replace existing files of these names.", False)

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """After the LoRA, or {name}, and the target; "" as long as these are not chosen."""
        loras, target = values.get("loras") or (), values.get("target_base")
        if not loras or not target:
            return ""
        return f"{PurePath(loras[0]).stem if len(loras) == 1 else NAME}-for-{PurePath(target).stem}"

    def check(self) -> None:
        self.check_names(len(self.loras))
        if self.method == COPY and self.basis_energy is not None:
            raise SpecError(
                "Copying uses no leading directions.", f"basis_energy was given, {self.basis_energy:g}.",
                "Leave it out, or choose another method.",
            )  # fmt: skip

    def check_names(self, loras: int) -> None:
        """SpecError if so many LoRAs would have one name."""
        if loras > 1 and NAME not in self.out:
            raise SpecError(
                f"{loras} LoRAs cannot all be called {self.out!r}.", "Each becomes a file of its own.",
                f"Put {NAME} where each one's own name is to stand, as in {NAME}-for-target.",
            )  # fmt: skip

    @property
    def energy(self) -> float:
        """The share that a basis holds."""
        return USUAL_ENERGY if self.basis_energy is None else self.basis_energy

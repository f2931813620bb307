"""The parameters of extract. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ..errors import SpecError
from ..layouts.module import LAYER_GROUPS
from .rank_rule import RULES, TARGET_HELP, check_rule
from .spec import CHECKPOINT, CHOICE, CHOICES, FLAG, INTEGER, NUMBER, OUTPUT, Spec, param

LORA, DORA, LOHA, LOKR, SVDIFF, BEST = "lora", "dora", "loha", "lokr", "svdiff", "best"
FAMILIES = (
    (LORA, "LoRA: two factors, read by everything"),
    (DORA, "DoRA: LoRA with a magnitude for every input channel"),
    (LOHA, "LoHa: an entrywise product of two LoRAs of half the rank"),
    (LOKR, "LoKr: a Kronecker product"),
    (BEST, "the one of these four that fits this pair best"),
    (SVDIFF, "SVDiff: spectral shifts"),
)
# families that take the place of a LoRA of the same size, in the layers where they are closer
RIVALS = (DORA, LOHA, LOKR)
_GROUP_TITLES = {
    "attention": "attention", "feedforward": "feed-forward (MLP)", "projection": "projections around attention",
    "resnet": "residual blocks", "sampling": "down- and up-sampling", "embedding": "time and class embeddings",
    "inout": "first and last convolution",
}  # fmt: skip


@dataclass(frozen=True)
class ExtractSpec(Spec):
    """A LoRA, or a file of a related family, that turns the base checkpoint into the tuned one."""

    verb: ClassVar[str] = "extract"

    base: str = param(CHECKPOINT, "Base checkpoint", "The checkpoint that the fine-tune started from.")
    tuned: str = param(CHECKPOINT, "Fine-tuned checkpoint", "The checkpoint to turn into a LoRA.")
    out: str = param(OUTPUT, "Name of the LoRA", "The new file's name, without a folder.", placeholder="my-style")
    rank: int = param(
        INTEGER, "Rank", "Directions kept per linear layer, under the rule fixed. 32 suits most.", 32,
        bounds=(1, 4096),
    )  # fmt: skip
    conv_rank: int | None = param(
        INTEGER, "Rank of 3×3 convolutions",
        "Empty: as the rank. 0: leave these layers out. Under the other rules it is the most they get.", None,
        bounds=(0, 4096), optional=True, placeholder="as above",
    )  # fmt: skip
    rank_rule: str = param(CHOICE, "Rank rule", "How the rank of each layer is chosen.", "fixed", choices=RULES)
    rank_target: float | None = param(NUMBER, "Target of the rank rule", TARGET_HELP, None, optional=True)
    family: str = param(
        CHOICE, "Family",
        "DoRA, LoHa and LoKr go into the layers where they are closer than a LoRA of the same size; A1111, Forge and "
        "ComfyUI load them. SVDiff is one number per singular value, a file under 1 MB which no WebUI reads.", LORA,
        choices=FAMILIES,
    )  # fmt: skip
    components: tuple[str, ...] = param(
        CHOICES, "Components",
        "unet is also the transformer of SD3 and Flux. te is every text encoder; te1 is CLIP-L, te2 CLIP-G, te3 T5.",
        ("unet", "te"),
        choices=(
            ("unet", "UNet or transformer"), ("te", "all text encoders"),
            ("te1", "CLIP-L of SDXL, SD3, Flux"), ("te2", "CLIP-G of SDXL, SD3"), ("te3", "T5 of SD3, Flux"),
        ),
    )  # fmt: skip
    layers: tuple[str, ...] = param(
        CHOICES, "Layer groups", "Which kinds of layers to include.", LAYER_GROUPS, advanced=True,
        choices=tuple((group, _GROUP_TITLES[group]) for group in LAYER_GROUPS),
    )  # fmt: skip
    norms: bool = param(
        FLAG, "Include normalisation layers",
        "Small and exact (w_norm, b_norm). A1111, Forge and ComfyUI load them, other programs may not.", False,
    )  # fmt: skip
    biases: bool = param(
        FLAG, "Include biases",
        "Small and exact (diff_b). Loaded by Forge and ComfyUI; A1111 ignores them beside a LoRA.", False,
        advanced=True,
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format", "fp16 is what everything loads.", "fp16",
        choices=(("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float, twice the size")),
    )  # fmt: skip
    min_rank: int = param(INTEGER, "Least rank", "No changed layer gets less.", 1, bounds=(1, 4096), advanced=True)
    max_rank: int | None = param(
        INTEGER, "Largest rank", "No layer gets more. Empty: what a layer's size allows.", None, bounds=(1, 4096),
        advanced=True, optional=True, placeholder="no limit",
    )  # fmt: skip
    method: str = param(
        CHOICE, "Decomposition", "auto takes the faster per layer; both are within a fraction of a percent.", "auto",
        choices=(("auto", "the faster one"), ("randomised", "randomised"), ("exact", "exact, slower")), advanced=True,
    )  # fmt: skip
    device: str = param(
        CHOICE, "Device", "auto: the graphics card if there is one.", "auto", advanced=True,
        choices=(("auto", "best there is"), ("cpu", "processor"), ("cuda", "NVIDIA or AMD card"), ("mps", "Apple")),
    )  # fmt: skip
    seed: int = param(INTEGER, "Seed", "The same seed gives the same file.", 0, bounds=(0, 2**63 - 1), advanced=True)
    tuned_weight: float = param(
        NUMBER,
        "Weight of the fine-tune (α)",
        "The LoRA holds α·tuned − β·base.",
        1.0,
        bounds=(-100, 100),
        advanced=True,
    )
    base_weight: float = param(
        NUMBER, "Weight of the base (β)", "Leave both at 1 for the plain difference.", 1.0, bounds=(-100, 100),
        advanced=True,
    )  # fmt: skip
    skip_nonfinite: bool = param(
        FLAG, "Skip layers with NaN or Inf", "Otherwise such a checkpoint is refused.", False, advanced=True
    )
    overwrite: bool = param(FLAG, "Overwrite", "Replace an existing file of that name.", False)

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """A name for the result after the fine-tune's; "" as long as there is none."""
        family = values.get("family")
        return f"{PurePath(values['tuned']).stem}-{family if family in RIVALS else LORA}" if values.get("tuned") else ""

    def check(self) -> None:
        if self.family == SVDIFF and (self.rank_rule != "fixed" or self.norms or self.biases):
            raise SpecError(
                "Spectral shifts have no rank, and the file holds neither norms nor biases.",
                hint="Leave out the rank rule, norms and biases, or extract a LoRA.",
            )
        if self.family in (*RIVALS, BEST) and self.rank_rule != "fixed":
            raise SpecError(
                f"The rank rule {self.rank_rule!r} is for a LoRA.",
                "Other families are given the size of a LoRA of one rank.",
                "Leave the rule at 'fixed' and choose the rank, or extract a LoRA.",
            )
        check_rule(self.rank_rule, self.rank_target)
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise SpecError(f"The largest rank {self.max_rank} is below the least rank {self.min_rank}.")
        if self.tuned_weight == 0:
            raise SpecError("The weight of the fine-tune is 0: nothing would be left of it.")

    @property
    def rank_of_convs(self) -> int:
        return self.rank if self.conv_rank is None else self.conv_rank

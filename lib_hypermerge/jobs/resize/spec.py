"""The parameters of resize. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ...errors import SpecError
from ..checkpoint_formats import KEEP
from ..convert_spec import DIFFUSERS, KOHYA, PEFT
from ..rank_rule import FIXED, RULES, TARGET_HELP, check_rule
from ..rank_rule import SIZE as SIZE
from ..spec import (
    CHECKPOINT,
    CHOICE,
    FLAG,
    INTEGER,
    INTEGERS,
    LORA_FILES,
    NUMBER,
    OUTPUT,
    TEXT,
    Spec,
    param,
)

SVD, RSVD, RANDOM, SPARSE = "svd", "rsvd", "random", "sparse"
METHODS = (
    (SVD, "the best there is, from the factors' small core"),
    (RSVD, "randomised SVD, close to it (Halko, Martinsson and Tropp 2011)"),
    (RANDOM, "projection on random directions: far off, for comparison"),
    (SPARSE, "the same with sparse ones (Li, Hastie and Church 2006)"),
)
NAME, RANK = "{name}", "{rank}"
MOST_RANKS = 16
REFIT, PLAIN = "keep", "lora"


@dataclass(frozen=True, kw_only=True)
class ResizeSpec(Spec):
    """LoRAs with fewer directions, or with more that change nothing yet."""

    verb: ClassVar[str] = "resize"

    loras: tuple[str, ...] = param(
        LORA_FILES, "LoRAs",
        "One or many, of any family. On the command line also folders, and patterns such as 'loras/*.safetensors'.",
        (), optional=True, flag="lora",
    )  # fmt: skip
    pattern: str | None = param(
        TEXT, "All that match", "A folder of the list, or a pattern such as people/*.", None, optional=True,
        placeholder="people/*", chooses=True,
    )  # fmt: skip
    out: str = param(
        OUTPUT, "Name of the result",
        "{name} stands for the LoRA's own name, {rank} for the rank that was asked for (or the target).",
        placeholder="{name}-{rank}",
    )  # fmt: skip
    rank: tuple[int, ...] = param(
        INTEGERS, "Rank", "Directions kept per layer, under the rule fixed. Several, such as 64,32,8: a file each.",
        (32,), bounds=(1, 4096),
    )  # fmt: skip
    conv_rank: int | None = param(
        INTEGER, "Rank of 3×3 convolutions", "Empty: as the rank. Under the other rules it is the most they get.", None,
        bounds=(1, 4096), optional=True, placeholder="as above",
    )  # fmt: skip
    rank_rule: str = param(CHOICE, "Rank rule", "How the rank of each layer is chosen.", FIXED, choices=RULES)
    rank_target: float | None = param(NUMBER, "Target of the rank rule", TARGET_HELP, None, optional=True)
    fill: bool = param(
        FLAG, "Fill up lower ranks",
        "Every module gets exactly the rank, by directions that change nothing: for further training, and for "
        "compiled inference, which wants one rank everywhere.", False,
    )  # fmt: skip
    method: str = param(CHOICE, "Method", "How directions are chosen.", SVD, choices=METHODS, advanced=True)
    checkpoint: str | None = param(
        CHECKPOINT, "Checkpoint",
        "The base model, needed where the change depends on its weights: DoRA, OFT, IA3, GLoRA.", None, optional=True,
    )  # fmt: skip
    dora: str = param(
        CHOICE, "DoRA", "What becomes of magnitudes.", REFIT, advanced=True,
        choices=((REFIT, "stays DoRA, magnitudes fitted anew"), (PLAIN, "becomes a plain LoRA")),
    )  # fmt: skip
    to: str = param(
        CHOICE, "Dialect", "How the result names its layers.", KEEP, advanced=True,
        choices=(
            (KEEP, "as it is"), (KOHYA, "kohya: A1111, Forge, ComfyUI"), (DIFFUSERS, "diffusers"),
            (PEFT, "PEFT: a folder"),
        ),
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format", "Of the result.", KEEP, advanced=True,
        choices=((KEEP, "as stored"), ("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float")),
    )  # fmt: skip
    min_rank: int = param(INTEGER, "Least rank", "No module gets less, but its own.", 1, bounds=(1, 4096),
                          advanced=True)  # fmt: skip
    max_rank: int | None = param(
        INTEGER, "Largest rank", "No layer gets more. Empty: what it has.", None, bounds=(1, 4096), advanced=True,
        optional=True, placeholder="no limit",
    )  # fmt: skip
    seed: int = param(INTEGER, "Seed", "Of random directions; the same seed gives the same file.", 0,
                      bounds=(0, 2**63 - 1), advanced=True)  # fmt: skip
    overwrite: bool = param(FLAG, "Overwrite", "Replace existing files of these names.", False)
    preview: bool = param(
        FLAG, "Preview", "Compute and measure everything, by all methods, and write nothing.", False, flag="dry-run"
    )  # fmt: skip

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """A name for the result after what goes into it; "" as long as nothing is chosen."""
        loras, ranks = values.get("loras") or (), values.get("rank") or ()
        rule = values.get("rank_rule") or FIXED
        if not loras and not values.get("pattern"):
            return ""
        if len(loras) != 1 or values.get("pattern"):
            return f"{NAME}-{RANK}"
        stem = PurePath(loras[0]).stem
        return f"{stem}-{ranks[0]}" if rule == FIXED and len(ranks) == 1 else f"{stem}-{RANK}"

    def check(self) -> None:
        if not self.loras and not self.pattern:
            raise SpecError("No LoRA was named.", hint=self.params()["loras"].help)
        self._check_rule()
        if self.max_rank is not None and self.max_rank < self.min_rank:
            raise SpecError(f"The largest rank {self.max_rank} is below the least rank {self.min_rank}.")
        if self.method in (RANDOM, SPARSE) and self.rank_rule != FIXED:
            raise SpecError(
                f"The rank rule {self.rank_rule!r} goes by singular values, which random directions do not have.",
                hint="Choose the rule fixed, or another method.",
            )
        if self.fill and self.rank_rule != FIXED:
            raise SpecError(
                "Ranks are filled up to the one that is asked for, and the rule does not ask for one.",
                hint="Choose the rule fixed; a file made by another rule can be filled up afterwards.",
            )
        if self.preview and self.overwrite:
            raise SpecError("A preview writes nothing that could be overwritten.", hint="Leave one of the two out.")

    def _check_rule(self) -> None:
        check_rule(self.rank_rule, self.rank_target)
        if len(set(self.rank)) < len(self.rank):
            raise SpecError("A rank was given twice.", f"Got {', '.join(map(str, self.rank))}.")
        if len(self.rank) > 1 and self.rank_rule != FIXED:
            raise SpecError(
                "Several ranks were given, and a rank rule that chooses them itself.", hint="Leave one of the two out."
            )
        if len(self.rank) > MOST_RANKS:
            raise SpecError(f"More than {MOST_RANKS} ranks were given.", f"Got {len(self.rank)}.")

    @property
    def rungs(self) -> tuple[int, ...]:
        """The ranks asked for, one for each file; (0,) where the rule chooses."""
        return self.rank if self.rank_rule == FIXED else (0,)

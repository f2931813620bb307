"""The parameters of combine. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ...algebra.merging.methods import DENSITY, ENERGY, METHODS, Method
from ...errors import MissingError, SpecError
from ..spec import (
    CHECKPOINT,
    CHOICE,
    FLAG,
    INTEGER,
    LORAS,
    NUMBER,
    OUTPUT,
    PROMPT,
    TEXT,
    Spec,
    WeightedLora,
    param,
)
from . import prompt as prompts

LINEAR = "linear"
USUAL_DENSITY = 0.5
_PAPER = re.compile(r"arXiv [\d.]+")
_IN_A_NAME = 3  # LoRAs, beyond which the result's name counts the others


def _meaning(method: Method) -> str:
    papers = ", ".join(_PAPER.findall(method.source))
    return f"{method.title} ({papers})" if papers else method.title


@dataclass(frozen=True, kw_only=True)
class CombineSpec(Spec):
    """One LoRA that shows what the prompt with several would show."""

    verb: ClassVar[str] = "combine"

    prompt: str | None = param(
        PROMPT, "Prompt", "LoRAs and weights as a prompt has them; other text is passed over.", None, optional=True,
        placeholder="<lora:one:0.7><lora:two:-0.3:0.1>", chooses=True,
    )  # fmt: skip
    loras: tuple[WeightedLora, ...] = param(
        LORAS, "LoRAs",
        "Any number, of any family, rank and dialect, each with a weight as in a prompt; text encoders take the weight "
        "too, or one of their own.",
        (), flag="lora", optional=True,
    )  # fmt: skip
    lora_dir: str | None = param(
        TEXT, "Folder of LoRAs", "Where the names in a prompt are looked for. Empty: the present one.", None,
        optional=True, paths_only=True,
    )  # fmt: skip
    out: str = param(OUTPUT, "Name of the LoRA", "The new file's name, without a folder.", placeholder="my-mix")
    checkpoint: str | None = param(
        CHECKPOINT, "Checkpoint",
        "The base model, needed where a change depends on its weights: DoRA, OFT, IA3, GLoRA, SVDiff.", None,
        optional=True,
    )  # fmt: skip
    rank: int | None = param(
        INTEGER, "Rank",
        "Directions kept per layer. Empty: exactly, or as many as all LoRAs have together where the method gives more.",
        None, bounds=(1, 4096), optional=True, placeholder="exact",
    )  # fmt: skip
    energy: float | None = param(
        NUMBER, "Retained energy", "Instead of a rank: the share of each layer's squared change to keep.", None,
        bounds=(1e-6, 1.0), optional=True, placeholder="0.99",
    )  # fmt: skip
    size: float | None = param(
        NUMBER, "Size, MiB", "Instead of a rank: a file of this size, ranks allotted over all layers at once.", None,
        bounds=(0.01, 1e9), optional=True,
    )  # fmt: skip
    method: str = param(
        CHOICE, "Method", "How several changes of a layer become one.", LINEAR,
        choices=tuple((method.id, _meaning(method)) for method in METHODS.values()),
    )  # fmt: skip
    density: float | None = param(
        NUMBER, "Density",
        "Share of the entries that TIES, DARE, DELLA, KnOTS and Breadcrumbs keep of each LoRA.", None,
        bounds=(1e-6, 1.0), optional=True, advanced=True, placeholder=f"{USUAL_DENSITY:g}",
    )  # fmt: skip
    directions: float | None = param(
        NUMBER, "Main directions",
        "For TSV, Iso-C, without and shared: only the directions that make up this share of each LoRA's squared "
        "change. Empty: all.",
        None, bounds=(1e-6, 1.0), optional=True, advanced=True, placeholder="all",
    )  # fmt: skip
    seed: int = param(INTEGER, "Seed", "The same seed gives the same file.", 0, bounds=(0, 2**63 - 1), advanced=True)
    dtype: str = param(
        CHOICE, "Number format", "fp16 is what everything loads.", "fp16", advanced=True,
        choices=(("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float, twice the size")),
    )  # fmt: skip
    preview: bool = param(
        FLAG, "Preview", "Compute and measure everything, how alike the LoRAs are first; write nothing.", False,
        advanced=True, flag="dry-run",
    )  # fmt: skip
    overwrite: bool = param(FLAG, "Overwrite", "Replace an existing file of that name.", False)

    @property
    def way(self) -> Method:
        """The row of the table of methods."""
        return METHODS[self.method]

    @property
    def told(self) -> str:
        """The method in words, with its source."""
        source = f" ({self.way.source})" if self.way.source else ""
        return f"{self.way.title}{source}. {self.way.advice}"

    @property
    def cuts(self) -> bool:
        """Whether the result is to be of a rank, an energy or a size."""
        return any(goal is not None for goal in (self.rank, self.energy, self.size))

    def check(self) -> None:
        read = prompts.read(self.prompt) if self.prompt is not None else None
        count = len(self.loras) + (len(read.loras) if read else 0)
        if not count:
            raise MissingError("No LoRA was named.", hint="Choose one, or paste a prompt such as <lora:one:0.7>.")
        if self.way.first_is_special and count < 2:
            raise MissingError(
                f"{self.way.title}: there is only one LoRA.", hint="Name the first, and one or more others."
            )
        goals = [name for name in ("rank", "energy", "size") if getattr(self, name) is not None]
        if len(goals) > 1:
            raise SpecError(f"Both {goals[0]} and {goals[1]} were given.", hint="Choose one of them.")
        for name, use in (("density", DENSITY), ("directions", ENERGY)):
            if getattr(self, name) is not None and use not in self.way.uses:
                heed = ", ".join(method.id for method in METHODS.values() if use in method.uses)
                raise SpecError(
                    f"The method {self.method!r} has no use for {name!r}.", f"These have: {heed}.", "Leave it out."
                )

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """A name for the result after what goes into it; "" as long as nothing is chosen."""
        names = [lora.get("lora") for lora in values.get("loras") or ()]
        if values.get("prompt"):
            names += [lora.name for lora in prompts.read(values["prompt"]).loras]
        stems = list(dict.fromkeys(PurePath(name).stem for name in names if name))
        more = [f"{len(stems) - _IN_A_NAME + 1}-more"] if len(stems) > _IN_A_NAME else []
        shown = stems[: _IN_A_NAME - 1] if more else stems
        return "-".join([*shown, *more]) + ("-weighted" if len(stems) == 1 else "")

"""The parameters of inspect. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .spec import CHECKPOINT, CHOICE, FILES, FLAG, Spec, param

SIMILARITY = (
    ("auto", "of two or more files: LoRAs exactly, checkpoints by a sample of their values"),
    ("full", "the same, over every value of the checkpoints"),
    ("none", "no comparison"),
)


@dataclass(frozen=True)
class InspectSpec(Spec):
    """What is in model files of any kind, and how like each other they are."""

    verb: ClassVar[str] = "inspect"

    files: tuple[str, ...] = param(
        FILES, "Files", "Model files of any kind; several checkpoints or LoRAs are also compared with each other."
    )
    norms: bool = param(
        FLAG, "Norms", "How much a LoRA changes each block, and whether there is NaN or Inf: reads all of it.", False
    )
    spectra: bool = param(
        FLAG, "Spectra", "The norms, and the singular values of each layer's change.", False
    )  # fmt: skip
    hashes: bool = param(
        FLAG, "Hashes", "SHA-256 of the file and of its data, and whether the stored one is right.", False
    )
    duplicates: bool = param(
        FLAG, "Duplicates", "Look for files of the same data among these and all in the list.", False
    )
    similarity: str = param(CHOICE, "Similarity", "How two or more files are compared.", "auto", choices=SIMILARITY)
    base: str | None = param(
        CHECKPOINT, "Base checkpoint",
        "Checkpoints are compared by what they change in it; DoRA, OFT, IA3, GLoRA, SVDiff are measured on it.", None,
        optional=True, advanced=True,
    )  # fmt: skip

    @property
    def measures(self) -> bool:
        """Whether the numbers of single files are read."""
        return self.norms or self.spectra

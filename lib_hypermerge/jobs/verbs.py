"""The list of jobs. A new verb is one row here and one module with make_plan and run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from ..errors import SpecError
from .combine.spec import CombineSpec
from .convert_spec import ConvertSpec
from .extract_spec import ExtractSpec
from .hyper.fit_spec import FitSpec
from .hyper.restore_spec import RestoreSpec
from .hyper.spec import HyperSpec
from .inspect_spec import InspectSpec
from .merge_spec import MergeSpec
from .resize.spec import ResizeSpec
from .spec import Spec
from .transfer.spec import TransferSpec


@dataclass(frozen=True)
class Verb:
    """title and help are what a person reads; module is imported when the job is planned (it needs torch)."""

    id: str
    title: str
    help: str
    spec: type[Spec]
    module_name: str

    def load(self) -> ModuleType:
        return import_module(self.module_name, __package__)


VERBS = {
    "extract": Verb("extract", "Extract", "A LoRA from a fine-tuned checkpoint and its base.", ExtractSpec, ".extract"),
    "merge": Verb("merge", "Merge", "LoRAs of any kind into a checkpoint.", MergeSpec, ".merge"),
    "combine": Verb(
        "combine", "Combine", "Several LoRAs with weights, or those of a prompt, as one LoRA.", CombineSpec,
        ".combine.job",
    ),
    "resize": Verb(
        "resize", "Resize", "LoRAs with fewer directions, or with room for more; many at once.", ResizeSpec,
        ".resize.job",
    ),
    "transfer": Verb(
        "transfer", "Transfer", "LoRAs of one base checkpoint for another, related one.", TransferSpec, ".transfer.job",
    ),
    "convert": Verb(
        "convert", "Convert", "A LoRA in another dialect or family, a checkpoint in another number format.",
        ConvertSpec, ".convert",
    ),
    "hyper": Verb(
        "hyper", "Hyper-Merge", "Several checkpoints become one hyper-model, a few LoRAs, and multipliers for each.",
        HyperSpec, ".hyper.job",
    ),
    "fit": Verb("fit", "Fit", "Multipliers of a hyper-model's LoRAs for a checkpoint that was not merged.", FitSpec,
                ".hyper.fit"),
    "restore": Verb(
        "restore", "Restore", "A model of a hyper-merge, or a blend of them, as a checkpoint or as one LoRA.",
        RestoreSpec, ".hyper.restore",
    ),
    "inspect": Verb("inspect", "Inspect", "What model files are, and how alike.", InspectSpec, ".inspect"),
}  # fmt: skip


def find_verb(name: object) -> Verb:
    """The verb of that name, or a SpecError that lists all."""
    if not isinstance(name, str) or name not in VERBS:
        raise SpecError(f"There is no job {name!r}.", hint=f"There are: {', '.join(VERBS)}.")
    return VERBS[name]

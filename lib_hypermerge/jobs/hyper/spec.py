"""The parameters of hyper. Free of torch, so that a mistyped flag is answered at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, ClassVar

from ...errors import SpecError
from ..checkpoint_formats import KEEP
from ..spec import CHECKPOINT, CHOICE, FILES, FLAG, INTEGER, NUMBER, OUTPUT, TEXT, Spec, param

JOINT, GREEDY, DIRECTIONS = "joint", "greedy", "directions"
UNIFORM, LAYERS = "uniform", "layers"
PLAIN, RELATIVE, COMPONENT = "plain", "relative", "component"
LORAS, CONTAINER, BOTH = "loras", "container", "both"
NONE, NORMS, ALL = "none", "norms", "all"
FULL = "full"
MOST_LORAS = 16


@dataclass(frozen=True)
class HyperSpec(Spec):
    """One hyper-model and K LoRAs that give back M checkpoints, each by its own multipliers."""

    verb: ClassVar[str] = "hyper"
    numbered: ClassVar[str] = "{}{}"  # a second one of a name; NAME-2 is a LoRA

    models: tuple[str, ...] = param(
        FILES, "Models", "Two or more checkpoints of one family. With a base, LoRA files of any kind too.",
        flag="model", fewest=2,
    )  # fmt: skip
    name: str = param(
        OUTPUT, "Name", "Of the hyper-model; the LoRAs are called NAME-1, NAME-2 …", placeholder="my-family",
        target="checkpoint",
    )  # fmt: skip
    base: str | None = param(
        CHECKPOINT, "Base",
        "Empty: the hyper-model is the models' mean. A checkpoint: it stays as it is, and the LoRAs start from it.",
        None, optional=True,
    )  # fmt: skip
    ranks: str = param(
        TEXT, "Ranks of the LoRAs",
        "One number for each LoRA, such as 128,64,32,16. full,full: no limit, the LoRAs are whole matrices.",
        "64,32", placeholder="128,64,32,16",
    )  # fmt: skip
    size: float | None = param(
        NUMBER, "Size of all LoRAs together, MiB", "Instead of ranks: they are planned for this size.", None,
        bounds=(0.01, None), optional=True,
    )  # fmt: skip
    count: int | None = param(
        INTEGER, "Number of LoRAs", "With a size. Empty: as many as serve the models best.", None,
        bounds=(1, MOST_LORAS), optional=True,
    )  # fmt: skip
    out_dir: str | None = param(
        TEXT,
        "Folder",
        "Where all files go. Empty: the present one.",
        None,
        optional=True,
        advanced=True,
        paths_only=True,
    )
    allocation: str = param(
        CHOICE, "Ranks of the layers",
        "At equal size. Uneven ranks miss less of the weights; pictures hardly show it.", UNIFORM,
        choices=((UNIFORM, "a LoRA has one rank in all layers"), (LAYERS, "more where it matters more")),
    )  # fmt: skip
    solver: str = param(
        CHOICE, "Solver", "joint is never worse than greedy.", JOINT, advanced=True,
        choices=(
            (JOINT, "all LoRAs and multipliers together"), (GREEDY, "one LoRA after another, as published"),
            (DIRECTIONS, "main directions of the models, cut to rank"),
        ),
    )  # fmt: skip
    separate_te: bool = param(
        FLAG, "Multipliers of their own for text encoders",
        "Comes closer, above all where some models change text encoders and others do not; a prompt then has two "
        "numbers a LoRA. One number where no text encoder changes.", True,
    )  # fmt: skip
    dtype: str = param(
        CHOICE, "Number format of the LoRAs", "fp16 is what everything loads.", "fp16", advanced=True,
        choices=(("fp16", "16-bit float"), ("bf16", "bfloat16"), ("fp32", "32-bit float, twice the size")),
    )  # fmt: skip
    model_dtype: str = param(
        CHOICE, "Number format of the hyper-model", "Of all its weights.", KEEP, advanced=True,
        choices=(
            (KEEP, "as in the first model, or the base"), ("fp16", "16-bit float"), ("bf16", "bfloat16"),
            ("fp32", "32-bit float"),
        ),
    )  # fmt: skip
    weights: str | None = param(
        TEXT, "Weights of the mean", "One number for each model, such as 2,1,1. Empty: all count alike.", None,
        optional=True, advanced=True,
    )  # fmt: skip
    layer_weights: str = param(
        CHOICE, "What counts", "How much a layer's error matters.", PLAIN, advanced=True,
        choices=(
            (PLAIN, "every number alike"), (RELATIVE, "every layer by its size: small layers count as much"),
            (COMPONENT, "UNet and text encoders as much as each other"),
        ),
    )  # fmt: skip
    rest_from: str | None = param(
        CHECKPOINT, "Norms, biases and embeddings from", "Empty: the models' mean. Or one of the models.", None,
        optional=True, advanced=True,
    )  # fmt: skip
    vae_from: str | None = param(
        CHECKPOINT, "VAE from", "Empty: the models' mean, or the first model's where they differ much.", None,
        optional=True, advanced=True,
    )  # fmt: skip
    remainders: str = param(
        CHOICE, "Remainder files", "One small file per model with what no shared LoRA carries.", NONE, advanced=True,
        choices=(
            (NONE, "none"), (NORMS, "norms: A1111, Forge, ComfyUI load them"), (ALL, "biases too: Forge and ComfyUI"),
        ),
    )  # fmt: skip
    form: str = param(
        CHOICE, "Form", "A container gives any model's LoRA on demand, by Restore.", LORAS, advanced=True,
        choices=(
            (LORAS, "LoRAs for prompts"), (CONTAINER, "one container of shared bases and small cores"),
            (BOTH, "both"),
        ),
    )  # fmt: skip
    loras_only: bool = param(
        FLAG, "LoRAs only", "With a base: no hyper-model is written, the base takes its place.", False, advanced=True
    )
    compare: bool = param(
        FLAG, "Compare with other ways",
        "At the same size: own LoRAs, the published way, a container. A preview always does.", False, advanced=True,
    )  # fmt: skip
    starts: int = param(
        INTEGER, "Starts", "Random starts that the solver tries; the best result is kept.", 3, bounds=(1, 100),
        advanced=True,
    )  # fmt: skip
    tolerance: float = param(
        NUMBER, "Stop below", "Relative change of the loss in one iteration.", 1e-4, bounds=(0, 0.1), advanced=True
    )
    iterations: int = param(INTEGER, "Most iterations", "Of one start.", 200, bounds=(1, 10000), advanced=True)
    device: str = param(
        CHOICE, "Device", "auto: the graphics card if there is one.", "auto", advanced=True,
        choices=(("auto", "best there is"), ("cpu", "processor"), ("cuda", "NVIDIA or AMD card"), ("mps", "Apple")),
    )  # fmt: skip
    seed: int = param(INTEGER, "Seed", "The same seed gives the same files.", 0, bounds=(0, 2**63 - 1), advanced=True)
    preview: bool = param(
        FLAG, "Preview", "Compute and measure everything, write nothing.", False, advanced=True, flag="dry-run"
    )
    overwrite: bool = param(FLAG, "Overwrite", "Replace existing files of these names.", False)

    @staticmethod
    def suggest_name(values: dict[str, Any]) -> str:
        """After the first model; "" as long as there are not two."""
        models = values.get("models") or ()
        return f"{PurePath(models[0]).stem}-hyper" if len(models) > 1 else ""

    def check(self) -> None:
        if len(self.models) < 2:
            raise SpecError(
                "Hyper-Merge needs two or more models.", "One alone has nothing to share.",
                "Add a model, or use Extract for one model and its base.",
            )  # fmt: skip
        ranks_of(self.ranks)
        weights_of(self.weights, len(self.models))
        if self.base is not None and self.weights is not None:
            raise SpecError("With a base there is no mean to weigh.", hint="Leave out the weights, or the base.")
        if self.base is None and self.loras_only:
            raise SpecError("Without a base, the LoRAs need their hyper-model.", hint="Name a base, or write all.")
        if self.count is not None and self.size is None:
            raise SpecError("A number of LoRAs is used with a size only.", hint="Give their ranks, or a size.")
        if self.form != LORAS and ranks_of(self.ranks) == () and self.size is None:
            raise SpecError("A container needs a size: that of ranks, or in MiB.", hint="Give ranks as numbers.")
        if self.solver == DIRECTIONS and self.allocation == LAYERS:
            raise SpecError("Plain directions have one rank in all layers.", hint="Choose the joint solver.")


def ranks_of(text: str) -> tuple[int, ...]:
    """The ranks of a text such as "128,64,32,16"; empty for "full,full", see full_count. SpecError if it is none."""
    items = _items(text)
    if all(item == FULL for item in items) and len(items) <= MOST_LORAS:
        return ()
    try:
        ranks = tuple(int(item) for item in items)
    except ValueError:
        raise SpecError(f"{text!r} is no list of ranks.", hint="Give whole numbers such as 128,64,32,16.") from None
    if not all(1 <= rank <= 4096 for rank in ranks):
        raise SpecError("A rank must be between 1 and 4096.", f"Got {text}.")
    if len(ranks) > MOST_LORAS:
        raise SpecError(f"At most {MOST_LORAS} LoRAs.", f"Got {len(ranks)} ranks.")
    return ranks


def full_count(text: str) -> int:
    """How many LoRAs without limit a text such as "full,full" asks for; 0 if it lists ranks."""
    return 0 if ranks_of(text) else len(_items(text))


def _items(text: str) -> list[str]:
    """A comma at the end is of a list that is being typed."""
    return [item.strip() for item in text.strip().removesuffix(",").split(",")]


def weights_of(text: str | None, models: int) -> tuple[float, ...] | None:
    """The weights of the mean, of sum 1; None where all count alike. SpecError if they are none."""
    if text is None:
        return None
    try:
        weights = [float(item) for item in text.split(",")]
    except ValueError:
        raise SpecError(f"{text!r} is no list of weights.", hint="Give a number for each model: 2,1,1.") from None
    total = sum(weights)
    if len(weights) != models or not all(0 <= w < float("inf") for w in weights) or total <= 0:
        raise SpecError(
            f"The {models} models need {models} weights of 0 or more, not all 0.", f"Got {text}.",
            "Give a number for each model: 2,1,1.",
        )  # fmt: skip
    return tuple(w / total for w in weights)

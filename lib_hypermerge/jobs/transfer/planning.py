"""Make the plan of a transfer: open everything, and refuse what headers show to be wrong. How alike the models are is
known only when their numbers are read."""

from __future__ import annotations

from pathlib import Path

from ...errors import LayoutError, SpecError, UnchangedError
from ...files.writer import check_room, check_target
from ...layouts.adapter_file import Entry, Target
from ...layouts.dialects import parts
from ...layouts.module import LORA_KINDS, Model
from ...layouts.opening import open_checkpoint
from ..adapter_inputs import LoraInput, open_lora
from ..host import Host
from ..outputs import refuse_inputs
from ..resize.naming import MOST_FILES
from .pairing import PLACE, Choice, Chosen
from .plan import TransferPlan, key_of
from .relation import refuse_unknown
from .spec import CROSS, NAME, TransferSpec

_MARKERS = {"v_pred": "v-prediction", "ztsnr": "zero terminal SNR"}


def make_plan(spec: TransferSpec, host: Host) -> TransferPlan:
    """Open everything and check it. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError."""
    source = open_checkpoint(host.resolve_checkpoint(spec.source_base))
    try:
        target = open_checkpoint(host.resolve_checkpoint(spec.target_base))
    except BaseException:
        source.file.close()
        raise
    plan = TransferPlan(spec, source, target)
    try:
        _refuse_models(source, target)
        for path in _paths(spec, host):
            plan.loras.append(open_lora(path, source))
        plan.outputs = [host.lora_output(spec.out.replace(NAME, _stem(lora.path))) for lora in plan.loras]
        _refuse_names(plan, host)
        plan.uses = [_uses(lora) for lora in plan.loras]
        plan.layout = plan.lay_out(lambda choice: _foreseen(plan, choice))
        _refuse_nothing(plan)
        refuse_unknown(plan)
        _gather_warnings(plan)
        if not spec.preview:
            sizes = [plan.bytes_of(i) for i in range(len(plan.loras))]
            for path, size in zip(plan.outputs, sizes, strict=True):
                check_target(path, size, spec.overwrite)
            check_room(plan.outputs[0].parent, "the new LoRAs", sum(sizes))
    except BaseException:
        plan.close()
        raise
    return plan


def _paths(spec: TransferSpec, host: Host) -> list[Path]:
    """Every LoRA that was named, or that a folder or pattern takes in, once."""
    found: dict[str, Path] = {}
    for name in spec.loras:
        found |= host.find_loras(name) or {name: host.resolve_lora(name)}
    if len(found) > MOST_FILES:
        raise SpecError(
            f"{len(found)} LoRAs are too many at once.", f"At most {MOST_FILES} are, as all files appear together.",
            "Do it in parts.",
        )  # fmt: skip
    spec.check_names(len(found))
    return list(found.values())


def _refuse_models(source: Model, target: Model) -> None:
    names = source.file.path.name, target.file.path.name
    if source.architecture is not target.architecture:
        raise LayoutError(
            "The two bases are of different architectures.",
            f"{names[0]} is {source.title}, {names[1]} is {target.title}; their layers do not correspond.",
            "Transfer works between relatives: a fine-tuned, distilled or pruned model and what it came from.",
        )
    if source.file.is_same(target.file):
        raise UnchangedError("Both bases are the same file.", "The LoRA works with it as it is.", "Choose two models.")


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _refuse_names(plan: TransferPlan, host: Host) -> None:
    inputs = [plan.source.file.path, plan.target.file.path, *(lora.path for lora in plan.loras)]
    seen: dict[str, int] = {}
    for number, path in enumerate(plan.outputs):
        other = seen.setdefault(str(path).casefold(), number)
        if other != number:
            raise SpecError(
                f"Two of the new LoRAs would be called {path.name}.",
                f"They come from {plan.loras[other].path} and {plan.loras[number].path}.", "Transfer them one by one.",
            )  # fmt: skip
        refuse_inputs(path, inputs, host)


def _uses(lora: LoraInput) -> dict[str, list[tuple[Entry, Target]]]:
    found: dict[str, list[tuple[Entry, Target]]] = {}
    for entry, target in lora.resolution.targets:
        if entry.key not in lora.idle:
            found.setdefault(key_of(target.module), []).append((entry, target))
    return found


def _foreseen(plan: TransferPlan, choice: Choice) -> Chosen:
    """Before anything is read, by order; the choice is noted."""
    from ...algebra.transfer.order import spread

    plan.choices.append(choice)
    return Chosen(spread(len(choice.target), len(choice.source)), PLACE)


def changes_nothing(lora: LoraInput) -> UnchangedError:
    """The error for a LoRA whose modules are all zero."""
    return UnchangedError(
        f"{lora.path.name} changes nothing.", "All that it has for these models is zero, or has the alpha 0.",
        "Choose another LoRA.",
    )  # fmt: skip


def _refuse_nothing(plan: TransferPlan) -> None:
    layers = [task for task in plan.layout.tasks if task.partner.target.kind in LORA_KINDS]
    for lora, uses in zip(plan.loras, plan.uses, strict=True):
        if lora.idle and not uses:
            raise changes_nothing(lora)
    if not layers:
        raise LayoutError(
            "The LoRAs change no layer that the target base has.",
            f"They are {', '.join(lora.path.name for lora in plan.loras)}.", "Choose another target.",
        )  # fmt: skip
    if plan.spec.method != CROSS and not any(task.same_size for task in layers):
        task = layers[0].partner
        assert task.source.weight is not None and task.target.weight is not None
        raise LayoutError(
            "No layer has the same size in both bases.",
            f"{key_of(task.target)} is {list(task.source.weight.shape)} in the source and "
            f"{list(task.target.weight.shape)} in the target.",
            "Only the method cross goes from one size to another.",
        )


def _gather_warnings(plan: TransferPlan) -> None:
    for lora in plan.loras:
        plan.warnings += lora.warnings
        if lora.file.dialect not in (parts.KOHYA, parts.LYCORIS):
            old = lora.file.dialect
            plan.warnings.append(f"{lora.path.name}: its names (those of {old}) become kohya's, in one file.")
        left = len(lora.file.embeddings) - len(plan.embeddings(lora))
        if left:
            plan.warnings.append(
                f"{lora.path.name}: {left} tensors of embeddings are left out: keep the embedding as a file of its own."
            )
    for marker, meaning in _MARKERS.items():
        if (marker in plan.source.file.tensors) != (marker in plan.target.file.tensors):
            which = "source" if marker in plan.source.file.tensors else "target"
            plan.warnings.append(f"Only the {which} base is marked for {meaning}; no LoRA carries that.")
    touched = {key.split(".", 1)[0] for uses in plan.uses for key in uses}
    for component in sorted(touched - plan.target.components.keys()):
        plan.warnings.append(f"{component}: the target base brings none along, so what is for it is left out.")
    if plan.spec.method != CROSS:
        others = sum(not task.same_size for task in plan.layout.tasks)
        if others:
            plan.warnings.append(
                f"{others} layers have another size in the target and are left out; the method cross maps them."
            )

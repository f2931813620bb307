"""Make the plan of a transfer: open everything, and refuse what headers show to be wrong. How alike the models are is
known only when their numbers are read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...errors import HypermergeError, LayoutError, OutputError, SpecError, UnchangedError
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
    """Open everything and check it. Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError; of a
    batch, what concerns one LoRA alone stands in the plan, unless it concerns all of them."""
    paths = _paths(spec, host)
    outputs = _outputs(spec, paths, host)
    source = open_checkpoint(host.resolve_checkpoint(spec.source_base))
    try:
        target = open_checkpoint(host.resolve_checkpoint(spec.target_base))
    except BaseException:
        source.file.close()
        raise
    plan = TransferPlan(spec, source, target)
    try:
        _refuse_models(source, target)
        for path, output in zip(paths, outputs, strict=True):
            with _in_its_row(plan, path, len(paths)):
                _open(plan, path, output, [*paths, source.file.path, target.file.path], host)
        _lay_out(plan)
        problems = [_useless(plan, i) for i in range(len(plan.loras))]
        if any(problems):
            for i in reversed(range(len(problems))):
                with _in_its_row(plan, plan.loras[i].path, len(paths)):
                    _take_out(plan, i, problems[i])
            _lay_out(plan)
        if not plan.loras:
            raise none_left(plan.failed, "can")
        refuse_unknown(plan)
        _gather_warnings(plan)
        if not spec.preview:
            sizes = [plan.bytes_of(i) for i in range(len(plan.loras))]
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


def none_left(failed: Mapping[str, HypermergeError], could: str) -> SpecError:
    """The error for a batch of which nothing came."""
    name, error = next(iter(failed.items()))
    why = f"{name}: {error.what} {error.why}".rstrip()
    return SpecError(f"None of the {len(failed)} LoRAs {could} be transferred.", why, error.hint)


def _outputs(spec: TransferSpec, paths: Sequence[Path], host: Host) -> list[Path]:
    """Where each LoRA's goes. SpecError if two would have one name."""
    outputs = [host.lora_output(spec.out.replace(NAME, path.name if path.is_dir() else path.stem)) for path in paths]
    seen: dict[str, int] = {}
    for number, path in enumerate(outputs):
        other = seen.setdefault(str(path).casefold(), number)
        if other != number:
            raise SpecError(
                f"Two of the new LoRAs would be called {path.name}.",
                f"They come from {paths[other]} and {paths[number]}.", "Transfer them one by one.",
            )  # fmt: skip
    return outputs


@contextlib.contextmanager
def _in_its_row(plan: TransferPlan, path: Path, count: int) -> Iterator[None]:
    """What is wrong with one LoRA of several is noted, and the others go on."""
    try:
        yield
    except OutputError:
        raise
    except HypermergeError as error:
        if count == 1:
            raise
        plan.failed[path.name] = error


def _open(plan: TransferPlan, path: Path, output: Path, inputs: Sequence[Path], host: Host) -> None:
    refuse_inputs(output, list(inputs), host)
    if not plan.spec.preview:
        check_target(output, 0, plan.spec.overwrite)
    lora = open_lora(path, plan.source)
    plan.loras.append(lora)
    plan.outputs.append(output)
    plan.uses.append(_uses(lora))


def _take_out(plan: TransferPlan, number: int, problem: HypermergeError | None) -> None:
    """A LoRA of which nothing can come. Raises the problem."""
    if problem is None:
        return
    plan.loras.pop(number).close()
    del plan.outputs[number], plan.uses[number]
    raise problem


def _lay_out(plan: TransferPlan) -> None:
    plan.choices.clear()
    plan.layout = plan.lay_out(lambda choice: _foreseen(plan, choice))


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


def _useless(plan: TransferPlan, number: int) -> HypermergeError | None:
    """Why nothing can come of a LoRA, if headers tell."""
    lora = plan.loras[number]
    if lora.idle and not plan.uses[number]:
        return changes_nothing(lora)
    tasks = [task for task in plan.layout.tasks if number in task.uses]
    layers = [task for task in tasks if task.partner.target.kind in LORA_KINDS]
    if not layers:
        return LayoutError(
            f"{lora.path.name} changes no layer that the target base has.",
            f"The target is {plan.target.file.path.name}.", "Choose another target.",
        )  # fmt: skip
    if plan.spec.method != CROSS and not any(task.same_size for task in layers):
        task = layers[0].partner
        assert task.source.weight is not None and task.target.weight is not None
        return LayoutError(
            "No layer has the same size in both bases.",
            f"{key_of(task.target)} is {list(task.source.weight.shape)} in the source and "
            f"{list(task.target.weight.shape)} in the target.",
            "Only the method cross goes from one size to another.",
        )
    return None


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

"""Whether two bases are related at all: without that, a LoRA of the one means nothing to the other."""

from __future__ import annotations

from ...errors import LayoutError
from ...layouts.module import LORA_KINDS
from ...words import two_digits
from .plan import Task, TransferPlan

UNRELATED = 0.25  # a mean similarity below it is no relation
SAMPLE = 24  # layers that are looked at first
_STRANGERS = UNRELATED / 2  # a mean over the sample below it is enough to stop
_FEWEST_KNOWN = 0.05  # of the layers: with fewer that can be compared nobody knows
_HINT = "Choose bases of which one came from the other; or force it, and expect little."


def refuse_unknown(plan: TransferPlan) -> None:
    """LayoutError, from headers, where hardly a layer has a side of one size in both models."""
    layers = [task for task in plan.layout.tasks if task.partner.target.kind in LORA_KINDS]
    known = sum(task.is_compared(plan.spec) and _can_be_compared(task) for task in layers)
    if plan.spec.force or known >= _FEWEST_KNOWN * len(layers):
        return
    raise LayoutError(
        f"Nothing tells whether {_names(plan)} are related.",
        f"Of {len(layers)} layers, {known} have a side of one size in both, by which they could be compared.", _HINT,
    )  # fmt: skip


def sample_first(tasks: list[Task]) -> list[Task]:
    """The same layers, some of the smaller ones before all others, so that strangers are soon known."""
    step = max(1, len(tasks) // (2 * SAMPLE))
    sample = tasks[: len(tasks) // 2 : -1][::step][:SAMPLE]
    first = set(map(id, sample))
    return [*sample, *(task for task in tasks if id(task) not in first)]


def refuse_strangers(plan: TransferPlan, similarities: list[float], complete: bool) -> None:
    """LayoutError where the layers that were compared are not alike. complete: whether these are all."""
    if plan.spec.force or not (complete or len(similarities) == SAMPLE):
        return
    mean = sum(similarities) / max(1, len(similarities))
    if mean < (UNRELATED if complete else _STRANGERS):
        which = "their layers" if complete else f"{SAMPLE} of their layers"
        raise LayoutError(
            f"{_names(plan)} are not related.",
            f"The leading directions of {which} have a similarity of {two_digits(mean)} on average, 0 being chance "
            f"and 1 the same; below {UNRELATED:g} a LoRA of the one means nothing to the other.", _HINT,
        )  # fmt: skip


def _can_be_compared(task: Task) -> bool:
    source, target = task.partner.source.matrix_shape, task.partner.target.matrix_shape
    return any(a == b > 1 for a, b in zip(source, target, strict=True))


def _names(plan: TransferPlan) -> str:
    return f"{plan.source.file.path.name} and {plan.target.file.path.name}"

"""Merge and try without saving: the change goes into the model in a WebUI's memory, and can be taken back."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from ..errors import SpecError
from ..files.source import TensorInfo
from ..layouts.module import Model
from .host import Context, Host, ModelInMemory, Part, Spot
from .merge import details_of, merged_weights
from .merge_plan import MergePlan, plan_change
from .merge_spec import KEEP, MergeSpec
from .report import Report
from .spec import Spec
from .verbs import VERBS, Verb

TRY, TAKE_BACK = "try", "take_back"  # the reports' verbs


class TrialHost(Host, Protocol):
    """A host with a model in memory. trial: the change in it at the moment."""

    trial: Trial | None

    def model_in_memory(self) -> ModelInMemory:
        """SpecError if there is none, or if it cannot be changed."""
        ...


@dataclass
class Trial:
    """A change of a model in memory. originals: its tensors as they were, on the CPU, by parameter."""

    model: ModelInMemory
    loras: str
    originals: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What a person is told of it."""
        return f"{self.model.checkpoint.name} in memory is changed by {self.loras}; no file has this change."

    def write(self, spots: list[Spot], first: int, rows: torch.Tensor) -> None:
        """Overwrite rows first… of a checkpoint's tensor; what is overwritten is kept."""
        last = first + len(rows)
        for spot in spots:
            start, stop = max(first, spot.start), min(last, spot.stop)
            if start >= stop:
                continue
            tensors = self.model.tensors(spot.parameter)
            if spot.parameter not in self.originals:
                self.originals[spot.parameter] = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
            new = rows[start - first : stop - first]
            for tensor in tensors:
                place = tensor[start - spot.start : stop - spot.start]
                place.copy_(_as_loaded(new.reshape(place.shape), tensor))

    def take_back(self) -> None:
        """Every tensor as it was, bit for bit. Nothing to do if the model is gone."""
        if not self.model.is_there():
            return
        self.model.settle()
        for parameter, originals in self.originals.items():
            for tensor, original in zip(self.model.tensors(parameter), originals, strict=True):
                tensor.copy_(original)
        self.model.forget_results()


def _as_loaded(rows: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    # hosts come to 8 bits by way of 16
    return rows.half() if tensor.dtype.itemsize == 1 else rows


def current(host: Host) -> Trial | None:
    """The change that is in the host's memory now; None also where the changed model was thrown away."""
    trial = getattr(host, "trial", None)
    return trial if trial is not None and trial.model.is_there() else None


# --- try ------------------------------------------------------------------------------------------------------


@dataclass
class TrialPlan:
    """Holds the merge's files open; use as a context or close() it."""

    merge: MergePlan
    model: ModelInMemory
    spots: dict[str, list[Spot]]

    def __enter__(self) -> TrialPlan:
        return self

    def __exit__(self, *_) -> None:
        self.merge.close()


def make_plan(spec: MergeSpec, host: TrialHost) -> TrialPlan:
    """Open and check everything. Number formats are those of the checkpoint: the WebUI loads it in its own.

    Raises SpecError, FormatError, LayoutError.
    """
    model = host.model_in_memory()
    path = host.resolve_checkpoint(spec.checkpoint)
    if not _same(path, model.checkpoint):
        raise SpecError(
            f"The model in memory is {model.checkpoint.name}, not {path.name}.",
            "Only the model in memory can be changed without saving.",
            f"Load {path.name}, or choose {model.checkpoint.name} here.",
        )
    plan = plan_change(replace(spec, dtype=KEEP, te_dtype=KEEP, vae_dtype=KEEP), host, path)
    try:
        spots = model.spots(_parts(plan.model, plan.steps.keys()))
    except BaseException:
        plan.close()
        raise
    return TrialPlan(plan, model, spots)


def run(plan: TrialPlan, host: TrialHost, context: Context) -> Report:
    """Change the model. If that cannot be done to the end, it is as it was before."""
    context.progress(0.0, "merging")
    loras = ", ".join(f"{item.lora} ({item.weight:g})" for item in plan.merge.spec.loras)
    trial = Trial(plan.model, loras)
    with torch.inference_mode():  # some hosts' parameters were made in it
        earlier = current(host)
        if earlier:
            earlier.take_back()
        host.trial = None
        plan.model.settle()
        try:
            _apply(plan, trial, host, context)
        except BaseException:
            trial.take_back()
            raise
        plan.model.forget_results()
    host.trial = trial
    merge = plan.merge
    return Report(
        TRY, [], None, sum(merge.applied.values()), merge.zeroed.total(), merge.unmatched, list(merge.warnings),
        time.perf_counter() - merge.begun, details_of(merge),
    )  # fmt: skip


def _apply(plan: TrialPlan, trial: Trial, host: Host, context: Context) -> None:
    whole = sum(plan.merge.model.file.tensors[name].numel for name in plan.spots) or 1
    done, rows_of = 0, dict.fromkeys(plan.spots, 0)
    for info, rows in merged_weights(plan.merge, host, context):
        first = rows_of[info.name]
        trial.write(plan.spots[info.name], first, rows)
        rows_of[info.name] = first + len(rows)
        done += rows.numel()
        context.progress(0.99 * done / whole, info.name)


def _parts(model: Model, names: Collection[str]) -> dict[TensorInfo, list[Part]]:
    """What the tensors are of: one module, or q, k and v."""
    whole = {name: model.file.tensors[name] for name in names}
    out: dict[TensorInfo, list[Part]] = {info: [] for info in whole.values()}
    for modules in model.components.values():
        for module in modules.values():
            for info, bias in ((module.weight, False), (module.bias, True)):
                if info is not None and info.name in whole:
                    first = _first_row(info, whole[info.name])
                    out[whole[info.name]].append(Part(module, first, first + info.shape[0], bias))
    return out


def _first_row(info: TensorInfo, whole: TensorInfo) -> int:
    step = whole.rows(1, 1).offset - whole.offset
    return (info.offset - whole.offset) // step


def _same(a: Path, b: Path) -> bool:
    try:
        return a.samefile(b)
    except OSError:
        return False


# --- the two as jobs of a runner ------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoParameters(Spec):
    """Of taking back: there is only one thing to take back."""

    verb: ClassVar[str] = TAKE_BACK


_MERGE = VERBS["merge"]
# of the id "merge", so that the merge panel shows them as its own
TRY_VERB = replace(_MERGE, module_name=".trial")
TAKE_BACK_VERB = Verb(_MERGE.id, _MERGE.title, "The model in memory as it was.", NoParameters, ".untrial")

"""Merge LoRAs into a checkpoint, tensor by tensor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import NumericalError
from ..files.checkpoint_writer import CheckpointWriter, TensorPlan
from ..files.dtypes import torch_dtype
from ..files.source import TensorInfo
from ..files.writer import Written
from .host import Context, Host
from .merge_layers import TensorMerge
from .merge_plan import MergePlan, make_plan
from .merge_spec import MergeSpec
from .report import Output, Report
from .workers import map_in_order, plan_workers

__all__ = ["MergeSpec", "make_plan", "merged_weights", "run"]


def merged_weights(plan: MergePlan, host: Host, context: Context) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """The changed tensors in the file's order, each in the format that is to be written, some rows at a time:
    (the tensor, its next rows). NumericalError if a number is, or becomes, NaN or Inf.
    """
    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)

    def work(piece: tuple[TensorMerge, int, int]) -> tuple[TensorInfo, torch.Tensor | None]:
        merge, start, stop = piece
        return merge.info, merge.rows(start, stop)

    for info, rows in map_in_order(work, _pieces(plan), workers, threads, context.check):
        if rows is None:
            plan.check_unchanged()
            raise _not_finite(plan, info)
        yield info, rows


def _not_finite(plan: MergePlan, info: TensorInfo) -> NumericalError:
    """Which file it comes from, if one has such numbers itself."""
    what = f"{info.name} holds NaN or Inf, or does so once merged."
    parts = [(step.lora.file.file, part) for step in plan.steps[info.name] for part in step.entry.parts.values()]
    for file, tensor in [(plan.model.file, info), *parts]:
        if not file.read(tensor).float().isfinite().all():
            return NumericalError(what, f"{tensor.name} in {file.path.name} is damaged.", "Get a sound copy.")
    return NumericalError(
        what, "Its numbers become too large for the number format.", "Lower the weights, or choose fp32."
    )


def _pieces(plan: MergePlan) -> Iterator[tuple[TensorMerge, int, int]]:
    for info in plan.order:
        if info.name in plan.steps:
            merge = TensorMerge(
                plan.model.file, info, plan.steps[info.name], torch_dtype(plan.tensors[info.name].dtype)
            )
            for start, stop in merge.pieces():
                yield merge, start, stop


def run(plan: MergePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    context.progress(0.0, "merging")
    written = _write(plan, host, context)
    output = Output(str(written.path), written.bytes, written.sha256)
    return Report(
        "merge", [output], None, sum(plan.applied.values()), plan.zeroed.total(), plan.unmatched, list(plan.warnings),
        time.perf_counter() - plan.begun, details_of(plan),
    )  # fmt: skip


def details_of(plan: MergePlan) -> dict[str, Any]:
    """What a report says of what went in, and where to."""
    families: Counter[str] = Counter()
    for lora in plan.loras:
        families.update(lora.counts)
    return {
        "architecture": plan.model.title,
        "components": dict(plan.applied),
        "families": dict(families),
        "loras": [_lora_json(lora) for lora in plan.loras],
        "changed_tensors": len(plan.steps),
        "carried_tensors": len(plan.tensors) - len(plan.steps),
        "skipped_because": dict(plan.zeroed),
        "unreachable_tensors": [key for lora in plan.loras for key in lora.resolution.unmatched][:50],
        "checkpoint": plan.output.name,
        "device": "cpu",
    }


def _lora_json(lora) -> dict:
    return {
        "name": lora.path.name, "dialect": lora.file.dialect, "families": lora.counts,
        "modules": len(lora.resolution.targets), "unmatched": len(lora.resolution.unmatched),
        "unknown": len(lora.file.unknown),
    }  # fmt: skip


def _write(plan: MergePlan, host: Host, context: Context) -> Written:
    file, done, whole = plan.model.file, 0, sum(tensor.nbytes for tensor in plan.tensors.values()) or 1
    merged = merged_weights(plan, host, context)
    with CheckpointWriter(plan.output, plan.tensors, plan.metadata, plan.spec.overwrite) as writer:
        for info in plan.order:
            planned = plan.tensors[info.name]
            if info.name in plan.steps:
                _add(writer, info, planned, merged)
            elif planned.dtype == info.dtype:
                writer.copy(info.name, file, info)
            else:
                writer.add(info.name, _converted(file.read(info), torch_dtype(planned.dtype), info.name))
            done += planned.nbytes
            context.progress(0.99 * done / whole, info.name)
        plan.check_unchanged()
        context.progress(0.99, "saving")
        return writer.commit()


def _add(writer: CheckpointWriter, info: TensorInfo, planned: TensorPlan, merged: Iterator) -> None:
    """Take pieces from the stream until the tensor is whole."""
    writer.begin(info.name, planned)
    missing = planned.nbytes
    while missing > 0:
        rows = next(merged)[1]
        writer.more(rows)
        missing -= rows.nbytes


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    out = tensor.to(dtype)
    if not out.float().isfinite().all() and tensor.float().isfinite().all():
        raise NumericalError(
            f"{name} does not fit the number format {str(dtype).removeprefix('torch.')}.",
            "Its largest numbers overflow.",
            "Choose another format.",
        )
    return out

"""Merge LoRAs into a checkpoint, tensor by tensor."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import torch

from ..errors import NumericalError
from ..files.checkpoint_writer import CheckpointWriter
from ..files.dtypes import torch_dtype
from ..files.source import TensorInfo
from ..files.writer import Written
from .host import Context, Host
from .merge_layers import merge_tensor
from .merge_plan import MergePlan, make_plan
from .merge_spec import MergeSpec
from .report import Output, Report
from .workers import map_in_order, plan_workers

__all__ = ["MergeSpec", "make_plan", "merged_weights", "run"]

_MIB = 1 << 20


def merged_weights(plan: MergePlan, host: Host, context: Context) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
    """The changed tensors in the file's order, each in the format that is to be written.

    NumericalError if a number is, or becomes, NaN or Inf.
    """
    changed = [info for info in plan.order if info.name in plan.steps]
    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)

    def work(info: TensorInfo) -> torch.Tensor | None:
        return merge_tensor(plan.model.file, info, plan.steps[info.name], torch_dtype(plan.tensors[info.name].dtype))

    results = map_in_order(work, changed, workers, threads, context.check)
    for info, tensor in zip(changed, results, strict=True):
        if tensor is None:
            plan.model.file.check_unchanged()
            raise NumericalError(
                f"{info.name} holds NaN or Inf, or does so once merged.",
                "A file is damaged, or a weight is too large for the number format.",
                "Get sound copies, lower the weights, or choose fp32.",
            )
        yield info, tensor


def run(plan: MergePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    context.progress(0.0, "merging")
    written = _write(plan, host, context)
    warnings = list(plan.warnings)
    families: Counter[str] = Counter()
    for lora in plan.loras:
        families += lora.families
    details = {
        "architecture": plan.model.title,
        "components": dict(plan.applied),
        "families": dict(families),
        "loras": [_lora_json(lora) for lora in plan.loras],
        "changed_tensors": len(plan.steps),
        "carried_tensors": len(plan.tensors) - len(plan.steps),
        "skipped_because": {"weight 0": plan.zeroed},
        "unreachable_tensors": [key for lora in plan.loras for key in lora.resolution.unmatched][:50],
        "checkpoint": plan.output.name,
        "device": "cpu",
    }
    return Report(
        "merge", [Output(str(written.path), written.bytes, written.sha256)], None, sum(plan.applied.values()),
        plan.zeroed, plan.unmatched, warnings, time.perf_counter() - plan.begun, details,
    )  # fmt: skip


def _lora_json(lora) -> dict:
    return {
        "name": lora.file.file.path.name, "dialect": lora.file.dialect, "families": dict(lora.families),
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
                writer.add(info.name, next(merged)[1])
            elif planned.dtype == info.dtype:
                writer.copy(info.name, file, info)
            else:
                writer.add(info.name, _converted(file.read(info), torch_dtype(planned.dtype), info.name))
            done += planned.nbytes
            context.progress(0.99 * done / whole, info.name)
        for source in (file, *(lora.file.file for lora in plan.loras)):
            source.check_unchanged()
        context.progress(0.99, "saving")
        return writer.commit()


def _converted(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    out = tensor.to(dtype)
    if not out.float().isfinite().all() and tensor.float().isfinite().all():
        raise NumericalError(
            f"{name} does not fit the number format {str(dtype).removeprefix('torch.')}.",
            "Its largest numbers overflow.",
            "Choose another format.",
        )
    return out

"""Convert a checkpoint: another number format, without what only training needs, from a pickle to safetensors."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import LayoutError, NumericalError
from ..files.checkpoint_writer import CheckpointWriter, TensorPlan, header_of
from ..files.dtypes import EIGHT_BITS, torch_dtype
from ..files.opening import open_tensors
from ..files.source import TensorFile, TensorInfo
from ..files.writer import check_target
from ..layouts.adapter_file import open_adapter
from ..layouts.opening import open_checkpoint
from .checkpoint_formats import check_formats, components, format_of
from .convert_spec import KEEP, SAME, ConvertSpec
from .host import Context, Host
from .outputs import RECIPE, STALE, left_behind, recipe, refuse_inputs
from .report import Output, Report
from .workers import map_in_order, plan_workers

_TRAINING = {
    "first_stage_model.loss.": "loss of the VAE's training",
    "optimizer": "optimizer states", "lr_scheduler": "optimizer states",
}  # fmt: skip
_EMA, _EMA_TITLE = "model_ema.", "EMA copies"
_OWN = "model.diffusion_model."  # what an EMA copy is a copy of
_PROCESS_BYTES = 320 << 20  # Python with torch, about


@dataclass
class CheckpointPlan:
    """Holds the file open; use as a context or close() it.

    tensors: what will be written, in the file's order.  pruned: how many tensors of what kind are left out.
    """

    spec: ConvertSpec
    output: Path
    file: TensorFile
    title: str
    tensors: dict[str, TensorPlan] = field(default_factory=dict)
    pruned: Counter[str] = field(default_factory=Counter)
    metadata: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> CheckpointPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()

    @property
    def order(self) -> list[TensorInfo]:
        """What is carried over, as it lies in the file."""
        kept = [info for name, info in self.file.tensors.items() if name in self.tensors]
        return sorted(kept, key=lambda info: (info.offset, info.name))

    @property
    def converted(self) -> list[TensorInfo]:
        return [info for info in self.order if self.tensors[info.name].dtype != info.dtype]

    @property
    def bytes(self) -> int:
        """The file's size, exactly."""
        return 8 + len(header_of(self.tensors, self.metadata)) + sum(plan.nbytes for plan in self.tensors.values())

    @property
    def bytes_per_worker(self) -> int:
        return max((12 * info.numel for info in self.converted), default=0)

    def to_json(self, host: Host) -> dict[str, Any]:
        """What the forecast shows."""
        return {
            "verb": "convert",
            "output": str(self.output),
            "architecture": self.title,
            "modules": len(self.tensors),
            "converted": len(self.converted),
            "left_out": sum(self.pruned.values()),
            "expected_bytes": self.bytes,
            "most_bytes": self.bytes,
            "bytes_to_read": sum(info.nbytes for info in self.order),
            "expected_seconds": round(1 + self.bytes / 1e9, 1),
            "expected_memory": _PROCESS_BYTES + 4 * self.bytes_per_worker,
            "warnings": self.warnings,
        }


def make_plan(spec: ConvertSpec, host: Host) -> CheckpointPlan:
    """Open the checkpoint and check everything. Raises SpecError, FormatError, LayoutError or OutputError."""
    assert spec.checkpoint is not None
    output = host.checkpoint_output(spec.out)
    path = host.resolve_checkpoint(spec.checkpoint)
    file, title, component_of = _open(path, spec)
    plan = CheckpointPlan(spec, output, file, title)
    try:
        refuse_inputs(output, [path], host)
        formats = _formats(spec)
        pruned = _pruned(file) if spec.prune else {}
        for info in sorted(file.tensors.values(), key=lambda info: (info.offset, info.name)):
            if info.name in pruned:
                plan.pruned[pruned[info.name]] += 1
            else:
                wanted = formats.get(component_of.get(info.name, ""), KEEP)
                plan.tensors[info.name] = TensorPlan(format_of(info, wanted), info.shape)
        plan.warnings += left_behind(file)
        if spec.prune and not plan.pruned and not file.besides:
            plan.warnings.append("There was nothing to prune.")
        plan.metadata = _metadata(plan)
        check_target(output, plan.bytes, spec.overwrite)
    except BaseException:
        plan.close()
        raise
    return plan


def _open(path: Path, spec: ConvertSpec) -> tuple[TensorFile, str, dict[str, str]]:
    """The file, what it is, and the component of its tensors.

    What is no known model, such as a VAE alone, is carried over bit for bit if that is all that is asked for.
    """
    try:
        model = open_checkpoint(path)
        return model.file, model.title, components(model)
    except LayoutError:
        if {spec.dtype, spec.te_dtype, spec.vae_dtype} - {KEEP, SAME} or spec.prune or path.is_dir() or _is_lora(path):
            raise
    return open_tensors(path), "no known model", {}


def _is_lora(path: Path) -> bool:
    try:
        open_adapter(path).close()
    except LayoutError:
        return False
    return True


def _formats(spec: ConvertSpec) -> dict[str, str]:
    """Component → number format. SpecError where torch lacks one."""
    te = spec.dtype if spec.te_dtype == SAME else spec.te_dtype
    vae = spec.vae_dtype
    if vae == SAME:
        vae = KEEP if spec.dtype in EIGHT_BITS else spec.dtype
    check_formats((spec.dtype, te, vae))
    return {"unet": spec.dtype, "te": te, "vae": vae}


def _pruned(file: TensorFile) -> dict[str, str]:
    """Name → what it is, of every tensor that is of no use without training."""
    names = file.tensors
    out = {name: what for name in names for start, what in _TRAINING.items() if name.startswith(start)}
    copies = [name for name in names if name.startswith(_EMA)]
    if copies and not any(name.startswith(_OWN) for name in names):
        raise LayoutError(
            f"{file.path.name} holds the UNet only as EMA copies.",
            "Without them nothing would be left of it.",
            "Convert it without pruning.",
        )
    return out | dict.fromkeys(copies, _EMA_TITLE)


def _metadata(plan: CheckpointPlan) -> dict[str, str]:
    """All that the source said; what is no longer true left out; no date, so that equal inputs give equal files."""
    file = plan.file
    as_it_was = not plan.converted and not plan.pruned and bool(file.metadata)
    metadata = {key: text for key, text in file.metadata.items() if as_it_was or key not in STALE}
    metadata.setdefault("format", "pt")
    extra = {"pruned": dict(plan.pruned)} if plan.pruned else {}
    return metadata | {RECIPE: recipe(plan.spec, {"checkpoint": file}, **extra)}


def run(plan: CheckpointPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    context.progress(0.0, "converting")
    file, strange = plan.file, 0
    done, whole = 0, sum(tensor.nbytes for tensor in plan.tensors.values()) or 1
    with (
        contextlib.closing(_converted(plan, host, context)) as converted,
        CheckpointWriter(plan.output, plan.tensors, plan.metadata, plan.spec.overwrite) as writer,
    ):
        for info in plan.order:
            if plan.tensors[info.name].dtype == info.dtype:
                writer.copy(info.name, file, info)
            else:
                tensor, finite = next(converted)
                strange += not finite
                writer.add(info.name, tensor)
            done += plan.tensors[info.name].nbytes
            context.progress(0.99 * done / whole, info.name)
        file.check_unchanged()
        context.progress(0.99, "saving")
        written = writer.commit()
    warnings = list(plan.warnings)
    if strange:
        warnings.append(f"{strange} tensors hold NaN or Inf, as they did before.")
    details = {
        "kind": "checkpoint",
        "architecture": plan.title,
        "converted": len(plan.converted),
        "carried": len(plan.tensors) - len(plan.converted),
        "pruned": dict(plan.pruned),
        "besides": len(file.besides),
        "formats": dict(Counter(tensor.dtype for tensor in plan.tensors.values())),
        "bytes_before": file.size,
        "device": "cpu",
    }
    return Report(
        "convert", [Output(str(written.path), written.bytes, written.sha256)], None, len(plan.tensors),
        sum(plan.pruned.values()), 0, warnings, time.perf_counter() - plan.begun, details,
    )  # fmt: skip


def _converted(plan: CheckpointPlan, host: Host, context: Context) -> Generator[tuple[torch.Tensor, bool], None, None]:
    """The tensors whose format changes, in the file's order, and whether all their numbers are finite."""
    file = plan.file

    def work(info: TensorInfo) -> tuple[torch.Tensor, bool]:
        tensor = file.read(info)
        out = tensor.to(torch_dtype(plan.tensors[info.name].dtype))
        finite = is_finite(out)
        if not finite and is_finite(tensor):
            raise NumericalError(
                f"{info.name} does not fit the number format {str(out.dtype).removeprefix('torch.')}.",
                "Its largest numbers overflow.",
                "Choose bf16 or fp32.",
            )
        return out, finite

    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
    yield from map_in_order(work, plan.converted, workers, threads, context.check)


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a floating-point tensor is NaN or Inf.

    From the least and the largest, which a NaN becomes both of: that is ten times faster than to ask each.
    """
    wide = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # 8-bit floats cannot be asked
    return not wide.numel() or all(bool(end.isfinite()) for end in torch.aminmax(wide))

"""What an extraction will read, compute and write; made from headers, and where every refusal happens."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters.lora import tensor_bytes
from ..errors import LayoutError, SpecError, UnchangedError
from ..files.dtypes import ITEMSIZE, OUTPUT_DTYPES
from ..files.writer import check_target
from ..layouts.dialects import diffusers
from ..layouts.module import CONV, Model, Module
from ..layouts.opening import open_checkpoint
from . import extract_costs
from .extract_spec import BEST, DORA, LOHA, LOKR, LORA, SVDIFF, ExtractSpec
from .host import Host
from .pairing import Pair, Pairing, pair

_ENTRY_BYTES = 110  # header text of one tensor of a module, about
_TENSORS = {LORA: 3, DORA: 4, LOHA: 5, LOKR: 4, BEST: 4, SVDIFF: 1.5}  # of a module; SVDiff's names are longer
# what a worker holds for each weight of a layer: in float32 and bfloat16, for shifts several times in float64
_HELD = {LORA: 6, DORA: 30, LOHA: 22, LOKR: 14, BEST: 30, SVDIFF: 36}
_USUAL_CAP = 128
_PROCESS_BYTES = 350 << 20  # Python with torch, about
_MARKERS = {"v_pred": "v-prediction", "ztsnr": "zero terminal SNR"}


@dataclass
class ExtractPlan:
    """Holds both files open; use as a context or close() it.

    layers: to be decomposed, largest first.  left_out: excluded by layer group or convolution rank 0.
    """

    spec: ExtractSpec
    output: Path
    base: Model
    tuned: Model
    pairing: Pairing
    layers: list[Pair] = field(default_factory=list)
    left_out: list[Pair] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)

    def __enter__(self) -> ExtractPlan:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.base.file.close()
        self.tuned.file.close()

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[OUTPUT_DTYPES[self.spec.dtype]]

    def largest_rank(self, pair: Pair) -> int:
        """What a layer's size, the largest rank and, for convolutions under other rules, their rank allow."""
        limits = [min(pair.tuned.matrix_shape), self.spec.max_rank]
        if self.spec.rank_rule != "fixed" and pair.tuned.kind == CONV:
            limits.append(self.spec.conv_rank)
        return min(limit for limit in limits if limit)

    def fixed_rank(self, pair: Pair) -> int:
        """The rank of the rule "fixed", within bounds."""
        wanted = self.spec.rank_of_convs if pair.tuned.kind == CONV else self.spec.rank
        return max(min(wanted, self.largest_rank(pair)), min(self.spec.min_rank, self.largest_rank(pair)))

    def bytes_at(self, rank_of) -> int:
        """Size of the file if every layer changed and got rank_of(pair)."""
        if self.spec.family == SVDIFF:
            numbers = sum(min(p.tuned.matrix_shape) * self.itemsize for p in self.layers)
        else:
            numbers = sum(tensor_bytes(rank_of(p), *p.tuned.matrix_shape, self.itemsize) for p in self.layers)
        if self.spec.family in (DORA, BEST):
            numbers += sum(p.tuned.weight.shape[1] * self.itemsize for p in self.layers if p.tuned.weight)
        return numbers + int(_TENSORS[self.spec.family] * _ENTRY_BYTES) * len(self.layers) + 4096

    @property
    def expected_bytes(self) -> int | None:
        """The file's size if every layer changed; None where it depends on the spectra."""
        if self.spec.rank_rule == "fixed":
            return self.bytes_at(self.fixed_rank)
        if self.spec.rank_rule == "size":
            return int((self.spec.rank_target or 0) * 2**20)
        return None

    @property
    def most_bytes(self) -> int:
        return self.expected_bytes or self.bytes_at(self.largest_rank)

    def expected_seconds(self, device: str, threads: int) -> float:
        """A rough forecast of the run on a CPU or a graphics card."""
        from ..algebra import svd
        from .devices import slowness

        low = device == "cpu" and svd.native_bf16()
        rule = self.spec.rank_rule

        def decomposition(pair: Pair, rank: int) -> float:
            a, b = sorted(pair.tuned.matrix_shape)
            if rule == "cumulative" or self.spec.family == SVDIFF:  # all singular values, in float64
                return 3 * svd.cost(a, b, a, False, "exact")
            return svd.cost(a, b, rank, low, self.spec.method) * (1.5 if rule == "size" else 1)

        def rank_of(pair: Pair) -> int:
            # how far ratio and energy must look is known only then; four times the usual rank is a guess
            return self.fixed_rank(pair) if rule == "fixed" else min(_USUAL_CAP, self.largest_rank(pair))

        family = LORA if self.spec.family == SVDIFF else self.spec.family
        seconds = extract_costs.seconds(family, self.layers, rank_of, decomposition)
        read = sum(2 * p.tuned.weight.nbytes for p in self.layers if p.tuned.weight) / 2e9
        if device != "cpu":
            return seconds / 20 + read
        return (seconds * slowness() + read) / self._workers(device, threads)

    def _workers(self, device: str, threads: int) -> int:
        from .workers import plan_workers

        return plan_workers(threads, device, self.bytes_per_worker)[0]

    @property
    def bytes_per_worker(self) -> int:
        """What one worker holds of the largest layer."""
        return max(p.tuned.weight.numel for p in self.layers if p.tuned.weight) * _HELD[self.spec.family]

    @property
    def least_free_bytes(self) -> int:
        """Disk space to ask for beforehand: the file's size, or what the rank alone would take."""
        return self.expected_bytes or self.bytes_at(self.fixed_rank)

    def to_json(self, host: Host) -> dict[str, Any]:
        """The forecast; raises DeviceError."""
        from .devices import resolve_device

        device = resolve_device(self.spec.device, host.device())
        return {
            "verb": "extract",
            "output": str(self.output),
            "architecture": self.tuned.title,
            "modules": len(self.layers),
            "left_out": len(self.left_out),
            "unreachable": len([r for r in self.pairing.rest if not r.owner.name]),
            "expected_bytes": self.expected_bytes,
            "most_bytes": self.most_bytes,
            "bytes_to_read": sum(2 * p.tuned.weight.nbytes for p in self.layers if p.tuned.weight),
            "only_in_base": self.pairing.only_in["base"],
            "only_in_tuned": self.pairing.only_in["tuned"],
            "device": device,
            "expected_memory": _PROCESS_BYTES + self.bytes_per_worker * self._workers(device, host.threads()),
            "expected_seconds": round(self.expected_seconds(device, host.threads()), 1),
            "warnings": self.warnings,
        }


def make_plan(spec: ExtractSpec, host: Host) -> ExtractPlan:
    """Open both files and check everything that can be known before computing.

    Raises SpecError, FormatError, LayoutError, UnchangedError or OutputError.
    """
    base_path, tuned_path = host.resolve_checkpoint(spec.base), host.resolve_checkpoint(spec.tuned)
    output = host.lora_output(spec.out)
    opened: list[Model] = []
    try:
        for path in (base_path, tuned_path):
            opened.append(open_checkpoint(path))
        base, tuned = opened
        if base.file.is_same(tuned.file):
            raise UnchangedError(
                "Base and fine-tune are the same file.", "A LoRA of it would change nothing.", "Choose two checkpoints."
            )
        plan = _plan_layers(spec, output, base, tuned)
        check_target(output, plan.least_free_bytes, spec.overwrite)
        if output.exists() and any(output.samefile(p) for p in (base_path, tuned_path)):
            raise SpecError("The output is one of the inputs.", hint="Choose another name.")
    except BaseException:
        for model in opened:
            model.file.close()
        raise
    return plan


def _plan_layers(spec: ExtractSpec, output: Path, base: Model, tuned: Model) -> ExtractPlan:
    plan = ExtractPlan(spec, output, base, tuned, pair(base, tuned, _components(spec, tuned)))
    for layer in plan.pairing.layers:
        excluded = layer.tuned.group not in spec.layers or (layer.tuned.kind == CONV and spec.rank_of_convs == 0)
        (plan.left_out if excluded else plan.layers).append(layer)
    plan.layers.sort(key=lambda p: (-(p.tuned.weight.numel if p.tuned.weight else 0), p.key))
    if not plan.layers:
        raise LayoutError("No layer is left to extract.", "All were excluded.", "Choose more layer groups.")
    if spec.family == SVDIFF and any(not shifts_name(plan, p.tuned) for p in plan.layers):
        raise LayoutError(
            f"Spectral shifts cannot be extracted from {tuned.title}.",
            "Their names are those of diffusers, which splits layers that such a checkpoint fuses.",
            "Extract a LoRA.",
        )
    if spec.family == SVDIFF:
        plan.warnings.append("No WebUI loads spectral shifts: merge them into a checkpoint, or convert them to a LoRA.")
    plan.warnings += _differences(base, tuned, plan.layers)
    for component in plan.pairing.absent:
        plan.warnings.append(f"{component}: one of the files has none, so it is left out.")
    for side, names in plan.pairing.only_in.items():
        if names:
            plan.warnings.append(f"{len(names)} layers are only in the {side}, such as {names[0]}: left out.")
    return plan


def shifts_name(plan: ExtractPlan, module: Module) -> str | None:
    """What a file of spectral shifts calls a layer: its path in diffusers; None where that has several for it.

    svdiff-pytorch's own file of a UNet has bare paths. With text encoders beside it, which svdiff-pytorch keeps in
    files of their own, the component stands before.
    """
    pieces = diffusers.pieces(plan.tuned.architecture.id, module)
    if len(pieces) != 1:
        return None
    if {p.tuned.component for p in plan.layers} == {"unet"}:
        return pieces[0].path
    return diffusers.names(plan.tuned.architecture.id, module)[0][0]


def _components(spec: ExtractSpec, model: Model) -> list[str]:
    """The architecture's components that the request names; te means every text encoder."""
    ids = [table.id for table in model.architecture.components]
    wanted = [i for i in ids if i in spec.components or (i.startswith("te") and "te" in spec.components)]
    foreign = [c for c in spec.components if c not in ids and c != "te"]
    if not wanted or foreign:
        raise SpecError(
            f"{model.title} has no component {', '.join(foreign or spec.components)}.", hint=f"It has {', '.join(ids)}."
        )
    return wanted


def _differences(base: Model, tuned: Model, layers: list[Pair]) -> list[str]:
    """What no LoRA carries and only the headers tell."""
    found = []
    for marker, meaning in _MARKERS.items():
        if (marker in tuned.file.tensors) != (marker in base.file.tensors):
            which = "fine-tune" if marker in tuned.file.tensors else "base"
            found.append(f"Only the {which} is marked for {meaning}; no LoRA carries that, set it when generating.")
    formats = {(p.base.weight.dtype, p.tuned.weight.dtype) for p in layers if p.base.weight and p.tuned.weight}
    mixed = sorted(f"{b} and {t}" for b, t in formats if b != t)
    if mixed:
        found.append(
            f"Base and fine-tune are stored in different number formats ({', '.join(mixed)}): layers that are equal "
            "but for that rounding count as identical, in the others the rounding is part of the change."
        )
    return found

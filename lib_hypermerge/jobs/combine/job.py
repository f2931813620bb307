"""Combine: several LoRAs with weights as one LoRA, layer by layer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ...errors import UnchangedError
from ...files.writer import Written
from ..extract_measure import Measures
from ..host import Context, Host
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from . import size
from .alike import Course
from .layers import Layer
from .plan import CombinePlan, make_plan
from .spec import CombineSpec
from .work import NOTHING, LayerWork, Made, Spectrum
from .write import CombinedFile, overhead

__all__ = ["CombineSpec", "make_plan", "run"]


def run(plan: CombinePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, UnchangedError, OutputError, InputChangedError."""
    return _Combination(plan, host, context).run()


class _Combination:
    def __init__(self, plan: CombinePlan, host: Host, context: Context):
        self.plan, self.context = plan, context
        self.work = LayerWork(plan)
        self.workers, self.threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
        self.course = Course(len(plan.loras))
        self.measures = Measures(plan.itemsize)
        passes = 2 if plan.spec.size is not None else 1
        self._done, self._all = 0, passes * sum(math.prod(layer.shape) for layer in plan.layers) + 1

    def run(self) -> Report:
        plan = self.plan
        self.context.progress(0.0, "combining")
        ranks = None
        if plan.spec.size is not None:
            ranks = size.allot(plan, self._spectra, lambda ranks: overhead(plan, ranks))
        with CombinedFile(plan, ranks) as file:
            for made in self._map(lambda layer: self._make(layer, ranks), plan.layers):
                self._count(made)
                file.add(made)
            if not file.modules:
                raise self._unchanged()
            plan.check_unchanged()
            self.context.progress(0.99, "saving")
            error = self.measures.relative_error
            written = file.finish(relative_error=round(error, 9))
            return self._report(file, written)

    def _make(self, layer: Layer, ranks: dict[str, int] | None) -> Made:
        if not layer.parts:  # it may be needed beside others
            return Made(layer, NOTHING)
        return self.work.make(layer, None if ranks is None else ranks.get(layer.name))

    def _spectra(self, layers: Sequence[Layer], cap: Callable[[Layer], int]) -> Iterator[Spectrum]:
        return self._map(lambda layer: self.work.spectrum(layer, cap(layer)), layers)

    def _map(self, function: Callable[[Layer], Any], layers: Sequence[Layer]) -> Iterator[Any]:
        """Results in order, telling the progress."""
        for result in map_in_order(function, layers, self.workers, self.threads, self.context.check):
            layer = result.layer
            self._done += math.prod(layer.shape)
            fraction = min(0.98, self._done / self._all)  # a size can need more than was foreseen
            self.context.progress(fraction, f"{layer.module.component} {layer.module.block} {layer.module.path}")
            yield result

    def _count(self, made: Made) -> None:
        module = made.layer.module
        if made.alike is not None:
            self.course.add(module.component, module.block, made.alike)
        if made.energy > 0:
            sums = self.measures.blocks[module.component, module.block]
            sums[0] += made.error2
            sums[1] += made.energy

    def _unchanged(self) -> UnchangedError:
        self.plan.check_unchanged()
        way, names = self.plan.spec.way, self.plan.names
        if len(names) == 1 and self.course.is_zero:
            return UnchangedError(f"{names[0]} changes nothing.", "All its changes are zero.", "Choose another LoRA.")
        if self.course.is_zero and not any(layer.is_norm or layer.changes_bias for layer in self.plan.layers):
            why = "All changes of each of them are zero."
            return UnchangedError("The LoRAs change nothing.", why, "Choose other LoRAs.")
        why = f"{way.title} leaves nothing of them." if not way.is_exact else "Their changes cancel each other exactly."
        return UnchangedError("The LoRAs add up to nothing.", why, "Choose other weights, or another method.")

    def _report(self, file: CombinedFile, written: Written | None) -> Report:
        plan, m = self.plan, self.measures
        warnings = list(plan.warnings)
        goal = (plan.spec.size or 0) * 2**20
        all_there = file.bytes < 0.98 * goal
        if all_there:
            warnings.append("Every layer has all the directions that there are: the file stays below the size.")
        if file.zeros:
            warnings.append(
                f"{file.zeros} modules of zeros were added, for AUTOMATIC1111 takes q, k, v and out of these "
                "attentions all or none."
            )
        ranks: dict[str, int] = {}
        for rank in sorted([*file.ranks.values(), *file.conv_ranks.values()]):
            ranks[str(rank)] = ranks.get(str(rank), 0) + 1
        left_out = {why: count for why, count in plan.left_out.items() if count}
        details = {
            "architecture": plan.model.title,
            "preview": plan.spec.preview,
            "method": plan.spec.method,
            "advice": plan.spec.told,
            "loras": [plan.lora_json(index) for index in range(len(plan.loras))],
            "alike": self.course.to_json(),
            "components": m.by_component() if m.energy > 0 else {},
            "made": dict(file.kinds),
            "ranks": ranks,
            "skipped_because": left_out,
            "unmatched_keys": [key for lora in plan.loras for key in lora.resolution.unmatched][:50],
            "embeddings": len(plan.embeddings),
            "bytes": file.bytes,
            "cut": "" if all_there else plan.cut,
            "device": "cpu",
            "prompt": "" if written is None else f"<lora:{plan.output.stem}:1>",
        }
        outputs = [] if written is None else [Output(str(written.path), written.bytes, written.sha256)]
        return Report(
            "combine", outputs, m.relative_error, file.modules, sum(left_out.values()) + file.kinds[NOTHING],
            plan.unmatched, warnings, time.perf_counter() - plan.begun, details,
        )  # fmt: skip

"""Restore: any of the models of a hyper-merge, or a blend of them, as a full checkpoint or as one LoRA."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from ...files.dtypes import torch_dtype
from ...files.metadata import with_hashes
from ...files.writer import SafetensorsWriter
from ...layouts.module import CONV
from .. import merge
from ..host import Context, Host
from ..merge_plan import MergePlan
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from .recipe import snippet
from .restore_join import Joined, join
from .restore_lora import JoinPlan, components
from .restore_offers import offers
from .restore_plan import RestorePlan, make_plan
from .restore_spec import RestoreSpec

__all__ = ["RestoreSpec", "make_plan", "offers", "run"]


def run(plan: RestorePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    if isinstance(plan.inner, MergePlan):
        report = merge.run(plan.inner, host, context)
    else:
        report = _write_lora(plan.inner, host, context)
    report.verb = "restore"
    report.warnings[:0] = plan.wanted.warnings
    report.details |= {
        "kind": plan.spec.kind, "hyper": plan.inner.model.file.path.name, "container": plan.spec.container,
        **plan.wanted.to_json(),
    }  # fmt: skip
    return report


def _write_lora(plan: JoinPlan, host: Host, context: Context) -> Report:
    context.progress(0.0, "joining")
    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
    dtype, most = torch_dtype(plan.dtype), plan.spec.rank
    joined = map_in_order(lambda unit: join(unit, most, dtype), plan.units, workers, threads, context.check)
    tally = _Tally(len(plan.units))
    with SafetensorsWriter(plan.output, plan.header_reserve(), plan.spec.overwrite) as writer:
        for module in tally.counted(joined):
            for name, tensor in module.tensors:
                writer.add(name, tensor)
            context.progress(0.99 * tally.share, module.unit.name)
        plan.check_unchanged()
        texts = plan.metadata(tally.ranks, tally.conv_ranks)
        written = writer.commit(lambda data, legacy: with_hashes(texts, data, legacy))
    error = math.sqrt(tally.error2 / tally.energy) if tally.energy else 0.0
    return Report(
        "restore", [Output(str(written.path), written.bytes, written.sha256)], error, tally.done,
        sum(plan.left_out.values()), sum(len(lora.resolution.unmatched) for lora in plan.loras),
        list(plan.warnings), time.perf_counter() - plan.begun, {**tally.to_json(), **_details(plan)},
    )  # fmt: skip


def _details(plan: JoinPlan) -> dict[str, Any]:
    return {
        "architecture": plan.model.title,
        "components": components(plan),
        "skipped_because": dict(plan.left_out),
        "prompt": snippet({plan.output.stem: 1.0}),
        "device": "cpu",
    }


class _Tally:
    """What the report and the metadata tell of the modules."""

    def __init__(self, whole: int):
        self.whole, self.done, self.compressed = whole, 0, 0
        self.energy = self.error2 = 0.0
        self.ranks: dict[str, int] = {}
        self.conv_ranks: dict[str, int] = {}

    def counted(self, modules: Iterator[Joined]) -> Iterator[Joined]:
        for module in modules:
            self.done += 1
            self.compressed += module.compressed
            self.energy += module.energy
            self.error2 += module.error2
            if module.rank:
                ranks = self.conv_ranks if module.unit.module.kind == CONV else self.ranks
                ranks[module.unit.name] = module.rank
            yield module

    @property
    def share(self) -> float:
        return self.done / self.whole

    def to_json(self) -> dict[str, Any]:
        ranks = Counter([*self.ranks.values(), *self.conv_ranks.values()])
        return {"ranks": {str(rank): count for rank, count in sorted(ranks.items())}, "compressed": self.compressed}

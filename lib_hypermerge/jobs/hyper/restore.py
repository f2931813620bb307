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
from .. import merge
from ..host import Context, Host
from ..merge_plan import MergePlan
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from .recipe import snippet
from .restore_container import ContainerPlan
from .restore_join import JoinPlan
from .restore_offers import offers
from .restore_plan import RestorePlan, make_plan
from .restore_spec import RestoreSpec
from .restore_units import Joined

__all__ = ["RestoreSpec", "make_plan", "offers", "run"]


def run(plan: RestorePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, FormatError, OutputError, InputChangedError."""
    inner, wanted = plan.inner, plan.wanted
    if isinstance(inner, MergePlan):
        report, hyper = merge.run(inner, host, context), inner.model.file.path.name
    else:
        report, hyper = _write_lora(inner, host, context), inner.hyper
    report.verb = "restore"
    report.warnings[:0] = wanted.warnings
    report.modules = sum(plan.components.values())
    report.details |= {
        "kind": plan.spec.kind, "hyper": hyper, "components": plan.components, **wanted.to_json(),
    }  # fmt: skip
    if isinstance(inner, ContainerPlan) and wanted.remainder:
        report.details["prompt"] += snippet({wanted.remainder: 1.0})
    return report


def _write_lora(plan: JoinPlan | ContainerPlan, host: Host, context: Context) -> Report:
    context.progress(0.0, "joining")
    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
    tasks = plan.tasks(torch_dtype(plan.dtype))
    made, tally = map_in_order(lambda task: task(), tasks, workers, threads, context.check), _Tally(len(tasks))
    with SafetensorsWriter(plan.output, plan.header_reserve(), plan.spec.overwrite) as writer:
        for module in tally.counted(made):
            for name, tensor in module.tensors:
                writer.add(name, tensor)
            context.progress(0.99 * tally.share, module.name)
        plan.check_unchanged()
        texts = plan.metadata(tally.ranks, tally.conv_ranks)
        written = writer.commit(lambda data, legacy: with_hashes(texts, data, legacy))
    details: dict[str, Any] = {
        "architecture": plan.title,
        "components": plan.components,
        "ranks": tally.modules_by_rank(),
        "skipped_because": {why: count for why, count in plan.left_out.items() if count},
        "prompt": snippet({plan.output.stem: 1.0}),
        "device": "cpu",
    }
    return Report(
        "restore", [Output(str(written.path), written.bytes, written.sha256)], tally.relative_error, tally.done,
        sum(plan.left_out.values()), plan.unmatched, list(plan.warnings), time.perf_counter() - plan.begun, details,
    )  # fmt: skip


class _Tally:
    """What the report and the metadata tell of the modules."""

    def __init__(self, whole: int):
        self.whole, self.done = whole, 0
        self.energy = self.error2 = 0.0
        self.ranks: dict[str, int] = {}
        self.conv_ranks: dict[str, int] = {}

    def counted(self, modules: Iterator[Joined]) -> Iterator[Joined]:
        for module in modules:
            self.done += 1
            self.energy += module.energy
            self.error2 += module.error2
            if module.rank:
                (self.conv_ranks if module.is_conv else self.ranks)[module.name] = module.rank
            yield module

    @property
    def share(self) -> float:
        return self.done / self.whole

    @property
    def relative_error(self) -> float:
        """Of what was written, against the exact sum."""
        return math.sqrt(self.error2 / self.energy) if self.energy else 0.0

    def modules_by_rank(self) -> dict[str, int]:
        ranks = Counter([*self.ranks.values(), *self.conv_ranks.values()])
        return {str(rank): count for rank, count in sorted(ranks.items())}

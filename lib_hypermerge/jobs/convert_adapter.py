"""Carry out the conversion of a LoRA, layer by layer."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from typing import Any

from ..files.dtypes import ITEMSIZE
from .convert_modules import ModuleWork
from .convert_plan import AdapterPlan, counts
from .convert_seams import BY_RANK
from .convert_units import CARRY, Out
from .convert_write import Tally, open_sink
from .extract_measure import Measures
from .host import Context, Host
from .report import Output, Report
from .workers import map_in_order, plan_workers


def run(plan: AdapterPlan, host: Host, context: Context) -> Report:
    """Raises Cancelled, NumericalError, OutputError, InputChangedError."""
    work, tally, measures = ModuleWork(plan), Tally(), Measures(ITEMSIZE["F16"])
    workers, threads = plan_workers(host.threads(), "cpu", plan.bytes_per_worker)
    methods: Counter[str] = Counter()
    joined: Counter[str] = Counter()
    context.progress(0.0, "converting")

    def in_parallel(function: Callable[..., Any], items: Iterable[Any]) -> Generator[Any, None, None]:
        yield from map_in_order(function, items, workers, threads, context.check)

    with open_sink(plan, tally, in_parallel) as sink, contextlib.closing(in_parallel(work.make, plan.units)) as results:
        for done, made in enumerate(results, 1):
            unit = made.unit
            for out, tensors in made.outputs:
                sink.add(out, unit.module, tensors)
            if made.methods:
                sums = measures.blocks[unit.module.component, unit.module.block]
                sums[0] += made.error2
                sums[1] += made.energy
            methods.update(made.methods)
            joined.update([made.joined] if made.joined else [])
            tally.strange += made.strange
            context.progress(0.98 * done / len(plan.units), f"{unit.module.component} {unit.module.path}")
        for entry in plan.verbatim:
            tensors, finite = work.verbatim(entry)
            tally.strange += [] if finite else [entry.key]
            sink.add(Out(entry.key, 0, 0), None, tensors)
        plan.lora.file.file.check_unchanged()
        if plan.has_weights:
            plan.model.file.check_unchanged()
        context.progress(0.99, "saving")
        written = sink.commit()
    details = {
        "kind": "lora",
        "architecture": plan.model.title,
        "from": plan.lora.file.dialect,
        "to": plan.spec.to,
        "family": plan.spec.family,
        "families": plan.lora.counts,
        "left_out": {what: len(keys) for what, keys in plan.left_out.items()},
        "left_out_keys": {what: keys[:20] for what, keys in plan.left_out.items()},
        "embeddings": len(plan.embeddings),
        "written_per_component": counts(plan),
        "methods": dict(methods),
        "joined": dict(joined),
        "padded": tally.padded,
        "inexact": tally.inexact,
        "strange": len(tally.strange),
        "ranks": {str(r): n for r, n in sorted(Counter([*tally.ranks.values(), *tally.conv_ranks.values()]).items())},
        "components": measures.by_component() if measures.energy > 0 else {},
        "folder": str(plan.output) if len(written) > 1 or plan.output.suffix != ".safetensors" else "",
        "device": "cpu",
    }
    if plan.output.suffix == ".safetensors" and plan.spec.to == "kohya":
        details["prompt"] = f"<lora:{plan.output.stem}:1>"
    left = sum(len(keys) for keys in plan.left_out.values())
    computed = any(unit.how != CARRY for unit in plan.units)
    error = measures.relative_error if computed and math.isfinite(measures.relative_error) else None
    return Report(
        "convert", [Output(str(w.path), w.bytes, w.sha256) for w in written], error, tally.modules, left,
        len(plan.left_out.get("without a layer", [])), plan.warnings + _warnings(tally, joined),
        time.perf_counter() - plan.begun, details,
    )  # fmt: skip


def _warnings(tally: Tally, joined: Counter[str]) -> list[str]:
    out = []
    if tally.strange:
        shown = ", ".join(sorted(tally.strange)[:3])
        out.append(f"{len(tally.strange)} modules hold NaN or Inf, as they did before, such as {shown}.")
    if tally.widened:
        out.append("All numbers became float32, so that the way back gives the very 16-bit numbers: diffusers has no "
                   "alphas, and these do not fold into up exactly.")  # fmt: skip
    if tally.inexact:
        out.append(f"In {tally.inexact} modules alpha was folded into up by rounding: the way back may miss the last "
                   "bit of these numbers. PEFT's dialect keeps all.")  # fmt: skip
    if tally.padded:
        out.append(f"{tally.padded} modules were filled up with zeros to their component's largest rank: diffusers "
                   "scales modules of mixed ranks wrongly.")  # fmt: skip
    if joined[BY_RANK]:
        out.append(f"{joined[BY_RANK]} layers that the checkpoint fuses were joined from LoRAs with different downs: "
                   "their ranks add up.")  # fmt: skip
    return out

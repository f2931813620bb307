"""Resize: LoRAs brought to other ranks, module by module, all results of a run at once."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import Cancelled, HypermergeError, OutputError, SpecError
from ...files.dtypes import ITEMSIZE
from ...files.together import publish_together
from ...files.unnamed import UnnamedFile, Written
from ..convert_plan import AdapterPlan
from ..convert_spec import KOHYA
from ..convert_units import CARRY, Out
from ..convert_write import Sink, Tally, open_sink
from ..extract_measure import Measures
from ..host import Context, Host
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from . import size
from .plan import Facts, ResizePlan, make_plan, open_plan, rungs
from .spec import RANDOM, SIZE, SPARSE, SVD, ResizeSpec
from .work import REFITTED, Choose, Made, ResizeWork

__all__ = ["ResizeSpec", "make_plan", "run"]

_ROOM = 1024  # bytes of header beyond what is expected


@dataclass
class Result:
    """One file at one rank. written: None in a preview."""

    path: Path
    rank: int
    tally: Tally = field(default_factory=Tally)
    measures: Measures = field(default_factory=lambda: Measures(ITEMSIZE["F16"]))
    errors: Counter[str] = field(default_factory=Counter)  # squared, by method
    expected: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    compared: float = 0.0
    header: int = 0
    bytes: int = 0
    written: list[Written] = field(default_factory=list)

    def add(self, made: Made, number: int) -> None:
        rung = made.rungs[number]
        if rung.energy > 0:
            module = None if made.unit is None else made.unit.module
            sums = self.measures.blocks[("other", "-") if module is None else (module.component, module.block)]
            sums[0] += rung.error2
            sums[1] += rung.energy
        self.compared += rung.compared
        self.errors.update(rung.errors)
        self.expected.update(rung.expected)
        self.methods.update(rung.methods)
        self.bytes += sum(t.numel() * t.element_size() for _, tensors in rung.outputs for t in tensors.values())

    def to_json(self) -> dict[str, Any]:
        m = self.measures
        ranks = Counter([*self.tally.ranks.values(), *self.tally.conv_ranks.values()])

        def share(error2: float) -> float:
            return math.sqrt(max(error2, 0.0) / self.compared) if self.compared > 0 else 0.0

        return {
            "file": self.path.name,
            "rank": self.rank or None,
            "bytes": sum(w.bytes for w in self.written) or self.header + self.bytes,
            "relative_error": m.relative_error,
            "methods": dict(self.methods),
            "errors": {method: share(error2) for method, error2 in self.errors.items()},
            "expected": {method: share(error2) for method, error2 in self.expected.items()},
            "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
            "components": m.by_component() if m.energy > 0 else {},
        }


def run(plan: ResizePlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, InputChangedError, SpecError (size too small);
    of a batch, what concerns one file alone stands in the report."""
    job = _Resizing(plan, host, context)
    with job.stack:
        return job.run()


class _Resizing:
    def __init__(self, plan: ResizePlan, host: Host, context: Context):
        self.plan, self.spec, self.host, self.context = plan, plan.spec, host, context
        self.stack = contextlib.ExitStack()
        self.files: list[UnnamedFile] = []
        self.failed = dict(plan.failed)
        self.rows: list[dict[str, Any]] = []
        self.results: list[list[Result]] = []
        self.warnings: list[str] = []
        self._done, self._all = 0.0, sum(one.flops + one.bytes_to_read for one in plan.facts) or 1.0

    def run(self) -> Report:
        self.context.progress(0.0, "resizing")
        checkpoint = None if self.spec.checkpoint is None else self.host.resolve_checkpoint(self.spec.checkpoint)
        for facts in self.plan.facts:
            before = self._done
            try:
                self._one(facts, checkpoint)
            except (Cancelled, OutputError):
                raise
            except HypermergeError as error:
                if not self.plan.is_batch:
                    raise
                self.failed[facts.name] = error
            self._done = before + facts.flops + facts.bytes_to_read
        if not self.rows:
            name, error = next(iter(self.failed.items()))
            raise SpecError("None of the LoRAs could be resized.", f"{name}: {error.what} {error.why}", error.hint)
        self.context.progress(0.99, "saving")
        names = {file.path: written for file, written in
                 zip(self.files, publish_together(self.files) if self.files else [], strict=True)}  # fmt: skip
        for results in self.results:
            for result in results:
                result.written = [names[result.path]] if result.path in names else result.written
        return self._report()

    # --- one LoRA ---------------------------------------------------------------------------------------------------

    def _one(self, facts: Facts, checkpoint: Path | None) -> None:
        with open_plan(self.spec, facts.path, facts.outputs, checkpoint) as plan, contextlib.ExitStack() as stack:
            choose, spare = None, False
            results = [Result(path, rank) for path, rank in zip(facts.outputs, self.spec.rungs, strict=True)]
            if self.spec.rank_rule == SIZE:
                choose, results[0].header, spare = self._allot(plan)
            elif plan.spec.to == KOHYA:
                for result in results:
                    result.header = size.header(plan, size.most_ranks(self.spec, plan, result.rank)) + _ROOM
            sinks = self._sinks(plan, results, stack)
            left_out: list[str] = []
            for made in self._made(plan, choose, facts):
                left_out += made.strange
                for number, result in enumerate(results):
                    result.add(made, number)
                    for out, tensors in made.rungs[number].outputs:
                        module = None if made.unit is None else made.unit.module
                        sinks[number].add(out, module, tensors)
            plan.lora.file.file.check_unchanged()
            if plan.has_weights:
                plan.model.file.check_unchanged()
            if not self.spec.preview:
                self._seal(plan, results, sinks)
            self.stack.enter_context(stack.pop_all())
        self.results.append(results)
        self.rows.append(self._row(facts, plan, results, spare, left_out))

    def _sinks(self, plan: AdapterPlan, results: list[Result], stack: contextlib.ExitStack) -> list[Sink]:
        if self.spec.preview:
            return [_Nowhere(result.tally) for result in results]
        run = partial(self._map, bytes_each=0)
        own = rungs(self.spec, plan, [result.path for result in results])
        return [
            stack.enter_context(open_sink(each, result.tally, run, result.header or None))
            for each, result in zip(own, results, strict=True)
        ]

    def _seal(self, plan: AdapterPlan, results: list[Result], sinks: list[Sink]) -> None:
        for result, sink in zip(results, sinks, strict=True):
            sealed = sink.seal()
            self.files += sealed
            if not sealed:  # a PEFT folder, the only result
                result.written = sink.commit()

    def _map(self, function: Callable[[Any], Any], items: Iterable[Any], bytes_each: int) -> Generator[Any, None, None]:
        workers, threads = plan_workers(self.host.threads(), "cpu", bytes_each)
        yield from map_in_order(function, items, workers, threads, self.context.check)

    def _made(self, plan: AdapterPlan, choose: Choose | None, facts: Facts) -> Iterator[Made]:
        work = ResizeWork(plan, self.spec, choose)
        whole = sum(unit.numel for unit in plan.units) or 1
        share = (facts.flops + facts.bytes_to_read) / self._all
        start, done = self._done / self._all, 0
        with contextlib.closing(self._map(work.resize, plan.units, facts.bytes_per_worker)) as found:
            for made in found:
                yield made
                assert made.unit is not None
                done += made.unit.numel
                module = made.unit.module
                where = f"{module.component} {module.block} {module.path}"
                text = f"{facts.path.name}: {where}" if self.plan.is_batch else where
                self.context.progress(min(0.98, start + share * done / whole), text)
        for entry in plan.verbatim:
            yield work.other(entry)

    def _allot(self, plan: AdapterPlan) -> tuple[Choose, int, bool]:
        """The ranks of every module for the size asked for, the header's size, and whether ranks ran out."""
        work = ResizeWork(plan, self.spec)
        units = [unit for unit in plan.units if unit.how != CARRY]
        found = [one for each in self._map(work.spectra, units, plan.bytes_per_worker) for one in each]
        return size.allot(self.spec, plan, found)

    # --- what came of it --------------------------------------------------------------------------------------------

    def _row(
        self, facts: Facts, plan: AdapterPlan, results: list[Result], spare: bool, strange: list[str]
    ) -> dict[str, Any]:
        warnings = list(facts.warnings)
        if spare:
            warnings.append("Every module has all the rank it can use: the file stays below the target size.")
        if all(result.measures.energy == 0 and not result.methods[REFITTED] for result in results):
            warnings.append("It changes nothing: the product of its factors is zero in every module.")
        if self.spec.method != SVD and any(result.methods[REFITTED] for result in results):
            warnings.append(f"{max(r.methods[REFITTED] for r in results)} DoRA modules were cut along singular "
                            "directions: the other methods are for plain changes, and are compared on these alone.")
        if strange:
            warnings.append(f"{len(strange)} modules hold NaN or Inf, as they did before, such as {strange[0]}.")
        if plan.verbatim:
            warnings = [w for w in warnings if "carried over as they are" not in w]
            warnings.append(f"{len(plan.verbatim)} modules have no layer in {plan.model.title}, such as "
                            f"{plan.verbatim[0].key}; plain LoRAs among them were resized, others carried over.")
        for result in results:
            warnings += _advice(self.spec, result)
        prefix = f"{facts.path.name}: " if self.plan.is_batch else ""
        self.warnings += [w if w.startswith(facts.path.name) else prefix + w for w in warnings]
        return {
            "name": facts.name,
            "architecture": facts.architecture,
            "dialect": facts.dialect,
            "families": facts.families,
            "bytes": sum(path.stat().st_size for path in _files(facts.path)),
            "rank": facts.largest,
            "modules": facts.modules,
            "left_out": {what: len(keys) for what, keys in plan.left_out.items()},
        }

    def _report(self) -> Report:
        rows: list[dict[str, Any]] = [row | {"results": [result.to_json() for result in results]}
                                      for row, results in zip(self.rows, self.results, strict=True)]  # fmt: skip
        failures = [{"name": name, "error": error.to_json()} for name, error in self.failed.items()]
        written = [w for results in self.results for result in results for w in result.written]
        single = len(rows) == 1 and len(rows[0]["results"]) == 1
        details: dict[str, Any] = {
            "files": rows, "failed": failures, "preview": self.spec.preview, "method": self.spec.method,
            "rank_rule": self.spec.rank_rule, "device": "cpu",
        }  # fmt: skip
        if written and single and self.results[0][0].path.suffix == ".safetensors":
            details["prompt"] = f"<lora:{written[0].path.stem}:1>"
        left = sum(sum(row["left_out"].values()) for row in rows)
        return Report(
            "resize", [Output(str(w.path), w.bytes, w.sha256) for w in written],
            rows[0]["results"][0]["relative_error"] if single else None,
            sum(result.tally.modules for results in self.results for result in results), left, 0, self.warnings,
            time.perf_counter() - self.plan.begun, details, exit_code=1 if self.failed else 0,
        )  # fmt: skip


def _files(path: Path) -> list[Path]:
    """A LoRA's file, or those of a folder."""
    return [path] if path.is_file() else [entry for entry in path.rglob("*") if entry.is_file()]


class _Nowhere:
    """Takes what a preview computes."""

    def __init__(self, tally: Tally):
        self.tally = tally

    def add(self, out: Out, module: Any, tensors: Any) -> None:
        self.tally.count(out.name, module, tensors)

    def seal(self) -> list[UnnamedFile]:
        return []

    def commit(self) -> list[Written]:
        return []


def _advice(spec: ResizeSpec, result: Result) -> list[str]:
    """Says so when a method is a bad idea, in numbers of this very file."""
    numbers = result.to_json()["errors"]
    own, best = numbers.get(spec.method), numbers.get(SVD)
    if spec.method not in (RANDOM, SPARSE) or own is None or best is None or own <= 1.2 * best:
        return []
    return [
        f"Random directions miss {own:.0%} of the change, singular directions {best:.0%} at the same size: "
        + ("what is left is mostly noise. " if own > 1 else "")
        + "Take the method svd, unless this is for comparison."
    ]



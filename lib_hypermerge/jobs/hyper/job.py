"""Hyper-Merge: sketch every layer, solve on the small cores, and finish on the whole weights, file by file."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...algebra.hyper.alternatives import Alternative, alternatives, joined, numbers_of
from ...algebra.hyper.container import SharedCores, shared_cores
from ...errors import NumericalError
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.writer import check_room
from ..devices import resolve_device, whole_float32
from ..host import Context, Host
from ..report import Report
from ..workers import map_in_order, plan_workers, torch_threads
from . import remainders
from .finish import Finished, Finisher, Job
from .inputs import Layer, blame
from .measure import Measures
from .plan import HyperPlan, make_plan
from .recipe import Recipe
from .remainders import Remainder
from .rest_values import RestValues
from .rests import MEASURED
from .result import Ran, report_of
from .sketch import Sketch, Sketcher
from .solving import TE, UNET, Part, Seen, directions_of, parts_of, residual_of, settings_of, solve_parts
from .spec import GREEDY, LAYERS, NONE, HyperSpec
from .stack import Stack
from .work import Work
from .writing import Files, parameters, parents

__all__ = ["HyperSpec", "make_plan", "run"]

_SKETCHED, _SOLVED = 0.5, 0.62  # shares of the progress
_OF_PART = {"": "", UNET: "U-Net: ", TE: "Text encoders: "}  # before what is said of it


def run(plan: HyperPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, BusyError, InputChangedError."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(whole_float32())
        folder = plan.work_folder
        if plan.spec.preview:
            check_room(Path(tempfile.gettempdir()), "what a preview works on", plan.work_bytes)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hypermerge-"))) / "work"
        work = stack.enter_context(Work.open(folder, _fingerprint(plan)))
        try:
            report = _Merge(plan, host, context, work).run()
        except BaseException:
            work.discard()
            raise
        work.discard()
        return report


def _fingerprint(plan: HyperPlan) -> dict[str, Any]:
    """All that the sketches depend on."""
    files = [part for source in plan.inputs.sources for part in source.file.parts]
    files += plan.inputs.base.file.parts if plan.inputs.base else ()
    stats = [(str(file.path.absolute()), file.path.stat()) for file in files]
    spec = plan.spec
    return {
        "files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "base": plan.inputs.base is not None, "weights": spec.weights, "seed": spec.seed, "dtype": spec.dtype,
        "rank": plan.total_rank, "full": plan.full, "layers": len(plan.inputs.layers),
    }  # fmt: skip


class _Merge:
    def __init__(self, plan: HyperPlan, host: Host, context: Context, work: Work):
        self.plan, self.spec, self.context, self.work = plan, plan.spec, context, work
        self.device = resolve_device(plan.spec.device, host.device())
        self.workers, self.threads = plan_workers(host.threads(), self.device, plan.bytes_per_worker)
        self.dtype = torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])
        self.stack = Stack(plan.inputs, plan.weights)
        self.values = RestValues(plan.inputs, plan.spec, plan.rests, context.check)
        self.warnings = list(plan.warnings)
        self.steps: dict[str, float] = {}
        self.fell_back = 0

    def run(self) -> Report:
        with self._timed("reading and sketching"):
            seen = self._sketch()
        with torch_threads(self.workers):
            with self._timed("solving"):
                parts, ranks = self._solve(seen)
            with self._timed("comparing"):
                boxes, others = self._compare(parts, ranks)
        draft = self._recipe(parts, ranks)
        measures = Measures(self.plan, seen, len(ranks), len(parts) > 1)
        with self._timed("finishing and writing"), contextlib.ExitStack() as stack:
            # first, as the hyper-model's header tells of them
            rests = self._remainders(draft.hyper)
            self.warnings += remainders.note(rests, self.plan.inputs, self.spec)
            more = [stack.enter_context(rest.writer) for rest in rests if rest.writer is not None]
            draft = replace(draft, remainders={rest.label: rest.path.stem for rest in rests})
            files = None if self.spec.preview else stack.enter_context(Files(self.plan, ranks, draft))
            self._finish(parts, boxes, measures, files)
            self.plan.inputs.check_unchanged()
            self.context.progress(0.98, "saving")
            recipe = self._measured(draft, measures)
            written = [] if files is None else files.publish(recipe, more, self.work.journal)
        self.fell_back += measures.fell_back
        if self.fell_back:
            self.warnings.append(f"{self.fell_back} layers were computed on the CPU: the device ran out of memory.")
        ran = Ran(self.steps, self.device, self.workers * self.threads, self.work.resumed, self.warnings)
        return report_of(self.plan, recipe, parts, seen, measures, others, rests, written, ran)

    @contextlib.contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.steps[step] = round(time.perf_counter() - begun, 3)

    def _map(self, function, items) -> Iterator:
        return map_in_order(function, items, self.workers, self.threads, self.context.check)

    # --- the first pass ---------------------------------------------------------------------------

    def _sketch(self) -> list[Seen]:
        layers = self.plan.inputs.layers
        sketcher = Sketcher(self.stack, self.plan.total_rank, self.dtype, self.device, self.spec.seed)
        order = sorted(range(len(layers)), key=lambda i: -_numel(layers[i]))
        seen: dict[int, Seen] = {}
        whole, done = sum(map(_numel, layers)), 0
        self.context.progress(0.0, "reading")

        def look(index: int) -> tuple[int, Sketch | None]:
            if self.work.has(index):
                return index, None
            return index, sketcher.gram(layers[index]) if self.plan.full else sketcher.sketch(layers[index])

        for index, sketch in self._map(look, order):
            seen[index] = self._kept(index) if sketch is None else self._keep(index, sketch)
            done += _numel(layers[index])
            module = layers[index].module
            self.context.progress(_SKETCHED * done / whole, f"{module.component} {module.block} {module.path}")
        return [seen[index] for index in range(len(layers))]

    def _keep(self, index: int, sketch: Sketch) -> Seen:
        if not bool(sketch.gram.isfinite().all()):
            raise self._not_finite(sketch.layer)
        tensors = {"cores": sketch.cores, "gram": sketch.gram, "centre": torch.tensor(sketch.centre).double()}
        if sketch.basis is not None:
            tensors["basis"] = sketch.basis
        self.work.save(index, tensors)
        self.fell_back += sketch.fell_back
        return _seen(tensors)

    def _kept(self, index: int) -> Seen:
        return _seen(self.work.load(index))

    def _not_finite(self, layer: Layer) -> NumericalError:
        self.plan.inputs.check_unchanged()
        names = blame(self.plan.inputs, layer)
        return NumericalError(
            f"{layer.key} holds NaN or Inf{' in ' + ', '.join(names) if names else ''}.",
            "The model is damaged." if names else "Its numbers are too large for the number format.",
            "Get a sound copy, or leave the model out." if names else "Choose fp32 or bf16.",
        )

    # --- solving ----------------------------------------------------------------------------------

    def _solve(self, seen: list[Seen]) -> tuple[list[Part], tuple[int, ...]]:
        self.context.progress(_SKETCHED, "solving")
        parts = parts_of(self.plan, seen, self.work, self.work.folder)

        def progress(share: float) -> None:
            self.context.progress(_SKETCHED + (_SOLVED - _SKETCHED) * min(share, 1.0), "solving")

        if self.plan.full:
            directions_of(self.plan, parts)
            ranks = (max(min(layer.shape) for layer in self.plan.inputs.layers),) * self.plan.full
        else:
            ranks = solve_parts(self.plan, parts, progress)
        for part in parts:
            assert part.solution is not None
            notes = [f"{_OF_PART[part.id]}{note}" for note in part.solution.notes]
            self.warnings += [note for note in notes if note not in self.warnings]
        return parts, ranks

    def _recipe(self, parts: list[Part], ranks: tuple[int, ...]) -> Recipe:
        stems = [path.stem for path in self.plan.loras[: len(ranks)]]
        by_side = {}
        for part in parts:
            assert part.solution is not None
            rows = part.solution.multipliers.tolist()
            by_side[part.id] = {
                label: dict(zip(stems, row, strict=True))
                for label, row in zip(self.plan.inputs.labels, rows, strict=True)
            }
        main = by_side.get("") or by_side[UNET]
        base = self.plan.inputs.base
        hyper = self.plan.model_output.name if self.plan.writes_model or base is None else base.file.path.name
        return Recipe(
            hyper, stems if self.plan.writes_loras else [],
            main if self.plan.writes_loras else {label: {} for label in self.plan.inputs.labels},
            by_side.get(TE) if self.plan.writes_loras else None,
            ranks=list(ranks), container=self.plan.container_output.name if self.plan.writes_container else None,
            parameters=parameters(self.plan), parents=parents(self.plan),
        )  # fmt: skip

    def _compare(self, parts: list[Part], ranks: tuple[int, ...]) -> tuple[SharedCores | None, list[Alternative]]:
        """The container, if one is asked for, and what else there is of the same size."""
        problems = [part.problem for part in parts]
        if self.plan.full:
            return None, []
        settings = settings_of(self.plan, lambda share: self.context.check())
        numbers = self.plan.numbers if self.spec.size is not None else sum(numbers_of(p, ranks) for p in problems)
        boxes = shared_cores(joined(problems), numbers, settings) if self.plan.writes_container else None
        if not (self.spec.compare or self.spec.preview):
            return boxes, []
        greedy = residual_of(parts) if self.spec.solver == GREEDY else None
        allocate = self.spec.allocation == LAYERS
        return boxes, alternatives(problems, ranks, settings, numbers=numbers, allocate=allocate, greedy=greedy,
                                   container=boxes)  # fmt: skip

    def _measured(self, draft: Recipe, measures: Measures) -> Recipe:
        """Errors are those of the LoRAs, or of the container where there are none."""
        share, models = measures.residual_share, measures.models()
        if not self.plan.writes_container:
            return replace(draft, models=models, residual_share=share)
        boxed_share, boxed_models = measures.container()
        if not self.plan.writes_loras:
            return replace(draft, models=boxed_models, residual_share=boxed_share)
        return replace(draft, models=models, residual_share=share, container_models=boxed_models)

    # --- the last pass ----------------------------------------------------------------------------

    def _jobs(
        self, parts: list[Part], boxes: SharedCores | None, order: list[int], formats: dict[str, str]
    ) -> Iterator[Job]:
        part_of = {index: (part, first) for part, first in zip(parts, _first_groups(parts), strict=True)
                   for index in part.layers}  # fmt: skip
        for index in order:
            (part, first), layer = part_of[index], self.plan.inputs.layers[index]
            assert part.solution is not None and layer.module.weight is not None
            hyper = formats[layer.module.weight.name]
            if part.mix is not None:
                yield Job(index, layer, [], part.solution.multipliers, hyper, mix=part.mix)
                continue
            box, up_rank = (None, 0) if boxes is None else part.box(boxes, first, index)
            basis = self.work.load(index).get("basis")
            yield Job(index, layer, part.downs(index), part.solution.multipliers, hyper, box, basis, up_rank)

    def _finish(self, parts: list[Part], boxes: SharedCores | None, measures: Measures, files: Files | None) -> None:
        """Every tensor of the hyper-model in its order, and every layer, whether its tensor is written or not."""
        layers, tensors = self.plan.inputs.layers, self.plan.tensors
        by_tensor: dict[str, list[int]] = {}
        for index, layer in enumerate(layers):
            assert layer.module.weight is not None
            by_tensor.setdefault(layer.module.weight.name, []).append(index)
        order = [index for name in tensors for index in by_tensor.get(name, ())]
        finisher = Finisher(self.stack, self.dtype, self.device)
        jobs = self._jobs(parts, boxes, order, {name: tensor.dtype for name, tensor in tensors.items()})
        finished = self._map(finisher.finish, jobs)
        self.warnings += self.values.warnings
        rests = {rest.name: rest for rest in self.plan.rests}
        model = None if files is None else files.model
        whole, done = sum(map(_numel, layers)), 0
        for name, tensor in tensors.items():
            if model is not None:
                model.begin(name, tensor)
            for _ in by_tensor.get(name, ()):
                layer = next(finished)
                self._take(layer, measures, files)
                if model is not None and name not in rests:
                    model.more(layer.rows)
                done += _numel(layer.job.layer)
                self.context.progress(_SOLVED + (0.97 - _SOLVED) * done / whole, layer.job.layer.key)
            if name in rests and (model is not None or rests[name].kind in MEASURED):
                value = self.values.value(rests[name])
                measures.add_rest(value)
                if model is not None:
                    model.more(value.tensor)

    def _remainders(self, hyper: str) -> list[Remainder]:
        plan, spec = self.plan, self.spec
        if spec.remainders == NONE:
            return []
        return remainders.make(
            plan.inputs, spec, plan.rests, self.values, plan.rest_files, hyper, not spec.preview, self.context.check
        )

    def _take(self, done: Finished, measures: Measures, files: Files | None) -> None:
        if done.status == "nonfinite":
            raise self._not_finite(done.job.layer)
        measures.add(done)
        if files is None:
            return
        if files.loras:
            for i, factors in enumerate(done.factors):
                files.add(i, done.job.layer.module, factors)
            for i, change in enumerate(done.whole):
                files.add_whole(i, done.job.layer.module, change)
        if files.container is not None:
            files.add_box(done.job.layer.module, done.box)


def _first_groups(parts: list[Part]) -> list[int]:
    """Where each part's groups begin among those of all."""
    counts = [len(part.problem.groups) for part in parts]
    return [sum(counts[:i]) for i in range(len(parts))]


def _seen(tensors: dict[str, torch.Tensor]) -> Seen:
    p, q = tensors["cores"].shape[1:]
    return Seen(tensors["gram"], float(tensors["centre"]), (p, q))


def _numel(layer: Layer) -> int:
    n, k = layer.shape
    return n * k

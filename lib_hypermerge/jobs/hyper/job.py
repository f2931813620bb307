"""Hyper-Merge: sketch every layer, solve on the small cores, and finish on the whole weights, file by file."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...errors import NumericalError
from ...files.dtypes import OUTPUT_DTYPES, torch_dtype
from ...files.unnamed import Written
from ..devices import resolve_device
from ..host import Context, Host
from ..report import Output, Report
from ..workers import map_in_order, plan_workers
from . import rests
from .finish import Finished, Finisher, Job
from .inputs import Layer, blame
from .measure import Measures, similarity
from .plan import HyperPlan, make_plan
from .recipe import Recipe
from .sketch import Sketch, Sketcher
from .solving import UNET, Part, Seen, parts_of, solve_parts
from .spec import HyperSpec
from .stack import Stack
from .work import Work
from .writing import Files, parameters, parents

__all__ = ["HyperSpec", "make_plan", "run"]

_SKETCHED, _SOLVED = 0.5, 0.62  # shares of the progress


def run(plan: HyperPlan, host: Host, context: Context) -> Report:
    """Carry out a plan. Raises Cancelled, NumericalError, OutputError, BusyError, InputChangedError."""
    with contextlib.ExitStack() as stack:
        folder = plan.work_folder
        if plan.spec.preview:
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
        self.workers, self.threads = plan_workers(host.threads(), self.device, 128 << 20)
        self.dtype = torch_dtype(OUTPUT_DTYPES[plan.spec.dtype])
        self.stack = Stack(plan.inputs, plan.weights)
        self.warnings = list(plan.warnings)
        self.steps: dict[str, float] = {}
        self.fell_back = 0

    def run(self) -> Report:
        with self._timed("reading and sketching"):
            seen = self._sketch()
        with self._timed("solving"):
            parts, ranks = self._solve(seen)
        draft = self._recipe(parts, ranks)
        measures = Measures(self.plan, seen, len(ranks))
        with self._timed("finishing and writing"), contextlib.ExitStack() as stack:
            files = None if self.spec.preview else stack.enter_context(Files(self.plan, ranks, draft))
            sums = self._finish(parts, measures, files)
            self.plan.inputs.check_unchanged()
            recipe = self._measured(draft, measures)
            self.context.progress(0.98, "saving")
            written = [] if files is None else files.publish(recipe, (), self.work.journal)
        return self._report(recipe, ranks, seen, parts, measures, sums, written)

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
        self.context.progress(0.0, "comparing")

        def look(index: int) -> tuple[int, Sketch | None]:
            return index, None if self.work.has(index) else sketcher.sketch(layers[index])

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

        ranks = solve_parts(self.plan, parts, self.device, progress)
        for part in parts:
            assert part.solution is not None
            self.warnings += [note for note in part.solution.notes if note not in self.warnings]
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
        main = by_side.get("") or by_side.get(UNET) or by_side["te"]
        base = self.plan.inputs.base
        hyper = self.plan.model_output.name if self.plan.writes_model or base is None else base.file.path.name
        return Recipe(
            hyper, stems if self.plan.writes_loras else [],
            main if self.plan.writes_loras else {label: {} for label in self.plan.inputs.labels},
            by_side.get("te", main) if self.spec.separate_te and self.plan.writes_loras else None,
            ranks=list(ranks), container=self.plan.container_output.name if self.plan.writes_container else None,
            parameters=parameters(self.plan), parents=parents(self.plan),
        )  # fmt: skip

    # --- the last pass ----------------------------------------------------------------------------

    def _jobs(self, parts: list[Part], order: list[int], formats: dict[str, str]) -> Iterator[Job]:
        part_of = {index: part for part in parts for index in part.layers}
        for index in order:
            part, layer = part_of[index], self.plan.inputs.layers[index]
            kept = self.work.load(index)
            basis = kept.get("basis")
            downs = [
                down if basis is None else down @ basis.float() for down in part.downs(index)
            ]
            assert part.solution is not None and layer.module.weight is not None
            yield Job(index, layer, downs, part.solution.multipliers, formats[layer.module.weight.name])

    def _finish(self, parts: list[Part], measures: Measures, files: Files | None) -> dict[str, int]:
        plan, layers = self.plan, self.plan.inputs.layers
        tensors = plan.tensors
        by_tensor: dict[str, list[int]] = {}
        for index, layer in enumerate(layers):
            assert layer.module.weight is not None
            by_tensor.setdefault(layer.module.weight.name, []).append(index)
        order = [index for name in tensors for index in by_tensor.get(name, ())]
        finisher = Finisher(self.stack, self.dtype, self.device)
        finished = self._map(finisher.finish, self._jobs(parts, order, {n: t.dtype for n, t in tensors.items()}))
        own = {rest.info.name: rest for rest in plan.rests}
        whole, done = sum(map(_numel, layers)), 0
        sizes: dict[str, int] = {}
        for name, tensor in tensors.items():
            if files is not None and files.model is not None and name not in own:
                files.model.begin(name, tensor)
            for _ in by_tensor.get(name, ()):
                layer = next(finished)
                self._take(layer, measures, files)
                if files is not None and files.model is not None and name not in own:
                    files.model.more(layer.rows)
                done += _numel(layer.job.layer)
                self.context.progress(_SOLVED + (0.97 - _SOLVED) * done / whole, layer.job.layer.key)
            if name in own:
                value = rests.value(own[name])
                if files is not None and files.model is not None:
                    files.model.begin(name, tensor)
                    files.model.more(value.tensor)
        return sizes

    def _take(self, done: Finished, measures: Measures, files: Files | None) -> None:
        if done.status == "nonfinite":
            raise self._not_finite(done.job.layer)
        measures.add(done)
        if files is not None and files.loras:
            for i, factors in enumerate(done.factors):
                files.add(i, done.job.layer.module, factors)

    # --- the report -------------------------------------------------------------------------------

    def _measured(self, draft: Recipe, measures: Measures) -> Recipe:
        from dataclasses import replace

        return replace(draft, models=measures.models(), residual_share=measures.residual_share)

    def _report(self, recipe: Recipe, ranks: tuple[int, ...], seen: list[Seen], parts: list[Part], measures: Measures,
                sums: dict[str, int], written: list[Written]) -> Report:  # fmt: skip
        plan = self.plan
        sizes = {Path(w.path).stem: w.bytes for w in written}
        each = [sizes.get(stem, plan.lora_bytes(rank)) for stem, rank in zip(recipe.loras, ranks, strict=False)]
        details = {
            "architecture": plan.inputs.template.title,
            "preview": self.spec.preview,
            "solver": self.spec.solver,
            "residual_share": measures.residual_share,
            "multipliers": recipe.multipliers,
            "te_multipliers": recipe.te_multipliers,
            "loss": _loss(parts),
            "models": recipe.models,
            "ranks": list(ranks),
            "hyper": recipe.hyper if plan.writes_model else None,
            "hyper_bytes": plan.model_bytes,
            "recipe": None if self.spec.preview else str(plan.recipe_output),
            "loras": [
                {"name": stem, "rank": rank, "bytes": size, "share": share}
                for stem, rank, size, share in zip(recipe.loras, ranks, each, measures.alone(), strict=False)
            ],
            "prompts": {label: recipe.prompt(label) for label in plan.inputs.labels} if recipe.loras else {},
            "similarity": similarity(plan, seen),
            "by_model": {
                label: {"components": measures.by_component(m), "rest_error": None}
                for m, label in enumerate(plan.inputs.labels)
            },
            "curve": measures.curve(each) if recipe.loras else [],
            "alternatives": [],
            "better": "",
            "rest_share": 0.0,
            "container": None,
            "remainders": {},
            "steps": self.steps,
            "device": self.device,
            "threads": self.workers * self.threads,
            "resumed": self.work.resumed,
        }  # fmt: skip
        return Report(
            "hyper", [Output(str(w.path), w.bytes, w.sha256) for w in written], measures.residual_share**0.5,
            len(plan.inputs.layers), 0, 0, self.warnings, time.perf_counter() - plan.begun, details,
        )  # fmt: skip


def _seen(tensors: dict[str, torch.Tensor]) -> Seen:
    p, q = tensors["cores"].shape[1:]
    return Seen(tensors["gram"], float(tensors["centre"]), (p, q))


def _loss(parts: list[Part]) -> list[float]:
    """Of all parts together; one that has ended stays as it was."""
    runs = [(part.solution.loss, part.problem.total) for part in parts if part.solution is not None]
    whole = sum(total for _, total in runs)
    longest = max((len(loss) for loss, _ in runs), default=0)
    if whole <= 0:
        return [0.0] * longest
    return [
        sum(loss[min(step, len(loss) - 1)] * total for loss, total in runs if loss) / whole for step in range(longest)
    ]


def _numel(layer: Layer) -> int:
    n, k = layer.shape
    return n * k

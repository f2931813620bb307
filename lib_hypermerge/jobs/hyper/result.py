"""What is said of a finished hyper-merge."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...algebra.hyper.alternatives import CONTAINER, Alternative, better
from ...files.unnamed import Written
from ...words import percent
from ..report import Output, Report
from .measure import Measures, similarity
from .plan import HyperPlan
from .recipe import Recipe
from .remainders import Remainder
from .solving import Part, Seen, residual_of
from .spec import DIRECTIONS

_NAMES = {
    "average": "plain average", "own": "own LoRA per model", "greedy": "shared LoRAs, one after another",
    "joint": "shared LoRAs, together", "directions": "main directions", "container": "container",
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """How the run went. steps: seconds by step."""

    steps: dict[str, float]
    device: str
    threads: int
    resumed: bool
    warnings: list[str]


def report_of(
    plan: HyperPlan, recipe: Recipe, parts: Sequence[Part], seen: Sequence[Seen], measures: Measures,
    others: Sequence[Alternative], rests: Sequence[Remainder], written: Sequence[Written], ran: Ran,
) -> Report:  # fmt: skip
    """The report; residual shares are measured on the rounded numbers that were, or would be, written."""
    spec, labels = plan.spec, plan.inputs.labels
    on_disk = {Path(file.path).name: file.bytes for file in written}
    sizes = [
        on_disk.get(f"{stem}.safetensors", plan.lora_bytes(rank))
        for stem, rank in zip(recipe.loras, recipe.ranks, strict=False)
    ]
    details: dict[str, Any] = {
        "architecture": plan.inputs.template.title,
        "preview": spec.preview,
        "solver": DIRECTIONS if plan.full else spec.solver,
        "from_base": plan.inputs.base is not None,
        "residual_share": recipe.residual_share,
        "multipliers": recipe.multipliers,
        "te_multipliers": recipe.te_multipliers,
        "loss": _loss(parts),
        "models": recipe.models,
        "ranks": recipe.ranks,
        "hyper": recipe.hyper if plan.writes_model else None,
        "hyper_bytes": on_disk.get(plan.model_output.name, plan.model_bytes),
        "recipe": None if spec.preview else str(plan.recipe_output),
        "loras": [
            {"name": stem, "rank": rank, "bytes": size, "share": share}
            for stem, rank, size, share in zip(recipe.loras, recipe.ranks, sizes, measures.alone(), strict=False)
        ],
        "prompts": {label: recipe.prompt(label) for label in labels} if recipe.loras else {},
        "similarity": similarity(plan, seen),
        "by_model": {
            label: {"components": measures.by_component(m), "rest_error": measures.rest_error(m)}
            for m, label in enumerate(labels)
        },
        "curve": measures.curve(sizes) if recipe.loras else [],
        "alternatives": _alternatives(plan, parts, others),
        "better": _better(parts, others),
        "rest_share": measures.rest_share,
        "container": _container(plan, measures, on_disk) if plan.writes_container else None,
        "remainders": {
            rest.label: {
                "name": rest.path.stem,
                "bytes": rest.bytes,
                "restores": rest.restores(measures.rest_error2(labels.index(rest.label))),
            }
            for rest in rests
        },
        "steps": ran.steps,
        "device": ran.device,
        "threads": ran.threads,
        "resumed": ran.resumed,
    }
    outputs = [Output(str(file.path), file.bytes, file.sha256) for file in written]
    return Report(
        "hyper", outputs, (recipe.residual_share or 0.0) ** 0.5,
        len(plan.inputs.layers), 0, 0, ran.warnings, time.perf_counter() - plan.begun, details,
    )  # fmt: skip


def _container(plan: HyperPlan, measures: Measures, on_disk: dict[str, int]) -> dict[str, Any]:
    share, models = measures.container()
    size = on_disk.get(plan.container_output.name, plan.loras_bytes)
    return {"name": plan.container_output.name, "bytes": size, "residual_share": share, "models": models}


def _alternatives(plan: HyperPlan, parts: Sequence[Part], others: Sequence[Alternative]) -> list[dict[str, Any]]:
    """With the LoRAs themselves among them, all as the cores tell; sizes are of the numbers alone, without headers."""
    if not others:
        return []
    solver, share = plan.spec.solver, residual_of(parts)
    size = plan.itemsize * max(other.numbers for other in others)
    own = {"name": _NAMES[solver], "kind": solver, "bytes": size, "residual_share": share}
    rest = [
        {"name": _NAMES[o.kind], "kind": o.kind, "bytes": o.numbers * plan.itemsize, "residual_share": o.share}
        for o in others
        if o.kind != solver
    ]
    return [own, *rest]


def _better(parts: Sequence[Part], others: Sequence[Alternative]) -> str:
    """LoRAs or container for these models, in a sentence; empty if they were not compared."""
    box = next((other for other in others if other.kind == CONTAINER), None)
    if box is None:
        return ""
    kind, saved = better(residual_of(parts), box.share)
    if saved < 0.01:
        return "LoRAs and a container of the same size come equally close."
    if kind == CONTAINER:
        return f"A container of the same size leaves {percent(saved)} less of the squared error than these LoRAs."
    return f"These LoRAs leave {percent(saved)} less of the squared error than a container of the same size."


def _loss(parts: Sequence[Part]) -> list[float]:
    """Of all parts together; one that has ended stays as it was."""
    runs = [(part.solution.loss, part.problem.total) for part in parts if part.solution is not None]
    whole = sum(total for _, total in runs)
    longest = max((len(loss) for loss, _ in runs), default=0)
    if whole <= 0:
        return [0.0] * longest
    return [
        sum(loss[min(step, len(loss) - 1)] * total for loss, total in runs if loss) / whole for step in range(longest)
    ]

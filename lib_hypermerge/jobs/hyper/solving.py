"""From the sketches of all layers to multipliers and, for each layer, the LoRAs' down factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...algebra.hyper.allocation import plan_ranks
from ...algebra.hyper.balance import unit_scale
from ...algebra.hyper.container import SharedCores
from ...algebra.hyper.directions import main_directions
from ...algebra.hyper.problem import Cores, Problem, Settings, Solution
from ...algebra.hyper.solve import solve
from .plan import HyperPlan
from .spec import COMPONENT, LAYERS, RELATIVE
from .work import Work

UNET, TE = "unet", "te"
_MULTIPLE = 16


@dataclass(frozen=True)
class Seen:
    """What is kept in memory of a layer's sketch. shape: (p, q) of its cores."""

    gram: torch.Tensor
    centre: float
    shape: tuple[int, int]


@dataclass
class Part:
    """Layers that share multipliers: all, or the UNet's, or the text encoders'.

    id: unet, te, or "" for all.  layers: their indices.  places: index → (group, row).  weights: √ω by index.
    widths: by index how many columns of its group's cores are a layer's own.
    """

    id: str
    layers: list[int]
    problem: Problem
    places: dict[int, tuple[int, int]]
    weights: dict[int, float]
    widths: dict[int, int]
    mix: torch.Tensor | None = None  # (K, M): how LoRAs without a limit of rank are made of the changes
    solution: Solution | None = None

    def downs(self, index: int) -> list[torch.Tensor]:
        """Per LoRA (r_i, q) float32, in the layer's own scale; r_i may be 0."""
        assert self.solution is not None
        group, row = self.places[index]
        rows, ranks, rooms = self.solution.downs[group][row], self.solution.ranks[group], self.solution.rooms
        starts = [sum(rooms[:i]) for i in range(len(rooms))]
        scale = self.weights[index] ** -0.5
        width = self.widths[index]
        return [scale * rows[a : a + rank, :width] for a, rank in zip(starts, ranks[row].tolist(), strict=True)]

    def box(self, boxes: SharedCores, first: int, index: int) -> tuple[torch.Tensor, int]:
        """The container's down (b, q) float32 of a layer, and how many columns its up has.

        first: where this part's groups begin among the boxes'.
        """
        group, row = self.places[index]
        a, b = int(boxes.up_ranks[first + group][row]), int(boxes.ranks[first + group][row])
        return boxes.downs[first + group][row, :b, : self.widths[index]], a


def parts_of(plan: HyperPlan, seen: Sequence[Seen], work: Work, folder: Path) -> list[Part]:
    """The problems to solve. folder: where cores that are too large for the memory are mapped from.

    Multipliers of their own are for text encoders that differ, beside U-Nets that do.
    """
    sides: dict[str, list[int]] = {UNET: [], TE: []}
    for index, layer in enumerate(plan.inputs.layers):
        sides[UNET if layer.module.component == UNET else TE].append(index)
    differ = all(any(float(seen[index].gram.trace()) > 0 for index in own) for own in sides.values())
    if not (plan.spec.separate_te and differ):
        sides = {"": list(range(len(plan.inputs.layers)))}
    weights = _layer_weights(plan, seen)
    return [_part(plan, side, own, seen, weights, work, folder) for side, own in sides.items()]


def total_of(plan: HyperPlan, gram: torch.Tensor) -> float:
    """What residual shares are shares of: Σ‖W_m − base‖², or without a base Σ‖W_m − mean‖²."""
    return float(changes(plan, gram).sum())


def changes(plan: HyperPlan, gram: torch.Tensor) -> torch.Tensor:
    """(M,) ‖W_m − base‖², or ‖W_m − mean‖² of the plain mean, from a Gram matrix of differences to any centre."""
    return from_origin(plan, gram).diagonal().clamp_min(0)


def from_origin(plan: HyperPlan, gram: torch.Tensor) -> torch.Tensor:
    """(M, M): the Gram matrix of differences to the base, or to the plain mean, from that of those to any centre."""
    if plan.inputs.base is not None:
        return gram
    return gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()


def _layer_weights(plan: HyperPlan, seen: Sequence[Seen]) -> list[float]:
    """√ω of each layer, scaled so that ω is 1 on average."""
    layers, kind = plan.inputs.layers, plan.spec.layer_weights
    if kind == RELATIVE:
        omega = [1 / s.centre if s.centre > 0 else 0.0 for s in seen]
    elif kind == COMPONENT:
        energy: dict[str, float] = {}
        for layer, s in zip(layers, seen, strict=True):
            energy[layer.module.component] = energy.get(layer.module.component, 0.0) + float(s.gram.trace())
        omega = [1 / e if (e := energy[layer.module.component]) > 0 else 0.0 for layer in layers]
    else:
        return [1.0] * len(layers)
    whole = math.fsum(w * float(s.gram.trace()) for w, s in zip(omega, seen, strict=True))
    plain = math.fsum(float(s.gram.trace()) for s in seen)
    scale = plain / whole if whole > 0 else 1.0
    return [math.sqrt(w * scale) or 1.0 for w in omega]


def _part(plan: HyperPlan, side: str, own: list[int], seen: Sequence[Seen], weights: list[float], work: Work,
          folder: Path) -> Part:  # fmt: skip
    M = plan.models
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index in own:
        by_shape.setdefault(_padded(seen[index].shape), []).append(index)
    groups, places = [], {}
    for group, ((p, q), members) in enumerate(by_shape.items() if not plan.full else ()):
        shape = (len(members), M, p, q)
        values = _mapped(folder / f"cores-{side}{p}-{q}.bin", shape) if plan.maps_cores else torch.zeros(shape)
        for row, index in enumerate(members):
            rows, columns = seen[index].shape
            torch.mul(work.load(index)["cores"], weights[index], out=values[row, :, :rows, :columns])
            places[index] = (group, row)
        costs = torch.tensor([sum(plan.inputs.layers[i].shape) for i in members], dtype=torch.float64)
        most = torch.tensor([min(*plan.inputs.layers[i].shape, *seen[i].shape) for i in members])
        rows = torch.tensor([plan.inputs.layers[i].shape[0] for i in members])
        groups.append(Cores(values, costs, most, rows))
    gram = torch.zeros(M, M, dtype=torch.float64)
    for index in own:
        gram += weights[index] ** 2 * seen[index].gram
    problem = Problem(groups, gram, total_of(plan, gram))
    return Part(side, own, problem, places, {index: weights[index] for index in own},
                {index: seen[index].shape[1] for index in own})  # fmt: skip


def _padded(shape: tuple[int, int]) -> tuple[int, int]:
    """A few shapes instead of many, so that layers are solved many at a time; what is added is 0."""
    p, q = (-(-size // _MULTIPLE) * _MULTIPLE for size in shape)
    return p, q


def _mapped(path: Path, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.memmap(path, dtype=np.float32, mode="w+", shape=shape))  # a new file is all 0


def directions_of(plan: HyperPlan, parts: list[Part]) -> None:
    """The closed form where no rank is limited: the leading eigenvectors of the Gram matrix as multipliers, and the
    sums of the models' changes by them as LoRAs (mix), orthogonal to each other (Eckart and Young)."""
    for part in parts:
        V = main_directions(part.problem.gram, plan.full)  # (M, K)
        scales = torch.tensor([unit_scale(column) for column in V.mT], dtype=torch.float64)
        multipliers = V / scales
        left = part.problem.energy - float(((V.mT @ part.problem.gram) * V.mT).sum())
        share = max(left, 0.0) / part.problem.total if part.problem.total > 0 else 0.0
        part.solution = Solution(multipliers, [], [], [], [share])
        part.mix = (V * scales).mT
        if not bool(V.any(0).all()):
            part.solution.notes.append("There are fewer directions than LoRAs: some LoRAs are empty.")


def solve_parts(plan: HyperPlan, parts: list[Part], progress: Callable[[float], None]) -> tuple[int, ...]:
    """Fill in the solutions; returns the ranks, which are planned first where a size is given.

    progress: told the share done; may raise to stop.
    """
    spec, ranks = plan.spec, plan.ranks
    if spec.size is not None:
        largest = max(parts, key=lambda part: len(part.layers))
        ranks = plan_ranks(
            largest.problem, plan.numbers_for(0), spec.count, settings_of(plan, lambda share: progress(share / 2)),
            beside=plan.numbers_beside, stored=[group for part in parts for group in part.problem.groups],
        )  # fmt: skip
    whole = sum(len(part.layers) for part in parts)
    done = 0
    for part in parts:
        before = done / whole

        def check(share: float, before: float = before, own: float = len(part.layers) / whole) -> None:
            progress(before + share * own)

        solution = solve(part.problem, ranks, spec.solver, settings_of(plan, check), allocate=spec.allocation == LAYERS)
        part.solution = solution
        done += len(part.layers)
    return tuple(ranks)


def residual_of(parts: Sequence[Part]) -> float:
    """The residual share that the solver ended with, on the cores."""
    total = math.fsum(part.problem.total for part in parts)
    left = math.fsum(part.solution.loss[-1] * part.problem.total for part in parts if part.solution is not None)
    return left / total if total > 0 else 0.0


def settings_of(plan: HyperPlan, check: Callable[[float], None]) -> Settings:
    """As the spec has it; check is told the share done, and may raise."""
    spec = plan.spec
    return Settings(spec.starts, spec.seed, spec.tolerance, spec.iterations, check)

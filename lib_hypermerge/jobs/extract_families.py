"""Which family fits a pair: each measured beside a LoRA of the same size, on all layers or on a sample of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch

from . import extract_costs
from .extract_fits import FamilyWork, kept
from .extract_layers import Fit, LayerResult
from .extract_plan import ExtractPlan
from .extract_spec import DORA, LOHA, LOKR, LORA, RIVALS

# what LyCORIS would be asked for such a network
LYCORIS = {
    DORA: {"algo": "locon", "dora_wd": "True", "wd_on_output": "False"},
    LOHA: {"algo": "loha"},
    LOKR: {"algo": "lokr"},
}
_MARGIN = 0.01  # of the error: what a family has to be closer by to take the place of LoRA, which everything reads


@dataclass
class FamilySums:
    """A file of a family where that wins, and of LoRA elsewhere, next to LoRAs of the same size, over layers."""

    family: str
    error2: float = 0.0
    rival2: float = 0.0
    nbytes: int = 0
    wins: int = 0

    def add(self, fit: Fit) -> None:
        self.error2 += fit.error2
        self.rival2 += fit.rival2
        self.nbytes += fit.nbytes
        self.wins += fit.family == self.family

    @property
    def gain(self) -> float:
        """The share by which the error is below that of a LoRA of the same size."""
        return 1 - math.sqrt(self.error2 / self.rival2) if self.rival2 > 0 else 0.0

    def to_json(self, energy: float) -> dict[str, Any]:
        return {
            "family": self.family, "relative_error": math.sqrt(self.error2 / energy) if energy > 0 else 0.0,
            "bytes": self.nbytes, "gain": self.gain, "layers": self.wins,
        }  # fmt: skip


@dataclass
class Comparison:
    """Several families over the same layers.  of: how many layers there are in all."""

    of: int
    families: tuple[str, ...]
    energy: float = 0.0
    measured: int = 0
    sums: dict[str, FamilySums] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = {family: FamilySums(family) for family in self.families}

    def add(self, result: LayerResult) -> None:
        """Take note of a layer that was fitted in all families."""
        assert result.fits is not None
        self.energy += result.energy
        self.measured += 1
        for family, sums in self.sums.items():
            sums.add(kept(result.fits, family))

    @property
    def best(self) -> str:
        """The family that gains most over a LoRA of its size; LoRA itself if none does by a margin."""
        family = max(self.families, key=lambda name: self.sums[name].gain)
        return family if self.sums[family].gain >= _MARGIN else LORA

    def to_json(self) -> dict[str, Any]:
        """The rows of a table, and how many layers are behind it."""
        rows = [sums.to_json(self.energy) for sums in self.sums.values()]
        return {"families": rows, "families_measured": {"layers": self.measured, "of": self.of}}


def compare(
    plan: ExtractPlan, work: FamilyWork, run: Callable[..., Generator[LayerResult, None, None]]
) -> tuple[Comparison, list[str]]:
    """All families on changed layers, drawn by the spec's seed, until the budget is used up; and the keys of layers
    with NaN or Inf.

    run: (function, pairs) → results in order.
    """
    found, nonfinite, used = Comparison(len(plan.layers), (LORA, *RIVALS)), [], 0.0
    generator = torch.Generator().manual_seed(plan.spec.seed % (1 << 32))
    order = torch.randperm(len(plan.layers), generator=generator).tolist()
    with closing(run(lambda pair: work.fits(pair, RIVALS), [plan.layers[i] for i in order])) as results:
        for result in results:
            if result.status == "nonfinite":
                nonfinite.append(result.pair.key)
            elif result.fits is not None:
                found.add(result)
                used += extract_costs.drawn(result.pair, plan.fixed_rank(result.pair))
                if used > extract_costs.SAMPLE and found.measured >= extract_costs.LEAST_LAYERS:
                    break
    return found, nonfinite

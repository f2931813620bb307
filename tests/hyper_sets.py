"""Hyper-models made by hand, with LoRAs and a recipe, and what they give back in float64."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from models import Weights, base_weights, cast, lora_deltas, reachable
from safetensors.torch import load_file, save_file

from lib_hypermerge.jobs.hyper.recipe import Recipe

MULTIPLIERS = {
    "anna": {"fam-1": 1.0, "fam-2": -0.25},
    "bert": {"fam-1": -0.5, "fam-2": 1.0},
    "carl": {"fam-1": -0.5, "fam-2": -0.75},
}
TE_MULTIPLIERS = {
    "anna": {"fam-1": 0.5, "fam-2": 1.0},
    "bert": {"fam-1": 1.0, "fam-2": -0.125},
    "carl": {"fam-1": -0.25, "fam-2": 0.0},
}


@dataclass(frozen=True)
class HyperSet:
    """hyper: the checkpoint, its recipe in the metadata.  loras: beside it, in order."""

    folder: Path
    hyper: Path
    loras: tuple[Path, ...]
    recipe: Recipe

    def weights(self) -> Weights:
        return load_file(self.hyper)

    def layers(self) -> list[tuple[str, str, slice]]:
        return _layers(self.hyper)

    def restored(
        self, unet: Mapping[str, float], te: Mapping[str, float] | None = None, weights: Weights | None = None
    ) -> Weights:
        """hyper + Σ λ · alpha/r · up·down in float64, of the tensors that the LoRAs reach."""
        stored, out = weights or self.weights(), {}
        for path in self.loras:
            deltas = lora_deltas(path)
            for name, key, rows in self.layers():
                if name in deltas:
                    out.setdefault(key, stored[key].double())
                    weight = (unet if name.startswith("lora_unet") or te is None else te)[path.stem]
                    out[key][rows] += weight * deltas[name].reshape(out[key][rows].shape)
        return out


@functools.cache
def _layers(path: Path) -> list[tuple[str, str, slice]]:
    return list(reachable(path))


def random_lora(path: Path, layers: list[tuple[str, str, slice]], weights: Weights, rank: int, seed: int) -> Path:
    """fp16 factors for every layer, alpha not the rank, each change a hundredth of its weight."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, key, rows in layers:
        weight = weights[key][rows].float()
        n, k = weight.flatten(1).shape
        up, down = torch.randn(n, rank, generator=generator), torch.randn(rank, k, generator=generator)
        size = 0.1 * weight.norm() / (up @ down).norm()
        kernel = weight.shape[2:]
        tensors[f"{name}.lora_up.weight"] = (up * size.sqrt() * 4).half().reshape(n, rank, *[1] * len(kernel))
        tensors[f"{name}.lora_down.weight"] = (down * size.sqrt()).half().reshape(rank, *weight.shape[1:])
        tensors[f"{name}.alpha"] = torch.tensor(rank / 4)
    save_file(tensors, path)
    return path


def make_set(
    folder: Path, family: str = "sd15", ranks: tuple[int, ...] = (4, 3), separate: bool = False, **recipe
) -> HyperSet:
    """A narrow fp16 hyper-model of a family with random LoRAs."""
    weights = cast(base_weights(family), torch.float16)
    hyper = folder / "fam.safetensors"
    save_file(weights, hyper)
    layers = list(reachable(hyper))
    loras = [random_lora(folder / f"fam-{i}.safetensors", layers, weights, r, i) for i, r in enumerate(ranks, start=1)]
    made = Recipe(
        hyper=hyper.name, loras=[path.stem for path in loras], multipliers=MULTIPLIERS,
        te_multipliers=TE_MULTIPLIERS if separate else None, models={"anna": 0.1, "bert": 0.2, "carl": 0.3},
        ranks=list(ranks), **{"residual_share": 0.04, **recipe},
    )  # fmt: skip
    save_file(weights, hyper, {"format": "pt", "hypermerge": made.text()})
    return HyperSet(folder, hyper, tuple(loras), made)

"""Models of a hyper-merge, and the rows that are read of their layers."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from adapter_samples import SAMPLES, Dice
from models import UNET, Weights, base_weights, rank_change, reachable, tuned_weights
from safetensors.torch import load_file, save_file

from lib_hypermerge.hosts.standalone import PathHost
from lib_hypermerge.jobs.hyper.inputs import Inputs, Layer, Source, open_inputs
from lib_hypermerge.jobs.hyper.spec import HyperSpec

PROJECTION = UNET + "input_blocks.4.1.proj_in.weight"


def opened(models: list[Path], base: Path | None = None, host=None, **more) -> Inputs:
    values = {"models": [str(path) for path in models], "name": "h", "ranks": "2,1", **more}
    return open_inputs(HyperSpec.from_json(values | ({"base": str(base)} if base else {})), host or PathHost())


@functools.cache
def family(name: str = "sd15", count: int = 3) -> list[Weights]:
    base = base_weights(name)
    return [tuned_weights(base, rank_change(3), seed=seed) for seed in range(count)]


def flat(weight: torch.Tensor) -> torch.Tensor:
    return weight.float().flatten(1)


def read(source: Source, layer: Layer, start: int, stop: int) -> torch.Tensor:
    out = torch.full((stop - start, layer.shape[1]), float("nan"))
    source.rows_into(layer, start, stop, out)
    return out


def assert_rows(source: Source, layer: Layer, expected: torch.Tensor, tolerance: float = 0.0) -> None:
    """All rows at once, and a few ranges of them in any order."""
    n = layer.shape[0]
    assert expected.shape == layer.shape
    ranges = [(0, n), (n // 2, n), (0, 1), (n - 1, n), (n // 3, max(n // 3, 2 * n // 3)), (1, 1)]
    for start, stop in ranges:
        got, true = read(source, layer, start, stop).double(), expected[start:stop].double()
        assert got.shape == true.shape
        assert float((got - true).norm()) <= tolerance * float(expected.norm()), (layer.key, start, stop)


@functools.cache
def tensors_of(path: Path) -> dict[str, tuple[str, slice]]:
    return {name: (key, rows) for name, key, rows in reachable(path)}


numbers_of = functools.cache(load_file)  # of files that stay as they are


def write_lora(path: Path, checkpoint: Path, kind: str, only=lambda name: True, seed: int = 0) -> tuple[Path, dict]:
    """One module per layer; returns what each changes as a function of its weight."""
    dice, tensors, changes = Dice(seed), {}, {}
    stored = numbers_of(checkpoint)
    for name, (key, rows) in tensors_of(checkpoint).items():
        if only(name):
            parts, changes[name] = SAMPLES[kind](tuple(stored[key][rows].shape), dice)
            tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    save_file(tensors, path)
    return path, changes

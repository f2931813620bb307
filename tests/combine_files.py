"""LoRAs of every family for a narrow checkpoint, and what they add up to, told in float64 from dense matrices."""

from __future__ import annotations

import functools
import shutil
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from adapter_samples import SAMPLES, Change, Dice
from models import base_weights, cast, last_json, reachable, run_cli
from safetensors.torch import load_file, save_file

from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise

Tensors = dict[str, torch.Tensor]
NEED_WEIGHT = ("ia3", "dora_input", "dora_output", "glora", "oft")
WITHOUT_FACTORS = (*NEED_WEIGHT, "full", "lokr_full")


@dataclass(frozen=True)
class Lora:
    """A file and, by module name, what it changes: W ↦ ΔW in float64."""

    path: Path
    changes: dict[str, Change]


def combine(*arguments) -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    result = run_cli(["combine", "--json", "--quiet", *arguments])
    assert result.returncode == 0, result.stderr
    return last_json(result)


def refused(*arguments) -> dict:
    """The error of a run that must be refused as wrong."""
    result = run_cli(["combine", "--json", "--quiet", *arguments])
    assert result.returncode == 2, result.stdout + result.stderr
    return last_json(result)["error"]


@functools.cache
def weights_of(path: Path) -> dict[str, torch.Tensor]:
    """The weight of every layer that a LoRA reaches, float64, by its module's name."""
    stored = load_file(path)
    return {name: stored[key][rows].double() for name, key, rows in reachable(path)}


@functools.cache
def blocks_of(path: Path) -> dict[str, str]:
    """The block of every module, by its name."""
    with open_tensors(path) as file:
        return {m.name: m.block for own in recognise(file).components.values() for m in own.values() if m.name}


def save_base(path: Path, family: str = "sd15", divisor: int = 32) -> Path:
    save_file(cast(base_weights(family, divisor), torch.float16), path)
    return path


def write(path: Path, base: Path, kind: str, seed: int = 0, only: Callable[[str], bool] = lambda name: True) -> Lora:
    """A file of one module per layer of the checkpoint."""
    dice, tensors, changes = Dice(seed), {}, {}
    for name, weight in weights_of(base).items():
        if only(name):
            parts, changes[name] = SAMPLES[kind](tuple(weight.shape), dice)
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(tensors, path)
    return Lora(path, changes)


def twin(lora: Lora) -> Lora:
    """The same in another file."""
    path = lora.path.with_name(f"twin-{lora.path.name}")
    shutil.copyfile(lora.path, path)
    return Lora(path, lora.changes)


def some(name: str) -> bool:
    """About a tenth of SD1's layers: linear, 1×1 and 3×3, of the UNet and its text encoder."""
    return "mid_block" in name or "layers_3_" in name or "down_blocks_1_resnets_0" in name


def half(name: str) -> bool:
    """Half of the layers, of all kinds and both networks."""
    return zlib.crc32(name.encode()) % 2 == 0


def every(name: str) -> bool:
    return True


def summed(base: Path, terms: Iterable[tuple[Lora, float, float]]) -> Tensors:
    """Σ w·ΔW by module, flattened; each LoRA changes the weight that those before it have changed already.

    terms: (LoRA, weight in the UNet, in text encoders).
    """
    before = weights_of(base)
    now = {name: weight.clone() for name, weight in before.items()}
    touched = set()
    for lora, unet, te in terms:
        for name, change in lora.changes.items():
            strength = te if name.startswith("lora_te") else unet
            now[name] += strength * change(now[name].clone())
            touched.add(name)
    return {name: (now[name] - before[name]).flatten(1) for name in touched}


def read(path: Path) -> Tensors:
    """What a kohya file adds to each module's weight, flattened float64: alpha / rank · up · down, or diff."""
    stored, out = load_file(path), {}
    for key, tensor in stored.items():
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            down, up = tensor.double().flatten(1), stored[f"{name}.lora_up.weight"].double().flatten(1)
            out[name] = out.get(name, 0) + up @ down * (float(stored[f"{name}.alpha"]) / len(down))
        elif part == "diff":
            out[name] = out.get(name, 0) + tensor.double().flatten(1)
    return out


def ranks(path: Path) -> dict[str, int]:
    return {key.partition(".")[0]: len(t) for key, t in load_file(path).items() if key.endswith("lora_down.weight")}


def missed(made: Tensors, goal: Tensors) -> float:
    """‖Σ − made‖ / ‖Σ‖ over all modules of the goal; the file must hold these and no others."""
    assert made.keys() == goal.keys()
    error2 = sum(float((made[name] - delta).square().sum()) for name, delta in goal.items())
    return (error2 / sum(float(delta.square().sum()) for delta in goal.values())) ** 0.5


def worst(made: Tensors, goal: Tensors) -> float:
    """The same of the layer that is missed most."""
    assert made.keys() == goal.keys()
    return max(float((made[name] - delta).norm() / delta.norm()) for name, delta in goal.items())


def flags(terms: Sequence[tuple[Lora, float, float]]) -> list:
    return [item for lora, unet, te in terms for item in ("--lora", lora.path, unet, te)]

"""Samples of every family on a few layers of a narrow SD1.5, and the resize command run on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from adapter_samples import SAMPLES, Dice
from convert_files import Tensors, layers, load
from models import last_json, run_cli

from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import Module

PATHS = ("input_blocks.4.1.transformer_blocks.0.attn1.to_q", "input_blocks.4.1.proj_in",
         "input_blocks.4.0.in_layers.2", "encoder.layers.0.mlp.fc1")  # fmt: skip
Changes = dict[str, Callable[[torch.Tensor], torch.Tensor]]


@functools.cache
def chosen() -> list[Module]:
    """A linear layer, a 1×1 and a 3×3 convolution, and a text encoder's layer."""
    return [next(m for m in layers("sd15", 16) if m.path == path) for path in PATHS]


def sample(family: str, seed: int = 0) -> tuple[Tensors, Changes]:
    """(a file's tensors, module name → W ↦ ΔW)."""
    tensors, changes = {}, {}
    for i, module in enumerate(chosen()):
        parts, change = SAMPLES[family](tuple(module.weight.shape), Dice(seed + i))
        tensors |= {f"{module.name}.{part}": t.clone() for part, t in parts.items()}
        changes[module.name] = change
    return tensors, changes


def wanted(changes: Changes, checkpoint: Path) -> dict[str, np.ndarray]:
    """What a file changes, (n, k) float64 by module name."""
    out = {}
    with open_tensors(checkpoint) as file:
        model = recognise(file)
        for module in chosen():
            weight = file.read(model.components[module.component][module.path].weight).double()
            out[module.name] = changes[module.name](weight).flatten(1).numpy()
    return out


def best(goal: dict[str, np.ndarray], rank: int) -> dict[str, np.ndarray]:
    """Each change cut to a rank by a full SVD."""
    out = {}
    for name, A in goal.items():
        U, S, Vh = np.linalg.svd(A, full_matrices=False)
        out[name] = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return out


def distance(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> float:
    """‖a − b‖ over all modules, as a share of ‖b‖."""
    top, bottom = (sum(float(np.square(x).sum()) for x in xs) for xs in ([a[k] - b[k] for k in b], b.values()))
    return (top / bottom) ** 0.5


def deltas(path: Path, as_loaded: bool = False) -> dict[str, np.ndarray]:
    """alpha / rank · up · down of every plain LoRA module in kohya's spelling, float64.

    as_loaded: with the scale in float32, as it meets a model's weights.
    """
    stored, out = load(path), {}
    for key, down in stored.items():
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            alpha = float(stored[f"{name}.alpha"]) if f"{name}.alpha" in stored else float(len(down))
            scale = float(np.float32(alpha / len(down))) if as_loaded else alpha / len(down)
            up, whole = stored[f"{name}.lora_up.weight"].double().flatten(1), 0.0
            for i, row in enumerate(down.double().flatten(1)):  # one after another, so that zeros change no bit
                whole = whole + scale * up[:, i : i + 1] * row
            out[name] = whole.numpy()
    return out


def run(*arguments) -> tuple[int, dict]:
    """Exit code, and the JSON of the last line."""
    result = run_cli(["resize", *arguments, "--json", "--quiet"])
    return result.returncode, last_json(result)


def resize(*arguments) -> dict:
    """A run that must succeed."""
    code, answer = run(*arguments)
    assert code == 0, answer
    return answer


def refusal(*arguments) -> dict:
    """The error of a run that must be refused."""
    code, answer = run(*arguments)
    assert code == 2, answer
    return answer["error"]

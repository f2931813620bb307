"""Narrow checkpoints with true keys, written by the safetensors library and by torch, and a way to run the CLI."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from lib_hypermerge import cli
from lib_hypermerge.files.opening import open_tensors
from lib_hypermerge.layouts.detect import recognise
from lib_hypermerge.layouts.module import LORA_KINDS
from lib_hypermerge.layouts.tables import narrow, shapes
from lib_hypermerge.synthetic import random_weight

ROOT = Path(__file__).resolve().parent.parent
Weights = dict[str, torch.Tensor]
Change = Callable[[str, torch.Tensor, torch.Generator], torch.Tensor | None]

UNET = "model.diffusion_model."
# a layer that every family has, and one of its text encoders' layers
ATTENTION = UNET + "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight"
CONVOLUTION = UNET + "input_blocks.4.0.in_layers.2.weight"
NORM = UNET + "input_blocks.4.0.in_layers.0"
SD1_TEXT = "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight"


def is_vae(key: str) -> bool:
    return key.startswith("first_stage_model.")


def base_weights(family: str = "sd15", divisor: int = 32, seed: int = 0) -> Weights:
    """A random float32 checkpoint of a family in layouts.tables; of its VAE only the first convolution."""
    table = narrow(shapes(family), divisor)
    generator = torch.Generator().manual_seed(seed)
    return {
        key: random_weight(key, shape, generator).contiguous()
        for key, shape in sorted(table.items())
        if not is_vae(key) or key.startswith("first_stage_model.encoder.conv_in.")
    }


def tuned_weights(base: Weights, change: Change, seed: int = 1) -> Weights:
    """base plus change(key, weight, generator); where that is None, the same tensor."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, weight in base.items():
        delta = change(key, weight, generator)
        out[key] = weight if delta is None else weight + delta
    return out


def rank_change(rank: int, strength: float = 0.1, only: Callable[[str], bool] = lambda key: True) -> Change:
    """A random change of exactly this rank for every matrix and convolution outside the VAE."""

    def change(key: str, weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor | None:
        if weight.dim() < 2 or weight.dtype == torch.int64 or is_vae(key) or "embedding" in key or not only(key):
            return None
        n, k = weight.flatten(1).shape
        r = min(rank, n, k)
        delta = torch.randn(n, r, generator=generator) @ torch.randn(r, k, generator=generator)
        return (strength * weight.norm() / delta.norm() * delta).reshape(weight.shape)

    return change


def only_keys(*keys: str) -> Callable[[str], bool]:
    return lambda key: key in keys


def cast(weights: Weights, dtype: torch.dtype) -> Weights:
    return {key: w.to(dtype) if w.is_floating_point() else w for key, w in weights.items()}


def save_checkpoint(path: Path, weights: Weights, **torch_save_options) -> Path:
    """By suffix: through the safetensors library, or torch.save."""
    if path.suffix == ".safetensors":
        save_file({key: w.contiguous() for key, w in weights.items()}, path)
    else:
        torch.save({"state_dict": weights}, path, **torch_save_options)
    return path


def torch_saves(dtype: torch.dtype) -> bool:
    """Whether this torch can write the number format into a pickle; 2.1 cannot write fp8."""
    try:
        torch.save(torch.ones(1).to(dtype), io.BytesIO())
    except KeyError:
        return False
    return True


def save_pair(folder: Path, base: Weights, tuned: Weights, dtype: torch.dtype = torch.float32) -> tuple[Path, Path]:
    return (
        save_checkpoint(folder / "base.safetensors", cast(base, dtype)),
        save_checkpoint(folder / "tuned.safetensors", cast(tuned, dtype)),
    )


# --- the command line -------------------------------------------------------------------------------------


def run_cli(arguments: list, spawn: bool = False) -> subprocess.CompletedProcess:
    """Run a command in this process, or as a program of its own (slow: that imports torch anew)."""
    arguments = [str(argument) for argument in arguments]
    if spawn:
        command = [sys.executable, "-m", "lib_hypermerge", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    out, err = io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def extract_arguments(base: Path, tuned: Path, out: Path, *more) -> list:
    return ["extract", "--base", base, "--tuned", tuned, "--out", out, "--json", "--quiet", "--device", "cpu", *more]


def extract(base: Path, tuned: Path, out: Path, *more) -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    result = run_cli(extract_arguments(base, tuned, out, *more))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def last_json(result: subprocess.CompletedProcess) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def listing(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# --- the oracle -------------------------------------------------------------------------------------------


def lora_deltas(path: Path) -> dict[str, torch.Tensor]:
    """What a LoRA file adds to each module, float64: alpha / rank · up · down."""
    stored = load_file(path)
    out = {}
    for key in stored:
        if key.endswith(".lora_down.weight"):
            name = key.removesuffix(".lora_down.weight")
            down, up = stored[key].double(), stored[f"{name}.lora_up.weight"].double()
            delta = up.flatten(1) @ down.flatten(1) * (stored[f"{name}.alpha"].double() / len(down))
            out[name] = delta.reshape(len(up), *down.shape[1:])
    return out


def lora_ranks(path: Path) -> dict[str, int]:
    return {k.removesuffix(".lora_down.weight"): len(v) for k, v in load_file(path).items() if "lora_down" in k}


def reachable(path: Path) -> Iterator[tuple[str, str, slice]]:
    """(LoRA name, tensor name, rows) of every weight of a checkpoint that a LoRA reaches."""
    with open_tensors(path) as file:
        for modules in recognise(file).components.values():
            for module in modules.values():
                if module.name and module.kind in LORA_KINDS and module.weight:
                    rows, index = module.weight.shape[0], "qkv".index(module.part or "q")
                    yield module.name, module.weight.name, slice(index * rows, (index + 1) * rows)


def true_deltas(base_path: Path, tuned_path: Path, alpha: float = 1.0, beta: float = 1.0) -> dict[str, torch.Tensor]:
    """alpha·tuned − beta·base of every reachable weight, float64, from files that spell names alike."""
    base, tuned = load_file(base_path), load_file(tuned_path)
    return {
        name: alpha * tuned[key][rows].double() - beta * base[key][rows].double()
        for name, key, rows in reachable(tuned_path)
    }


def relative_error(expected: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> float:
    """‖ΔW − stored‖ / ‖ΔW‖ over all modules that were stored."""
    error2 = sum(float((expected[name] - delta).square().sum()) for name, delta in stored.items())
    return (error2 / sum(float(expected[name].square().sum()) for name in stored)) ** 0.5

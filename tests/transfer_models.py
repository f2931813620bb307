"""Relatives of narrow checkpoints, made by hand: pruned ones, wider ones, and such whose relation is known exactly."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import convert_files as files
import torch
from models import UNET, Weights, base_weights, last_json, run_cli, save_checkpoint

from lib_hypermerge.jobs.host import Context
from lib_hypermerge.jobs.transfer.spec import TransferSpec

Tensor = torch.Tensor


def save_models(folder: Path) -> Path:
    """Two related bases, a stranger, one of another architecture, and a LoRA for either architecture."""
    base = base_weights()
    save_checkpoint(folder / "source.safetensors", base)
    save_checkpoint(folder / "target.safetensors", noisy(base, 0.05))
    save_checkpoint(folder / "stranger.safetensors", base_weights(seed=9))
    save_checkpoint(folder / "sd2.safetensors", base_weights("sd21"))
    files.save(folder / "style.safetensors", files.lora("sd15", only=files.some))
    files.save(folder / "xl.safetensors", files.lora("sdxl", only=files.some))
    return folder


def values(models: Path, tmp_path: Path, **more) -> TransferSpec:
    return TransferSpec.from_json({
        "loras": [str(models / "style.safetensors")], "source_base": str(models / "source.safetensors"),
        "target_base": str(models / "target.safetensors"), "out": str(tmp_path / "new"), **more,
    })  # fmt: skip


def replacing(path: Path) -> tuple[Context, list[int]]:
    """A job's context that replaces a file by a copy of it, once, while the job reads; and a list, empty until then."""
    done: list[int] = []

    def on_progress(fraction: float, _text: str) -> None:
        if fraction > 0.3 and not done:
            done.append(path.with_name("other").write_bytes(path.read_bytes()))
            path.with_name("other").replace(path)

    return Context(on_progress), done


def transfer(lora, source: Path, target: Path, out: Path, *more) -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    result = run_cli(arguments(lora, source, target, out, *more))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def arguments(lora, source: Path, target: Path, out: Path, *more) -> list:
    loras = lora if isinstance(lora, list) else [lora]
    return ["transfer", "--lora", *loras, "--source-base", source, "--target-base", target, "--out", out, "--json",
            "--quiet", *more]  # fmt: skip


def refusal(lora, source: Path, target: Path, out: Path, *more) -> dict:
    """The error of a run that must be refused."""
    result = run_cli(arguments(lora, source, target, out, *more))
    assert result.returncode == 2, result.stdout or result.stderr
    return last_json(result)["error"]


def noisy(weights: Weights, share: float, seed: int = 5) -> Weights:
    """Every matrix with random numbers added, of this share of its norm: as a little training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for key, weight in weights.items():
        out[key] = weight
        if weight.dim() > 1 and weight.is_floating_point() and "embedding" not in key:
            noise = torch.randn(weight.shape, generator=generator)
            out[key] = weight + share * weight.norm() / noise.norm() * noise
    return out


def fewer_transformer_blocks(weights: Weights, kept: Mapping[str, list[int]]) -> Weights:
    """As SSD-1B is pruned: of the list of blocks at a path only some, numbered anew; [] takes the attention away."""
    out = {}
    for key, weight in weights.items():
        found = next((path for path in kept if key.startswith(f"{UNET}{path}.")), None)
        if found is None:
            out[key] = weight
            continue
        match = re.fullmatch(rf"{re.escape(UNET + found)}\.transformer_blocks\.(\d+)\.(.+)", key)
        if match is None:
            if kept[found]:
                out[key] = weight
        elif int(match[1]) in kept[found]:
            number = kept[found].index(int(match[1]))
            out[f"{UNET}{found}.transformer_blocks.{number}.{match[2]}"] = weight
    return out


def without_blocks(weights: Weights, *paths: str) -> Weights:
    """As BK-SDM is pruned, in a single file's numbering, which then has gaps."""
    return {key: w for key, w in weights.items() if not any(key.startswith(f"{UNET}{path}.") for path in paths)}


def renumbered(weights: Weights, numbers: Mapping[str, str]) -> Weights:
    """Blocks under other numbers, as a program would save a network that never had the others."""
    out = {}
    for key, weight in weights.items():
        block = next((old for old in numbers if key.startswith(f"{UNET}{old}.")), None)
        out[key if block is None else f"{UNET}{numbers[block]}.{key.removeprefix(f'{UNET}{block}.')}"] = weight
    return out


def each_matrix(weights: Weights, change: Callable[[str, Tensor], Tensor]) -> Weights:
    """Every layer's weight, seen as (n, k) in float64, replaced."""
    out = {}
    for key, weight in weights.items():
        plain = weight.dim() < 2 or not weight.is_floating_point() or "embedding" in key
        out[key] = weight if plain else change(key, weight.double().flatten(1)).reshape(weight.shape).float()
    return out

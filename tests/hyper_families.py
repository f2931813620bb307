"""Narrow checkpoints of one family whose shared directions are known, and a hyper-merge of them by the CLI."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from models import UNET, Weights, base_weights, cast, is_vae, last_json, run_cli, save_checkpoint

Direction = dict[str, torch.Tensor]  # key → (n, k)


@dataclass(frozen=True)
class Family:
    """models: base + Σ_i multipliers[m, i] · directions[i] + own part, float32.  directions: of norm 1 overall."""

    base: Weights
    models: list[Weights]
    multipliers: torch.Tensor
    directions: list[Direction]

    def save(self, folder: Path, dtype: torch.dtype = torch.float32, names: str = "abcdefghij") -> list[Path]:
        """a.safetensors, b.safetensors …; base.safetensors beside them."""
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(folder / "base.safetensors", cast(self.base, dtype))
        return [
            save_checkpoint(folder / f"{name}.safetensors", cast(model, dtype))
            for name, model in zip(names, self.models, strict=False)
        ]


_BLOCKS = ("time_embed", "out.", "input_blocks.0.", "input_blocks.1.", "input_blocks.4.", "input_blocks.7.",
           "output_blocks.8.")  # fmt: skip


def few_blocks(weights: Weights) -> Weights:
    """A block of every width and two layers of each text encoder: what a test needs of a checkpoint, in less time."""

    def kept(key: str) -> bool:
        if key.startswith(UNET):
            return key.removeprefix(UNET).startswith(_BLOCKS)
        layer = re.search(r"\.(?:layers|resblocks)\.(\d+)\.", key)
        return layer is None or int(layer[1]) < 2

    return {key: weight for key, weight in weights.items() if kept(key)}


def base_of(family: str = "sd15", divisor: int = 32, seed: int = 0, whole: bool = False) -> Weights:
    weights = base_weights(family, divisor, seed)
    return weights if whole else few_blocks(weights)


def reached(weights: Weights) -> list[str]:
    """Keys of the matrices and convolutions that change."""
    matrices = (key for key, weight in weights.items() if weight.dim() > 1 and weight.is_floating_point())
    return [key for key in matrices if not is_vae(key) and "embedding" not in key]


def product(key: str, base: Weights, spectrum: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random (n, k) of a norm in proportion to the weight's, σ as given as far as the layer's size goes."""
    n, k = base[key].flatten(1).shape
    S = spectrum[: min(n, k)]
    U = torch.linalg.qr(torch.randn(n, len(S), generator=generator)).Q
    V = torch.linalg.qr(torch.randn(k, len(S), generator=generator)).Q
    return (U * S) @ V.mT * (base[key].norm() / S.norm())


def direction(base: Weights, spectrum: torch.Tensor, seed: int) -> Direction:
    """One change of every layer, of norm 1 over all of them."""
    generator = torch.Generator().manual_seed(seed)
    out = {key: product(key, base, spectrum, generator) for key in reached(base)}
    norm = sum(float(D.square().sum()) for D in out.values()) ** 0.5
    return {key: D / norm for key, D in out.items()}


def flat(rank: int) -> torch.Tensor:
    """A spectrum of `rank` like singular values, a little apart."""
    return torch.linspace(1.2, 0.8, rank)


def decaying(power: float, length: int = 64) -> torch.Tensor:
    return torch.arange(1, length + 1).float() ** -power


def mixed(
    base: Weights, multipliers: torch.Tensor, directions: Sequence[Direction], own: float = 0.0,
    own_spectrum: torch.Tensor | None = None, strength: float = 0.05, rests: float = 0.0, seed: int = 100,
) -> Family:  # fmt: skip
    """own: norm of each model's own part, in shared directions' norms.  strength: of those in the weights' norm.

    own_spectrum: none is plain noise.  rests: how far norms and biases are apart.
    """
    scale = strength * sum(float(base[key].square().sum()) for key in reached(base)) ** 0.5
    keys, models = set(reached(base)), []
    noise = torch.ones(4096) if own_spectrum is None else own_spectrum
    for m, row in enumerate(multipliers.tolist()):
        generator = torch.Generator().manual_seed(seed + 1 + m)
        alone = direction(base, noise, seed + 1000 * (m + 1)) if own else {}
        model = {}
        for key, weight in base.items():
            if key in keys:
                change = own * alone[key] if own else torch.zeros(weight.flatten(1).shape)
                for λ, D in zip(row, directions, strict=True):
                    change = change + λ * D[key]
                model[key] = weight + scale * change.reshape(weight.shape)
            elif rests and weight.dim() == 1 and not is_vae(key):
                model[key] = weight + rests * torch.randn(weight.shape, generator=generator)
            else:
                model[key] = weight
        models.append(model)
    scaled = [{key: scale * D for key, D in one.items()} for one in directions]
    return Family(base, models, multipliers, scaled)


def spread(models: int, K: int, seed: int, centred: bool = True) -> torch.Tensor:
    """(M, K) multipliers, far from parallel; centred: every column's sum is 0."""
    λ = torch.randn(models, K, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    λ = torch.linalg.qr(λ - λ.mean(0) if centred else λ).Q * models**0.5
    return λ * torch.linspace(1, 0.7, K)


def known(
    models: int = 5, ranks: Sequence[int] = (3, 2), own: float = 0.0, family: str = "sd15", divisor: int = 32,
    centred: bool = True, seed: int = 0, whole: bool = False, **more,
) -> Family:  # fmt: skip
    """True directions of these ranks in every layer that is large enough for them."""
    base = base_of(family, divisor, seed, whole)
    directions = [direction(base, flat(rank), seed + 10 + i) for i, rank in enumerate(ranks)]
    return mixed(base, spread(models, len(ranks), seed, centred), directions, own, seed=seed + 100, **more)


def gradual(
    models: int, K: int = 3, own: float = 0.7, divisor: int = 32, seed: int = 0, whole: bool = False, **more
) -> Family:
    """As fine-tunes look: K shared directions of decaying spectra, and as steep a part of each model's own."""
    base = base_of("sd15", divisor, seed, whole)
    directions = [direction(base, decaying(0.6 + 0.2 * i), seed + 10 + i) for i in range(K)]
    return mixed(base, spread(models, K, seed), directions, own, decaying(0.5), seed=seed + 100, **more)


def subspace(models: int, K: int, dimension: int, divisor: int = 32, seed: int = 0) -> Family:
    """Models in one column space and one row space of every layer, but each with directions of its own there."""
    base = base_of("sd15", divisor, seed)
    generator = torch.Generator().manual_seed(seed + 5)
    spaces = {}
    for key in reached(base):
        n, k = base[key].flatten(1).shape
        d = min(dimension, n, k)
        spaces[key] = [torch.linalg.qr(torch.randn(size, d, generator=generator)).Q for size in (n, k)]
    models_ = []
    for _ in range(models):
        model = dict(base)
        for key, (U, V) in spaces.items():
            change = U @ torch.randn(U.shape[1], V.shape[1], generator=generator) @ V.mT
            model[key] = base[key] + 0.05 * base[key].norm() * (change / change.norm()).reshape(base[key].shape)
        models_.append(model)
    return Family(base, models_, torch.zeros(models, K), [])


# --- runs ---------------------------------------------------------------------------------------------------


def arguments(models: Sequence[Path], folder: Path, *more, name: str = "h") -> list:
    chosen = [part for path in models for part in ("--model", path)]
    common = ["--name", name, "--out-dir", folder, "--json", "--quiet", "--device", "cpu", "--threads", 1]
    return ["hyper", *chosen, *common, *more]


def hyper(models: Sequence[Path], folder: Path, *more, name: str = "h") -> dict:
    """A run that must succeed; returns the JSON of its last line."""
    folder.mkdir(parents=True, exist_ok=True)
    result = run_cli(arguments(models, folder, *more, name=name))
    assert result.returncode == 0, result.stderr
    return last_json(result)


def lora_files(folder: Path, answer: dict) -> dict[str, Path]:
    return {one["name"]: folder / f"{one['name']}.safetensors" for one in answer["loras"]}


# --- comparing ------------------------------------------------------------------------------------------------


def matched(found: torch.Tensor, true: torch.Tensor) -> list[tuple[int, int, float]]:
    """(column found, column of the truth, |cosine|) of the pairs that fit best, best first."""
    cosines = (found / found.norm(dim=0)).mT @ (true / true.norm(dim=0))
    left, pairs = cosines.abs().clone(), []
    for _ in range(min(cosines.shape)):
        i, j = divmod(int(left.argmax()), left.shape[1])
        pairs.append((i, j, float(left[i, j])))
        left[i], left[:, j] = -1, -1
    return pairs

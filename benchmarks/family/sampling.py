"""Pictures from a model: SD1.5's noise schedule, classifier-free guidance, the deterministic DDIM sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from .drawing import SIDE
from .model import Model

STEPS, GUIDANCE = 12, 3.0


def signal_shares(steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Cumulative products of 1 − β of SD1.5's schedule: the square of the share of the signal after each step."""
    betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64).square()
    return (1 - betas).cumprod(0).float()


def noise(seeds: list[int], side: int = SIDE) -> Tensor:
    """[n, 4, side/8, side/8], each from its own seed, so that no picture depends on its neighbours."""
    return torch.stack(
        [torch.randn(4, side // 8, side // 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


@torch.no_grad()
def latents(
    model: Model, captions: list[str], seeds: list[int], steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """DDIM (Song et al., ICLR 2021, eq. 12, σ = 0) with guidance (Ho and Salimans 2022), evenly spaced from step 1."""
    shares = signal_shares()
    times = torch.arange(0, 1000, 1000 // steps).flip(0) + 1
    text = torch.cat([model.read([""]).expand(len(captions), -1, -1), model.read(captions)])
    x = noise(seeds)
    for index, time in enumerate(times.tolist()):
        predicted = model.unet(torch.cat([x, x]), torch.full((2 * len(x),), time), text)
        without, with_text = predicted.chunk(2)
        e = without + guidance * (with_text - without)
        share = shares[time]
        following = shares[times[index + 1]] if index + 1 < len(times) else shares[0]
        clean = (x - (1 - share).sqrt() * e) / share.sqrt()
        x = following.sqrt() * clean + (1 - following).sqrt() * e
    return x


@torch.no_grad()
def pictures(model: Model, captions: list[str], seeds: list[int], at_once: int = 32, **options: float) -> Tensor:
    """[n, 3, 64, 64] in [-1, 1]."""
    drawn = []
    for start in range(0, len(captions), at_once):
        part = slice(start, start + at_once)
        drawn.append(model.vae.decode(latents(model, captions[part], seeds[part], **options)))  # type: ignore[arg-type]
    return torch.cat(drawn).clamp(-1, 1)

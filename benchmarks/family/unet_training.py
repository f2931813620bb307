"""The family's U-Nets: a base from nothing, full fine-tunes of it; or the text encoder's weights alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .captions import Scene
from .drawing import draw
from .model import Model
from .sampling import signal_shares
from .vae_training import fast_bfloat16

_EMPTY = 0.1  # share of captions left empty, for guidance


@torch.no_grad()
def encode(model: Model, scenes: list[Scene], manner: str, random: torch.Generator) -> Tensor:
    """Latents [n, 4, 8, 8] of a drawing of each scene."""
    parts = [scenes[start : start + 64] for start in range(0, len(scenes), 64)]
    with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
        return torch.cat([model.vae.encode(draw(part, manner, random)).float() for part in parts])


def fit(
    model: Model,
    captions: list[str],
    latents: Tensor,
    seed: int,
    say: Callable[[str], None],
    *,
    steps: int,
    rate: float,
    size: int = 32,
    average: float = 0.995,
    text: bool = False,
    every: int = 100,
) -> None:
    """Train in place: mean squared error of the predicted noise (Ho et al. 2020, eq. 14), Adam, weights averaged.

    `text` trains the text encoder alone; otherwise the U-Net alone, all of its weights.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    trained = model.text if text else model.unet
    trained.requires_grad_(True)
    shares = signal_shares()
    distinct = sorted(set(captions))
    row = {caption: number for number, caption in enumerate(distinct)}
    rows = torch.tensor([row[caption] for caption in captions])
    states, empty = model.read(distinct), model.read([""])
    ids, no_ids = model.tokenizer(distinct), model.tokenizer([""])
    parameters = list(trained.parameters())
    averaged = [p.detach().clone() for p in parameters]
    optimiser = torch.optim.AdamW(parameters, rate, betas=(0.9, 0.99), weight_decay=0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1, pct_start=0.1)
    total = 0.0
    for step in range(1, steps + 1):
        picks = torch.randint(len(latents), (size,), generator=random)
        without = torch.rand(size, generator=random) < _EMPTY
        if text:
            read = model.text(torch.where(without[:, None], no_ids, ids[rows[picks]]))
        else:
            read = torch.where(without[:, None, None], empty, states[rows[picks]])
        time = ((torch.arange(size) + torch.rand(size, generator=random)) * (1000 / size)).long()  # one in each stretch
        share = shares[time][:, None, None, None]
        e = torch.randn(latents[picks].shape, generator=random)
        predicted = model.unet(share.sqrt() * latents[picks] + (1 - share).sqrt() * e, time, read)
        loss = F.mse_loss(predicted, e)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        rates.step()
        keep = min(average, step / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(averaged, parameters, strict=True):
                mean.lerp_(parameter, 1 - keep)
        total += float(loss.detach())
        if step % every == 0:
            say(f"{step}/{steps}: loss {total / every:.4f}")
            total = 0.0
    with torch.no_grad():
        for parameter, mean in zip(parameters, averaged, strict=True):
            parameter.copy_(mean)
    trained.requires_grad_(False)

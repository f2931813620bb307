"""The family's autoencoder, trained on the pictures of every manner."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .autoencoder import SCALE, Autoencoder, Block
from .captions import by_lot
from .drawing import MANNERS, draw, scenes_in

_SIZE, _RATE = 8, 2e-3
_KL, _NOISE = 1e-6, 0.05
_GUIDED = 0.4  # share of the steps in which the latents are pulled towards the colours of their 8×8 pixels
# Of the three directions of colour, brightness varies most by far; without weights the other two would be learnt last.
_DIRECTIONS = torch.tensor([[3**-0.5] * 3, [2**-0.5, -(2**-0.5), 0], [6**-0.5, 6**-0.5, -2 * 6**-0.5]])


def batch(size: int, random: torch.Generator) -> Tensor:
    """Pictures of scenes and manners drawn by lot, as many of each manner in the long run."""
    pictures = []
    for number in torch.randint(len(MANNERS), (size,), generator=random).tolist():
        manner = MANNERS[number]
        pictures.append(draw(by_lot(scenes_in(manner), 1, random), manner, random))
    return torch.cat(pictures)


def fast_bfloat16() -> bool:
    """Whether this processor multiplies in bfloat16 (AVX-512 BF16 or AMX); elsewhere float32 is quicker."""
    return torch.cpu._is_avx512_bf16_supported()


def train(widths: tuple[int, ...], seed: int, say: Callable[[str], None], steps: int) -> Autoencoder:
    """Least errors of pixels, of their differences to neighbours, and of means over 4×4 and 8×8 pixels.

    Noise on the latents in training makes the decoder forgive what a U-Net gets slightly wrong.
    """
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = Autoencoder(widths)
    _prepare(model)
    optimiser = torch.optim.AdamW(model.parameters(), _RATE, betas=(0.9, 0.99), weight_decay=0)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimiser, _RATE, total_steps=steps + 1, pct_start=0.05)
    half, total = fast_bfloat16(), 0.0
    for step in range(1, steps + 1):
        pictures = batch(_SIZE, random)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            mean, log_variance = (moment.float() for moment in model.moments(pictures))
            spread = torch.exp(0.5 * log_variance) + _NOISE * mean.detach().std()
            drawn = model.decode(SCALE * (mean + spread * torch.randn(mean.shape, generator=random))).float()
        error = _weighted(drawn - pictures, 2.5)
        loss = error.abs().mean() + 2 * error.square().mean()
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        for block in (4, 8):
            coarse = F.avg_pool2d(error, block)
            loss = loss + coarse.abs().mean() + 2 * coarse.square().mean()
        colours = SCALE * mean[:, :3] - F.avg_pool2d(pictures, 8)
        loss = loss + 2 * max(0.0, 1 - step / (_GUIDED * steps)) * _weighted(colours, 2.5).square().mean()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        optimiser.zero_grad(set_to_none=True)
        (loss + _KL * kl).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        rates.step()
        total += float((drawn - pictures).detach().abs().mean())
        if step % 100 == 0:
            say(f"{step}/{steps}: error {total / 100:.4f}")
            total = 0.0
    model.eval().requires_grad_(False)
    with torch.no_grad():
        model.whiten(model.encode(torch.cat([batch(32, random) for _ in range(8)])))
    return model


def _weighted(error: Tensor, weight: float) -> Tensor:
    """[n, 3, h, w] in brightness and two directions of colour, these `weight` times as strong."""
    scale = torch.tensor([1.0, weight, weight])
    return torch.einsum("ncij,dc->ndij", error, scale[:, None] * _DIRECTIONS)


@torch.no_grad()
def _prepare(model: Autoencoder) -> None:
    """Blocks start as what passes through them; the first convolution sees colour as strongly as brightness."""
    for module in model.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv2.weight)
    first = model.encoder.conv_in
    strong = _DIRECTIONS.T @ torch.diag(torch.tensor([1.0, 5.0, 5.0])) @ _DIRECTIONS
    first.weight.copy_(torch.einsum("ocij,cd->odij", first.weight, strong))

"""The autoencoder of Stable Diffusion 1.x at any width, under the names that its checkpoints use."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .unet import GROUPS

SCALE = 0.18215  # latents are multiplied by it before they are noised; hosts have it in their configuration


def _norm(width: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, width, eps=1e-6)


class Block(nn.Module):
    def __init__(self, wide: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = _norm(wide), nn.Conv2d(wide, out, 3, padding=1)
        self.norm2, self.conv2 = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        if wide != out:
            self.nin_shortcut = nn.Conv2d(wide, out, 1)
        self.widens = wide != out

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if self.widens else x)


class Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (part(y).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(mixed.transpose(1, 2).unflatten(2, x.shape[2:]))


class Middle(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.block_1, self.attn_1, self.block_2 = Block(width, width), Attention(width), Block(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Down(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    def __init__(self, wide: int, out: int, blocks: int, **resample: nn.Module):
        super().__init__()
        self.block = nn.ModuleList(Block(wide if number == 0 else out, out) for number in range(blocks))
        for name, part in resample.items():
            setattr(self, name, part)
        self.last = next(iter(resample), None)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        return getattr(self, self.last)(x) if self.last else x


class Encoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        wides, last = (widths[0], *widths[:-1]), len(widths) - 1
        self.down = nn.ModuleList(
            Level(wide, out, 2, **({"downsample": Down(out)} if level < last else {}))
            for level, (wide, out) in enumerate(zip(wides, widths, strict=True))
        )
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = _norm(widths[-1]), nn.Conv2d(widths[-1], latent, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    def __init__(self, widths: tuple[int, ...], latent: int):
        super().__init__()
        self.conv_in = nn.Conv2d(latent, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        wides = (*widths[1:], widths[-1])
        self.up = nn.ModuleList(
            Level(wide, out, 3, **({"upsample": Up(out)} if level else {}))
            for level, (wide, out) in enumerate(zip(wides, widths, strict=True))
        )
        self.norm_out, self.conv_out = _norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Pictures [n, 3, 8h, 8w] in [-1, 1] to latents [n, 4, h, w] and back. widths: multiples of 32, four of them."""

    def __init__(self, widths: tuple[int, ...], latent: int = 4):
        super().__init__()
        self.encoder, self.decoder = Encoder(widths, 2 * latent), Decoder(widths, latent)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1)
        self.post_quant_conv = nn.Conv2d(latent, latent, 1)

    def moments(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the variance of each latent."""
        mean, log_variance = self.quant_conv(self.encoder(pictures)).chunk(2, 1)
        return mean, log_variance.clamp(-30, 20)

    def encode(self, pictures: Tensor) -> Tensor:
        return SCALE * self.moments(pictures)[0]

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents / SCALE))

    @torch.no_grad()
    def whiten(self, latents: Tensor) -> None:
        """Turn and scale the latents, of which [n, 4, h, w] is a sample: `encode` then gives channels of mean 0 and
        deviation 1 that are uncorrelated. What is decoded stays as it is.
        """
        rows = latents.double().transpose(0, 1).flatten(1) / SCALE
        mean = rows.mean(1, keepdim=True)
        values, vectors = torch.linalg.eigh((rows - mean) @ (rows - mean).T / rows.shape[1])
        forward = (vectors / values.sqrt()).T / SCALE  # latent -> white latent, before SCALE
        half = len(forward)
        shift = forward @ mean[:, 0]
        first, last = self.quant_conv, self.post_quant_conv
        assert first.bias is not None and last.bias is not None
        weight, bias = first.weight.double().flatten(1), first.bias.double()
        first.weight[:half] = (forward @ weight[:half])[:, :, None, None].float()
        first.bias[:half] = (forward @ bias[:half] - shift).float()
        first.bias[half:] += torch.log(forward.square().sum(1) / half).float()  # about; hardly used
        back = last.weight.double().flatten(1) @ torch.linalg.inv(forward)
        last.bias += (back @ shift).float()
        last.weight.copy_(back[:, :, None, None].float())

"""The U-Net of Stable Diffusion 1.x at any width, under the names that its checkpoints use.

Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models (CVPR 2022); the blocks are those of its
public configuration: two residual blocks in each of four levels, attention in the upper three, three blocks on
the way up.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUPS = 32  # of every group norm in SD1.x; hosts have it hard-coded, so widths are multiples of it


def timestep_embedding(steps: Tensor, width: int) -> Tensor:
    """[batch] -> [batch, width]: cosines, then sines, of frequencies from 1 to 1/10000."""
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = steps[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


class ResBlock(nn.Module):
    def __init__(self, wide: int, out: int, embedding: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(GROUPS, wide), nn.SiLU(), nn.Conv2d(wide, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(GROUPS, out), nn.SiLU(), nn.Dropout(0), nn.Conv2d(out, out, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if wide == out else nn.Conv2d(wide, out, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(time)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width), nn.Dropout(0))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GatedLinear(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, -1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(GatedLinear(width, 4 * width), nn.Dropout(0), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, width: int, context: int, heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.proj_in = nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(width, context, heads)])
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x))
        tokens = self.transformer_blocks[0](y.flatten(2).transpose(1, 2), text)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, y.shape[2:]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Entry(nn.Conv2d):
    """The first convolution, called like a block."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class Stage(nn.ModuleList):
    """Blocks one after another."""

    def forward(self, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        for block in self:
            x = block(x, time, text)
        return x


class UNet(nn.Module):
    """widths: channels of the four levels, multiples of 32; context: width of the text encoder.

    Forward: latents [n, 4, h, w], steps [n], text [n, tokens, context] -> predicted noise [n, 4, h, w].
    """

    def __init__(self, widths: tuple[int, ...], context: int, heads: int = 8):
        super().__init__()
        first, embedding = widths[0], 4 * widths[0]
        self.width = first
        self.time_embed = nn.Sequential(nn.Linear(first, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        attends = [level < len(widths) - 1 for level in range(len(widths))]
        self.input_blocks = nn.ModuleList([Stage([Entry(4, first, 3, padding=1)])])
        skipped, wide = [first], first
        for level, out in enumerate(widths):
            for _ in range(2):
                block: list[nn.Module] = [ResBlock(wide, out, embedding)]
                if attends[level]:
                    block.append(SpatialTransformer(out, context, heads))
                self.input_blocks.append(Stage(block))
                skipped.append(wide := out)
            if level < len(widths) - 1:
                self.input_blocks.append(Stage([Downsample(wide)]))
                skipped.append(wide)
        self.middle_block = Stage(
            [ResBlock(wide, wide, embedding), SpatialTransformer(wide, context, heads), ResBlock(wide, wide, embedding)]
        )
        self.output_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            for number in range(3):
                block = [ResBlock(wide + skipped.pop(), out, embedding)]
                wide = out
                if attends[level]:
                    block.append(SpatialTransformer(out, context, heads))
                if level and number == 2:
                    block.append(Upsample(out))
                self.output_blocks.append(Stage(block))
        self.out = nn.Sequential(nn.GroupNorm(GROUPS, first), nn.SiLU(), nn.Conv2d(first, 4, 3, padding=1))
        for module in self.modules():  # blocks start as what passes through them
            if isinstance(module, (ResBlock, SpatialTransformer)):
                last = module.out_layers[3] if isinstance(module, ResBlock) else module.proj_out
                assert isinstance(last, nn.Conv2d)
                nn.init.zeros_(last.weight)

    def forward(self, latents: Tensor, steps: Tensor, text: Tensor) -> Tensor:
        time = self.time_embed(timestep_embedding(steps, self.width))
        h, kept = latents, []
        for stage in self.input_blocks:
            h = stage(h, time, text)
            kept.append(h)
        h = self.middle_block(h, time, text)
        for stage in self.output_blocks:
            h = stage(torch.cat([h, kept.pop()], 1), time, text)
        return self.out(h)

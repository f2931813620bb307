"""A narrow Stable Diffusion 1.5: its widths, its three parts, and the checkpoint that holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .captions import Tokenizer
from .text_encoder import TextEncoder
from .unet import UNet

# Widths change where SD1.5's (320, 640, 1280, 1280 and 128, 256, 512, 512) do, so that the names are the same. The
# U-Net's first is two channels a group of its norms: with one, its output could not be brighter or darker as a whole.
# They are whole multiples of the first, for the WebUI is told these.
WIDTHS, VAE_WIDTHS = (64, 128, 64, 64), (32, 64, 96, 96)
TEXT_WIDTH, TEXT_HEADS, HEADS = 64, 4, 2
PREFIXES = {
    "unet": "model.diffusion_model.", "text": "cond_stage_model.transformer.", "vae": "first_stage_model."
}  # fmt: skip


@dataclass
class Model:
    """The three parts, in float32, and the tokenizer that the text encoder was trained with."""

    unet: UNet
    text: TextEncoder
    vae: Autoencoder
    tokenizer: Tokenizer

    def parts(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text": self.text, "vae": self.vae}

    @torch.no_grad()
    def read(self, captions: list[str]) -> Tensor:
        """[n, 77, width]: what the text encoder makes of them."""
        return self.text(self.tokenizer(captions))


def new_unet() -> UNet:
    return UNet(WIDTHS, TEXT_WIDTH, HEADS)


def new_text(tokenizer: Tokenizer) -> TextEncoder:
    return TextEncoder(len(tokenizer), TEXT_WIDTH, TEXT_HEADS)


def save(file: Path, parts: dict[str, nn.Module], dtype: torch.dtype = torch.float16) -> None:
    """A checkpoint in the layout of SD1.5; whole numbers keep their type."""
    tensors = {
        PREFIXES[part] + name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for part, module in parts.items()
        for name, tensor in module.state_dict().items()
    }
    write(file, tensors)


def write(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Beside its target, then renamed: a file that is there is whole."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(file.name + ".part")
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside, metadata={"format": "pt"})
    beside.replace(file)


def load(file: Path) -> Model:
    """A checkpoint that `save` or a job wrote, into float32. RuntimeError if a tensor is missing or too much."""
    return from_tensors(load_file(file))


def from_tensors(tensors: dict[str, Tensor]) -> Model:
    tokenizer = Tokenizer()
    model = Model(new_unet(), new_text(tokenizer), Autoencoder(VAE_WIDTHS), tokenizer)
    for part, module in model.parts().items():
        prefix = PREFIXES[part]
        module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        module.eval().requires_grad_(False)
    return model

"""A VAE in a file of its own: CompVis' names, with or without a checkpoint's prefix, or diffusers'.

Source: CompVis/latent-diffusion ldm/modules/diffusionmodules/model.py; diffusers autoencoder_kl.py.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from ..files.source import TensorFile, TensorInfo

_PREFIXES = ("", "first_stage_model.", "vae.")
_PROBES = {
    "original": ("decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"),
    "diffusers": ("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
}
_ROOTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


@dataclass(frozen=True)
class Vae:
    """An open file of a VAE. layout: "original" or "diffusers".  tensors: its own, by their names in the file."""

    file: TensorFile
    layout: str
    prefix: str
    tensors: dict[str, TensorInfo]

    @property
    def latent_channels(self) -> int | None:
        """4 of SD1, SD2 and SDXL, 16 of SD3 and Flux.1; None where the layers that tell are missing."""
        decoder = self.tensors.get(f"{self.prefix}decoder.conv_in.weight")
        if decoder is not None and len(decoder.shape) == 4:
            return decoder.shape[1]
        encoder = self.tensors.get(f"{self.prefix}encoder.conv_out.weight")  # means and variances
        return encoder.shape[0] // 2 if encoder is not None and len(encoder.shape) == 4 else None


def find_vae(names: Container[str]) -> tuple[str, str] | None:
    """(layout, prefix) of a VAE among these tensors."""
    for prefix in _PREFIXES:
        for layout, probes in _PROBES.items():
            if any(prefix + probe in names for probe in probes):
                return layout, prefix
    return None


def recognise_vae(file: TensorFile) -> Vae | None:
    """The file as a VAE; None if it is none."""
    found = find_vae(file.tensors)
    if found is None:
        return None
    layout, prefix = found
    roots = tuple(prefix + root for root in _ROOTS)
    return Vae(file, layout, prefix, {name: info for name, info in file.tensors.items() if name.startswith(roots)})

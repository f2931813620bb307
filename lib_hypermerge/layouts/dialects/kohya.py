"""kohya-ss names: what sd-scripts writes and A1111, Forge and ComfyUI read.

The UNet of SD1 and SD2 goes by diffusers' block names, other denoisers by the checkpoint's own path;
text encoders by Hugging Face CLIP and T5 paths, open_clip ones too. Dots become underscores.
Source: kohya-ss/sd-scripts networks/lora.py, lora_flux.py, lora_sd3.py; A1111 extensions-builtin/Lora/networks.py.
"""

from __future__ import annotations

import re

from . import diffusers

_HF_LAYER = re.compile(r"encoder\.layers\.\d+\..+")
_T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w\w+)")


def unet_path(path: str) -> str:
    """SDXL, SD3, Flux, and what in SD1/SD2 has no diffusers name a WebUI knows: the path itself."""
    return "lora_unet_" + path.replace(".", "_")


def unet_diffusers(path: str) -> str:
    """SD1/SD2: diffusers' name of a CompVis UNet path such as input_blocks.1.1.proj_in."""
    # diffusers' name of the last norm is none that A1111 knows
    name = None if path == "out.0" else diffusers.unet(path)
    return f"lora_unet_{name.replace('.', '_')}" if name else unet_path(path)


def clip(prefix: str, path: str) -> str | None:
    """A Hugging Face CLIP layer, e.g. encoder.layers.0.mlp.fc1, or its last norm; None for embeddings.

    A1111 finds the last norm only under SDXL's prefix, in SD1 too.
    """
    if path == "final_layer_norm":
        return f"{'lora_te1' if prefix == 'lora_te' else prefix}_text_model_final_layer_norm"
    return f"{prefix}_text_model_{path.replace('.', '_')}" if _HF_LAYER.fullmatch(path) else None


def open_clip(prefix: str, path: str) -> str | None:
    """An open_clip layer, its fused attention given as attn.q_proj, attn.k_proj, attn.v_proj."""
    name = diffusers.text_encoder(path) if path.startswith("transformer.resblocks.") else None
    return f"{prefix}_{name.replace('.', '_')}" if name else None


def t5(path: str) -> str | None:
    """A Hugging Face T5 layer, e.g. encoder.block.0.layer.0.SelfAttention.q: always the third text encoder."""
    return f"lora_te3_{path.replace('.', '_')}" if _T5_LAYER.fullmatch(path) else None

"""kohya-ss names: what sd-scripts writes and A1111, Forge and ComfyUI read.

The UNet of SD1 and SD2 goes by diffusers' block names, other denoisers by the checkpoint's own path;
text encoders by Hugging Face CLIP and T5 paths, open_clip ones too. Dots become underscores.
Source: kohya-ss/sd-scripts networks/lora.py, lora_flux.py, lora_sd3.py; A1111 extensions-builtin/Lora/networks.py.
"""

from __future__ import annotations

import re

_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip

_OPEN_CLIP = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
}  # fmt: skip

_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.?(.*)")
_MIDDLE = re.compile(r"middle_block\.(\d)\.(.*)")
_HF_LAYER = re.compile(r"encoder\.layers\.\d+\..+")
_T5_LAYER = re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(?:SelfAttention\.[qkvo]|DenseReluDense\.w\w+)")
_OPEN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def unet_path(path: str) -> str:
    """SDXL, SD3, Flux, and what in SD1/SD2 has no diffusers name a WebUI knows: the path itself."""
    return "lora_unet_" + path.replace(".", "_")


def unet_diffusers(path: str) -> str:
    """SD1/SD2: diffusers' name of a CompVis UNet path such as input_blocks.1.1.proj_in."""
    if path == "input_blocks.0.0":
        return "lora_unet_conv_in"
    if path == "out.2":
        return "lora_unet_conv_out"
    if path.startswith("time_embed."):
        return f"lora_unet_time_embedding_linear_{int(path[-1]) // 2 + 1}"
    if match := _MIDDLE.fullmatch(path):
        where = "attentions_0" if match[1] == "1" else f"resnets_{int(match[1]) // 2}"
        return f"lora_unet_mid_block_{where}_" + _inner(match[2])
    if match := _BLOCK.fullmatch(path):
        side, index, slot, inner = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(index - 1, 3) if side == "input" else divmod(index, 3)
        name = f"lora_unet_{'down' if side == 'input' else 'up'}_blocks_{block}_"
        if inner == "op":
            return name + "downsamplers_0_conv"
        if inner == "conv":
            return name + "upsamplers_0_conv"
        return name + f"{'attentions' if slot == 1 else 'resnets'}_{layer}_" + _inner(inner)
    return unet_path(path)


def _inner(path: str) -> str:
    return _RESNET.get(path, path).replace(".", "_")


def clip(prefix: str, path: str) -> str | None:
    """A Hugging Face CLIP layer, e.g. encoder.layers.0.mlp.fc1, or its last norm; None for embeddings.

    A1111 finds the last norm only under SDXL's prefix, in SD1 too.
    """
    if path == "final_layer_norm":
        return f"{'lora_te1' if prefix == 'lora_te' else prefix}_text_model_final_layer_norm"
    return f"{prefix}_text_model_{path.replace('.', '_')}" if _HF_LAYER.fullmatch(path) else None


def open_clip(prefix: str, path: str) -> str | None:
    """An open_clip layer, its fused attention given as attn.q_proj, attn.k_proj, attn.v_proj."""
    match = _OPEN_LAYER.fullmatch(path)
    if not match or match[2] not in _OPEN_CLIP:
        return None
    return f"{prefix}_text_model_encoder_layers_{match[1]}_" + _OPEN_CLIP[match[2]].replace(".", "_")


def t5(path: str) -> str | None:
    """A Hugging Face T5 layer, e.g. encoder.block.0.layer.0.SelfAttention.q: always the third text encoder."""
    return f"lora_te3_{path.replace('.', '_')}" if _T5_LAYER.fullmatch(path) else None

"""diffusers' and transformers' names of a checkpoint's layers, and which rows of a fused layer each stands for.

Sources: huggingface/diffusers scripts/convert_original_stable_diffusion_to_diffusers.py, convert_flux_to_diffusers.py,
convert_sd3_to_diffusers.py; huggingface/transformers models/clip/convert_clip_original_pytorch_to_hf.py.
"""

from __future__ import annotations

import re

from ..module import Module
from . import diffusers_transformers as transformers
from .diffusers_transformers import Piece

# what diffusers calls the components of an architecture
COMPONENTS = {
    "sd1": {"unet": "unet", "te": "text_encoder"},
    "sd2": {"unet": "unet", "te": "text_encoder"},
    "sdxl": {"unet": "unet", "te1": "text_encoder", "te2": "text_encoder_2"},
    "sd3": {"unet": "transformer", "te1": "text_encoder", "te2": "text_encoder_2", "te3": "text_encoder_3"},
    "flux": {"unet": "transformer", "te1": "text_encoder", "te3": "text_encoder_2"},
}

RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
UNET_ROOT = {
    "input_blocks.0.0": "conv_in", "out.0": "conv_norm_out", "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2",
}  # fmt: skip
_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.?(.*)")
_MIDDLE = re.compile(r"middle_block\.(\d)\.(.*)")

OPEN_CLIP = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
    "attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj",
}  # fmt: skip
OPEN_CLIP_ROOT = {
    "ln_final": "final_layer_norm", "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding",
}  # fmt: skip
_OPEN_LAYER = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)")


def pieces(architecture: str, module: Module) -> list[Piece]:
    """The layers that a module is in diffusers, in the order of their rows; none where it has no counterpart."""
    if module.weight is None or not module.weight.shape:
        return []
    rows, columns = module.matrix_shape
    if module.component != "unet":
        path = text_encoder(module.path)
        return [Piece(path, 0, rows)] if path else []
    if architecture == "flux":
        return transformers.flux(module.path, rows, columns)
    if architecture == "sd3":
        return transformers.sd3(module.path, rows, columns)
    path = unet(module.path)
    return [Piece(path, 0, rows)] if path else []


def names(architecture: str, module: Module) -> list[tuple[str, Piece]]:
    """pieces() with their names in a file, e.g. `unet.down_blocks.0.attentions.0.proj_in`."""
    component = COMPONENTS[architecture][module.component]
    return [(f"{component}.{piece.path}", piece) for piece in pieces(architecture, module)]


def unet(path: str) -> str | None:
    """A layer of a UNet in the checkpoint's spelling, e.g. input_blocks.1.1.proj_in; None if it is no such path."""
    if path in UNET_ROOT:
        return UNET_ROOT[path]
    if match := _MIDDLE.fullmatch(path):
        where = "attentions.0" if match[1] == "1" else f"resnets.{int(match[1]) // 2}"
        return f"mid_block.{where}.{RESNET.get(match[2], match[2])}"
    if match := _BLOCK.fullmatch(path):
        side, index, slot, inner = match[1], int(match[2]), int(match[3]), match[4]
        block, layer = divmod(index - 1, 3) if side == "input" else divmod(index, 3)
        name = f"{'down' if side == 'input' else 'up'}_blocks.{block}."
        if inner == "op":
            return name + "downsamplers.0.conv"
        if inner == "conv":
            return name + "upsamplers.0.conv"
        return name + f"{'attentions' if slot == 1 else 'resnets'}.{layer}.{RESNET.get(inner, inner)}"
    return None


def text_encoder(path: str) -> str | None:
    """A layer of CLIP, open_clip (its fused attention given as attn.q_proj, attn.k_proj, attn.v_proj) or T5."""
    if path.startswith(("encoder.block.", "encoder.final_layer_norm", "shared")):
        return path
    if path.startswith(("encoder.", "embeddings.")) or path == "final_layer_norm":
        return f"text_model.{path}"
    if path in OPEN_CLIP_ROOT:
        return f"text_model.{OPEN_CLIP_ROOT[path]}"
    match = _OPEN_LAYER.fullmatch(path)
    if match and match[2] in OPEN_CLIP:
        return f"text_model.encoder.layers.{match[1]}.{OPEN_CLIP[match[2]]}"
    return None  # open_clip's text_projection, which transformers has transposed

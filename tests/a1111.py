"""How AUTOMATIC1111 v1.10.1 finds the layer for a name in a LoRA file, told anew from its extensions-builtin/Lora.

A host names its layers by their path with underscores: in SD1 and SD2 from the text encoder or from the UNet's
parent on (`transformer_text_model_…`, `model_transformer_…`, `diffusion_model_…`), in SDXL with the number of
the text encoder before (`0_transformer_…`, `1_model_…`).
"""

from __future__ import annotations

import re

RESNET_PARTS = {
    "norm1": "in_layers_0", "conv1": "in_layers_2", "norm2": "out_layers_0", "conv2": "out_layers_3",
    "time_emb_proj": "emb_layers_1", "conv_shortcut": "skip_connection",
}  # fmt: skip


def host_layers(keys: list[str]) -> dict[str, str]:
    """The host's name of every layer of a checkpoint → the layer's path in the file."""
    out = {}
    for key in keys:
        path = re.sub(r"\.(weight|bias|in_proj_weight|in_proj_bias)$", "", key)
        if path == key:
            continue
        local = re.sub(r"^(model\.(?=diffusion_model)|cond_stage_model\.|conditioner\.embedders\.)", "", path)
        if local != path:
            out[local.replace(".", "_")] = path
    return out


def resolve(name: str, layers: dict[str, str]) -> tuple[str, str] | None:
    """(path of the layer, "q", "k", "v" or "") that a module name of a LoRA file reaches, or None."""
    converted = _converted(name, any(layer.startswith("model_transformer_resblocks") for layer in layers))
    if converted in layers:
        return layers[converted], ""
    if (projection := re.fullmatch(r"(.*)_([qkv])_proj", converted)) and projection[1] in layers:
        return layers[projection[1]], projection[2]
    if "lora_unet" in name:
        attempts = [name.replace("lora_unet", "diffusion_model")]
    elif "lora_te1_text_model" in name:
        attempts = [name.replace("lora_te1_text_model", f"{i}transformer_text_model") for i in ("0_", "")]
    else:
        attempts = []
    return next(((layers[attempt], "") for attempt in attempts if attempt in layers), None)


def _converted(name: str, is_sd2: bool) -> str:
    """diffusers' block names turned into CompVis ones; anything else is returned as it is."""
    if name.startswith("lora_unet_conv_in"):
        return name.replace("lora_unet_conv_in", "diffusion_model_input_blocks_0_0", 1)
    if name.startswith("lora_unet_conv_out"):
        return name.replace("lora_unet_conv_out", "diffusion_model_out_2", 1)
    if found := re.match(r"lora_unet_time_embedding_linear_(\d+)(.*)", name):
        return f"diffusion_model_time_embed_{2 * int(found[1]) - 2}{found[2]}"
    if found := re.match(r"lora_unet_(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
        side, block, kind, layer, part = found.groups()
        index = 3 * int(block) + int(layer) + (side == "down")
        part = RESNET_PARTS.get(part, part) if kind == "resnets" else part
        where = "input" if side == "down" else "output"
        return f"diffusion_model_{where}_blocks_{index}_{int(kind == 'attentions')}_{part}"
    if found := re.match(r"lora_unet_mid_block_(attentions|resnets)_(\d+)_(.+)", name):
        kind, layer, part = found.groups()
        if kind == "attentions":
            return f"diffusion_model_middle_block_1_{part}"
        return f"diffusion_model_middle_block_{2 * int(layer)}_{RESNET_PARTS.get(part, part)}"
    if found := re.match(r"lora_unet_down_blocks_(\d+)_downsamplers_0_conv", name):
        return f"diffusion_model_input_blocks_{3 * int(found[1]) + 3}_0_op"
    if found := re.match(r"lora_unet_up_blocks_(\d+)_upsamplers_0_conv", name):
        return f"diffusion_model_output_blocks_{3 * int(found[1]) + 2}_{2 if int(found[1]) else 1}_conv"
    if found := re.match(r"lora_(te|te2)_text_model_encoder_layers_(\d+)_(.+)", name):
        encoder, layer, part = found.groups()
        if encoder == "te" and not is_sd2:
            return f"transformer_text_model_encoder_layers_{layer}_{part}"
        for ours, theirs in (("mlp_fc1", "mlp_c_fc"), ("mlp_fc2", "mlp_c_proj"), ("self_attn", "attn")):
            if ours in part:
                part = part.replace(ours, theirs)
                break
        return f"{'1_' if encoder == 'te2' else ''}model_transformer_resblocks_{layer}_{part}"
    return name

"""The other way round: where each tensor of a model saved by diffusers or transformers lies in a single file.

Inverse of diffusers.py, whose tables it turns: UNets and text encoders. A VAE, which no adapter names, is told here
alone. Source: huggingface/diffusers scripts/convert_diffusers_to_original_stable_diffusion.py, …_sdxl.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from . import diffusers
from .spots import Spot, Tensors, inverse

# --- UNet -----------------------------------------------------------------------------------------------------

_RESNET = inverse(diffusers.RESNET)
_UNET_ROOT = inverse(diffusers.UNET_ROOT) | {
    "class_embedding.linear_1": "label_emb.0.0", "class_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def unet(tensors: Tensors) -> dict[str, Spot]:
    """Spots of a UNet2DConditionModel's tensors; what has none is left out."""
    attending = {name.split(".")[1] for name in tensors if re.match(r"up_blocks\.\d+\.attentions\.", name)}
    return _by_stem(tensors, lambda stem: _unet_stem(stem, attending))


def _unet_stem(stem: str, attending: set[str]) -> str | None:
    if stem in _UNET_ROOT:
        return _UNET_ROOT[stem]
    if match := _MIDDLE.fullmatch(stem):
        is_attention = match[1] == "attentions"
        return f"middle_block.{2 * int(match[2]) + is_attention}.{_RESNET.get(match[3], match[3])}"
    match = _BLOCK.fullmatch(stem)
    if match is None:
        return None
    side, block, kind, layer, inner = match[1], int(match[2]), match[3], int(match[4]), match[5]
    if kind == "downsamplers":
        return f"input_blocks.{3 * block + 3}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{3 * block + 2}.{2 if match[2] in attending else 1}.conv"
    index = 3 * block + layer + (side == "down")
    slot = int(kind == "attentions")
    return f"{'input' if side == 'down' else 'output'}_blocks.{index}.{slot}.{_RESNET.get(inner, inner)}"


def _by_stem(tensors: Tensors, rename: Callable[[str], str | None]) -> dict[str, Spot]:
    out = {}
    for name in tensors:
        stem, _, last = name.rpartition(".")
        if (found := rename(stem)) is not None:
            out[name] = Spot(f"{found}.{last}")
    return out


# --- VAE ------------------------------------------------------------------------------------------------------

_VAE_ATTENTION = {
    "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out",
    "query": "q", "key": "k", "value": "v", "proj_attn": "proj_out",
}  # fmt: skip
_VAE_SHORTCUT = {"conv_shortcut": "nin_shortcut"}
_VAE_BLOCK = re.compile(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)")
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def vae(tensors: Tensors) -> dict[str, Spot]:
    """Spots of an AutoencoderKL's tensors. Its decoder counts blocks the other way, its attention is linear."""
    ups = [int(match[1]) for name in tensors if (match := re.match(r"decoder\.up_blocks\.(\d+)\.", name))]
    last = max(ups, default=0)
    out = {}
    for name, info in tensors.items():
        stem, _, end = name.rpartition(".")
        path = _vae_stem(stem, last)
        is_attention = ".attn_1." in path and end == "weight" and len(info.shape) > 1
        out[name] = Spot(f"{path}.{end}", axes=4 if is_attention else 0)
    return out


def _vae_stem(stem: str, last: int) -> str:
    if match := _VAE_MIDDLE.fullmatch(stem):
        if match[2] == "attentions":
            return f"{match[1]}.mid.attn_{int(match[3]) + 1}.{_VAE_ATTENTION.get(match[4], match[4])}"
        return f"{match[1]}.mid.block_{int(match[3]) + 1}.{_VAE_SHORTCUT.get(match[4], match[4])}"
    if match := _VAE_BLOCK.fullmatch(stem):
        side, way, block, kind, layer, inner = match.groups()
        at = f"{side}.{way}.{int(block) if way == 'down' else last - int(block)}"
        if kind != "resnets":
            return f"{at}.{way}sample.{inner}"
        return f"{at}.block.{layer}.{_VAE_SHORTCUT.get(inner, inner)}"
    return re.sub(r"^(encoder|decoder)\.conv_norm_out$", r"\1.norm_out", stem)


# --- text encoders --------------------------------------------------------------------------------------------

_OPEN_CLIP = {
    theirs: ours for theirs, ours in inverse(diffusers.OPEN_CLIP).items()
    if not theirs.startswith(("self_attn.q", "self_attn.k", "self_attn.v"))
}  # fmt: skip
_OPEN_CLIP_ROOT = inverse(diffusers.OPEN_CLIP_ROOT)
_HF_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_HF_PROJECTION = re.compile(r"self_attn\.([qkv])_proj")


def open_clip(tensors: Tensors) -> dict[str, Spot]:
    """Spots of a Hugging Face CLIP text model in an open_clip checkpoint, which fuses q, k and v."""
    out = {}
    for name in tensors:
        path = name.removeprefix("text_model.")
        stem, _, end = path.rpartition(".")
        if name == "text_projection.weight":
            out[name] = Spot("text_projection", turned=True)
        elif stem in _OPEN_CLIP_ROOT:
            ours = _OPEN_CLIP_ROOT[stem]
            out[name] = Spot(ours if ours == "positional_embedding" else f"{ours}.{end}")
        elif match := _HF_LAYER.fullmatch(path):
            at = f"transformer.resblocks.{match[1]}."
            if projection := _HF_PROJECTION.fullmatch(match[2]):
                out[name] = Spot(f"{at}attn.in_proj_{end}", "qkv".index(projection[1]), 3)
            elif match[2] in _OPEN_CLIP:
                out[name] = Spot(f"{at}{_OPEN_CLIP[match[2]]}.{end}")
    return out
